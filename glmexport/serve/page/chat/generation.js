import { ApiError } from "../client/api.js";
import { promptOf } from "./conversation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */

const NANOSECONDS = 1e9;
const MILLISECONDS = 1e3;

/** One answer on its way: asks, fills the message as text arrives, and notes how it ended. */
export class Generation {
  #abort = new AbortController();
  #api;
  #started = 0;
  #first = 0;
  chunks = 0;
  /** Whether its conversation was deleted on purpose, so that what arrives late does not bring it back. */
  discarded = false;
  #left = false;
  conversation;
  message;

  /**
   * @param {import("../client/api.js").Api} api
   * @param {Conversation} conversation
   * @param {Message} message the empty answer at the conversation's end
   */
  constructor(api, conversation, message) {
    this.#api = api;
    this.conversation = conversation;
    this.message = message;
  }

  /** Milliseconds since the question was sent. */
  get elapsed() {
    return this.#started ? performance.now() - this.#started : 0;
  }

  /** Tokens a second so far, a chunk taken for a token. */
  get speed() {
    const seconds = (performance.now() - this.#first) / MILLISECONDS;
    return this.#first && this.chunks > 1 && seconds > 0 ? (this.chunks - 1) / seconds : 0;
  }

  stop() {
    this.#abort.abort();
  }

  discard() {
    this.discarded = true;
    this.stop();
  }

  /** The page is left: that is no fault of the connection, and nobody's wish to stop. */
  leave() {
    this.#left = true;
    this.stop();
  }

  /** @param {() => void} onText called after each piece of text */
  async run(onText) {
    const { conversation, message } = this;
    this.#started = performance.now();
    message.end = "unfinished"; // true until this ends, and what a closed tab leaves behind
    const request = {
      model: conversation.model,
      messages: promptOf(conversation, message),
      options: conversation.options,
    };
    try {
      for await (const chunk of this.#api.chat(request, this.#abort.signal)) {
        const text = chunk.message?.content ?? "";
        if (text !== "") {
          this.#first ||= performance.now();
          this.chunks += 1;
          message.content += text;
          onText();
        }
        if (chunk.done) this.#finish(chunk);
      }
    } catch (error) {
      this.#estimate();
      if (this.#abort.signal.aborted) {
        if (!this.#left) message.end = "stopped";
        return;
      }
      delete message.end;
      message.error = (error instanceof ApiError ? error : new ApiError("unreadable", { detail: String(error) })).toJSON();
    }
  }

  /** @param {any} last */
  #finish(last) {
    if (last.done_reason === "length") this.message.end = "length";
    else delete this.message.end;
    this.message.stats = {
      promptTokens: last.prompt_eval_count ?? 0,
      tokens: last.eval_count ?? this.chunks,
      seconds: (last.eval_duration ?? 0) / NANOSECONDS,
      firstToken: this.#first ? (this.#first - this.#started) / MILLISECONDS : 0,
      estimated: false,
    };
  }

  /** A stopped answer has no last line with counts. */
  #estimate() {
    if (!this.#first) return;
    this.message.stats = {
      promptTokens: 0,
      tokens: this.chunks,
      seconds: (performance.now() - this.#first) / MILLISECONDS,
      firstToken: (this.#first - this.#started) / MILLISECONDS,
      estimated: true,
    };
  }
}

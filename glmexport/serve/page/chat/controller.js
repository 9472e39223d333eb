import { Emitter } from "../lib/emitter.js";
import { newConversation, newMessage, titleFromFirstMessage } from "./conversation.js";
import { Generation } from "./generation.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */

/** What a closed tab may lose at most. */
const SAVE_EVERY = 1000;

/**
 * The open conversation and the answers on their way; an answer goes on while another conversation is looked at.
 *
 * Emits `opened` (the open conversation is another one or was changed as a whole), `messages` (its list of messages
 * changed), `configured` (its model, system prompt or sampling did), `started`, `text` and `ended` (generation).
 */
export class ChatController extends Emitter {
  #api;
  #store;
  #settings;
  #models;
  /** @type {Map<string, Generation>} by the answer's id */
  #running = new Map();
  /** @type {Conversation} */
  current;

  /**
   * @param {import("../client/api.js").Api} api
   * @param {import("./store.js").ConversationStore} store
   * @param {import("./settings.js").Settings} settings
   * @param {import("./models.js").Models} models
   */
  constructor(api, store, settings, models) {
    super();
    this.#api = api;
    this.#store = store;
    this.#settings = settings;
    this.#models = models;
    models.on("changed", () => this.#chooseModel());
    this.current = newConversation(settings.values);
    store.on("elsewhere", (id) => {
      const fresh = store.get(id);
      if (fresh && id === this.current.id && !this.generationOf(this.current)) this.open(fresh);
    });
    store.on("removed", (id) => {
      if (id === this.current.id && !this.generationOf(this.current)) this.startNew();
    });
    window.addEventListener("pagehide", () => {
      for (const generation of this.#running.values()) {
        generation.leave();
        this.#store.save(generation.conversation, { touch: false });
      }
    });
  }

  /** @param {Conversation} conversation */
  open(conversation) {
    this.current = this.generationIn(conversation.id)?.conversation ?? conversation;
    this.#chooseModel();
    this.emit("opened");
  }

  startNew() {
    this.open(newConversation(this.#settings.values));
  }

  /** @param {Conversation} conversation @returns {Generation | null} */
  generationOf(conversation) {
    return this.generationIn(conversation.id);
  }

  /** @param {string} id @returns {Generation | null} */
  generationIn(id) {
    return [...this.#running.values()].find((generation) => generation.conversation.id === id) ?? null;
  }

  /** @param {string} text */
  send(text) {
    this.#ask(text, this.current.messages.length);
  }

  /** Puts `text` in place of a message; what followed it goes. @param {Message} message @param {string} text */
  edit(message, text) {
    const index = this.current.messages.indexOf(message);
    if (index >= 0) this.#ask(text, index);
  }

  /** Answers once more in place of `answer` and what followed it. @param {Message} answer */
  regenerate(answer) {
    const index = this.current.messages.indexOf(answer);
    if (index < 0 || this.generationOf(this.current)) return;
    this.current.messages.length = index;
    this.#answer(this.current);
  }

  stop() {
    this.generationOf(this.current)?.stop();
  }

  /** @param {string} id */
  remove(id) {
    this.generationIn(id)?.discard();
    const removed = this.#store.get(id);
    this.#store.remove(id);
    if (id === this.current.id) this.startNew();
    return removed;
  }

  /** Model, system prompt or sampling of the open conversation; the next new one begins with them. */
  configure(/** @type {Partial<Pick<Conversation, "model" | "system" | "options">>} */ changes) {
    Object.assign(this.current, structuredClone(changes));
    if (this.#store.get(this.current.id)) this.#store.save(this.current, { touch: false });
    this.#settings.update(changes);
    this.emit("configured");
  }

  /** A conversation that has begun keeps its model, even one that the server has no more. */
  #chooseModel() {
    const { names, loaded } = this.#models;
    const { messages, model } = this.current;
    if ((messages.length > 0 && model !== "") || names.length === 0 || names.includes(model)) return;
    this.current.model = names.find((name) => loaded.has(name)) ?? names[0];
  }

  /** @param {string} text @param {number} index */
  #ask(text, index) {
    if (this.generationOf(this.current) || text.trim() === "") return;
    this.current.messages.length = index;
    this.current.messages.push(newMessage("user", text));
    titleFromFirstMessage(this.current);
    this.#answer(this.current);
  }

  /** @param {Conversation} conversation */
  async #answer(conversation) {
    const message = newMessage("assistant", "");
    message.model = conversation.model;
    conversation.messages.push(message);
    const generation = new Generation(this.#api, conversation, message);
    this.#running.set(message.id, generation);
    const running = generation.run(() => this.emit("text", generation));
    this.#store.save(conversation);
    this.emit("messages");
    this.emit("started", generation);
    const save = () => generation.discarded || this.#store.save(conversation, { touch: false });
    const saving = setInterval(save, SAVE_EVERY);
    await running;
    clearInterval(saving);
    this.#running.delete(message.id);
    if (!generation.discarded) this.#store.save(conversation);
    this.emit("ended", generation);
  }
}

import { newId } from "../lib/id.js";

/**
 * @typedef {{promptTokens: number, tokens: number, seconds: number, firstToken: number, estimated: boolean}} Stats
 * @typedef {{id: string, role: "user" | "assistant", content: string, model?: string, stats?: Stats,
 *   end?: "stopped" | "unfinished" | "length", error?: import("../client/api.js").Failure}} Message
 * @typedef {{id: string, revision: string, title: string, named: boolean, created: number, updated: number,
 *   model: string, system: string, options: Record<string, any>, messages: Message[]}} Conversation
 */

const TITLE_LENGTH = 60;

/** @param {{model?: string, system?: string, options?: Record<string, any>}} [like] @returns {Conversation} */
export function newConversation({ model = "", system = "", options = {} } = {}) {
  const now = Date.now();
  return {
    id: newId(),
    revision: "",
    title: "",
    named: false,
    created: now,
    updated: now,
    model,
    system,
    options: structuredClone(options),
    messages: [],
  };
}

/** @param {"user" | "assistant"} role @param {string} content @returns {Message} */
export function newMessage(role, content) {
  return { id: newId(), role, content };
}

/** @param {Conversation} conversation @param {string} title an empty one asks for the automatic title again */
export function rename(conversation, title) {
  conversation.named = title.trim() !== "";
  conversation.title = title.trim();
  if (!conversation.named) titleFromFirstMessage(conversation);
}

/** @param {Conversation} conversation */
export function titleFromFirstMessage(conversation) {
  if (conversation.named) return;
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n", 1)[0].replace(/\s+/g, " ");
  const letters = [...line];
  conversation.title = letters.length > TITLE_LENGTH ? `${letters.slice(0, TITLE_LENGTH - 1).join("")}…` : line;
}

/**
 * What the model is told, up to and without `answer`. A question that got no answer is left out with its error:
 * two questions in a row are no conversation that a model has learnt.
 *
 * @param {Conversation} conversation
 * @param {Message} answer
 * @returns {{role: string, content: string}[]}
 */
export function promptOf(conversation, answer) {
  const told = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const before = conversation.messages.slice(0, conversation.messages.indexOf(answer));
  for (const [index, message] of before.entries()) {
    const reply = before[index + 1];
    const unanswered = message.role === "user" && reply?.role === "assistant" && reply.content === "";
    if (!unanswered && message.content !== "") told.push({ role: message.role, content: message.content });
  }
  return told;
}

/**
 * Tokens that the last counted prompt and its answer took, and what was written since in answers that were stopped.
 *
 * @param {Conversation} conversation
 */
export function tokensUsed(conversation) {
  let written = 0;
  for (const { stats } of conversation.messages.toReversed()) {
    if (!stats) continue;
    written += stats.tokens;
    if (!stats.estimated) return stats.promptTokens + written;
  }
  return written;
}

/** @param {Message} message @returns {number} tokens a second, 0 where unknown */
export function speedOf(message) {
  const { tokens = 0, seconds = 0 } = message.stats ?? {};
  return tokens > 0 && seconds > 0 ? tokens / seconds : 0;
}

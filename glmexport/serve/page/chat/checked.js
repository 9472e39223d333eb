/**
 * Conversations from outside: a file, or storage that anything on this address may have written. What is not as
 * expected is dropped or refused, nothing is passed on unseen.
 *
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 */

import { newId } from "../lib/id.js";

const PROBLEMS = ["unreachable", "unauthorized", "missing", "busy", "refused", "server", "cut", "unreadable"];
const ENDS = ["stopped", "unfinished", "length"];

/** @param {unknown} value @returns {Conversation | null} */
export function checkedConversation(value) {
  const given = /** @type {any} */ (value);
  if (!isRecord(given) || !Array.isArray(given.messages)) return null;
  const messages = given.messages.map(checkedMessage);
  if (messages.includes(null)) return null;
  const created = numberOf(given.created) || Date.now();
  return {
    id: /^[0-9a-f]{24}$/.test(given.id) ? given.id : newId(),
    revision: textOf(given.revision),
    title: textOf(given.title).slice(0, 200),
    named: given.named === true,
    created,
    updated: numberOf(given.updated) || created,
    model: textOf(given.model),
    system: textOf(given.system),
    options: checkedOptions(given.options),
    messages: /** @type {Message[]} */ (messages),
  };
}

/** @param {any} given @returns {Message | null} */
function checkedMessage(given) {
  if (!isRecord(given) || typeof given.content !== "string") return null;
  if (given.role !== "user" && given.role !== "assistant") return null;
  /** @type {Message} */
  const message = { id: textOf(given.id) || newId(), role: given.role, content: given.content };
  if (typeof given.model === "string") message.model = given.model;
  if (ENDS.includes(given.end)) message.end = given.end;
  if (isRecord(given.stats)) {
    message.stats = {
      promptTokens: numberOf(given.stats.promptTokens),
      tokens: numberOf(given.stats.tokens),
      seconds: numberOf(given.stats.seconds),
      firstToken: numberOf(given.stats.firstToken),
      estimated: given.stats.estimated === true,
    };
  }
  if (isRecord(given.error) && PROBLEMS.includes(given.error.code)) {
    const { code, status, detail, retryAfter } = given.error;
    message.error = { code, status: numberOf(status), detail: textOf(detail), retryAfter: numberOf(retryAfter) };
  }
  return message;
}

/** @param {any} given @returns {Record<string, any>} */
export function checkedOptions(given) {
  /** @type {Record<string, any>} */
  const options = {};
  if (!isRecord(given)) return options;
  for (const [name, value] of Object.entries(given)) {
    const stops = name === "stop" && Array.isArray(value) && value.every((stop) => typeof stop === "string");
    if (stops || (name !== "stop" && Number.isFinite(value))) options[name] = value;
  }
  return options;
}

/** @param {unknown} value */
function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @param {unknown} value */
function textOf(value) {
  return typeof value === "string" ? value : "";
}

/** @param {unknown} value */
function numberOf(value) {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : 0;
}

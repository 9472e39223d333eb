/** Conversations as files, and back. @typedef {import("./conversation.js").Conversation} Conversation */

import { checkedConversation } from "./checked.js";

const FORMAT = "glmexport-chat";
const VERSION = 1;

/** @param {Conversation[]} conversations */
export function toJson(conversations) {
  const kept = conversations.map(({ revision, ...rest }) => rest);
  return `${JSON.stringify({ format: FORMAT, version: VERSION, conversations: kept }, null, 2)}\n`;
}

/**
 * @param {string} text
 * @returns {Conversation[]}
 * @throws {Error} `format` where it is not such a file
 */
export function fromJson(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    throw new Error("format");
  }
  if (given?.format !== FORMAT || given.version !== VERSION || !Array.isArray(given.conversations)) {
    throw new Error("format");
  }
  const conversations = given.conversations.map(checkedConversation);
  if (conversations.includes(null)) throw new Error("format");
  return conversations;
}

/**
 * @param {Conversation} conversation
 * @param {{user: string, assistant: string, system: string, untitled: string}} words
 */
export function toMarkdown(conversation, words) {
  const parts = [`# ${conversation.title || words.untitled}`];
  if (conversation.system.trim()) parts.push(`## ${words.system}`, conversation.system.trim());
  for (const message of conversation.messages) {
    if (message.content === "") continue;
    const model = message.model ? ` (${message.model})` : "";
    parts.push(`## ${message.role === "user" ? words.user : words.assistant + model}`, message.content.trim());
  }
  return `${parts.join("\n\n")}\n`;
}

import { Emitter } from "../lib/emitter.js";
import { newId } from "../lib/id.js";
import { checkedConversation } from "./checked.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */

const PREFIX = "glmexport.chat.";

/**
 * Conversations in the browser, one key each, so that tabs write beside one another. A revision says which text a
 * change was made on: where another tab was faster, this tab's text is kept as a copy instead of replacing it.
 *
 * Emits `changed` (conversation or undefined), `removed` (id), `forked` (conversation), `full` and `saved`.
 */
export class ConversationStore extends Emitter {
  #storage;
  /** @type {Map<string, Conversation>} */
  #known = new Map();

  /** @param {Storage} storage */
  constructor(storage) {
    super();
    this.#storage = storage;
    for (let index = 0; index < storage.length; index += 1) {
      const key = storage.key(index);
      if (key?.startsWith(PREFIX)) this.#load(key);
    }
    window.addEventListener("storage", (event) => this.#changedElsewhere(event));
  }

  /** @returns {Conversation[]} the latest first */
  list() {
    return [...this.#known.values()].sort((one, other) => other.updated - one.updated);
  }

  /** @param {string} id */
  get(id) {
    return this.#known.get(id) ?? null;
  }

  /**
   * @param {Conversation} conversation
   * @param {{touch?: boolean}} [options] `touch` moves it to the top of the list
   * @returns {boolean} whether it is stored; where not, it stays usable in this tab
   */
  save(conversation, { touch = true } = {}) {
    const forked = this.#mergeOrFork(conversation);
    if (touch) conversation.updated = Date.now();
    this.#known.set(conversation.id, conversation);
    const before = conversation.revision;
    conversation.revision = newId();
    let stored = true;
    try {
      this.#storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    } catch {
      conversation.revision = before;
      stored = false;
    }
    this.emit("changed", conversation);
    this.emit(stored ? "saved" : "full");
    if (forked) this.emit("forked", conversation);
    return stored;
  }

  /** @param {string} id */
  remove(id) {
    this.#known.delete(id);
    this.#storage.removeItem(PREFIX + id);
    this.emit("removed", id);
    this.emit("changed");
  }

  /** @param {Conversation} mine @returns {boolean} whether it is a copy now */
  #mergeOrFork(mine) {
    const theirs = this.#read(PREFIX + mine.id);
    if (!theirs || theirs.revision === mine.revision) return false;
    if (goesOn(mine, theirs)) {
      mine.title = theirs.title;
      mine.named = theirs.named;
      return false;
    }
    this.#known.set(theirs.id, theirs);
    mine.id = newId();
    mine.title = `${mine.title} (2)`;
    mine.named = true;
    return true;
  }

  /** @param {StorageEvent} event */
  #changedElsewhere(event) {
    if (event.storageArea !== this.#storage) return;
    if (event.key === null) {
      this.#known.clear();
      this.emit("changed");
      return;
    }
    if (!event.key.startsWith(PREFIX)) return;
    const id = event.key.slice(PREFIX.length);
    if (event.newValue === null) {
      this.#known.delete(id);
      this.emit("removed", id);
      this.emit("changed");
    } else {
      this.#load(event.key);
      this.emit("changed", this.#known.get(id));
      this.emit("elsewhere", id);
    }
  }

  /** @param {string} key */
  #load(key) {
    const conversation = this.#read(key);
    if (conversation) this.#known.set(conversation.id, conversation);
  }

  /** @param {string} key @returns {Conversation | null} */
  #read(key) {
    try {
      const conversation = checkedConversation(JSON.parse(this.#storage.getItem(key) ?? "null"));
      return conversation && PREFIX + conversation.id === key ? conversation : null;
    } catch {
      return null; // a text that is no JSON is not ours to show or to delete
    }
  }
}

/** Whether `mine` has all that `theirs` has, and perhaps more. @param {Conversation} mine @param {Conversation} theirs */
function goesOn(mine, theirs) {
  return theirs.messages.every((message, index) => {
    const own = mine.messages[index];
    if (own?.id !== message.id) return false;
    return index === theirs.messages.length - 1
      ? own.content.startsWith(message.content)
      : own.content === message.content;
  });
}

import { rename } from "../chat/conversation.js";
import { t } from "../i18n/index.js";
import { h, iconButton } from "../lib/dom.js";

/** @typedef {import("../chat/conversation.js").Conversation} Conversation */

const DAY = 24 * 60 * 60 * 1000;
const GROUPS = /** @type {const} */ (["sidebar.today", "sidebar.yesterday", "sidebar.week", "sidebar.older"]);

/** The list of conversations. */
export class Sidebar {
  #chat;
  #store;
  #root;
  #onOpened;
  #onDeleted;
  #renaming = "";

  /**
   * @param {{chat: import("../chat/controller.js").ChatController, store: import("../chat/store.js").ConversationStore,
   *   root: HTMLElement, onOpened: () => void, onDeleted: (conversation: Conversation) => void}} parts
   */
  constructor({ chat, store, root, onOpened, onDeleted }) {
    this.#chat = chat;
    this.#store = store;
    this.#root = root;
    this.#onOpened = onOpened;
    this.#onDeleted = onDeleted;
    for (const name of ["opened", "started", "ended"]) chat.on(name, () => this.update());
    let drawn = "";
    store.on("changed", () => {
      const state = this.#state(); // saving while an answer grows changes nothing here
      if (state !== drawn) this.update();
      drawn = state;
    });
  }

  update() {
    if (this.#renaming) return;
    const conversations = this.#store.list();
    if (conversations.length === 0) {
      this.#root.replaceChildren(h("p", { class: "sidebar-empty" }, t("sidebar.empty")));
      return;
    }
    const focused = this.#focusedRow();
    const now = new Date().setHours(0, 0, 0, 0);
    const sections = GROUPS.map((group) => {
      const rows = conversations.filter((conversation) => groupOf(conversation.updated, now) === group);
      if (rows.length === 0) return null;
      const heading = h("h2", { class: "group" }, t(group));
      return h("section", {}, heading, h("ul", {}, ...rows.map((conversation) => this.#row(conversation))));
    });
    this.#root.replaceChildren(...sections.filter(Boolean));
    if (focused) this.#root.querySelector(`[data-id="${focused}"] .conversation-open`)?.focus();
  }

  #state() {
    return JSON.stringify(this.#store.list().map(({ id, title, updated }) => [id, title, updated]));
  }

  #focusedRow() {
    const row = this.#root.contains(document.activeElement) ? document.activeElement?.closest("[data-id]") : null;
    return row instanceof HTMLElement ? row.dataset.id : "";
  }

  /** @param {Conversation} conversation */
  #row(conversation) {
    const current = conversation.id === this.#chat.current.id;
    const title = conversation.title || t("untitled");
    const writing = this.#chat.generationOf(conversation) !== null;
    const open = h(
      "button",
      {
        type: "button",
        class: "conversation-open",
        "aria-current": current ? "true" : null,
        title,
        onclick: () => {
          this.#chat.open(this.#store.get(conversation.id) ?? conversation);
          this.#onOpened();
        },
        ondblclick: () => this.#rename(conversation),
      },
      h("span", { class: "conversation-title" }, title),
      writing && h("span", { class: "writing-dot", role: "img", "aria-label": t("sidebar.writing") }),
    );
    const edit = iconButton("edit", t("sidebar.rename", { title }), () => this.#rename(conversation));
    const remove = iconButton("trash", t("sidebar.delete", { title }), () => this.#delete(conversation));
    return h("li", { class: "conversation", "data-id": conversation.id }, open, h("div", { class: "row-tools" }, edit, remove));
  }

  /** @param {Conversation} conversation */
  #rename(conversation) {
    const row = this.#root.querySelector(`[data-id="${conversation.id}"]`);
    if (!row || this.#renaming) return;
    this.#renaming = conversation.id;
    const input = h("input", { class: "rename", ".value": conversation.title, "aria-label": t("sidebar.name"), maxlength: 200 });
    const end = (/** @type {boolean} */ keep) => {
      if (!this.#renaming) return;
      this.#renaming = "";
      const { current } = this.#chat;
      const mine = current.id === conversation.id ? current : (this.#store.get(conversation.id) ?? conversation);
      if (keep && input.value.trim() !== mine.title) {
        rename(mine, input.value);
        this.#store.save(mine, { touch: false });
      }
      this.update();
      this.#root.querySelector(`[data-id="${conversation.id}"] .conversation-open`)?.focus();
    };
    input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      event.stopPropagation();
      if (event.isComposing) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") end(false);
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }

  /** @param {Conversation} conversation */
  #delete(conversation) {
    const removed = this.#chat.remove(conversation.id);
    if (removed) this.#onDeleted(removed);
  }
}

/** @param {number} time @param {number} today the day's first millisecond */
function groupOf(time, today) {
  if (time >= today) return "sidebar.today";
  if (time >= today - DAY) return "sidebar.yesterday";
  return time >= today - 7 * DAY ? "sidebar.week" : "sidebar.older";
}

import { number, t } from "../i18n/index.js";
import { h } from "../lib/dom.js";
import { MessageView } from "./message.js";
import { Scroller } from "./scroller.js";

/** @typedef {import("../chat/generation.js").Generation} Generation */

const CLOCK = 250;
const SECOND = 1000;
const SUGGESTIONS = /** @type {const} */ (["welcome.1", "welcome.2", "welcome.3", "welcome.4"]);
const ANNOUNCED = 2000;

/** The open conversation. Text that arrives is drawn at most once a frame. */
export class Thread {
  #chat;
  #models;
  #root;
  #welcome;
  #announcer;
  #scroller;
  #onCopied;
  /** @type {Map<string, MessageView>} */
  #views = new Map();
  #frame = 0;

  /**
   * @param {{chat: import("../chat/controller.js").ChatController, models: import("../chat/models.js").Models,
   *   root: HTMLElement, welcome: HTMLElement, scroll: HTMLElement, latest: HTMLElement, announcer: HTMLElement,
   *   onCopied: (ok: boolean) => void}} parts
   */
  constructor({ chat, models, root, welcome, scroll, latest, announcer, onCopied }) {
    this.#chat = chat;
    this.#models = models;
    this.#root = root;
    this.#welcome = welcome;
    this.#announcer = announcer;
    this.#onCopied = onCopied;
    this.#scroller = new Scroller(scroll, latest);
    chat.on("opened", () => this.rebuild());
    chat.on("messages", () => {
      this.#reconcile();
      this.#scroller.toEnd();
    });
    chat.on("started", () => this.#say(t("announce.started")));
    chat.on("text", (/** @type {Generation} */ generation) => this.#schedule(generation));
    chat.on("ended", (/** @type {Generation} */ generation) => this.#ended(generation));
    setInterval(() => this.#tick(), CLOCK);
  }

  /** Draws everything anew: another conversation, or another language. */
  rebuild() {
    this.#views.clear();
    this.#root.replaceChildren();
    this.#reconcile();
    this.#scroller.toEnd();
  }

  /** Puts the last message of the user up for editing. */
  editLast() {
    const last = this.#chat.current.messages.findLast((message) => message.role === "user");
    if (last && !this.#chat.generationOf(this.#chat.current)) this.#views.get(last.id)?.startEditing();
  }

  #reconcile() {
    const { messages } = this.#chat.current;
    const kept = new Set(messages.map((message) => message.id));
    for (const [id, view] of this.#views) {
      if (kept.has(id)) continue;
      view.element.remove();
      this.#views.delete(id);
    }
    for (const message of messages) {
      if (this.#views.has(message.id)) continue;
      const view = new MessageView(message, {
        edit: (edited, text) => this.#chat.edit(edited, text),
        regenerate: (answer) => this.#chat.regenerate(answer),
        copied: this.#onCopied,
      });
      this.#views.set(message.id, view);
      this.#root.append(view.element);
    }
    this.#updateAll();
    this.#showWelcome(messages.length === 0);
  }

  #updateAll() {
    const { messages } = this.#chat.current;
    const running = this.#chat.generationOf(this.#chat.current);
    for (const [index, message] of messages.entries()) {
      const writes = message.role === "user" || running?.message === message;
      this.#views.get(message.id)?.update(writes ? running : null, index === messages.length - 1);
    }
    this.#tick();
  }

  /** @param {boolean} shown */
  #showWelcome(shown) {
    this.#welcome.hidden = !shown;
    if (!shown) return;
    const suggestions = SUGGESTIONS.map((key) =>
      h("button", { type: "button", class: "suggestion", onclick: () => this.#chat.send(t(key)) }, t(key)),
    );
    this.#welcome.replaceChildren(
      h("h2", {}, t("welcome.title")),
      h("p", {}, t("welcome.local")),
      h("div", { class: "suggestions" }, ...suggestions),
    );
  }

  /** @param {Generation} generation */
  #schedule(generation) {
    if (this.#frame || generation.conversation !== this.#chat.current) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#views.get(generation.message.id)?.text();
      this.#scroller.grown();
    });
  }

  /** @param {Generation} generation */
  #ended(generation) {
    if (generation.conversation !== this.#chat.current) return;
    this.#updateAll();
    this.#scroller.grown();
    const { end, error, content } = generation.message;
    if (error) return; // the error itself is an alert
    this.#say(end === "stopped" ? t("announce.stopped") : t("announce.finished", { text: content.slice(0, ANNOUNCED) }));
  }

  /** What is being waited for, while there is something to wait for. */
  #tick() {
    const running = this.#chat.generationOf(this.#chat.current);
    if (!running) return;
    const seconds = running.elapsed / SECOND;
    const since = seconds >= 1 ? ` ${number(Math.floor(seconds))} s` : "";
    const loaded = this.#models.loaded.has(running.conversation.model);
    const waiting = t(loaded ? "phase.waiting" : "phase.loading") + since;
    const speed = running.speed > 0 ? ` ≈ ${t("stats.speed", { speed: number(running.speed, 1) })}` : "";
    this.#views.get(running.message.id)?.phase(running.chunks ? t("phase.writing") + speed : waiting);
  }

  /** @param {string} text */
  #say(text) {
    this.#announcer.textContent = text;
  }
}

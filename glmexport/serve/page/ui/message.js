import { speedOf } from "../chat/conversation.js";
import { shortName } from "../chat/models.js";
import { number, t } from "../i18n/index.js";
import { h, icon, iconButton } from "../lib/dom.js";
import { LiveMarkdown } from "../markdown/live.js";
import { codeBlock, copyButton } from "./code_block.js";

/**
 * @typedef {import("../chat/conversation.js").Message} Message
 * @typedef {import("../chat/generation.js").Generation} Generation
 * @typedef {{edit(message: Message, text: string): void, regenerate(message: Message): void,
 *   copied(ok: boolean): void}} Actions
 */

/** One message: its text, what can be done with it, and how its making went. */
export class MessageView {
  #actions;
  #body = h("div", { class: "message-body" });
  #foot = h("div", { class: "message-foot" });
  /** @type {LiveMarkdown | null} */
  #markdown = null;
  element;
  message;

  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.#actions = actions;
    const user = message.role === "user";
    const who = user ? t("message.you") : shortName(message.model ?? "") || t("message.assistant");
    const name = h("h2", { class: user ? "visually-hidden" : "message-name" }, who);
    this.element = h("article", { class: `message message-${message.role}`, "data-id": message.id }, name, this.#body, this.#foot);
    if (user) this.#showText();
    else {
      this.#body.classList.add("markdown");
      const copied = (/** @type {boolean} */ ok) => this.#actions.copied(ok);
      this.#markdown = new LiveMarkdown(this.#body, (text, language) => codeBlock(text, language, copied));
    }
  }

  /** Draws what has changed. @param {Generation | null} generation @param {boolean} last */
  update(generation, last) {
    if (this.message.role === "user") {
      this.#foot.replaceChildren(...this.#userTools(generation === null));
      return;
    }
    this.text();
    this.element.toggleAttribute("data-writing", generation !== null);
    this.element.setAttribute("aria-busy", String(generation !== null));
    if (generation) this.#foot.replaceChildren(h("span", { class: "phase" }));
    else this.#foot.replaceChildren(...this.#ending(), this.#tools(last), this.#stats());
  }

  /** Draws the text as far as it has come. */
  text() {
    this.#markdown?.update(this.message.content);
  }

  /** @param {string} words what is going on while nothing else can be seen */
  phase(words) {
    const phase = this.#foot.querySelector(".phase");
    if (phase && phase.textContent !== words) phase.textContent = words;
  }

  startEditing() {
    const area = h("textarea", { class: "edit-text", "aria-label": t("message.edit.label"), ".value": this.message.content, rows: 2 });
    const send = () => area.value.trim() !== "" && this.#actions.edit(this.message, area.value);
    const cancel = () => {
      this.#showText();
      this.element.removeAttribute("data-editing");
      this.element.querySelector(".edit")?.focus();
    };
    const form = h(
      "form",
      { class: "edit-form", onsubmit: (/** @type {Event} */ event) => (event.preventDefault(), send()) },
      area,
      h("p", { class: "edit-hint" }, t("message.edit.warning")),
      h(
        "div",
        { class: "edit-buttons" },
        h("button", { type: "button", class: "button", onclick: cancel }, t("message.edit.cancel")),
        h("button", { type: "submit", class: "button button-primary" }, t("message.edit.send")),
      ),
    );
    area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.element.setAttribute("data-editing", "");
    this.#body.replaceChildren(form);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  #showText() {
    this.#body.replaceChildren(h("div", { class: "plain" }, this.message.content));
  }

  /** @param {boolean} idle */
  #userTools(idle) {
    const copy = copyButton(t("message.copy"), () => this.message.content, this.#actions.copied);
    const edit = iconButton("edit", t("message.edit"), () => this.startEditing(), "icon-button edit");
    return [h("div", { class: "message-tools" }, copy, idle && edit)];
  }

  /** @param {boolean} last */
  #tools(last) {
    const copy = copyButton(t("message.copy"), () => this.message.content, this.#actions.copied);
    const again = () => this.#actions.regenerate(this.message);
    const regenerate = last && !this.message.error && iconButton("again", t("message.regenerate"), again, "icon-button again");
    return h("div", { class: "message-tools" }, this.message.content !== "" && copy, regenerate);
  }

  /** What is unusual about the answer's end. @returns {HTMLElement[]} */
  #ending() {
    const { end, error, content } = this.message;
    if (error) {
      const retry = () => this.#actions.regenerate(this.message);
      const texts = h("div", {}, h("p", {}, problemText(error, shortName(this.message.model ?? ""))));
      if (error.detail) texts.append(h("p", { class: "error-detail" }, error.detail));
      const button = h("button", { type: "button", class: "button retry", onclick: retry }, t("error.retry"));
      return [h("div", { class: "message-error", role: "alert" }, icon("alert"), texts, button)];
    }
    if (end) return [h("p", { class: "message-end" }, t(`message.${end}`))];
    return content === "" ? [h("p", { class: "message-end" }, t("message.empty"))] : [];
  }

  #stats() {
    const { stats } = this.message;
    if (!stats) return "";
    const about = stats.estimated ? "≈ " : "";
    const speed = speedOf(this.message);
    const facts = [
      speed > 0 && about + t("stats.speed", { speed: number(speed, 1) }),
      stats.tokens > 0 && about + t("stats.tokens", { count: number(stats.tokens) }),
      stats.firstToken > 0 && t("stats.first", { seconds: number(stats.firstToken, stats.firstToken < 1 ? 2 : 1) }),
    ].filter(Boolean);
    return h("span", { class: "stats" }, facts.join(" · "));
  }
}

/** @param {import("../client/api.js").Failure} error @param {string} model */
export function problemText(error, model) {
  if (error.code === "busy" && error.retryAfter > 0) return t("error.busy.after", { seconds: number(error.retryAfter) });
  return t(`error.${error.code}`, { model });
}

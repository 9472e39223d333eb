import { t } from "../i18n/index.js";
import { icon } from "../lib/dom.js";

const MAX_HEIGHT = 220;

/** Where messages are written. What is typed stays with its conversation until it is sent. */
export class Composer {
  #chat;
  #parts;
  /** @type {Map<string, string>} */
  #drafts = new Map();
  #conversation = "";

  /**
   * @param {{chat: import("../chat/controller.js").ChatController, form: HTMLFormElement, text: HTMLTextAreaElement,
   *   send: HTMLButtonElement, system: HTMLButtonElement, editLast: () => void, openPanel: () => void}} parts
   */
  constructor(parts) {
    this.#chat = parts.chat;
    this.#parts = parts;
    const { chat, form, text, system } = parts;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    text.addEventListener("input", () => this.update());
    text.addEventListener("keydown", (event) => this.#key(event));
    system.addEventListener("click", () => parts.openPanel());
    for (const name of ["opened", "configured", "messages", "started", "ended"]) chat.on(name, () => this.update());
  }

  focus() {
    this.#parts.text.focus();
  }

  update() {
    const { chat, text, send, system } = this.#parts;
    if (this.#conversation !== chat.current.id) {
      this.#conversation = chat.current.id;
      text.value = this.#drafts.get(this.#conversation) ?? "";
    }
    this.#drafts.set(this.#conversation, text.value);
    const writing = chat.generationOf(chat.current) !== null;
    const label = t(writing ? "composer.stop" : "composer.send");
    if (send.getAttribute("aria-label") !== label) {
      send.replaceChildren(icon(writing ? "stop" : "send"));
      send.setAttribute("aria-label", label);
      send.title = label;
    }
    send.classList.toggle("stop", writing);
    send.disabled = !writing && text.value.trim() === "";
    system.hidden = chat.current.system.trim() === "";
    text.style.height = "auto";
    text.style.height = `${Math.min(text.scrollHeight, MAX_HEIGHT)}px`;
  }

  #submit() {
    const { chat, text } = this.#parts;
    if (chat.generationOf(chat.current)) {
      chat.stop();
      return;
    }
    const message = text.value;
    if (message.trim() === "") return;
    text.value = "";
    this.#drafts.delete(chat.current.id);
    chat.send(message);
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const { chat, text, editLast } = this.#parts;
    if (event.isComposing || event.keyCode === 229) return; // Enter chooses a word here; Safari tells by the code only
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      if (!chat.generationOf(chat.current)) this.#submit();
    } else if (event.key === "ArrowUp" && text.value === "") {
      event.preventDefault();
      editLast();
    }
  }
}

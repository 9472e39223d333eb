import { t } from "../i18n/index.js";
import { h, iconButton } from "../lib/dom.js";

const SHOWN_FOR = 8000;
const MAX_SHOWN = 3;

/** Short notices that go by themselves, but not while a pointer or the focus is on them. */
export class Toasts {
  #root;

  /** @param {HTMLElement} root */
  constructor(root) {
    this.#root = root;
  }

  /** @param {string} text @param {{label: string, run: () => void}} [action] */
  show(text, action) {
    const close = () => {
      clearTimeout(timer);
      toast.remove();
    };
    const act = () => {
      close();
      action?.run();
    };
    const button = action && h("button", { type: "button", class: "toast-action", onclick: act }, action.label);
    const toast = h("div", { class: "toast" }, h("span", {}, text), button, iconButton("close", t("dismiss"), close));
    let timer = setTimeout(close, SHOWN_FOR);
    const hold = () => clearTimeout(timer);
    const resume = () => {
      clearTimeout(timer);
      timer = setTimeout(close, SHOWN_FOR);
    };
    toast.addEventListener("pointerenter", hold);
    toast.addEventListener("focusin", hold);
    toast.addEventListener("pointerleave", resume);
    toast.addEventListener("focusout", resume);
    this.#root.append(toast);
    while (this.#root.children.length > MAX_SHOWN) this.#root.firstElementChild?.remove();
  }
}

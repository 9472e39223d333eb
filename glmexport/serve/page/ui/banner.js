import { h, icon } from "../lib/dom.js";

/** What is wrong and stays wrong until something is done, one line a cause. */
export class Banner {
  #root;
  /** @type {Map<string, () => {text: string, action?: {label: string, run: () => void}}>} */
  #causes = new Map();

  /** @param {HTMLElement} root */
  constructor(root) {
    this.#root = root;
  }

  /** @param {string} cause @param {() => {text: string, action?: {label: string, run: () => void}}} line in today's language */
  show(cause, line) {
    this.#causes.set(cause, line);
    this.update();
  }

  /** @param {string} cause */
  clear(cause) {
    if (this.#causes.delete(cause)) this.update();
  }

  update() {
    const lines = [...this.#causes.values()].map((line) => {
      const { text, action } = line();
      const button = action && h("button", { type: "button", class: "button", onclick: action.run }, action.label);
      return h("div", { class: "banner-line" }, icon("alert"), h("span", {}, text), button);
    });
    this.#root.replaceChildren(...lines);
    this.#root.hidden = lines.length === 0;
  }
}

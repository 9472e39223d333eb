import { t } from "../i18n/index.js";
import { byId } from "../lib/dom.js";

const KEY = "glmexport.key";

/** The server's key: asked for when the server asks, and kept no longer than the tab. */
export class KeyDialog {
  #dialog = byId("key-dialog");
  #input = byId("key-input");
  #memory = "";
  /** @type {((given: boolean) => void) | null} */
  #done = null;
  /** @type {Promise<boolean> | null} */
  #asking = null;

  constructor() {
    byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#remember(this.#input.value.trim());
      this.#finish(true);
    });
    byId("key-cancel").addEventListener("click", () => this.#finish(false));
    this.#dialog.addEventListener("close", () => this.#finish(false));
  }

  get value() {
    try {
      return sessionStorage.getItem(KEY) ?? this.#memory;
    } catch {
      return this.#memory;
    }
  }

  /** @returns {Promise<boolean>} whether a key was given; who asks meanwhile gets the same answer */
  ask() {
    this.#asking ??= new Promise((resolve) => {
      this.#done = resolve;
      byId("key-wrong").textContent = this.value ? t("key.wrong") : "";
      this.#input.value = "";
      this.#dialog.showModal();
    });
    return this.#asking;
  }

  /** @param {boolean} given */
  #finish(given) {
    const done = this.#done;
    this.#done = null;
    this.#asking = null;
    this.#dialog.close();
    done?.(given);
  }

  /** @param {string} key */
  #remember(key) {
    this.#memory = key;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // forbidden: it holds until the page is left
    }
  }
}

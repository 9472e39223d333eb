import { Emitter } from "../lib/emitter.js";
import { checkedOptions } from "./checked.js";

const KEY = "glmexport.settings";

/**
 * What holds for the whole page and for the next new conversation. Emits `changed` with the names that changed.
 *
 * @typedef {{theme: "auto" | "light" | "dark", language: "auto" | "en" | "zh", model: string, system: string,
 *   options: Record<string, any>, sidebar: boolean, panel: boolean}} Values
 */
export class Settings extends Emitter {
  #storage;
  /** @type {Values} */
  values;

  /** @param {Storage} storage */
  constructor(storage) {
    super();
    this.#storage = storage;
    this.values = this.#read(storage.getItem(KEY));
    window.addEventListener("storage", (event) => {
      if (event.storageArea !== storage || event.key !== KEY) return;
      const { sidebar, panel } = this.values;
      this.values = { ...this.#read(event.newValue), sidebar, panel };
      this.emit("changed", Object.keys(this.values));
    });
  }

  /** @param {Partial<Values>} changes */
  update(changes) {
    Object.assign(this.values, changes);
    try {
      this.#storage.setItem(KEY, JSON.stringify(this.values));
    } catch {
      // full: the choice holds until the page closes, and the conversations say so already
    }
    this.emit("changed", Object.keys(changes));
  }

  /** @param {string | null} text @returns {Values} */
  #read(text) {
    /** @type {any} */
    let given = {};
    try {
      given = JSON.parse(text ?? "{}") ?? {};
    } catch {
      // not ours: as if nothing had been chosen
    }
    return {
      theme: ["light", "dark"].includes(given.theme) ? given.theme : "auto",
      language: ["en", "zh"].includes(given.language) ? given.language : "auto",
      model: typeof given.model === "string" ? given.model : "",
      system: typeof given.system === "string" ? given.system : "",
      options: checkedOptions(given.options),
      sidebar: given.sidebar !== false,
      panel: given.panel === true,
    };
  }
}

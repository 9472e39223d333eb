import { shortName } from "../chat/models.js";
import { t } from "../i18n/index.js";
import { h } from "../lib/dom.js";

/** The select with the server's models; the open conversation's own one stays in it even when the server lost it. */
export class ModelPicker {
  #chat;
  #models;
  #select;

  /**
   * @param {{chat: import("../chat/controller.js").ChatController, models: import("../chat/models.js").Models,
   *   select: HTMLSelectElement}} parts
   */
  constructor({ chat, models, select }) {
    this.#chat = chat;
    this.#models = models;
    this.#select = select;
    select.addEventListener("change", () => chat.configure({ model: select.value }));
    chat.on("opened", () => this.update());
    models.on("changed", () => this.update());
  }

  update() {
    const { names } = this.#models;
    const { current } = this.#chat;
    const shown = names.includes(current.model) || !current.model ? names : [current.model, ...names];
    const options = shown.map((name) => h("option", { value: name }, shortName(name)));
    if (options.length === 0) options.push(h("option", { value: "" }, t("model.none")));
    this.#select.replaceChildren(...options);
    this.#select.value = current.model;
  }
}

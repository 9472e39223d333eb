import { shortName } from "../chat/models.js";
import { number, t } from "../i18n/index.js";
import { h, iconButton } from "../lib/dom.js";
import { NUMBER_OPTIONS } from "./options.js";

/** System prompt, sampling and facts of the model, for the open conversation. */
export class Panel {
  #chat;
  #models;
  #root;
  #shown = "";

  /**
   * @param {{chat: import("../chat/controller.js").ChatController, models: import("../chat/models.js").Models,
   *   root: HTMLElement}} parts
   */
  constructor({ chat, models, root }) {
    this.#chat = chat;
    this.#models = models;
    this.#root = root;
    chat.on("opened", () => this.update());
    chat.on("configured", () => this.update());
    models.on("changed", () => this.update());
  }

  rebuild() {
    this.#shown = "";
    this.update();
  }

  /** Draws the panel anew where what it shows is not what was typed into it. */
  update() {
    const facts = this.#models.facts(this.#chat.current.model);
    const state = this.#state();
    if (state === this.#shown) return;
    this.#shown = state;
    this.#root.replaceChildren(this.#system(facts?.system), this.#sampling(facts?.defaults ?? {}), this.#model(facts));
  }

  /** @param {string} [standard] the model's own */
  #system(standard) {
    const area = h("textarea", {
      id: "system",
      rows: 4,
      placeholder: standard || t("panel.system.placeholder"),
      "aria-describedby": "system-hint",
      ".value": this.#chat.current.system,
      oninput: () => this.#change({ system: area.value }),
    });
    const hint = h("p", { class: "hint", id: "system-hint" }, t("panel.system.hint"));
    return h("section", {}, h("h3", {}, h("label", { for: "system" }, t("panel.system"))), area, hint);
  }

  /** @param {Record<string, any>} defaults */
  #sampling(defaults) {
    const reset = h(
      "button",
      { type: "button", class: "button reset-all", onclick: () => this.#resetAll(), disabled: !this.#changed() },
      t("panel.reset"),
    );
    const fields = NUMBER_OPTIONS.map((option) => this.#numberField(option, defaults[option.name], reset));
    const hint = h("p", { class: "hint" }, t("panel.sampling.hint"));
    return h("section", {}, h("h3", {}, t("panel.sampling")), hint, ...fields, this.#stopField(defaults.stop ?? [], reset), reset);
  }

  #resetAll() {
    this.#chat.configure({ options: {} });
    this.#root.querySelector("input")?.focus();
  }

  #changed() {
    return Object.keys(this.#chat.current.options).length > 0;
  }

  /** @param {(typeof NUMBER_OPTIONS)[number]} option @param {number | undefined} standard @param {HTMLButtonElement} resetAll */
  #numberField({ name, min, max, step, slider }, standard, resetAll) {
    const label = t(`option.${name}`);
    const chosen = this.#chat.current.options[name];
    const unset = name === "seed" ? t("option.seed.random") : t("panel.default");
    const input = h("input", {
      type: "number",
      id: `option-${name}`,
      min,
      max,
      step: step === 1 ? 1 : "any",
      inputmode: step === 1 ? "numeric" : "decimal",
      placeholder: standard ?? unset,
      "aria-describedby": `hint-${name} error-${name}`,
      ".value": chosen ?? "",
    });
    const range = slider && h("input", { type: "range", min, max, step, tabindex: -1, "aria-hidden": "true" });
    const error = h("p", { class: "field-error", id: `error-${name}`, role: "alert" });
    const reset = iconButton("reset", t("panel.reset.one", { name: label }), () => take(""), "icon-button reset");
    const show = () => {
      const set = name in this.#chat.current.options;
      reset.hidden = !set;
      resetAll.disabled = !this.#changed();
      if (range) {
        range.value = String(this.#chat.current.options[name] ?? standard ?? (min + max) / 2);
        range.classList.toggle("unset", !set);
      }
    };
    const take = (/** @type {string} */ text) => {
      if (text !== input.value) input.value = text;
      const valid = input.checkValidity();
      error.textContent = valid ? "" : t("panel.invalid", { min: number(min, min % 1 ? 1 : 0), max: number(max) });
      input.setAttribute("aria-invalid", String(!valid));
      if (!valid) return;
      this.#setOption(name, text === "" ? undefined : Number(text));
      show();
    };
    input.addEventListener("input", () => take(input.value));
    range?.addEventListener("input", () => take(range.value));
    reset.addEventListener("click", () => input.focus());
    show();
    return h(
      "div",
      { class: "field" },
      h("div", { class: "field-head" }, h("label", { for: input.id }, label), reset, input),
      range,
      h("p", { class: "hint", id: `hint-${name}` }, t(`option.${name}.hint`)),
      error,
    );
  }

  /** @param {string[]} standard @param {HTMLButtonElement} resetAll */
  #stopField(standard, resetAll) {
    const area = h("textarea", {
      id: "option-stop",
      rows: 2,
      placeholder: standard.length > 0 ? standard.join("\n") : t("panel.default"),
      "aria-describedby": "hint-stop",
      ".value": (this.#chat.current.options.stop ?? []).join("\n"),
      oninput: () => {
        const stops = area.value.split("\n").filter((/** @type {string} */ line) => line !== "");
        this.#setOption("stop", stops.length > 0 ? stops : undefined);
        resetAll.disabled = !this.#changed();
      },
    });
    const hint = h("p", { class: "hint", id: "hint-stop" }, t("option.stop.hint"));
    return h("div", { class: "field" }, h("div", { class: "field-head" }, h("label", { for: "option-stop" }, t("option.stop"))), area, hint);
  }

  /** @param {import("../client/model_facts.js").ModelFacts | null} facts */
  #model(facts) {
    const loaded = this.#models.loaded.has(this.#chat.current.model);
    const rows = [
      [t("panel.model.name"), shortName(this.#chat.current.model)],
      [t("panel.model.family"), facts?.family],
      [t("panel.model.size"), facts?.size],
      [t("panel.model.quantization"), facts?.quantization],
      [t("panel.model.context"), facts?.context ? t("panel.model.tokens", { count: number(facts.context) }) : ""],
      [t("panel.model.state"), loaded ? t("panel.model.loaded") : t("panel.model.unloaded")],
    ].filter(([, value]) => value);
    const list = rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
    return h("section", {}, h("h3", {}, t("panel.model")), h("dl", { class: "facts" }, ...list));
  }

  /** @param {string} name @param {unknown} value */
  #setOption(name, value) {
    const { [name]: _, ...options } = this.#chat.current.options;
    this.#change({ options: value === undefined ? options : { ...options, [name]: value } });
  }

  /** What was typed here is shown already. @param {{system?: string, options?: Record<string, any>}} changes */
  #change(changes) {
    Object.assign(this.#chat.current, structuredClone(changes));
    this.#shown = this.#state();
    this.#chat.configure(changes);
  }

  #state() {
    const { id, model, system, options } = this.#chat.current;
    return JSON.stringify([id, model, system, options, this.#models.facts(model), this.#models.loaded.has(model)]);
  }
}

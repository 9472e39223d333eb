import { ApiError } from "../client/api.js";
import { modelFacts } from "../client/model_facts.js";
import { Emitter } from "../lib/emitter.js";

/** @typedef {import("../client/model_facts.js").ModelFacts} ModelFacts */

/** A name as people say it. @param {string} name */
export function shortName(name) {
  return name.replace(/:latest$/, "");
}

/** The server's models. Emits `changed`, and `problem` with an ApiError or, once all is well again, null. */
export class Models extends Emitter {
  #api;
  /** @type {Map<string, ModelFacts>} */
  #facts = new Map();
  /** @type {string[]} */
  names = [];
  loaded = new Set();

  /** @param {import("../client/api.js").Api} api */
  constructor(api) {
    super();
    this.#api = api;
  }

  async refresh() {
    try {
      const [models, running] = await Promise.all([this.#api.models(), this.#api.running().catch(() => [])]);
      this.names = models.map((model) => model.name);
      this.loaded = new Set(running);
      this.#facts.clear(); // a model may have been made anew under its name
      this.emit("changed");
      this.emit("problem", null);
    } catch (error) {
      this.emit("problem", error instanceof ApiError ? error : new ApiError("unreadable"));
    }
  }

  /** What is known now; asks the server where nothing is, and emits `changed` later. @param {string} name */
  facts(name) {
    const known = this.#facts.get(name) ?? null;
    if (!known && this.names.includes(name)) this.#ask(name);
    return known;
  }

  /** Notes that a model has answered. @param {string} name */
  noteLoaded(name) {
    if (this.loaded.has(name)) return;
    this.loaded.add(name);
    this.emit("changed");
  }

  /** @param {string} name */
  async #ask(name) {
    this.#facts.set(name, modelFacts({})); // asked once, however many parts of the page want to know
    try {
      this.#facts.set(name, modelFacts(await this.#api.show(name)));
      this.emit("changed");
    } catch {
      // defaults stay unknown; the answer itself will say what is wrong
    }
  }
}

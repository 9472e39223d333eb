import { tokensUsed } from "../chat/conversation.js";
import { number, t } from "../i18n/index.js";
import { h } from "../lib/dom.js";

const NEAR = 0.8;
const FULL = 0.95;
const SVG = "http://www.w3.org/2000/svg";
const RADIUS = 8;
const LENGTH = 2 * Math.PI * RADIUS;

/** How much of the model's context the open conversation fills. */
export class Meter {
  #chat;
  #models;
  #root;
  #near;

  /**
   * @param {{chat: import("../chat/controller.js").ChatController, models: import("../chat/models.js").Models,
   *   root: HTMLElement, near: HTMLElement}} parts
   */
  constructor({ chat, models, root, near }) {
    this.#chat = chat;
    this.#models = models;
    this.#root = root;
    this.#near = near;
    for (const name of ["opened", "configured", "messages", "ended"]) chat.on(name, () => this.update());
    models.on("changed", () => this.update());
  }

  update() {
    const { current } = this.#chat;
    const total = this.#models.facts(current.model)?.context ?? 0;
    const used = tokensUsed(current);
    this.#root.hidden = total === 0;
    this.#near.hidden = total === 0 || used < NEAR * total;
    if (total === 0) return;
    const share = Math.min(1, used / total);
    const about = current.messages.findLast((message) => message.stats)?.stats?.estimated;
    const label = t(about ? "meter.label.estimate" : "meter.label", { used: number(used), total: number(total) });
    this.#root.dataset.level = share >= FULL ? "full" : share >= NEAR ? "near" : "fine";
    this.#root.title = label;
    this.#root.setAttribute("role", "meter");
    this.#root.setAttribute("aria-label", label);
    this.#root.setAttribute("aria-valuemin", "0");
    this.#root.setAttribute("aria-valuemax", String(total));
    this.#root.setAttribute("aria-valuenow", String(Math.min(used, total)));
    this.#root.replaceChildren(ring(share), h("span", { class: "meter-text" }, `${number(used)} / ${number(total)}`));
  }
}

/** @param {number} share */
function ring(share) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", "ring");
  svg.setAttribute("aria-hidden", "true");
  for (const [name, length] of /** @type {[string, number][]} */ ([["track", LENGTH], ["fill", share * LENGTH]])) {
    const circle = document.createElementNS(SVG, "circle");
    circle.setAttribute("class", name);
    circle.setAttribute("cx", "10");
    circle.setAttribute("cy", "10");
    circle.setAttribute("r", String(RADIUS));
    circle.setAttribute("stroke-dasharray", `${length} ${LENGTH}`);
    circle.setAttribute("transform", "rotate(-90 10 10)");
    svg.append(circle);
  }
  return svg;
}

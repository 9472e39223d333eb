/** How far from the end still counts as being there. */
const NEAR = 48;

/** Follows a growing text, but never pulls back who has scrolled up to read. */
export class Scroller {
  #box;
  #follows = true;

  /**
   * @param {HTMLElement} box
   * @param {HTMLElement} button shown while the end is out of sight
   */
  constructor(box, button) {
    this.#box = box;
    box.addEventListener("scroll", () => {
      this.#follows = this.#distance() < NEAR;
      button.hidden = this.#follows;
    }, { passive: true });
    button.addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.grown()).observe(box); // a notice or a keyboard takes some of its room
  }

  toEnd() {
    this.#follows = true;
    this.#box.scrollTop = this.#box.scrollHeight;
  }

  /** After the text has grown. */
  grown() {
    if (this.#follows) this.#box.scrollTop = this.#box.scrollHeight;
  }

  #distance() {
    return this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight;
  }
}

const FOCUSABLE = "button:not([hidden]), input, select, textarea, a[href]";

/**
 * A part at the side: beside the conversation where there is room, else over it, with everything else out of reach
 * until it is closed.
 */
export class Drawer {
  #parts;
  #wide;
  #open = false;
  /** @type {Element | null} */
  #opener = null;

  /**
   * @param {{element: HTMLElement, openButton: HTMLButtonElement, closeButton: HTMLButtonElement, backdrop: HTMLElement,
   *   others: HTMLElement[], room: string, open: boolean, onChange: (open: boolean) => void}} parts `room` is the
   *   media query of a window wide enough, `open` says whether it is open at first there
   */
  constructor(parts) {
    this.#parts = parts;
    this.#wide = window.matchMedia(parts.room);
    parts.openButton.addEventListener("click", () => this.toggle());
    parts.closeButton.addEventListener("click", () => this.close());
    parts.backdrop.addEventListener("click", () => this.closeOver());
    this.#wide.addEventListener("change", () => this.#show(this.#wide.matches && parts.open));
    this.#show(this.#wide.matches && parts.open);
  }

  get isOver() {
    return this.#open && !this.#wide.matches;
  }

  toggle() {
    if (this.#open) this.close();
    else this.open();
  }

  open() {
    this.#opener = document.activeElement;
    this.#choose(true);
    const first = this.#parts.element.querySelector(FOCUSABLE);
    if (first instanceof HTMLElement) first.focus();
  }

  close() {
    const inside = this.#parts.element.contains(document.activeElement);
    this.#choose(false);
    if (!inside) return;
    const target = this.#opener instanceof HTMLElement && this.#opener.isConnected ? this.#opener : this.#parts.openButton;
    target.focus();
  }

  /** Closes it where it hides the conversation. */
  closeOver() {
    if (this.isOver) this.close();
  }

  /** @param {boolean} open */
  #choose(open) {
    this.#show(open);
    if (!this.#wide.matches) return;
    this.#parts.open = open;
    this.#parts.onChange(open);
  }

  /** @param {boolean} open */
  #show(open) {
    const { element, openButton, backdrop, others } = this.#parts;
    const wasOver = element.hasAttribute("aria-modal");
    this.#open = open;
    element.inert = !open; // closed, it only slides out of sight
    element.classList.toggle("open", open);
    openButton.setAttribute("aria-expanded", String(open));
    if (this.isOver === wasOver) return;
    backdrop.hidden = !this.isOver;
    for (const other of others) other.inert = this.isOver;
    if (this.isOver) {
      element.setAttribute("role", "dialog");
      element.setAttribute("aria-modal", "true");
    } else {
      element.removeAttribute("role");
      element.removeAttribute("aria-modal");
    }
  }
}

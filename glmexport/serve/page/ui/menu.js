/** A button's menu, moved through with the arrow keys. @param {HTMLElement} button @param {HTMLElement} list */
export function menu(button, list) {
  const items = () => /** @type {HTMLElement[]} */ ([...list.querySelectorAll("[role=menuitem]:not(:disabled)")]);
  const show = (/** @type {boolean} */ open) => {
    list.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
  };
  const move = (/** @type {number} */ by) => {
    const all = items();
    const at = all.indexOf(/** @type {HTMLElement} */ (document.activeElement));
    all[(at + by + all.length) % all.length]?.focus();
  };
  button.addEventListener("click", () => {
    show(list.hidden);
    if (!list.hidden) items()[0]?.focus();
  });
  list.addEventListener("click", () => show(false));
  list.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") move(1);
    else if (event.key === "ArrowUp") move(-1);
    else if (event.key === "Home") items()[0]?.focus();
    else if (event.key === "End") items().at(-1)?.focus();
    else if (event.key === "Escape") {
      show(false);
      button.focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  list.addEventListener("focusout", (event) => {
    const to = /** @type {Node | null} */ (event.relatedTarget);
    if (!list.contains(to) && to !== button) show(false);
  });
}

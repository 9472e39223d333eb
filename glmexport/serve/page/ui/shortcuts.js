import { t } from "../i18n/index.js";
import { h } from "../lib/dom.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
export const COMMAND = MAC ? "⌘" : "Ctrl";

/** @param {HTMLElement} list the help dialog's */
export function describeShortcuts(list) {
  /** @type {[string[], string][]} */
  const rows = [
    [["Enter"], t("help.send")],
    [["Shift", "Enter"], t("help.newline")],
    [["Esc"], t("help.stop")],
    [[COMMAND, "K"], t("help.new")],
    [["/"], t("help.focus")],
    [["↑"], t("help.edit")],
    [[COMMAND, "B"], t("help.sidebar")],
    [[COMMAND, ","], t("help.panel")],
    [["?"], t("help.help")],
  ];
  const keys = (/** @type {string[]} */ names) => h("dt", {}, ...names.map((name) => h("kbd", {}, name)));
  list.replaceChildren(...rows.map(([names, text]) => h("div", {}, keys(names), h("dd", {}, text))));
}

/**
 * @param {{newChat: () => void, focus: () => void, escape: () => void, sidebar: () => void, panel: () => void,
 *   help: () => void}} actions
 */
export function listenForShortcuts(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.altKey || document.querySelector("dialog[open]")) return;
    const action = event.ctrlKey || event.metaKey ? withCommand(event, actions) : plain(event, actions);
    if (!action) return;
    event.preventDefault();
    action();
  });
}

/** @param {KeyboardEvent} event @param {Parameters<typeof listenForShortcuts>[0]} actions */
function withCommand(event, actions) {
  if (event.shiftKey) return null;
  return { k: actions.newChat, b: actions.sidebar, ",": actions.panel }[event.key.toLowerCase()] ?? null;
}

/** @param {KeyboardEvent} event @param {Parameters<typeof listenForShortcuts>[0]} actions */
function plain(event, actions) {
  if (event.key === "Escape") return actions.escape;
  const target = /** @type {HTMLElement} */ (event.target);
  if (target.matches("textarea, select, input:not([type=range])")) {
    // `?` in an empty message box is a question about the page far more often than a message
    const empty = target.id === "composer-text" && /** @type {HTMLTextAreaElement} */ (target).value === "";
    return event.key === "?" && empty ? actions.help : null;
  }
  return { "/": actions.focus, "?": actions.help }[event.key] ?? null;
}

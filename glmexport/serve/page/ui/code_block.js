import { t } from "../i18n/index.js";
import { copyText } from "../lib/clipboard.js";
import { h, icon } from "../lib/dom.js";

const SHOWN_FOR = 1600;

/**
 * A button that copies, and says that it did.
 *
 * @param {string} label
 * @param {() => string} text
 * @param {(copied: boolean) => void} [onDone]
 */
export function copyButton(label, text, onDone = () => {}) {
  const button = h("button", { type: "button", class: "icon-button copy", "aria-label": label, title: label }, icon("copy"));
  const show = (/** @type {string} */ name, /** @type {string} */ words) => {
    button.replaceChildren(icon(name));
    button.setAttribute("aria-label", words);
    button.title = words;
  };
  button.addEventListener("click", async () => {
    const copied = await copyText(text());
    if (copied) {
      show("check", t("copied"));
      button.dataset.copied = "";
      setTimeout(() => {
        show("copy", label);
        delete button.dataset.copied;
      }, SHOWN_FOR);
    }
    onDone(copied);
  });
  return button;
}

/**
 * @param {string} text
 * @param {string} language
 * @param {(copied: boolean) => void} [onCopied]
 * @returns {HTMLElement}
 */
export function codeBlock(text, language, onCopied) {
  const name = language || t("code.text");
  const code = h("code", {}, text);
  const head = h("figcaption", {}, h("span", {}, name), copyButton(t("code.copy"), () => code.textContent, onCopied));
  const body = h("pre", { tabindex: 0, role: "region", "aria-label": t("code.label", { language: name }) }, code);
  return h("figure", { class: "code", "data-language": language }, head, body);
}

import en from "./en.js";
import zh from "./zh.js";

/** @typedef {"en" | "zh"} Language */

const TEXTS = { en, zh };
const TAGS = { en: "en", zh: "zh-CN" };

/** @type {Language} */
let language = "en";

/** @param {"auto" | Language} choice @returns {Language} */
export function resolveLanguage(choice) {
  if (choice !== "auto") return choice;
  return navigator.languages.find((tag) => /^(en|zh)\b/i.test(tag))?.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** @param {Language} chosen */
export function useLanguage(chosen) {
  language = chosen;
  document.documentElement.lang = TAGS[chosen];
}

export function currentLanguage() {
  return language;
}

/**
 * @param {keyof typeof en} key
 * @param {Record<string, string | number>} [values]
 * @returns {string}
 */
export function t(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** @param {number} value @param {number} [digits] */
export function number(value, digits = 0) {
  return value.toLocaleString(TAGS[language], { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Fills the texts of the page's own elements, which name them in `data-text`, `data-label` and `data-placeholder`. */
export function translate(/** @type {ParentNode} */ root = document) {
  for (const element of /** @type {NodeListOf<HTMLElement>} */ (root.querySelectorAll("[data-text]"))) {
    element.textContent = t(/** @type {any} */ (element.dataset.text));
  }
  for (const element of /** @type {NodeListOf<HTMLElement>} */ (root.querySelectorAll("[data-label]"))) {
    const label = t(/** @type {any} */ (element.dataset.label));
    element.setAttribute("aria-label", label);
    if (element.matches("button")) element.title = label;
  }
  for (const element of /** @type {NodeListOf<HTMLElement>} */ (root.querySelectorAll("[data-placeholder]"))) {
    element.setAttribute("placeholder", t(/** @type {any} */ (element.dataset.placeholder)));
  }
}

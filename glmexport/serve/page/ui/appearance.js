import { currentLanguage, resolveLanguage, t, translate, useLanguage } from "../i18n/index.js";
import { icon } from "../lib/dom.js";

const NEXT_THEME = /** @type {const} */ ({ auto: "light", light: "dark", dark: "auto" });

/**
 * Theme and language, and the buttons that change them.
 *
 * @param {{settings: import("../chat/settings.js").Settings, themeButton: HTMLElement, languageButton: HTMLElement,
 *   onLanguage: () => void}} parts
 */
export function appearance({ settings, themeButton, languageButton, onLanguage }) {
  const showTheme = () => {
    const { theme } = settings.values;
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    themeButton.replaceChildren(icon(theme));
    themeButton.title = t(`theme.${theme}`);
    themeButton.setAttribute("aria-label", themeButton.title);
  };
  const showLanguage = () => {
    useLanguage(resolveLanguage(settings.values.language));
    translate();
    languageButton.textContent = t("language.short");
    languageButton.title = t("language.switch");
    languageButton.setAttribute("aria-label", languageButton.title);
    languageButton.lang = currentLanguage() === "en" ? "zh-CN" : "en";
  };
  themeButton.addEventListener("click", () => settings.update({ theme: NEXT_THEME[settings.values.theme] }));
  languageButton.addEventListener("click", () => {
    settings.update({ language: currentLanguage() === "en" ? "zh" : "en" });
  });
  settings.on("changed", (/** @type {string[]} */ names) => {
    if (names.includes("theme")) showTheme();
    if (!names.includes("language")) return;
    showLanguage();
    showTheme();
    onLanguage();
  });
  showLanguage();
  showTheme();
}

/** Markdown's tree as elements. Text enters the document as text nodes only. */

import { h } from "../lib/dom.js";

/** The page's own headings stay above those of an answer. */
const HEADING_OFFSET = 2;

/**
 * @param {import("./blocks.js").Block[]} blocks
 * @param {(text: string, language: string) => HTMLElement} codeBlock
 * @returns {DocumentFragment}
 */
export function renderBlocks(blocks, codeBlock) {
  const fragment = document.createDocumentFragment();
  for (const block of blocks) fragment.append(renderBlock(block, codeBlock));
  return fragment;
}

/**
 * @param {import("./blocks.js").Block} block
 * @param {(text: string, language: string) => HTMLElement} codeBlock
 * @returns {HTMLElement}
 */
export function renderBlock(block, codeBlock) {
  switch (block.type) {
    case "heading":
      return h(`h${Math.min(6, block.level + HEADING_OFFSET)}`, { "data-level": block.level }, inline(block.inline));
    case "code":
      return codeBlock(block.text, block.language);
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, renderBlocks(block.blocks, codeBlock));
    case "list": {
      const start = block.ordered && block.start !== 1 ? block.start : null;
      const items = block.items.map((item) => h("li", {}, listItem(item, block.loose, codeBlock)));
      return h(block.ordered ? "ol" : "ul", { start }, ...items);
    }
    case "table":
      return table(block);
    default:
      return h("p", {}, inline(block.inline));
  }
}

/**
 * @param {import("./blocks.js").Block[]} blocks
 * @param {boolean} loose
 * @param {(text: string, language: string) => HTMLElement} codeBlock
 */
function listItem(blocks, loose, codeBlock) {
  const fragment = document.createDocumentFragment();
  for (const block of blocks) {
    fragment.append(block.type === "paragraph" && !loose ? inline(block.inline) : renderBlock(block, codeBlock));
  }
  return fragment;
}

/** @param {Extract<import("./blocks.js").Block, {type: "table"}>} block */
function table(block) {
  const row = (/** @type {string} */ tag, /** @type {import("./inline.js").Inline[][]} */ cells) =>
    h("tr", {}, ...cells.map((cell, column) => h(tag, { class: `align-${block.align[column]}` }, inline(cell))));
  const head = h("thead", {}, row("th", block.head));
  const body = h("tbody", {}, ...block.rows.map((cells) => row("td", cells)));
  return h("div", { class: "table-scroll", tabindex: 0 }, h("table", {}, head, body));
}

/** @param {import("./inline.js").Inline[]} nodes */
function inline(nodes) {
  const fragment = document.createDocumentFragment();
  for (const node of nodes) {
    if (node.type === "text") fragment.append(node.text);
    else if (node.type === "break") fragment.append(h("br"));
    else if (node.type === "code") fragment.append(h("code", {}, node.text));
    else if (node.type === "link") {
      const target = { href: node.href, title: node.href, target: "_blank", rel: "noopener noreferrer nofollow" };
      fragment.append(h("a", target, inline(node.children)));
    } else fragment.append(h(node.type, {}, inline(node.children)));
  }
  return fragment;
}

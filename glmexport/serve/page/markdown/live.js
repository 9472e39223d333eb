import { parseBlocks } from "./blocks.js";
import { renderBlock } from "./render.js";

/** @typedef {import("./blocks.js").Block} Block */

/**
 * Markdown that grows. What lies before the last block is final, so only the end is parsed and drawn anew: an answer
 * of any length costs each frame no more than its last block or two.
 */
export class LiveMarkdown {
  #root;
  #codeBlock;
  #text = "";
  #settled = 0;
  /** @type {HTMLElement[]} */
  #open = [];

  /**
   * @param {HTMLElement} root
   * @param {(text: string, language: string) => HTMLElement} codeBlock
   */
  constructor(root, codeBlock) {
    this.#root = root;
    this.#codeBlock = codeBlock;
  }

  /** @param {string} source */
  update(source) {
    const text = source.includes("\r") ? source.replace(/\r\n?/g, "\n") : source;
    if (text === this.#text) return;
    if (!text.startsWith(this.#text)) this.#reset();
    this.#text = text;

    const tail = text.slice(this.#settled);
    const blocks = parseBlocks(tail);
    if (blocks.length === 0) return;
    if (blocks.length === 1 && this.#growCode(blocks[0])) return;
    for (const element of this.#open) element.remove();
    const elements = blocks.map((block) => renderBlock(block, this.#codeBlock));
    this.#root.append(...elements);
    const first = firstOpen(blocks, tail);
    this.#open = elements.slice(first);
    this.#settled += offsetOfLine(tail, blocks[first].line);
  }

  /** Keeps the element, so that a selection or a scrolled line in long code survives. @param {Block} block */
  #growCode(block) {
    const [element] = this.#open;
    if (block.type !== "code" || this.#open.length !== 1 || element.dataset.language !== block.language) return false;
    const code = element.querySelector("pre code");
    if (!code) return false;
    const shown = code.textContent ?? "";
    if (!block.text.startsWith(shown)) code.textContent = block.text;
    else if (block.text.length > shown.length) code.append(block.text.slice(shown.length));
    return true;
  }

  #reset() {
    this.#root.replaceChildren();
    this.#text = "";
    this.#settled = 0;
    this.#open = [];
  }
}

/**
 * The last block, or the one before it while the last is but an unfinished line: `2` under a list becomes its item
 * when the full stop arrives.
 *
 * @param {Block[]} blocks @param {string} text
 */
function firstOpen(blocks, text) {
  const last = blocks.length - 1;
  const unfinished = offsetOfLine(text, blocks[last].line) > text.lastIndexOf("\n");
  return unfinished ? Math.max(0, last - 1) : last;
}

/** @param {string} text @param {number} line */
function offsetOfLine(text, line) {
  let offset = 0;
  for (let passed = 0; passed < line; passed += 1) offset = text.indexOf("\n", offset) + 1;
  return offset;
}

/**
 * Blocks of markdown: headings, lists, quotes, tables, fenced code, rules, paragraphs.
 *
 * Indented code and underlined headings are left out on purpose: models write fences and `#`, and what looks like the
 * others is nearly always a list's continuation or a rule.
 *
 * @typedef {import("./inline.js").Inline} Inline
 * @typedef {{type: "paragraph", line: number, inline: Inline[]}
 *   | {type: "heading", line: number, level: number, inline: Inline[]}
 *   | {type: "code", line: number, language: string, text: string, closed: boolean}
 *   | {type: "quote", line: number, blocks: Block[]}
 *   | {type: "list", line: number, ordered: boolean, start: number, loose: boolean, items: Block[][]}
 *   | {type: "table", line: number, align: string[], head: Inline[][], rows: Inline[][][]}
 *   | {type: "rule", line: number}} Block
 */

import { parseInline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/;
const CELL_RULE = /^:?-+:?$/;

/** Deeper nesting is shown as text: nobody reads it, and recursion needs an end. */
const MAX_DEPTH = 8;
const MAX_COLUMNS = 64;

/** @param {string} source @returns {Block[]} */
export function parseBlocks(source) {
  return blocksOf(source.split("\n").map(expandTabs), 0);
}

/** @param {string} line */
function expandTabs(line) {
  return /^ *\t/.test(line) ? line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    ")) : line;
}

/** @param {string[]} lines @param {number} depth @returns {Block[]} */
function blocksOf(lines, depth) {
  /** @type {Block[]} */
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[Block, number]} */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = fenceOf(line);
  if (fence) return codeAt(lines, at, fence);
  if (HEADING.test(line)) return [headingOf(line, at), at + 1];
  if (RULE.test(line)) return [{ type: "rule", line: at }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quoteAt(lines, at, depth);
  if (depth < MAX_DEPTH && itemOf(line)) return listAt(lines, at, depth);
  if (startsTable(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at, depth);
}

/** @param {string} line */
function isBlank(line) {
  return line.trim() === "";
}

/** @param {string} line */
function indentOf(line) {
  let indent = 0;
  while (line[indent] === " ") indent += 1;
  return indent;
}

/** @param {string} line */
function fenceOf(line) {
  const match = FENCE.exec(line);
  if (!match || (match[1][0] === "`" && match[2].includes("`"))) return null;
  return { mark: match[1], indent: indentOf(line), info: match[2].trim() };
}

/** @param {string} line @param {string} mark */
function closesFence(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && indentOf(line) < 4 && text === mark[0].repeat(text.length);
}

/** @param {string[]} lines @param {number} at @param {{mark: string, indent: number, info: string}} fence */
function codeAt(lines, at, fence) {
  const body = [];
  let next = at + 1;
  while (next < lines.length && !closesFence(lines[next], fence.mark)) {
    body.push(lines[next].slice(Math.min(fence.indent, indentOf(lines[next]))));
    next += 1;
  }
  const closed = next < lines.length;
  const language = /^[\w+#.-]{1,24}/.exec(fence.info)?.[0] ?? "";
  const block = /** @type {Block} */ ({ type: "code", line: at, language, text: body.join("\n"), closed });
  return /** @type {[Block, number]} */ ([block, closed ? next + 1 : next]);
}

/** @param {string} line @param {number} at @returns {Block} */
function headingOf(line, at) {
  const text = line.trim();
  let level = 0;
  while (text[level] === "#" && level < 6) level += 1;
  let end = text.length;
  while (end > level && text[end - 1] === "#") end -= 1;
  const closing = end < text.length && (end === level || text[end - 1] === " ");
  return { type: "heading", line: at, level, inline: parseInline(text.slice(level, closing ? end : undefined).trim()) };
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[Block, number]} */
function quoteAt(lines, at, depth) {
  const body = [];
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) {
    body.push(lines[next].replace(QUOTE, ""));
    next += 1;
  }
  return [{ type: "quote", line: at, blocks: blocksOf(body, depth + 1) }, next];
}

/** @param {string} line */
function itemOf(line) {
  if (RULE.test(line)) return null;
  const match = ITEM.exec(line);
  if (!match) return null;
  const [, space, mark, gap = " ", text = ""] = match;
  return {
    indent: space.length,
    kind: mark.length > 1 ? mark[mark.length - 1] : mark,
    ordered: mark.length > 1,
    number: Number.parseInt(mark, 10),
    content: space.length + mark.length + (gap.length > 4 ? 1 : gap.length),
    text: gap.length > 4 ? gap.slice(1) + text : text,
  };
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[Block, number]} */
function listAt(lines, at, depth) {
  const first = /** @type {NonNullable<ReturnType<typeof itemOf>>} */ (itemOf(lines[at]));
  /** @type {Block[][]} */
  const items = [];
  let loose = false;
  let next = at;
  while (next < lines.length) {
    const item = itemOf(lines[next]);
    if (!item || item.kind !== first.kind || item.indent > first.indent + 1) break;
    const [body, after, blank] = itemBody(lines, next + 1, item);
    items.push(blocksOf([item.text, ...body], depth + 1));
    loose ||= blank;
    const following = skipBlank(lines, after);
    const sibling = following < lines.length ? itemOf(lines[following]) : null;
    if (!sibling || sibling.kind !== first.kind || sibling.indent > first.indent + 1) {
      next = after;
      break;
    }
    loose ||= following > after;
    next = following;
  }
  const start = first.ordered ? first.number : 1;
  return [{ type: "list", line: at, ordered: first.ordered, start, loose, items }, next];
}

/**
 * Lines of an item after its first. Two spaces are enough to belong to it, though `1. ` asks for three: models write
 * two. Code that is open keeps its lines however they are indented.
 *
 * @param {string[]} lines
 * @param {number} from
 * @param {NonNullable<ReturnType<typeof itemOf>>} item
 * @returns {[string[], number, boolean]} the lines, the next line, whether a blank line parts paragraphs
 */
function itemBody(lines, from, item) {
  const body = [];
  let blank = false;
  let fence = fenceOf(item.text)?.mark ?? "";
  let at = from;
  while (at < lines.length) {
    const line = lines[at];
    const inner = line.slice(Math.min(indentOf(line), item.content));
    if (fence) {
      if (closesFence(inner, fence)) fence = "";
      body.push(inner);
      at += 1;
      continue;
    }
    if (isBlank(line)) {
      const following = skipBlank(lines, at);
      if (following === lines.length || indentOf(lines[following]) < item.indent + 2) break;
      blank ||= !itemOf(lines[following]);
      while (at < following) {
        body.push("");
        at += 1;
      }
      continue;
    }
    const belongs = indentOf(line) >= item.indent + 2;
    if (!belongs && (body[body.length - 1] === "" || startsBlock(line))) break;
    fence = (belongs && fenceOf(inner)?.mark) || "";
    body.push(inner);
    at += 1;
  }
  return [body, at, blank];
}

/** @param {string[]} lines @param {number} at */
function skipBlank(lines, at) {
  let next = at;
  while (next < lines.length && isBlank(lines[next])) next += 1;
  return next;
}

/** What ends a paragraph without a blank line. @param {string} line */
function startsBlock(line) {
  return Boolean(fenceOf(line)) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || itemOf(line) !== null;
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[Block, number]} */
function paragraphAt(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next])) {
    const item = itemOf(lines[next]);
    const interrupts = item ? item.text !== "" && (!item.ordered || item.number === 1) : startsBlock(lines[next]);
    if ((interrupts && depth < MAX_DEPTH) || startsTable(lines, next)) break;
    next += 1;
  }
  const text = lines.slice(at, next).map((line) => line.trimStart());
  return [{ type: "paragraph", line: at, inline: parseInline(text.join("\n").trimEnd()) }, next];
}

/** @param {string[]} lines @param {number} at */
function startsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const rule = cellsOf(lines[at + 1]);
  if (!rule.every((cell) => CELL_RULE.test(cell))) return false;
  return rule.length <= MAX_COLUMNS && cellsOf(lines[at]).length === rule.length;
}

/** @param {string[]} lines @param {number} at @returns {[Block, number]} */
function tableAt(lines, at) {
  const align = cellsOf(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "end";
    return "start";
  });
  const inline = (/** @type {string} */ line) => {
    const cells = cellsOf(line);
    return align.map((_, column) => parseInline(cells[column] ?? ""));
  };
  const rows = [];
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|") && !isBlank(lines[next])) {
    rows.push(inline(lines[next]));
    next += 1;
  }
  return [{ type: "table", line: at, align, head: inline(lines[at]), rows }, next];
}

/** @param {string} line */
function cellsOf(line) {
  const cells = [""];
  const text = line.trim();
  for (let at = text.startsWith("|") ? 1 : 0; at < text.length; at += 1) {
    if (text[at] === "\\" && text[at + 1] === "|") {
      cells[cells.length - 1] += "|";
      at += 1;
    } else if (text[at] === "|") {
      cells.push("");
    } else {
      cells[cells.length - 1] += text[at];
    }
  }
  if (cells.length > 1 && cells[cells.length - 1].trim() === "") cells.pop();
  return cells.map((cell) => cell.trim());
}

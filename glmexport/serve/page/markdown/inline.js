/**
 * Inline markdown as a tree: code spans, emphasis, links, bare addresses, line breaks. HTML is plain text here.
 *
 * Every construct is bounded (runs, open brackets, open emphasis, length of an address), so time grows linearly with
 * the text and the tree stays shallow whatever a model writes.
 *
 * @typedef {{type: "text", text: string}
 *   | {type: "code", text: string}
 *   | {type: "break"}
 *   | {type: "strong" | "em" | "del", children: Inline[]}
 *   | {type: "link", href: string, children: Inline[]}} Inline
 */

const PLAIN = /[^\\`*_~[\]!<h\n]+/y;
const BARE_ADDRESS = /https?:\/\/[^\s<>"`[\]\\^{|}\u0080-\uffff]{1,2048}/iy;
const ANGLE_ADDRESS = /<(https?:\/\/[^\s<>]{1,2048})>/iy;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s/;

const MAX_OPEN_EMPHASIS = 32;
const MAX_OPEN_BRACKETS = 32;
const MAX_ADDRESS = 2048;
const MAX_PARENTHESES = 8;

/**
 * @param {string} address
 * @returns {string | null} the normalised address, or null for everything that is not http(s)
 */
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

/**
 * @param {string} source
 * @returns {Inline[]}
 */
export function parseInline(source) {
  const codeEnds = backtickRuns(source);
  /** @type {any[]} */
  const items = [];
  /** @type {{at: number, image: boolean}[]} */
  const brackets = [];
  let at = 0;

  const text = (/** @type {string} */ piece) => {
    const last = items[items.length - 1];
    const opensBracket = brackets.length > 0 && brackets[brackets.length - 1].at === items.length - 1;
    if (last?.type === "text" && !opensBracket) last.text += piece;
    else items.push({ type: "text", text: piece });
  };

  while (at < source.length) {
    const char = source[at];

    if (char === "\\") {
      const next = source[at + 1];
      if (next === "\n") {
        items.push({ type: "break" });
        at += 2;
      } else if (next && PUNCTUATION.test(next)) {
        text(next);
        at += 2;
      } else {
        text(char);
        at += 1;
      }
      continue;
    }

    if (char === "`") {
      const length = runLength(source, at);
      const end = codeEnds(length, at + length);
      if (end < 0) text(source.slice(at, at + length));
      else items.push({ type: "code", text: codeText(source.slice(at + length, end)) });
      at = end < 0 ? at + length : end + length;
      continue;
    }

    if (char === "*" || char === "_" || char === "~") {
      const length = runLength(source, at);
      items.push(emphasisRun(source, at, length));
      at += length;
      continue;
    }

    if (char === "[" || (char === "!" && source[at + 1] === "[")) {
      const image = char === "!";
      items.push({ type: "text", text: image ? "![" : "[" });
      if (brackets.length === MAX_OPEN_BRACKETS) brackets.shift();
      brackets.push({ at: items.length - 1, image });
      at += image ? 2 : 1;
      continue;
    }

    if (char === "]") {
      const open = brackets.pop();
      const target = open && source[at + 1] === "(" ? linkTarget(source, at + 2) : null;
      if (open && target) {
        const children = withoutLinks(emphasise(items.splice(open.at + 1)));
        items.pop();
        items.push({ type: "link", href: target.href, children: open.image ? imageText(children) : children });
        if (!open.image) brackets.length = 0; // a link holds no link
        at = target.end;
      } else {
        text(char);
        at += 1;
      }
      continue;
    }

    if (char === "<" || char === "h") {
      const link = char === "<" ? angleAddress(source, at) : bareAddress(source, at);
      if (link) {
        items.push({ type: "link", href: link.href, children: [{ type: "text", text: link.shown }] });
        at = link.end;
      } else {
        text(char);
        at += 1;
      }
      continue;
    }

    if (char === "\n") {
      const last = items[items.length - 1];
      if (last?.type === "text") last.text = last.text.trimEnd();
      items.push({ type: "break" });
      at += 1;
      while (source[at] === " ") at += 1;
      continue;
    }

    PLAIN.lastIndex = at;
    const plain = PLAIN.exec(source)?.[0] ?? char;
    text(plain);
    at += plain.length;
  }
  return emphasise(items);
}

/** Text without its marks, for titles and announcements. @param {Inline[]} nodes @returns {string} */
export function inlineText(nodes) {
  return nodes
    .map((node) => {
      if (node.type === "break") return " ";
      return node.type === "text" || node.type === "code" ? node.text : inlineText(node.children);
    })
    .join("");
}

/** @param {string} source @param {number} at */
function runLength(source, at) {
  let end = at + 1;
  while (source[end] === source[at]) end += 1;
  return end - at;
}

/**
 * Where runs of backticks of one length start, found once and walked forwards only: a search for each opening run
 * would be quadratic.
 *
 * @param {string} source
 * @returns {(length: number, from: number) => number}
 */
function backtickRuns(source) {
  /** @type {Map<number, {starts: number[], next: number}>} */
  const runs = new Map();
  for (const match of source.matchAll(/`+/g)) {
    const known = runs.get(match[0].length) ?? { starts: [], next: 0 };
    known.starts.push(match.index);
    runs.set(match[0].length, known);
  }
  return (length, from) => {
    const known = runs.get(length);
    if (!known) return -1;
    while (known.next < known.starts.length && known.starts[known.next] < from) known.next += 1;
    return known.starts[known.next] ?? -1;
  };
}

/** @param {string} raw */
function codeText(raw) {
  const line = raw.replaceAll("\n", " ");
  const padded = line.startsWith(" ") && line.endsWith(" ") && line.trim() !== "";
  return padded ? line.slice(1, -1) : line;
}

/**
 * `*` may close before a letter and open after one: Chinese puts no spaces around bold text, and the usual rules leave
 * its marks standing. `_` keeps to the edges of words, as in snake_case.
 *
 * @param {string} source @param {number} at @param {number} length
 */
function emphasisRun(source, at, length) {
  const char = source[at];
  const before = source[at - 1] ?? " ";
  const after = source[at + length] ?? " ";
  let canOpen = !SPACE.test(after);
  let canClose = !SPACE.test(before);
  if (char === "_") {
    const [wordBefore, wordAfter] = [WORD.test(before), WORD.test(after)];
    canOpen &&= !wordBefore;
    canClose &&= !wordAfter;
  }
  const bounded = char === "~" ? length === 2 : length <= 3;
  return { type: "run", char, count: length, canOpen: canOpen && bounded, canClose: canClose && bounded };
}

/** @param {any[]} items @returns {Inline[]} */
function emphasise(items) {
  /** @type {any[]} */
  const out = [];
  /** @type {{at: number, char: string, count: number, length: number, canClose: boolean}[]} */
  const open = [];
  for (const item of items) {
    if (item.type !== "run") {
      out.push(item);
      continue;
    }
    let count = item.count;
    while (item.canClose && count > 0) {
      let found = open.length - 1;
      while (found >= 0 && !pairs(open[found], item)) found -= 1;
      if (found < 0) break;
      const opener = open[found];
      open.length = found + 1;
      const used = Math.min(opener.count, count, 2);
      const children = out.splice(opener.at + 1);
      opener.count -= used;
      count -= used;
      out[opener.at].text = opener.char.repeat(opener.count);
      out.push({ type: item.char === "~" ? "del" : used === 2 ? "strong" : "em", children });
      if (opener.count === 0) open.pop();
    }
    if (count > 0) {
      out.push({ type: "text", text: item.char.repeat(count) });
      if (item.canOpen) {
        if (open.length === MAX_OPEN_EMPHASIS) open.shift();
        open.push({ at: out.length - 1, char: item.char, count, length: item.count, canClose: item.canClose });
      }
    }
  }
  return out.filter((node) => node.type !== "text" || node.text !== "");
}

/** @param {{char: string, length: number, canClose: boolean}} opener @param {any} closer */
function pairs(opener, closer) {
  if (opener.char !== closer.char) return false;
  const ambiguous = opener.canClose || closer.canOpen;
  const sum = opener.length + closer.count;
  return !(ambiguous && sum % 3 === 0 && (opener.length % 3 !== 0 || closer.count % 3 !== 0));
}

/** `address "title")` after `](`. @param {string} source @param {number} from */
function linkTarget(source, from) {
  let at = from;
  while (source[at] === " ") at += 1;
  const angled = source[at] === "<";
  const start = angled ? at + 1 : at;
  const limit = Math.min(source.length, start + MAX_ADDRESS);
  let depth = 0;
  for (at = start; at < limit; at += 1) {
    const char = source[at];
    if (angled ? char === ">" : SPACE.test(char)) break;
    if (char === "\n") return null;
    if (angled) continue;
    if (char === "(" && ++depth > MAX_PARENTHESES) return null;
    if (char === ")" && depth-- === 0) break;
  }
  const href = safeAddress(source.slice(start, at));
  if (!href) return null;
  if (angled) at += 1;
  while (source[at] === " ") at += 1;
  const quote = source[at];
  if (quote === '"' || quote === "'") {
    const stop = Math.min(source.length, at + MAX_ADDRESS);
    for (at += 1; at < stop && source[at] !== quote; at += 1);
    at += 1;
    while (source[at] === " ") at += 1;
  }
  return source[at] === ")" ? { href, end: at + 1 } : null;
}

/** @param {string} source @param {number} at */
function angleAddress(source, at) {
  ANGLE_ADDRESS.lastIndex = at;
  const match = ANGLE_ADDRESS.exec(source);
  const href = match && safeAddress(match[1]);
  return href ? { href, shown: match[1], end: at + match[0].length } : null;
}

/** @param {string} source @param {number} at */
function bareAddress(source, at) {
  if (at > 0 && WORD.test(source[at - 1])) return null;
  BARE_ADDRESS.lastIndex = at;
  const match = BARE_ADDRESS.exec(source);
  if (!match) return null;
  const shown = withoutTrailingMarks(match[0]);
  const href = safeAddress(shown);
  return href ? { href, shown, end: at + shown.length } : null;
}

/** A sentence's full stop or closing parenthesis does not belong to the address in it. @param {string} address */
function withoutTrailingMarks(address) {
  let closing = 0;
  for (const char of address) closing += char === ")" ? 1 : char === "(" ? -1 : 0;
  let end = address.length;
  for (; end > 0; end -= 1) {
    const char = address[end - 1];
    if (char === ")" && closing > 0) closing -= 1;
    else if (!".,;:!?*_~'".includes(char)) break;
  }
  return address.slice(0, end);
}

/** @param {Inline[]} nodes @returns {Inline[]} */
function withoutLinks(nodes) {
  return nodes.flatMap((node) => {
    if (node.type === "link") return withoutLinks(node.children);
    return "children" in node ? [{ ...node, children: withoutLinks(node.children) }] : [node];
  });
}

/** Pictures are never fetched: a picture's address tells its owner who reads. @param {Inline[]} children */
function imageText(children) {
  return /** @type {Inline[]} */ ([{ type: "text", text: "🖼 " }, ...children]);
}

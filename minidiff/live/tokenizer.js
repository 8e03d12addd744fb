// Chapter 1: from text to ids, by merges of bytes (CLIP) or the best path (T5).
"use strict";

const END_OF_WORD = "</w>", SPACE = "▁", UNKNOWN_PENALTY = 10;

// A tokenizer from its exported table; encode(text, length) gives the padded ids.
function makeTokenizer(table, unicode) {
  const vocab = new Map(table.pieces.map((piece, id) => [piece, id]));
  const { normalize, encodePlain } = table.merges
    ? bytePairs(table, vocab, unicode) : unigram(table, vocab);
  const split = splitterAt(table.added, normalize);
  const ids = (text) => split(text)
    .flatMap((part) => typeof part === "string" ? encodePlain(part) : [vocab.get(part.content)]);
  const start = table.bos === null ? [] : [table.bos];
  return {
    pieces: table.pieces,
    length: table.length,
    encode(text, length = table.length) {
      const room = length - start.length - 1;
      const row = [...start, ...ids(text).slice(0, room), table.eos];
      return [...row, ...Array(length - row.length).fill(table.pad)];
    },
    // How many ids the text has, cut or not, with its beginning and end.
    count: (text) => start.length + ids(text).length + 1,
  };
}

// Cuts a text at the added tokens, those sought in the raw text first; normalises the rest.
function splitterAt(added, normalize) {
  const raw = added.filter((token) => !token.normalized);
  const normal = added.filter((token) => token.normalized);
  const first = splitter(raw, (content) => content), then = splitter(normal, normalize);
  return (text) => first(text).flatMap((part) =>
    typeof part === "string" ? then(normalize(part)) : [part]);
}

// Cuts at the leftmost token, of several that begin there the longest; and so on.
function splitter(added, spell) {
  if (!added.length) return (text) => [text];
  const tokens = new Map(added.map((token) => [spell(token.content), token]));
  const escape = (word) => word.replace(/[$()*+.?[\\\]^{|}]/g, "\\$&");
  const words = [...tokens.keys()].sort((a, b) => b.length - a.length).map(escape);
  const pattern = new RegExp(words.join("|"), "gu");
  return (text) => {
    const parts = [];
    let done = 0;
    for (const match of text.matchAll(pattern)) {
      const token = tokens.get(match[0]);
      let start = match.index, end = start + match[0].length;
      if (token.lstrip) {
        start = Math.max(done, text.slice(0, start).replace(/\p{White_Space}+$/u, "").length);
      }
      if (token.rstrip) end += text.slice(end).match(/^\p{White_Space}*/u)[0].length;
      parts.push(text.slice(done, start), token);
      done = end;
    }
    return [...parts, text.slice(done)].filter(Boolean);
  };
}

// CLIP's byte-level BPE -------------------------------------------------------------

// Every byte as a character that prints: its own, or U+0100 and the next ones.
const BYTES = (() => {
  const prints = (b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(prints(b) ? b : next++));
})();

function bytePairs(table, vocab, unicode) {
  const { letter, number } = unicode, young = new RegExp(`(${unicode.young})`, "u");
  const ranks = new Map(table.merges.map((pair, rank) => [pair, rank]));
  const word = new RegExp("<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d"
    + `|${letter}+|${number}|[^\\p{White_Space}${letter}${number}]+`, "gv");
  const marks = new Map(["startoftext", "endoftext"].map((name) =>
    [`<|${name}|>`, ["<|", name, "|>"]]));
  const wordIds = (text) => merge(wordSymbols(text), ranks)
    .map((symbol) => vocab.get(symbol) ?? table.unk);
  return {
    normalize: (text) => lowercase(nfc(text, young).replace(/\p{White_Space}+/gu, " "), unicode.capitals),
    encodePlain: (text) => (text.match(word) ?? [])
      .flatMap((found) => marks.get(found) ?? [found]).flatMap(wordIds),
  };
}

// Normal form C of Unicode 9, the reference's: what is younger neither composes nor moves.
const nfc = (text, young) => text.split(young).map((part) => part.normalize("NFC")).join("");

// Character by character: Σ becomes σ, at the end of a word too.
const lowercase = (text, capitals) =>
  Array.from(text.replaceAll("Σ", "σ").toLowerCase(), (c) => capitals[c] ?? c).join("");

function wordSymbols(word) {
  const symbols = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]);
  symbols[symbols.length - 1] += END_OF_WORD;
  return symbols;
}

// Merge again and again the pair that was learned first.
function merge(symbols, ranks) {
  for (;;) {
    let first = Infinity, pair;
    for (let i = 0; i + 1 < symbols.length; i++) {
      const rank = ranks.get(`${symbols[i]} ${symbols[i + 1]}`);
      if (rank < first) [first, pair] = [rank, [symbols[i], symbols[i + 1]]];
    }
    if (!pair) return symbols;
    const joined = [];
    for (let i = 0; i < symbols.length; i++) {
      const here = symbols[i] === pair[0] && symbols[i + 1] === pair[1];
      joined.push(here ? symbols[i] + symbols[++i] : symbols[i]);
    }
    symbols = joined;
  }
}

// T5's Unigram ----------------------------------------------------------------------

function unigram(table, vocab) {
  const scores = new Map(table.pieces.slice(0, table.scores.length)
    .map((piece, id) => [piece, table.scores[id]]));
  const unknown = Math.min(...table.scores) - UNKNOWN_PENALTY;
  const longest = Math.max(...Array.from(scores.keys(), (piece) => Array.from(piece).length));
  const wordIds = (word) => {
    const ids = [];
    for (const piece of bestPath(Array.from(word), scores, unknown, longest)) {
      const id = vocab.get(piece) ?? table.unk;
      if (id !== table.unk || ids.at(-1) !== id) ids.push(id); // neighbours share one
    }
    return ids;
  };
  return {
    normalize: table.charsmap ? characterMap(table.charsmap) : (text) => text,
    encodePlain: (text) => spacedWords(text).flatMap(wordIds),
  };
}

// Cut at white space, mark each word's beginning; a mark in the text cuts too.
function spacedWords(text) {
  return text.split(/\p{White_Space}+/u).filter(Boolean)
    .flatMap((word) => (word.startsWith(SPACE) ? word : SPACE + word).match(/▁[^▁]*/gu));
}

// Viterbi: the pieces of the letters whose scores add up to the most.
function bestPath(letters, scores, unknown, longest) {
  const best = [0, ...letters.map(() => -Infinity)], origin = [];
  const reach = (start, end, score) => {
    if (best[start] + score > best[end]) [best[end], origin[end]] = [best[start] + score, start];
  };
  for (let start = 0; start < letters.length; start++) {
    let piece = "";
    for (let end = start; end < Math.min(start + longest, letters.length); end++) {
      piece += letters[end];
      if (scores.has(piece)) reach(start, end + 1, scores.get(piece));
    }
    if (!scores.has(letters[start])) reach(start, start + 1, unknown);
  }
  const pieces = [];
  for (let end = letters.length; end > 0; end = origin[end]) {
    pieces.unshift(letters.slice(origin[end], end).join(""));
  }
  return pieces;
}

// SentencePiece's normaliser: a double-array trie over bytes, then the replacements.
function characterMap(data) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const units = new Uint32Array(bytes.slice(4, 4 + size).buffer);
  const replacements = bytes.subarray(4 + size);
  const children = (node, unit) => (node ^ ((unit >>> 10) << ((unit & 512) >> 6))) >>> 0;
  const lookup = (text) => { // the SHORTEST key that begins the text; the rest is lost
    let node = children(0, units[0]);
    for (const byte of new TextEncoder().encode(text)) {
      node = (node ^ byte) >>> 0;
      if (byte === 0 || node >= units.length) return null;
      const unit = units[node];
      if (((unit & 0x800000ff) >>> 0) !== byte) return null;
      node = children(node, unit);
      if ((unit >>> 8) & 1) {
        const start = units[node] & 0x7fffffff;
        const end = replacements.indexOf(0, start);
        return new TextDecoder().decode(replacements.subarray(start, end));
      }
    }
    return null;
  };
  const graphemes = new Intl.Segmenter("en", { granularity: "grapheme" });
  const replace = (grapheme) => {
    const short = new TextEncoder().encode(grapheme).length < 6;
    return (short ? lookup(grapheme) : null)
      ?? Array.from(grapheme, (letter) => lookup(letter) ?? letter).join("");
  };
  return (text) => Array.from(graphemes.segment(text), (part) => replace(part.segment)).join("");
}

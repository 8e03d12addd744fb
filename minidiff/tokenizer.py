# %% [markdown]
r"""
# Tokenizers: from text to ids

In this chapter a prompt becomes three rows of whole numbers, which is all that the
text encoders of Stable Diffusion 3.5 ever see of it.

After it you will be able to

- **train** a byte-level BPE tokenizer, as CLIP uses it, and watch its merges;
- **encode** any text with it, in a time that hardly grows faster than the text;
- **find** the most probable way to cut a word into pieces, as T5 does, and learn such
  pieces from captions;
- **reproduce** the ids of the three published tokenizers, with their padding;
- **explain** the quirks in these ids that the trained weights depend on.
"""

# %%
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Self

import regex
import torch
from torch import Tensor

from minidiff.files import tokenizer_files as files
from minidiff.files.sentencepiece import CharacterMap
from minidiff.files.tokenizer_files import LETTER, NUMBER, Settings, lowercase, nfc

# %% [markdown]
# ## Where we are
#
# At the very beginning: the map shows the whole pipeline, and the arrow that enters our
# box is a string. One prompt travels through this book, always the same; each chapter
# takes what the one before made of it. Here it is still text.
# (<a href="../book/inside.html">Type one of your own</a>: the book draws it in your
# browser, and shows its tokens.)

# %% tags=["active-ipynb"]
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.files.weights import TINY
# from minidiff.data.garments import prompts
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT
#
# viz.show_pipeline("tokenizer")

# %% [markdown]
# A network reads vectors, and a table turns ids into vectors: row 17 for id 17. So the
# text must be cut into units of which there are few enough to list in a table. Two cuts
# suggest themselves, and both are bad.

# %% tags=["active-ipynb"]
# viz.show_pieces([list("a red dress"), ["a", "red", "dress"]], ["letters", "words"])

# %% [markdown]
# *Letters* make a small table but a long sequence, and a letter means next to nothing.
# *Words* mean something, but a list of words is never complete: what is the id of
# "dresslike"? *Subwords* lie between: frequent words are whole, rare ones are made of
# parts. The tokenizers of this chapter differ in how they find the parts.
#
# | symbol | meaning | CLIP-L, CLIP-G | T5 | tiny (CLIP, T5) |
# |---|---|---|---|---|
# | $V$ | size of the vocabulary, `vocab_size` | 49,408 | 32,100 | about 630, 210 |
# | $L$ | ids in a row, `max_length` | 77 | 256 | 32 |
# | $w$ | a word, `word` | | | |
# | $p$ | a piece of it, in the vocabulary | | | |
# | $s(p)$ | its score, the log of its probability | – | `scores[p]` | `scores[p]` |
#
# The tiny tokenizers ship with the book and learned from captions of its pictures. A
# batch of $B$ prompts becomes a tensor of ids `(B, L)`.

# %% [markdown]
# ## Bytes as characters
#
# CLIP starts from bytes, not letters: UTF-8 writes every text of the world in bytes.
# There are only 256 of them, so a vocabulary that holds them all never meets an unknown
# sign. The files of the vocabulary are text, however, and many bytes do not print.
# GPT-2 gave each byte a printable stand-in, and CLIP took the table over.


# %%
def byte_characters() -> dict[int, str]:
    """Give every byte a printable character (Radford et al. 2019, GPT-2's code).

    A byte that prints keeps its own sign; the other 68 take U+0100 and the next ones.
    The order is that of the ids in CLIP's vocabulary.
    """
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    codes = zip(prints + others, prints + [*range(256, 324)], strict=True)
    return {byte: chr(code) for byte, code in codes}


BYTE_TO_CHARACTER = byte_characters()
CHARACTER_TO_BYTE = {char: bytes([byte]) for byte, char in BYTE_TO_CHARACTER.items()}

# %% tags=["active-ipynb"]
# for sign in "dé👗":
#     data = sign.encode("utf-8")
#     print(sign, list(data), "".join(BYTE_TO_CHARACTER[byte] for byte in data))

# %% [markdown]
# ## Words
#
# Before it looks for parts, CLIP tidies the text (accents composed, white space
# collapsed to single spaces, letters lower-cased) and cuts it into words: runs of
# letters, single digits, runs of other signs, and English endings such as `'s`. No
# piece reaches across such a cut. Spaces are then dropped; so that "red" at a word's
# end differs from "red" within "redder", the last character of each word carries the
# mark `</w>`.

# %%
END_OF_WORD = "</w>"
WORD = regex.compile(  # (?V1): the newer syntax, in which [A--B] is without B
    r"(?V1)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    rf"|{LETTER}+|{NUMBER}|[^\s{LETTER}{NUMBER}]+"
)


def clean(text: str) -> str:
    """Compose accents (NFC), make each run of white space one space, lower case."""
    return lowercase(regex.sub(r"\s+", " ", nfc(text)))


def split_words(text: str) -> list[str]:
    """Split clean text into words, single digits and runs of other signs."""
    # a marker's text is cut from its neighbours, and then in three
    marks = {f"<|{name}|>": ["<|", name, "|>"] for name in ("startoftext", "endoftext")}
    return [part for word in WORD.findall(text) for part in marks.get(word, [word])]


def word_symbols(word: str) -> tuple[str, ...]:
    """Spell a word in byte characters; the last one carries the end-of-word mark."""
    spelling = [BYTE_TO_CHARACTER[byte] for byte in word.encode("utf-8")]
    return (*spelling[:-1], spelling[-1] + END_OF_WORD)


# %% tags=["active-ipynb"]
# print(split_words(clean("A  T-shirt, it's NEW: 2 for €25!")))
# print(word_symbols("red"), word_symbols("café"))

# %% [markdown]
# ## Learning merges
#
# *Byte-pair encoding* (BPE) grows a vocabulary from these symbols. It counts all pairs
# of neighbours in a corpus, with $n_w$ the number of times that word $w$ occurs and
# $w_i$ its $i$-th symbol,
#
# $$
# (a, b)^\star = \arg\max_{(a, b)} \sum_w n_w \cdot
# \#\{i : w_i = a,\; w_{i+1} = b\},
# $$
#
# makes the winner a symbol of its own, and repeats ([Sennrich et al.
# 2016](https://arxiv.org/abs/1508.07909), section 3.2). The list of merges, in the
# order of learning, is the whole model.

# %%
Pair = tuple[str, str]


def count_pairs(words: dict[tuple[str, ...], int]) -> Counter[Pair]:
    """Count neighbouring symbols over words that are given with their frequencies."""
    counts: Counter[Pair] = Counter()
    for symbols, times in words.items():
        for pair in pairwise(symbols):
            counts[pair] += times
    return counts


def best_pair(counts: Counter[Pair]) -> Pair | None:
    """Return the most frequent pair, of equals the first by name; None if all are 1."""
    best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
    return best if best and counts[best] > 1 else None


def join_pair(symbols: Sequence[str], pair: Pair) -> tuple[str, ...]:
    """Merge every occurrence of a pair, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return tuple(joined)


def learn_merges_naively(words: dict[tuple[str, ...], int], limit: int) -> list[Pair]:
    """Merge the most frequent pair, again and again (Sennrich et al. 2016, 3.2)."""
    merges: list[Pair] = []
    while len(merges) < limit and (best := best_pair(count_pairs(words))):
        words = {join_pair(symbols, best): n for symbols, n in words.items()}
        merges.append(best)
    return merges


# %% [markdown]
# The tiny model draws *scenes*, coloured garments on a coloured ground, and the
# captions of these scenes serve as the corpus (here 2,000, each with two garments).
# Follow some words while the merges come in: each row shows them after so many merges.

# %% tags=["active-ipynb"]
# corpus = prompts(2000, "two")[0]
# words = Counter(word_symbols(w) for text in corpus for w in split_words(clean(text)))
# merges = learn_merges_naively(words, 200)
# print(corpus[0], "·", len(words), "different words ·", merges[:5])

# %% tags=["active-ipynb"]
# steps, rows = (0, 5, 10, 20, 40, 80, len(merges)), []
# for step in steps:
#     row = [word_symbols(w) for w in ("black", "background", "boot")]
#     for pair in merges[:step]:
#         row = [join_pair(symbols, pair) for symbols in row]
#     rows.append([piece for symbols in row for piece in symbols])
# viz.show_pieces(rows, [f"{step} merges" for step in steps])

# %% [markdown]
# The parts of "background" come early, because every caption has a background. With so
# few words in the world all of them end up whole, and the learning stops by itself long
# before the merges that we allowed are used up: no pair is left to join.
#
# The naive loop counts all words again after each merge. But a merge changes only the
# words that hold its pair: we keep the set of these for each pair, take their old pairs
# out of the counts and put their new pairs in.


# %%
def learn_merges(words: dict[tuple[str, ...], int], limit: int) -> list[Pair]:
    """Learn the same merges; each one recounts only the words that hold its pair."""
    spellings, times = list(words), list(words.values())
    counts, homes = count_pairs(words), defaultdict[Pair, set[int]](set)
    merges: list[Pair] = []
    for index, symbols in enumerate(spellings):
        for pair in pairwise(symbols):
            homes[pair].add(index)
    while len(merges) < limit and (best := best_pair(counts)):
        for index in homes.pop(best):
            for pair in pairwise(spellings[index]):
                counts[pair] -= times[index]
            spellings[index] = join_pair(spellings[index], best)
            for pair in pairwise(spellings[index]):
                counts[pair] += times[index]
                homes[pair].add(index)
        merges.append(best)
    return merges


# %% tags=["active-ipynb"]
# print("the same merges:", learn_merges(words, 200) == merges)

# %% [markdown]
# ## Applying merges
#
# A new word is spelled in bytes, and the merges are replayed on it. Of all neighbouring
# pairs, the one that was learned *first* is merged; this goes on until no learned pair
# is left. The rank of a pair is its place in the list of merges.


# %%
def merge_naively(symbols: Sequence[str], ranks: dict[Pair, int]) -> Iterator[tuple]:
    """Yield the symbols after each merge: always of the pair that was learned first."""
    yield (symbols := tuple(symbols))
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        yield (symbols := join_pair(symbols, min(pairs, key=ranks.__getitem__)))


# %% tags=["active-ipynb"]
# ranks = {pair: rank for rank, pair in enumerate(merges)}
# viz.show_pieces([*merge_naively(word_symbols("undressed"), ranks)])

# %% [markdown]
# "Undressed" is in no caption. Still it has an encoding: "dres" was learned on the way
# to "dress", whose last s carries the end-of-word mark, so that the second s here stays
# alone. Nothing is ever unknown; at worst it is spelled.
#
# Each round of this loop looks at all pairs, so a word of $n$ letters can cost $n^2$
# steps. A *heap*, a list kept half in order, hands out its lowest entry in $\log n$
# steps instead. And in a *linked list*, where each symbol knows the places `before` and
# `after` it, a merged pair is joined without moving the rest. An empty symbol at either
# end saves asking whether there is a neighbour:


# %%
def merge(symbols: Sequence[str], ranks: dict[Pair, int]) -> list[str]:
    """Return the symbols after the last merge, in O(n log n).

    The heap holds (rank, place). A merged symbol leaves an empty string behind, which
    no rank knows: heap entries that it made obsolete are passed over.
    """
    symbols = ["", *symbols, ""]
    before, after = list(range(-1, len(symbols))), list(range(1, len(symbols) + 1))
    pairs = enumerate(pairwise(symbols))
    heap = [(ranks[pair], place) for place, pair in pairs if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, place = heapq.heappop(heap)
        follower = after[place]
        if ranks.get((symbols[place], symbols[follower])) != rank:
            continue
        symbols[place], symbols[follower] = symbols[place] + symbols[follower], ""
        after[place] = after[follower]
        before[after[place]] = place
        for start in before[place], place:
            pair = symbols[start], symbols[after[start]]
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], start))
    return [symbol for symbol in symbols if symbol]


# %% tags=["active-ipynb"]
# tests = [word_symbols(w) for w in ("undressed", "greenback", "aboveboard", "ab" * 99)]
# last = [list(steps)[-1] for steps in (merge_naively(w, ranks) for w in tests)]
# print("the same symbols:", [tuple(merge(w, ranks)) for w in tests] == last)
# print(len(merge(word_symbols("background" * 1000), ranks)), "symbols from 10,000")

# %% [markdown]
# Three symbols for each "background" but the last, which alone ends in `</w>` and is
# whole.
#
# ## Special tokens, length and padding
#
# *Special tokens* stand for no text: the beginning and end of a prompt, and padding. If
# one is spelled out in a prompt, say `<|endoftext|>`, it becomes its id: they are
# looked up in the raw text, before anything else (or in the tidied text, if they are
# marked `normalized`). What both tokenizers share is gathered here: find the special
# tokens, encode what lies between, frame it with the beginning and the end, cut it, pad
# it. This class is bookkeeping; on a first reading look at `__call__` and go on.


# %%
class Tokenizer:
    """Text to ids and back, with special tokens, padding and truncation.

    A subclass brings ``normalize`` (raw text to normal text), ``encode_plain`` (normal
    text to ids) and ``join`` (pieces to text).

    Attributes: ``vocab`` (piece → id), ``vocab_size``, ``model_max_length``, and
    ``pad_token_id``, ``eos_token_id``, ``unk_token_id``, ``bos_token_id`` (None in T5).
    """

    normalize: Callable[[str], str]
    encode_plain: Callable[[str], list[int]]
    join: Callable[[Sequence[str]], str]

    def __init__(self, vocab: dict[str, int], settings: Settings) -> None:
        self.vocab, self.settings = dict(vocab), settings
        for token in settings.added:
            self.vocab.setdefault(token.content, len(self.vocab))
        self.pieces = {number: piece for piece, number in self.vocab.items()}
        self.vocab_size = len(self.vocab)
        self.model_max_length = settings.model_max_length
        ids = {name: self.vocab[piece] for name, piece in settings.names.items()}
        self.pad_token_id, self.eos_token_id = ids["pad_token"], ids["eos_token"]
        self.unk_token_id, self.bos_token_id = ids["unk_token"], ids.get("bos_token")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text with its special tokens, neither padded nor cut.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: it holds half a surrogate pair, which UTF-8 cannot write.
        """
        return self._frame(self._encode(text))

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Return the ids of B texts, cut and padded to one length: (B, max_length).

        ``max_length`` counts the special tokens; by default it is model_max_length.
        """
        if isinstance(texts, str):
            raise TypeError(f"expected a list of strings, found the string {texts!r}")
        length = self.model_max_length if max_length is None else max_length
        room = length - len(self._frame([]))
        if room < 0:
            raise ValueError(f"max_length {length} leaves no room for special tokens")
        rows = [self._frame(self._encode(text)[:room]) for text in texts]
        padded = [row + [self.pad_token_id] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).reshape(len(rows), length)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens left out."""
        special = {t.content for t in self.settings.added if t.special}
        return self.join([p for p in self.tokens(ids) if p not in special])

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return the pieces of ids as the vocabulary writes them."""
        ids = [int(number) for number in ids]
        if unknown := set(ids) - self.pieces.keys():
            raise ValueError(f"expected ids below {self.vocab_size}, found {unknown}")
        return [self.pieces[number] for number in ids]

    def _frame(self, ids: list[int]) -> list[int]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*start, *ids, self.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"expected a string, found {type(text).__name__}: {text!r}")
        text.encode("utf-8")  # half a surrogate pair raises a ValueError here
        ids: list[int] = []
        for part in files.split_added(text, self.settings.added, self.normalize):
            if isinstance(part, str):
                ids += self.encode_plain(part)
            else:
                ids.append(self.vocab[part.content])
        return ids


# %% [markdown]
# ## CLIP's tokenizer
#
# The vocabulary lists the 256 bytes, the 256 bytes at a word's end, one symbol for each
# merge, then the two markers. Reading and writing the files of a model on the Hugging
# Face hub (`vocab.json`, `merges.txt`) is left to `minidiff.files`. The heart of the
# class is `_word_ids`: merge, then look up.


# %%
class CLIPTokenizer(Tokenizer):
    """Byte-level BPE in lower case, as both CLIPs read it (Radford et al. 2021).

    ``CLIPTokenizer(vocab, merges, settings)``; usually made by ``from_pretrained`` or
    ``train``.
    """

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[Pair], settings: Settings
    ) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.word_ids = lru_cache(maxsize=10_000)(self._word_ids)
        super().__init__(vocab, settings)

    def normalize(self, text: str) -> str:
        return clean(text)

    def encode_plain(self, text: str) -> list[int]:
        return [number for word in split_words(text) for number in self.word_ids(word)]

    def _word_ids(self, word: str) -> list[int]:
        symbols = merge(word_symbols(word), self.ranks)
        return [self.vocab.get(symbol, self.unk_token_id) for symbol in symbols]

    def join(self, pieces: Sequence[str]) -> str:
        """Turn byte characters into text; bytes that are no UTF-8 become U+FFFD."""
        letters = "".join(pieces)
        data = b"".join(CHARACTER_TO_BYTE.get(c, c.encode()) for c in letters)
        return data.decode("utf-8", errors="replace").replace(END_OF_WORD, " ").strip()

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        model_max_length: int = 77,
        pad_token: str = "<|endoftext|>",
    ) -> Self:
        """Learn a vocabulary: 512 byte symbols, merges, and the two markers at the end.

        It ends below ``vocab_size`` where no pair is left that occurs twice. Give
        ``pad_token="!"`` for the habit of SD3.5's second tokenizer.

        Raises:
            ValueError: ``vocab_size`` is below 514, or ``pad_token`` is no symbol.
        """
        base = [char + end for end in ("", END_OF_WORD) for char in CHARACTER_TO_BYTE]
        markers = [token.content for token in files.CLIP_SETTINGS.added]
        limit = vocab_size - len(base) - len(markers)
        if limit < 0:
            raise ValueError(f"vocab_size is {vocab_size}, expected at least 514")
        words = Counter(word for text in texts for word in split_words(clean(text)))
        spelled = {word_symbols(word): times for word, times in words.items()}
        # "a" + "bc" and "ab" + "c" make the same symbol: a pair can win twice
        merges = list(dict.fromkeys(learn_merges(spelled, limit)))
        entries = dict.fromkeys([*base, *map("".join, merges), *markers])
        vocab = {piece: number for number, piece in enumerate(entries)}
        settings = files.CLIP_SETTINGS.padding_with(pad_token, vocab)
        return cls(vocab, merges, settings._replace(model_max_length=model_max_length))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a hub folder: tokenizer.json, or vocab.json and merges.txt.

        Raises:
            FileNotFoundError: the folder holds neither.
            ValueError: a file is damaged, or the two do not belong together.
        """
        return cls(*files.read_bpe(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and the settings, as on the hub."""
        files.write_bpe(folder, self.vocab, list(self.ranks), self.settings)


# %% tags=["active-ipynb"]
# clip_l = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
# print(clip_l.decode(clip_l.encode("A café's red t-shirt 👗")))
# viz.show_tokens(clip_l, ["A café's red t-shirt 👗", PROMPT])

# %% [markdown]
# Each chip shows a piece as the vocabulary writes it, its id below. Decoding is lossy:
# capitals and the number of spaces do not come back, and "t-shirt" returns with spaces.
# The pipeline never decodes; there, ids go in one direction only.
#
# ## Unigram: a lattice of pieces
#
# T5 asks another question. It has a list of pieces with probabilities, and takes a word
# to be drawn piece by piece, independently. Of all ways to cut the word it wants the
# most probable one ([Kudo 2018](https://arxiv.org/abs/1804.10959), section 3.2):
#
# $$
# (p_1, \dots, p_m)^\star = \arg\max_{p_1 \cdots p_m = w} \sum_{i=1}^{m} s(p_i),
# \qquad s(p) = \log P(p).
# $$
#
# Think of the places between letters as stations, numbered from 0 to $|w|$, and of
# every piece that fits as an arc; the piece $w_{i:j}$ leads from station $i$ to station
# $j$. A cut is a path from the first station to the last. To find all arcs quickly the
# pieces are kept in a *trie*, dictionaries nested letter by letter. A letter that is no
# piece gets an arc too, with so low a score that it is taken only where nothing else
# fits. Words begin with the sign `▁`, which stands for the space before them.

# %%
SPACE = "▁"
UNKNOWN_PENALTY = 10.0  # SentencePiece's
MAX_PIECE = 16


def build_trie(scores: dict[str, float]) -> dict:
    """Nest dictionaries letter by letter; the score of a piece stands under ``""``."""
    trie: dict = {}
    for piece, score in scores.items():
        node = trie
        for letter in piece:
            node = node.setdefault(letter, {})
        node[""] = score
    return trie


def arcs(text: str, start: int, trie: dict, unknown: float) -> Iterator[tuple]:
    """Yield (end, score) of every piece that begins at ``start``, the shortest first.

    A letter that is no piece itself comes last, with the score of the unknown.
    """
    node, single = trie, False
    for end in range(start, len(text)):
        if text[end] not in node:
            break
        node = node[text[end]]
        if "" in node:
            single = single or end == start
            yield end + 1, node[""]
    if not single:
        yield start + 1, unknown


# %% [markdown]
# To try all paths is hopeless for long words: their number can double with each letter.
# *Viterbi's* idea is that the best path to station $j$ ends with some arc from a
# station $i$, and before that it was the best path to $i$:
#
# $$
# \text{best}_0 = 0, \qquad
# \text{best}_j = \max_{\text{arcs } i \to j} \big(\text{best}_i + s(w_{i:j})\big).
# $$


# %%
def best_path(text: str, trie: dict, unknown: float = -math.inf) -> list[str]:
    """Viterbi: the pieces whose scores add up to the most (Kudo 2018, section 3.2)."""
    best, origin = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
    for start in range(len(text)):
        for end, score in arcs(text, start, trie, unknown):
            if best[start] + score > best[end]:
                best[end], origin[end] = best[start] + score, start
    pieces, end = [], len(text)
    while end > 0:
        pieces.append(text[origin[end] : end])
        end = origin[end]
    return pieces[::-1]


# %% tags=["active-ipynb"]
# trie = build_trie(scores := files.read_unigram(TINY / "tokenizer_3")[0])
#
#
# def all_paths(word: str) -> list[list[str]]:
#     heads = [word[:end] for end, _ in arcs(word, 0, trie, -99.0)] if word else []
#     tails = [[h, *tail] for h in heads for tail in all_paths(word[len(h) :])]
#     return tails if word else [[]]

# %% tags=["active-ipynb"]
# for word in ("▁dress", "▁reddish", "▁background", "▁orangeboot"):
#     paths = all_paths(word)
#     best = max(paths, key=lambda path: sum(scores[piece] for piece in path))
#     print(len(paths), "paths, the best:", best, best == best_path(word, trie))

# %% tags=["active-ipynb"]
# word = "▁handbag"
# edges = [(i, *arc) for i in range(len(word)) for arc in arcs(word, i, trie, -99.0)]
# ends = [sum(map(len, best_path(word, trie)[:i])) for i in range(10)]
# viz.show_lattice(word, edges, list(pairwise(ends)))

# %% [markdown]
# The numbers at the arcs are log-probabilities; the coloured path has the largest sum:
# "and" wins over "a" with "nd" and over "an" with "d". Unlike BPE, Unigram weighs the
# whole word at once, and no early decision can spoil a later one.
#
# ## Learning pieces
#
# Where do the probabilities come from? If we knew how often each piece is used, $P(p)$
# would be its share. If we knew $P$, we could tell how often each piece is used. *EM*
# (expectation and maximisation) alternates. In the E step every path counts with its
# probability: an arc $i \to j$ is used in a share of
#
# $$
# \frac{\alpha_i \; P(w_{i:j}) \; \beta_j}{\alpha_{|w|}},
# $$
#
# where $\alpha_i$ sums the probabilities of all paths from the start to $i$ (`before`,
# as a logarithm) and $\beta_j$ those from $j$ to the end (`after`). The recursions are
# Viterbi's with a sum for the maximum. The M step turns counts into shares.


# %%
def log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def expected_counts(
    words: dict[str, int], scores: dict[str, float]
) -> dict[str, float]:
    """E step: how often each piece is used, over all paths by probability."""
    trie, counts = build_trie(scores), defaultdict[str, float](float)
    for word, times in words.items():
        places = range(len(word))
        edges = [(i, *arc) for i in places for arc in arcs(word, i, trie, -math.inf)]
        before = [0.0] + [-math.inf] * len(word)
        after = before[::-1]
        for start, end, score in edges:
            before[end] = log_add(before[end], before[start] + score)
        for start, end, score in reversed(edges):
            after[start] = log_add(after[start], score + after[end])
        for start, end, score in edges:
            share = math.exp(before[start] + score + after[end] - before[-1])
            counts[word[start:end]] += times * share
    return counts


def maximize(counts: dict[str, float], alphabet: str) -> dict[str, float]:
    """M step: counts to log-probabilities; what is used less than 0.5 times goes."""
    kept = {p: max(n, 0.5) for p, n in counts.items() if n >= 0.5 or len(p) == 1}
    total = math.log(sum(kept.values()) or 1.0)  # log 1 where nothing repeats
    scores = {piece: math.log(n) - total for piece, n in kept.items()}
    return dict.fromkeys(alphabet, min(scores.values(), default=0.0) - 1.0) | scores


# %% [markdown]
# The vocabulary itself is found by pruning. All parts of words that occur at least
# twice are candidates, up to 16 letters long. After two rounds of EM the quarter that
# would be missed least is dropped. A piece's worth is the number of its uses, times the
# score lost to its best replacement by other pieces. Then EM again, and pruning again,
# down to the size that was asked for. Single letters always stay.


# %%
def prune(
    words: dict[str, int], scores: dict[str, float], size: int
) -> dict[str, float]:
    """Keep all letters, and of the longer pieces those that would be missed most."""
    counts = expected_counts(words, scores)

    def loss(piece: str) -> float:
        rest = {p: score for p, score in scores.items() if p in piece and p != piece}
        best = best_path(piece, build_trie(rest))
        return counts[piece] * (scores[piece] - sum(scores[p] for p in best))

    letters = [piece for piece in scores if len(piece) == 1]
    longer = sorted((p for p in scores if len(p) > 1), key=lambda p: (-loss(p), p))
    return {p: scores[p] for p in (*letters, *longer[: max(0, size - len(letters))])}


def learn_pieces(words: dict[str, int], alphabet: str, size: int) -> dict[str, float]:
    """Fit a Unigram model to words and shrink it to ``size`` pieces (Kudo 2018, 3.2).

    Letters of ``alphabet`` always stay. Returns log-probabilities, the highest first.
    """
    seeds = defaultdict[str, float](float)
    for word, times in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + MAX_PIECE, len(word)) + 1):
                seeds[word[start:end]] += times
    scores = maximize({p: n for p, n in seeds.items() if n > 1}, alphabet)
    while True:
        for _ in range(2):
            scores = maximize(expected_counts(words, scores), alphabet)
        if len(scores) <= size:
            return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))
        scores = prune(words, scores, max(size, len(scores) * 3 // 4))


# %% tags=["active-ipynb"]
# counted = Counter("▁" + word for text in corpus for word in text.split())
# letters, sizes, rows = "".join(sorted(set("".join(counted)))), (30, 34, 40, 44), []
# for size in sizes:
#     small = build_trie(learn_pieces(counted, letters, size))
#     caption = ["▁" + word for word in "a purple sneaker on a pink background".split()]
#     rows.append([piece for word in caption for piece in best_path(word, small)])
# viz.show_pieces(rows, [f"{size} pieces" for size in sizes])

# %% [markdown]
# With room for hardly more than the letters, only the most useful words are pieces; as
# the vocabulary grows, the rest join them.
#
# ## T5's tokenizer
#
# Around this model T5 puts a *character map*, which replaces signs by simpler ones ("ﬁ"
# by "fi", full-width letters by plain ones) and comes as a trie packed into an array
# (`minidiff.files.sentencepiece` reads it); a cut at white space; one id, `<unk>`,
# for letters that are no piece, neighbours sharing one; and 100 *sentinels*
# `<extra_id_0>` …, which stand for hidden spans when T5 is trained (chapter 7). There
# is no token for the beginning, and capitals are kept. Again `_word_ids` is the heart:
# the best path, then look up.


# %%
def spaced_words(text: str) -> list[str]:
    """Cut at white space, mark each word's beginning; a mark in the text cuts too."""
    words = (word for word in regex.split(r"\p{White_Space}+", text) if word)
    marked = (word if word.startswith(SPACE) else SPACE + word for word in words)
    return [part for word in marked for part in regex.findall("▁[^▁]*", word)]


class T5Tokenizer(Tokenizer):
    """SentencePiece Unigram as T5 reads it (Kudo 2018; Raffel et al. 2020).

    ``scores``: every piece with its log-probability, in order of id. ``charsmap``: the
    normaliser's character map, may be empty.
    """

    def __init__(
        self, scores: dict[str, float], charsmap: bytes, settings: Settings
    ) -> None:
        self.scores, self.charsmap, self._trie = scores, charsmap, build_trie(scores)
        self._unknown = min(scores.values()) - UNKNOWN_PENALTY
        self._map = CharacterMap(charsmap) if charsmap else None
        self.word_ids = lru_cache(maxsize=10_000)(self._word_ids)
        super().__init__({p: number for number, p in enumerate(scores)}, settings)

    def sentinel_id(self, number: int) -> int:
        """Return the id of ``<extra_id_number>``, which stands for a hidden span."""
        return self.vocab[f"<extra_id_{number}>"]

    def normalize(self, text: str) -> str:
        return self._map(text) if self._map else text

    def encode_plain(self, text: str) -> list[int]:
        return [number for word in spaced_words(text) for number in self.word_ids(word)]

    def _word_ids(self, word: str) -> list[int]:
        ids: list[int] = []
        for piece in best_path(word, self._trie, self._unknown):
            number = self.vocab.get(piece, self.unk_token_id)
            if number != self.unk_token_id or ids[-1:] != [number]:
                ids.append(number)
        return ids

    def join(self, pieces: Sequence[str]) -> str:
        """Write a space for its sign, but none at the beginning."""
        first, rest = "".join(pieces[:1]), "".join(pieces[1:])
        text = first.replace(SPACE, "") + rest.replace(SPACE, " ")
        return files.tidy(text) if self.settings.clean_up else text

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        extra_ids: int = 100,
        model_max_length: int = 512,
    ) -> Self:
        """Learn a vocabulary: pad, end, unknown; pieces; sentinels, counting down.

        Every letter of the texts and of printable ASCII is a piece. The vocabulary ends
        below ``vocab_size`` where fewer pieces serve the texts.

        Raises:
            ValueError: ``vocab_size`` cannot hold these letters.
        """
        words = Counter(word for text in texts for word in spaced_words(text))
        alphabet = "".join(sorted({SPACE, *map(chr, range(33, 127)), *"".join(words)}))
        fixed = [token.content for token in files.T5_SETTINGS.added]
        settings = files.T5_SETTINGS.with_sentinels(extra_ids)
        size = vocab_size - len(settings.added)
        if size < len(alphabet):
            least = len(alphabet) + len(settings.added)
            raise ValueError(f"vocab_size is {vocab_size}, expected at least {least}")
        scores = dict.fromkeys(fixed, 0.0) | learn_pieces(words, alphabet, size)
        scores |= {t.content: 0.0 for t in settings.added[len(fixed) :]}
        return cls(scores, b"", settings._replace(model_max_length=model_max_length))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a hub folder: tokenizer.json, or spiece.model.

        Raises:
            FileNotFoundError: the folder holds neither.
            ValueError: a file is damaged, or holds another kind of model.
        """
        return cls(*files.read_unigram(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and the settings, as on the hub."""
        files.write_unigram(folder, self.scores, self.charsmap, self.settings)


# %% [markdown]
# ## One prompt, three rows
#
# SD3.5 gives the same text to all three. The rows have a fixed length, 77 for each CLIP
# and 256 for T5 (here 32), so that prompts can be stacked: what is too long is cut
# *before* the end token, what is too short is padded *behind* it.

# %% tags=["active-ipynb"]
# clip_g = CLIPTokenizer.from_pretrained(TINY / "tokenizer_2")
# t5 = T5Tokenizer.from_pretrained(TINY / "tokenizer_3")
# readers = {"CLIP-L": clip_l, "CLIP-G": clip_g, "T5": t5}
# viz.show_rows(readers, PROMPT, 12)

# %% [markdown]
# Look at the padding. CLIP-L pads with its end token; the text encoder takes the
# sentence's vector at the *first* of these (chapter 2), so the others do not enter it.
# CLIP-G pads with the id 0, which is `!`, the first byte that prints. T5 has a `<pad>`.
# Nothing hides the padding from the transformer, neither in Stability's code nor in
# diffusers: it is part of what the published weights have learned, down to the
# exclamation marks.
#
# The `!` has a side effect. To pad with it, CLIP-G's settings declare it a special
# token, and special tokens are found first: *every* `!` of a prompt becomes the id 0,
# while CLIP-L reads `!</w>`, the `!` that ends a word.
#
# ## Predict, then break it
#
# Predict for each of these prompts which of the three readers can tell it from "a red
# dress", and where T5 will meet something unknown. Then look.

# %% tags=["active-ipynb"]
# for text in ("A  RED dress", "a red dress!", "a réd dress", "a red dress 👗👗"):
#     for name, reader in readers.items():
#         ids = reader.encode(text)
#         print(f"{text:15} {name:6} {reader.decode(ids):15}", *reader.tokens(ids)[:-1])

# %% [markdown]
# All three readers notice the `!`. CLIP does not see capitals; T5 spells them, since no
# caption had any. The emoji are eight bytes to CLIP and one `<unk>` to T5, which has
# nothing for "é" either. (The published T5 knows "é", but not the emoji, and of a
# Chinese prompt one `<unk>` is left.)
#
# Now break something: replay the merges with the ranks reversed, the last learned
# first. All symbols are still in the vocabulary, and no error is raised.

# %% tags=["active-ipynb"]
# backwards = CLIPTokenizer(clip_l.vocab, list(clip_l.ranks)[::-1], clip_l.settings)
# viz.show_tokens(backwards, PROMPT)

# %% [markdown]
# "background" falls apart. "ac", learned late for the sake of "black", now comes before
# "ba", and no merge can use it with the "b" that is left. The other words survive only
# because nothing competes for their letters. Silent failure is the rule with
# tokenizers: wrong ids are valid ids, the picture is merely worse, and only comparison
# with the reference tells.
#
# ## Parity
#
# Here the reference is transformers. It loads the same three folders and must give the
# same ids and the same decoded text, on captions and on noise from Unicode's first
# three planes. On the published vocabularies the tests of this repository check this
# for 20,000 strings, and that the absence of any one quirk is noticed.

# %% tags=["active-ipynb"]
# import random
# import warnings
#
# warnings.filterwarnings("ignore", "IProgress not found")  # there is no progress here
# import transformers as hf
#
# hf.logging.set_verbosity_error()
# signs = [chr(code) for code in range(0x20, 0x30000) if not 0xD800 <= code < 0xE000]
# noise = ["".join(random.Random(i).choices(signs, k=12)) for i in range(1500)]

# %% tags=["active-ipynb"]
# texts = [PROMPT, "", "wow! cat", "<|endoftext|> </s> <extra_id_0>", *corpus, *noise]
# for (name, ours), suffix in zip(readers.items(), ("", "_2", "_3"), strict=True):
#     theirs = hf.AutoTokenizer.from_pretrained(TINY / f"tokenizer{suffix}")
#     ids = theirs(texts)["input_ids"]
#     assert [ours.encode(text) for text in texts] == ids
#     assert [ours.decode(row) for row in ids] == theirs.batch_decode(ids, True)
#     print(f"{name}: the same ids and decoded texts for {len(texts)} strings")

# %% [markdown]
# ## What production code does differently
#
# - **It is compiled.** transformers calls a Rust library that encodes many texts in
#   parallel, with the heap and the lattice of this chapter. It also remembers where in
#   the text each piece began.
# - **It carries its own Unicode.** That library composes accents by the tables of
#   Unicode 9 and knows the letters of version 16; Python 3.11 knows those of 14. For
#   equal ids on every sign, `minidiff.files.tokenizer_files` lists the differences.
# - **It has two T5s.** Google's SentencePiece and transformers disagree on rare input.
#   transformers also cuts at the control sign U+0085, loses an accent on the ligature
#   "ﬁ", and reads the full-width `＜pad＞` as its own pad token. The pipeline of SD3.5
#   uses transformers, so we follow it in all three.
# - **It learns at scale.** SentencePiece finds candidates with a suffix array and
#   discounts rare pieces in the M step (a digamma function, from a Bayesian view). The
#   captions in training have only 35 different words, and each became a piece.
# - **It reads prompts in its own ways.** Some programs parse weights such as
#   `(word:1.2)`, or cut long prompts into several rows. Diffusers does neither: the
#   parentheses are text, and what exceeds 77 ids is dropped by CLIP, though T5 may
#   still see it.

# %% [markdown]
# ## Exercises
#
# **1.1 Predict.** How many ids does CLIP-L of this chapter give to "red 👗 dress", and
# how many a byte-level BPE without any merges? Count the special tokens too.

# %% tags=["active-ipynb", "hide-cell"]
# bare = CLIPTokenizer(clip_l.vocab, [], clip_l.settings)
# print([len(reader.encode("red 👗 dress")) for reader in (clip_l, bare)])

# %% [markdown]
# **1.2 Code.** Count the paths through the lattice of a word without listing them.
# `arcs(word, start, trie, -99.0)` gives (end, score) for the arcs that leave a place,
# with -99 for a letter that is no piece; Viterbi's recursion is a good pattern. (The
# check ends with 220 letters: whoever walks each path waits for ever.)

# %% tags=["active-ipynb", "exercise"]
# def count_paths(word: str) -> int:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_1_2() -> None:
#     for word in ("▁a", "▁dress", "▁reddish", "▁background"):
#         found, expected = count_paths(word), len(all_paths(word))
#         assert found == expected, f"{word} has {expected} paths, you count {found}"
#     assert count_paths("▁background" * 20) > 10**17, "too few in a long word"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def count_paths(word: str) -> int:
#     paths = [1] + [0] * len(word)
#     for start in range(len(word)):
#         for end, _ in arcs(word, start, trie, -99.0):
#             paths[end] += paths[start]
#     return paths[-1]
#
#
# exercise_1_2()

# %% [markdown]
# **1.3 Code.** A greedy reader takes the longest piece that fits, again and again.
# Write it, and with it `trap`: a word and the scores of some pieces, on which the
# greedy reader's sum of scores is lower than Viterbi's.

# %% tags=["active-ipynb", "exercise"]
# def greedy(word: str, trie: dict) -> list[str]:
#     raise NotImplementedError
#
#
# def trap() -> tuple[str, dict[str, float]]:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_1_3() -> None:
#     found = greedy("▁redboots", trie)
#     assert found == ["▁red", "boot", "s"], f"{found}: the longest piece comes first"
#     word, scores = trap()
#     ours, best = (f(word, build_trie(scores)) for f in (greedy, best_path))
#     assert "".join(ours) == word, f"{ours} is not {word}"
#     sums = [sum(scores.get(p, -99.0) for p in pieces) for pieces in (ours, best)]
#     assert sums[0] < sums[1], "not worse"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def greedy(word: str, trie: dict) -> list[str]:
#     pieces = []
#     while word:
#         end = max(end for end, _ in arcs(word, 0, trie, -99.0))
#         pieces, word = [*pieces, word[:end]], word[end:]
#     return pieces
#
#
# def trap() -> tuple[str, dict[str, float]]:
#     return "abc", {"a": -1.0, "b": -9.0, "c": -9.0, "ab": -3.0, "bc": -1.0}
#
#
# exercise_1_3()

# %% [markdown]
# **1.4 Explore.** Put `<|endoftext|>` into the middle of a prompt and look at CLIP-L's
# ids; what will the text encoder, which reads its vector at the first end token, make
# of the rest? Then train a BPE on the captions with `END_OF_WORD = ""` and find two
# prompts that now have the same ids (put the mark back afterwards). Last, let
# `learn_pieces` work on a text of your own language, with fifty pieces more than it has
# different letters: which of them have a meaning?

# %% [markdown]
# ## Summary
#
# You **trained** a byte-level BPE and watched words come together merge by merge. You
# **encoded** with it, first by looking at all pairs, then with a heap and a linked
# list. You **found** the most probable path through the lattice of a word, and learned
# the pieces of such a lattice by EM and pruning. You **reproduced** the ids of three
# tokenizers with their padding, and **explained** the quirks: a `!` that is special,
# capitals that only T5 sees, padding that nothing hides. This is what our prompt hands
# on to chapter 2. (`journey.check` compares a tensor with the one on record: all
# chapters speak of the same.)

# %% tags=["active-ipynb"]
# for name, reader in zip(("ids_l", "ids_g", "ids_t5"), readers.values()):
#     ids = reader([PROMPT])
#     print(journey.check(name, ids), ids[0, :12].tolist(), "…")

# %% [markdown]
# ## Further reading
#
# - Sennrich, Haddow and Birch 2016, [Neural Machine Translation of Rare Words with
#   Subword Units](https://arxiv.org/abs/1508.07909): BPE.
# - Radford et al. 2019, [Language Models are Unsupervised Multitask
#   Learners](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf):
#   BPE on bytes.
# - Kudo 2018, [Subword Regularization](https://arxiv.org/abs/1804.10959): the Unigram
#   model, and why drawing random paths helps training.
# - Kudo and Richardson 2018, [SentencePiece](https://arxiv.org/abs/1808.06226).
# - Radford et al. 2021, [Learning Transferable Visual Models From Natural Language
#   Supervision](https://arxiv.org/abs/2103.00020), section 2.4: CLIP's text input.
# - Raffel et al. 2020, [Exploring the Limits of Transfer Learning with a Unified
#   Text-to-Text Transformer](https://arxiv.org/abs/1910.10683): T5.

# %% [markdown]
r"""
# 1 · Tokenizers: from characters to numbers

**Promise.** A prompt becomes the three rows of numbers that Stable Diffusion 3.5 reads.
"""

# %%
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import regex
import torch
from torch import Tensor

from minidiff.support.sentencepiece import CharacterMap, Piece, read_model
from minidiff.support.tokenizer_files import (
    TIDY,
    AddedToken,
    Settings,
    first_file,
    read_json,
    read_settings,
    read_unigram,
    write_json,
    write_settings,
    write_unigram,
)
from minidiff.support.unicode import LETTER, NUMBER, WHITE_SPACE, lowercase, nfc

# %% [markdown]
# ## Bytes as characters


# %%
def byte_characters() -> dict[int, str]:
    """Give every byte a printable character, as GPT-2 does (Radford et al. 2019).

    A byte that prints keeps its own sign; the other 68 take U+0100 and the next ones.
    The order is that of the ids in CLIP's vocabulary.
    """
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    codes = dict(zip(prints + others, prints + [*range(256, 324)], strict=True))
    return {byte: chr(code) for byte, code in codes.items()}


BYTE_TO_CHARACTER = byte_characters()
CHARACTER_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHARACTER.items()}

# %% [markdown]
# ## Words

# %%
END_OF_WORD = "</w>"
WORD = regex.compile(
    r"(?V1)<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    rf"|{LETTER}+|{NUMBER}|[^\s{LETTER}{NUMBER}]+"
)


def clean(text: str) -> str:
    """Compose accents (NFC), make each run of white space one space, lower case."""
    return lowercase(regex.sub(r"\s+", " ", nfc(text)))


def split_words(text: str) -> list[str]:
    """Split clean text into words, single digits and runs of other signs."""
    words = []
    for word in WORD.findall(text):
        marker = word in ("<|startoftext|>", "<|endoftext|>")
        words += ["<|", word[2:-2], "|>"] if marker else [word]
    return words


def word_symbols(word: str) -> tuple[str, ...]:
    """Spell a word in byte characters; the last one carries the end-of-word mark."""
    spelling = [BYTE_TO_CHARACTER[byte] for byte in word.encode("utf-8")]
    return (*spelling[:-1], spelling[-1] + END_OF_WORD)


# %% [markdown]
# ## Learning merges

# %%
Pair = tuple[str, str]


def count_pairs(words: dict[tuple[str, ...], int]) -> Counter[Pair]:
    """Count neighbouring symbols over words that are given with their frequencies."""
    counts: Counter[Pair] = Counter()
    for symbols, times in words.items():
        for pair in zip(symbols, symbols[1:], strict=False):
            counts[pair] += times
    return counts


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
    """Merge the most frequent pair, again and again (Sennrich et al. 2016, section 3).

    Ties go to the pair that comes first in the alphabet; a pair seen once is not worth
    an entry of the vocabulary.
    """
    merges: list[Pair] = []
    while len(merges) < limit:
        counts = count_pairs(words)
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        words = {join_pair(symbols, best): n for symbols, n in words.items()}
        merges.append(best)
    return merges


# %%
def learn_merges(words: dict[tuple[str, ...], int], limit: int) -> list[Pair]:
    """Learn the same merges; each one recounts only the words that hold its pair."""
    spellings, times = list(words), list(words.values())
    counts, homes = count_pairs(words), defaultdict(set)
    for index, symbols in enumerate(spellings):
        for pair in zip(symbols, symbols[1:], strict=False):
            homes[pair].add(index)
    merges: list[Pair] = []
    while len(merges) < limit and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        for index in homes[best].copy():
            old, new = spellings[index], join_pair(spellings[index], best)
            for symbols, sign in (old, -1), (new, 1):
                for pair in zip(symbols, symbols[1:], strict=False):
                    counts[pair] += sign * times[index]
                    homes[pair].add(index)
            spellings[index] = new
        del counts[best], homes[best]
        merges.append(best)
    return merges


# %% [markdown]
# ## Applying merges


# %%
def merge_naively(symbols: Sequence[str], ranks: dict[Pair, int]) -> Iterator[tuple]:
    """Yield the symbols after each merge: always the pair that was learned first."""
    symbols = tuple(symbols)
    while True:
        yield symbols
        pairs = [p for p in zip(symbols, symbols[1:], strict=False) if p in ranks]
        if not pairs:
            return
        symbols = join_pair(symbols, min(pairs, key=ranks.__getitem__))


# %%
def merge(symbols: Sequence[str], ranks: dict[Pair, int]) -> list[str]:
    """Return the symbols after the last merge, in O(n log n).

    A heap holds (rank, place); a linked list says which symbol follows which. A merged
    symbol leaves an empty string behind, which no rank knows, so old heap entries for
    it are passed over.
    """
    symbols = ["", *symbols, ""]
    before, after = list(range(-1, len(symbols))), list(range(1, len(symbols) + 1))
    heap = [
        (ranks[pair], place)
        for place, pair in enumerate(zip(symbols, symbols[1:], strict=False))
        if pair in ranks
    ]
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
            rank = ranks.get((symbols[start], symbols[after[start]]))
            if rank is not None:
                heapq.heappush(heap, (rank, start))
    return [symbol for symbol in symbols if symbol]


# %% [markdown]
# ## Special tokens, and what both tokenizers share


# %%
def split_added(text: str, tokens: dict[str, AddedToken]) -> list[str | AddedToken]:
    """Cut a text at the added tokens in it: leftmost first, the longest of these."""
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = "|".join(map(regex.escape, longest_first)) or r"(?!)"
    parts: list[str | AddedToken] = []
    done = 0
    for match in regex.finditer(pattern, text):
        token, (start, stop) = tokens[match.group()], match.span()
        if token.lstrip:
            start = max(done, len(text[:start].rstrip(WHITE_SPACE)))
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip(WHITE_SPACE))
        parts += [text[done:start], token]
        done = stop
    return [part for part in (*parts, text[done:]) if part]


# %%
class Tokenizer:
    """Text to ids and back, with special tokens, padding and truncation.

    A subclass brings its ``DEFAULTS``, ``normalize`` (raw text to normal text),
    ``encode_plain`` (normal text to ids) and ``join`` (pieces to text).

    Attributes: ``vocab`` (piece → id), ``vocab_size``, ``model_max_length``, and
    ``pad_token_id``, ``eos_token_id``, ``unk_token_id``, ``bos_token_id`` (None in T5).
    """

    DEFAULTS: Settings

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
        self._raw = {t.content: t for t in settings.added if not t.normalized}
        self._normal = {
            self.normalize(t.content): t for t in settings.added if t.normalized
        }

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
        try:
            return [self.pieces[int(number)] for number in ids]
        except KeyError as error:
            raise ValueError(
                f"id {error} is not among the {self.vocab_size} of the vocabulary"
            ) from None

    def _frame(self, ids: list[int]) -> list[int]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*start, *ids, self.eos_token_id]

    def _encode(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"expected a string, found {type(text).__name__}: {text!r}")
        text.encode("utf-8")  # half a surrogate pair raises a ValueError here
        ids: list[int] = []
        for part in split_added(text, self._raw):
            if isinstance(part, AddedToken):
                ids.append(self.vocab[part.content])
                continue
            for piece in split_added(self.normalize(part), self._normal):
                added = isinstance(piece, AddedToken)
                ids += (
                    [self.vocab[piece.content]] if added else self.encode_plain(piece)
                )
        return ids


# %% [markdown]
# ## CLIP's tokenizer


# %%
class CLIPTokenizer(Tokenizer):
    """Byte-level BPE in lower case, as both CLIPs read it (Radford et al. 2021).

    ``CLIPTokenizer(vocab, merges, settings)``; usually made by ``from_pretrained`` or
    ``train``.
    """

    DEFAULTS = Settings(
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
        (AddedToken("<|startoftext|>", normalized=True), AddedToken("<|endoftext|>")),
        77,
    )

    def __init__(
        self, vocab: dict[str, int], merges: Sequence[Pair], settings: Settings
    ) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        for pair in self.ranks:
            if not {*pair, "".join(pair)} <= vocab.keys():
                raise ValueError(
                    f"merge {pair} has a symbol that is not in the vocabulary"
                )
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
        data = b""
        for piece in pieces:
            known = CHARACTER_TO_BYTE.keys() >= set(piece)
            data += (
                bytes(map(CHARACTER_TO_BYTE.get, piece)) if known else piece.encode()
            )
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
        base = [*CHARACTER_TO_BYTE]
        base += [char + END_OF_WORD for char in base]
        markers = [token.content for token in cls.DEFAULTS.added]
        limit = vocab_size - len(base) - len(markers)
        if limit < 0:
            raise ValueError(
                f"vocab_size is {vocab_size}, below the 514 of byte symbols"
            )
        words = Counter(word for text in texts for word in split_words(clean(text)))
        merges = learn_merges({word_symbols(w): n for w, n in words.items()}, limit)
        entries = dict.fromkeys([*base, *map("".join, merges), *markers])
        vocab = {piece: number for number, piece in enumerate(entries)}
        if pad_token not in vocab:
            raise ValueError(f"pad_token {pad_token!r} is not in the vocabulary")
        names = cls.DEFAULTS.names | {"pad_token": pad_token}
        added = {t.content: t for t in (AddedToken(pad_token), *cls.DEFAULTS.added)}
        added = dict(sorted(added.items(), key=lambda item: vocab[item[0]]))
        return cls(
            vocab, merges, Settings(names, tuple(added.values()), model_max_length)
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a hub folder: tokenizer.json, or vocab.json and merges.txt.

        Raises:
            FileNotFoundError: the folder holds neither.
            ValueError: a file is damaged, or the two do not belong together.
        """
        path = first_file(folder, "tokenizer.json", "vocab.json")
        content = read_json(path)
        if path.name == "tokenizer.json":
            model = content.get("model", {})
            vocab, lines = model.get("vocab"), model.get("merges", [])
        else:
            text = first_file(folder, "merges.txt").read_text(encoding="utf-8")
            vocab, lines = content, text.removesuffix("\n").split("\n")
            lines = [line for line in lines if not line.startswith("#version")]
        if not isinstance(vocab, dict):
            raise ValueError(f"{path}: expected a BPE vocabulary of pieces and ids")
        merges = [tuple(x.split(" ") if isinstance(x, str) else x) for x in lines]
        for number, pair in enumerate(merges):
            if len(pair) != 2:
                raise ValueError(
                    f"{folder}: merge {number} should be two symbols, is {pair}"
                )
        return cls(vocab, merges, read_settings(folder, cls.DEFAULTS))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and the settings, as on the hub."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", self.vocab)
        lines = ["#version: 0.2", *map(" ".join, self.ranks)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_settings(folder, "CLIPTokenizer", self.settings, self.vocab)


# %% [markdown]
# ## Unigram: a lattice of pieces

# %%
SPACE = "▁"
UNKNOWN_PENALTY = 10.0
MAX_PIECE = 16
Trie = dict[str, "Trie | float"]


def build_trie(scores: dict[str, float]) -> Trie:
    """Nest dictionaries letter by letter; the score of a piece stands under ``""``."""
    trie: Trie = {}
    for piece, score in scores.items():
        node = trie
        for letter in piece:
            node = node.setdefault(letter, {})
        node[""] = score
    return trie


def edges(
    text: str, start: int, trie: Trie, unknown: float
) -> Iterator[tuple[int, float]]:
    """Yield (end, score) of every piece that begins at ``start``, the shortest first.

    A letter that is no piece itself comes last, with the score of the unknown.
    """
    node, single = trie, False
    for end in range(start, len(text)):
        node = node.get(text[end])
        if node is None:
            break
        if "" in node:
            single = single or end == start
            yield end + 1, node[""]
    if not single:
        yield start + 1, unknown


def best_path(text: str, trie: Trie, unknown: float) -> list[str]:
    """Viterbi: the pieces whose scores add up to the most (Kudo 2018, section 3.2)."""
    best, origin = [0.0] + [-math.inf] * len(text), [0] * (len(text) + 1)
    for start in range(len(text)):
        for end, score in edges(text, start, trie, unknown):
            if best[start] + score > best[end]:
                best[end], origin[end] = best[start] + score, start
    pieces, end = [], len(text)
    while end > 0:
        pieces.append(text[origin[end] : end])
        end = origin[end]
    return pieces[::-1]


# %% [markdown]
# ## Learning pieces


# %%
def log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def expected_counts(words: dict[str, int], scores: dict[str, float]) -> Counter[str]:
    """E step: how often each piece is used, over all segmentations by probability.

    ``before[i]`` and ``after[i]`` are the logs of the summed probability of all paths
    from the word's start to place i, and from there to its end.
    """
    trie, counts = build_trie(scores), Counter()
    for word, times in words.items():
        arrows = [
            (start, end, score)
            for start in range(len(word))
            for end, score in edges(word, start, trie, -math.inf)
        ]
        before = [0.0] + [-math.inf] * len(word)
        after = before[::-1]
        for start, end, score in arrows:
            before[end] = log_add(before[end], before[start] + score)
        for start, end, score in reversed(arrows):
            after[start] = log_add(after[start], score + after[end])
        for start, end, score in arrows:
            share = math.exp(before[start] + score + after[end] - before[-1])
            counts[word[start:end]] += times * share
    return counts


def maximize(counts: Counter[str], alphabet: str) -> dict[str, float]:
    """M step: counts to log-probabilities; what is used less than half a time goes."""
    kept = {p: max(n, 0.5) for p, n in counts.items() if n >= 0.5 or p in alphabet}
    total = math.log(sum(kept.values()))
    scores = {piece: math.log(n) - total for piece, n in kept.items()}
    floor = min(scores.values()) - 1.0
    return dict.fromkeys(alphabet, floor) | scores


def prune(
    words: dict[str, int], scores: dict[str, float], size: int
) -> dict[str, float]:
    """Keep all letters, and of the longer pieces those that would be missed the most.

    The loss of a piece is its expected count times what its best replacement costs.
    """
    counts = expected_counts(words, scores)

    def loss(piece: str) -> float:
        rest = {p: score for p, score in scores.items() if p in piece and p != piece}
        best = best_path(piece, build_trie(rest), -math.inf)
        return counts[piece] * (scores[piece] - sum(map(scores.get, best)))

    letters = [piece for piece in scores if len(piece) == 1]
    longer = sorted((p for p in scores if len(p) > 1), key=lambda p: (-loss(p), p))
    return {p: scores[p] for p in (*letters, *longer[: max(0, size - len(letters))])}


# %%
def learn_pieces(words: dict[str, int], alphabet: str, size: int) -> dict[str, float]:
    """Fit a Unigram model to words and shrink it to ``size`` pieces (Kudo 2018, 3.2).

    Letters of ``alphabet`` always stay. Returns log-probabilities, the highest first.
    """
    seeds: Counter[str] = Counter()
    for word, times in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + MAX_PIECE, len(word)) + 1):
                seeds[word[start:end]] += times
    scores = maximize(Counter({p: n for p, n in seeds.items() if n > 1}), alphabet)
    while True:
        for _ in range(2):
            scores = maximize(expected_counts(words, scores), alphabet)
        if len(scores) <= size:
            return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))
        scores = prune(words, scores, max(size, len(scores) * 3 // 4))


# %% [markdown]
# ## T5's tokenizer


# %%
def spaced_words(text: str) -> list[str]:
    """Cut at white space, mark each word's beginning; a mark in the text cuts too."""
    words = (word for word in regex.split(r"\p{White_Space}+", text) if word)
    marked = (word if word.startswith(SPACE) else SPACE + word for word in words)
    return [part for word in marked for part in regex.findall("▁[^▁]*", word)]


class T5Tokenizer(Tokenizer):
    """SentencePiece Unigram as T5 reads it (Kudo 2018; Raffel et al. 2020).

    ``pieces``: every piece with its log-probability, in order of id. ``charsmap``: the
    normaliser's character map, may be empty.
    """

    DEFAULTS = Settings(
        {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        (AddedToken("<pad>"), AddedToken("</s>"), AddedToken("<unk>")),
        512,
        extra_ids=100,
    )

    def __init__(
        self, pieces: Sequence[Piece], charsmap: bytes, settings: Settings
    ) -> None:
        self.scores, self.charsmap = dict(pieces), charsmap
        if len(self.scores) < len(pieces):
            raise ValueError("the vocabulary lists a piece twice")
        self._trie = build_trie(self.scores)
        self._unknown = min(self.scores.values()) - UNKNOWN_PENALTY
        self._map = CharacterMap(charsmap) if charsmap else None
        self.word_ids = lru_cache(maxsize=10_000)(self._word_ids)
        super().__init__({p: n for n, p in enumerate(self.scores)}, settings)

    def sentinel_id(self, number: int) -> int:
        """Return the id of ``<extra_id_number>``, which stands for a hidden span."""
        return self.vocab[f"<extra_id_{number}>"]

    def normalize(self, text: str) -> str:
        return self._map(text) if self._map else text

    def encode_plain(self, text: str) -> list[int]:
        return [number for word in spaced_words(text) for number in self.word_ids(word)]

    def _word_ids(self, word: str) -> list[int]:
        """Return the ids of a word; neighbours that are unknown become one."""
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
        for spaced, tidy in TIDY if self.settings.clean_up else ():
            text = text.replace(spaced, tidy)
        return text

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
        fixed = [token.content for token in cls.DEFAULTS.added]
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
        size = vocab_size - len(fixed) - len(sentinels)
        if size < len(alphabet):
            raise ValueError(
                f"vocab_size is {vocab_size}, below {len(alphabet)} letters and "
                f"{len(fixed) + len(sentinels)} special tokens"
            )
        learned = learn_pieces(words, alphabet, size)
        scores = dict.fromkeys(fixed, 0.0) | learned | dict.fromkeys(sentinels, 0.0)
        marks = tuple(AddedToken(s, lstrip=True, rstrip=True) for s in sentinels)
        settings = Settings(
            cls.DEFAULTS.names, cls.DEFAULTS.added + marks, model_max_length, extra_ids
        )
        return cls([Piece(*item) for item in scores.items()], b"", settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a hub folder: tokenizer.json, or spiece.model.

        Raises:
            FileNotFoundError: the folder holds neither.
            ValueError: a file is damaged, or holds another kind of model.
        """
        settings = read_settings(folder, cls.DEFAULTS)
        path = first_file(folder, "tokenizer.json", "spiece.model")
        if path.name == "spiece.model":
            pieces, charsmap = read_model(path)
            extra = reversed(range(settings.extra_ids))
            pieces += [Piece(f"<extra_id_{i}>", 0.0) for i in extra]
        else:
            pieces, charsmap = read_unigram(path)
        return cls(pieces, charsmap, settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and the settings, as on the hub."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pieces = [Piece(*item) for item in self.scores.items()]
        write_unigram(folder / "tokenizer.json", pieces, self.charsmap, self.settings)
        write_settings(folder, "T5Tokenizer", self.settings, self.vocab)

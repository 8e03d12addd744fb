"""The files of a tokenizer, as the hub lays them out, and Unicode as they mean it.

``tokenizer_config.json`` names the special tokens and the length; which texts are added
tokens, and how they are sought, stands there (transformers 4), or in
``special_tokens_map.json`` (older), or in ``tokenizer.json`` (transformers 5).
``words.txt`` beside the tokenizers lists what a small model has seen.
"""

import base64
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import regex

from minidiff.files.disk import (
    LONGEST_TABLE,
    excerpt,
    read_json,
    read_text,
    write_json,
    write_text,
)
from minidiff.files.layout import INDEX, part_folder
from minidiff.files.sentencepiece import CharacterMap, Piece, read_model
from minidiff.files.weights import shipped
from minidiff.interface.checks import check_range

WHITE_SPACE = "".join(
    regex.findall(r"\p{White_Space}", "".join(map(chr, range(12289))))
)


def _class(ranges: str) -> str:
    """Turn ``"558 58b-58c"`` into the inside of a regular expression's class."""
    ends = [(r.split("-")[0], r.split("-")[-1]) for r in ranges.split()]
    return "".join(f"\\U{int(a, 16):08x}-\\U{int(b, 16):08x}" for a, b in ends)


# Letters and numbers that entered Unicode after version 16.
_NEW_LETTERS = _class(
    "558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 "
    "ab6c-ab6d 107bb-107bf 10940-10959 10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb "
    "11df1 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff 18cd6-18cda 18d09-18d20 "
    "18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 1df1f-1df24 "
    "1df2b-1df81 1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 "
    "1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e 2cea2-2cead 323b0-33479 "
    "3d000-3fc3f"
)
_NEW_NUMBERS = _class("11de0-11de9 1246f 12475-1247f 12550-12686 16ff4-16ff6")
# For use inside the brackets of a regular expression with the flag (?V1).
LETTER = rf"[\p{{L}}--[{_NEW_LETTERS}]]"
NUMBER = rf"[\p{{N}}--[{_NEW_NUMBERS}]]"

# Marks that entered after Unicode 9, and blocks whose letters compose since then.
YOUNG = regex.compile(
    "(["
    + _class(
        "5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c "
        "10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efd-10eff "
        "10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 119e0 11a34 11a47 11a99 "
        "11d42 11d44-11d45 11d97 11f41-11f42 16ff0-16ff1 1d127-1d128 1d250-1d252 "
        "1d25b-1d25c 1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef "
        "1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5 "
        "105c0-105ff 11380-113ff 11900-1195f 16100-1613f 16d40-16d7f"
    )
    + "])"
)

# Capitals that Python 3.11 does not know.
NEW_CAPITALS = {
    0xA7CB: 0x264,
    0xA7DC: 0x19B,
    **{c: c + 1 for c in (0x1C89, 0xA7CC, 0xA7CE, 0xA7D2, 0xA7D4, 0xA7DA)},
    **{c: c + 0x20 for c in range(0x10D50, 0x10D66)},
    **{c: c + 0x1B for c in range(0x16EA0, 0x16EB9)},
}


def nfc(text: str) -> str:
    """Normal form C of Unicode 9: younger characters neither compose nor move."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in YOUNG.split(text))


def lowercase(text: str) -> str:
    """Lower case character by character: Σ becomes σ, at the end of a word too."""
    return text.replace("Σ", "σ").lower().translate(NEW_CAPITALS)


# Steps of tokenizer.json's normalizer that our two tokenizers take
BPE_STEPS = ("NFC", "Replace", "Lowercase")
UNIGRAM_STEPS = ("Precompiled", "Strip", "Replace")
MOST_ADDED = 10_000  # tokens


class AddedToken(NamedTuple):
    """A token that is found in a text before anything else looks at it.

    ``lstrip``, ``rstrip``: white space on that side belongs to the token.
    ``normalized``: it is sought in the normalised text, not in the raw one.
    ``special``: decoding leaves it out.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


class Settings(NamedTuple):
    """What a tokenizer needs beside its vocabulary.

    ``names``: "pad_token" → its text, and so on. ``added``: in order of their ids.
    ``extra_ids``: how many sentinels T5 appends to the vocabulary of a spiece.model.
    ``clean_up``: decoding removes the space before a full stop and the like.
    """

    names: dict[str, str]
    added: tuple[AddedToken, ...]
    model_max_length: int
    extra_ids: int = 0
    clean_up: bool = False

    def padding_with(self, pad_token: str, vocab: dict[str, int]) -> Self:
        """Pad with this token of the vocabulary, which becomes a special one."""
        if pad_token not in vocab:
            raise ValueError(
                f"pad_token {excerpt(repr(pad_token))} is not in the vocabulary"
            )
        added = {token.content: token for token in (AddedToken(pad_token), *self.added)}
        ordered = sorted(added.values(), key=lambda token: vocab[token.content])
        names = self.names | {"pad_token": pad_token}
        return self._replace(names=names, added=tuple(ordered))

    def with_sentinels(self, count: int) -> Self:
        """Add the sentinels ``<extra_id_{count - 1}>`` … ``<extra_id_0>``."""
        texts = (f"<extra_id_{number}>" for number in reversed(range(count)))
        sentinels = tuple(AddedToken(text, lstrip=True, rstrip=True) for text in texts)
        return self._replace(added=self.added + sentinels, extra_ids=count)


CLIP_SETTINGS = Settings(
    {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    },
    (AddedToken("<|startoftext|>", normalized=True), AddedToken("<|endoftext|>")),
    model_max_length=77,
)
T5_SETTINGS = Settings(
    {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    (AddedToken("<pad>"), AddedToken("</s>"), AddedToken("<unk>")),
    model_max_length=512,
    extra_ids=100,
)


def split_added(
    text: str, added: Sequence[AddedToken], normalize: Callable[[str], str]
) -> Iterator[str | AddedToken]:
    """Cut a text at the added tokens in it, and normalise what lies between.

    First those that are sought in the raw text, then, in what is left of it after
    ``normalize``, those that are marked ``normalized``.
    """
    raw = {token.content: token for token in added if not token.normalized}
    normal = {normalize(token.content): token for token in added if token.normalized}
    for part in _split(text, raw):
        if isinstance(part, AddedToken):
            yield part
        else:
            yield from _split(normalize(part), normal)


def _split(text: str, tokens: dict[str, AddedToken]) -> list[str | AddedToken]:
    """Cut at the leftmost token, of several that begin there the longest; go on."""
    parts: list[str | AddedToken] = []
    done = 0
    for match in _pattern(tuple(tokens)).finditer(text):
        token, (start, stop) = tokens[match.group()], match.span()
        if token.lstrip:
            start = max(done, len(text[:start].rstrip(WHITE_SPACE)))
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip(WHITE_SPACE))
        parts += [text[done:start], token]
        done = stop
    return [part for part in (*parts, text[done:]) if part]


@lru_cache(maxsize=64)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def tidy(text: str) -> str:
    """Take back the space before a full stop and the like, as transformers does where
    ``clean_up_tokenization_spaces`` is set."""
    for spaced in " .| ?| !| ,| ' | n't| 'm| 's| 've| 're".split("|"):
        text = text.replace(spaced, spaced.replace(" ", ""))
    return text


def first_file(folder: str | Path, *names: str) -> Path:
    """Return the first of these files that the folder holds."""
    folder = Path(folder)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {' or '.join(names)}")


def read_tokenizer_settings(folder: str | Path, defaults: Settings) -> Settings:
    """Read the settings of a tokenizer's folder; a missing file leaves the defaults.

    Raises:
        ValueError: a file is damaged, or asks for what is not supported.
    """
    files = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    paths = [Path(folder) / file for file in files]
    config, special_map, whole = (
        read_json(path, LONGEST_TABLE) if path.is_file() else {} for path in paths
    )
    try:
        return _settings(config, special_map, whole, defaults)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        found = excerpt(error, 300)
        raise ValueError(f"{folder}, the tokenizer's settings: {found}") from None


def _settings(
    config: dict[str, Any],
    special_map: dict[str, Any],
    whole: dict[str, Any],
    defaults: Settings,
) -> Settings:
    """The settings in tokenizer_config.json, special_tokens_map.json and the whole."""
    if "added_tokens_decoder" in config:
        listed = sorted(config["added_tokens_decoder"].items(), key=lambda i: int(i[0]))
        known, special_map = [_added(entry) for _, entry in listed], {}
    else:
        known = [_added(entry) for entry in _entries(whole, "added_tokens")]
    merged = config | special_map
    named = {
        name: merged[name] if merged.get(name) else text
        for name, text in defaults.names.items()
    }
    sentinels = config.get("extra_ids", defaults.extra_ids)
    check_range("extra_ids", sentinels, 0, MOST_ADDED)
    extra = (
        _entries(merged, "additional_special_tokens")
        or _entries(merged, "extra_special_tokens")
        or [f"<extra_id_{number}>" for number in range(sentinels)]
    )
    added = {token.content: token for token in known}
    for entry in (*named.values(), *extra):
        token = _added(entry)
        added.setdefault(token.content, token)
    if len(added) > MOST_ADDED:
        raise ValueError(f"{len(added)} added tokens; expected at most {MOST_ADDED}")
    return Settings(
        {name: _added(entry).content for name, entry in named.items()},
        tuple(added.values()),
        _length(config, defaults),
        sentinels,
        bool(config.get("clean_up_tokenization_spaces", defaults.clean_up)),
    )


def _entries(content: dict[str, Any], name: str) -> list[Any]:
    """The added tokens that ``content`` lists under ``name``, or names one by one."""
    listed = content.get(name) or []
    listed = list(listed.values()) if isinstance(listed, dict) else listed
    if not isinstance(listed, list):
        raise ValueError(f"{name} is {excerpt(repr(listed))}; expected a list")
    return listed


def _length(config: dict[str, Any], defaults: Settings) -> int:
    """How many ids a prompt has; some folders state 1e30 for "not known"."""
    length = config.get("model_max_length", defaults.model_max_length)
    if not isinstance(length, int | float) or not length >= 2:
        found = f"model_max_length is {excerpt(repr(length))}"
        raise ValueError(f"{found}; expected a number, at least 2")
    return int(length) if length < 1_000_000 else defaults.model_max_length


def _added(entry: str | dict[str, Any]) -> AddedToken:
    whole = {"content": entry} if isinstance(entry, str) else entry
    content = whole.get("content") if isinstance(whole, dict) else None
    if not isinstance(content, str) or not content:
        found = excerpt(repr(entry))
        raise ValueError(f"expected an added token with a content, found {found}")
    if whole.get("single_word"):
        what = f"added token {excerpt(repr(content))}"
        raise ValueError(f"{what}: single_word is unsupported")
    flags = {name: bool(whole.get(name)) for name in AddedToken._fields[1:4]}
    return AddedToken(content, **flags, special=bool(whole.get("special", True)))


def write_settings(
    folder: str | Path, class_name: str, settings: Settings, vocab: dict[str, int]
) -> None:
    """Write tokenizer_config.json and special_tokens_map.json."""
    entries = {str(vocab[token.content]): entry(token) for token in settings.added}
    named = set(settings.names.values())
    extra = [token.content for token in settings.added if token.content not in named]
    more = {"extra_ids": settings.extra_ids, "additional_special_tokens": extra}
    config = {
        "added_tokens_decoder": entries,
        **settings.names,
        **(more if class_name.startswith("T5") else {}),
        "clean_up_tokenization_spaces": settings.clean_up,
        "model_max_length": settings.model_max_length,
        "tokenizer_class": class_name,
    }
    write_json(Path(folder) / "tokenizer_config.json", config)
    special = {
        name: {k: v for k, v in entries[str(vocab[text])].items() if k != "special"}
        for name, text in settings.names.items()
    }
    write_json(Path(folder) / "special_tokens_map.json", special)


def entry(token: AddedToken) -> dict[str, Any]:
    """Return the JSON entry of an added token."""
    return {**token._asdict(), "single_word": False}


def read_bpe(
    folder: str | Path,
) -> tuple[dict[str, int], list[tuple[str, str]], Settings]:
    """Return the vocabulary, the merges and the settings of a BPE tokenizer's folder.

    It holds tokenizer.json, or vocab.json and merges.txt.
    """
    path = first_file(folder, "tokenizer.json", "vocab.json")
    content = read_json(path, LONGEST_TABLE)
    if path.name == "tokenizer.json":
        check_normalizer(path, content, BPE_STEPS)
        model = content.get("model")
        model = model if isinstance(model, dict) else {}
        vocab, lines = model.get("vocab"), model.get("merges", [])
    else:
        text = read_text(first_file(folder, "merges.txt"), LONGEST_TABLE)
        vocab, lines = content, text.removesuffix("\n").split("\n")
        lines = [line for line in lines if not line.startswith("#version")]
    vocab = checked_vocabulary(path, vocab)
    lines = lines if isinstance(lines, list) else [lines]
    merges = [_merge(folder, n, line, vocab) for n, line in enumerate(lines)]
    return vocab, merges, read_tokenizer_settings(folder, CLIP_SETTINGS)


def checked_vocabulary(path: Path, vocab: Any) -> dict[str, int]:
    """``vocab``, ValueError unless each piece has an id of its own."""
    ids = vocab.values() if isinstance(vocab, dict) else [None]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{path}: expected a BPE vocabulary of pieces and ids")
    if len(set(ids)) < len(ids):
        twice = next(i for i, times in Counter(ids).items() if times > 1)
        raise ValueError(f"{path}: two pieces have the id {twice}")
    return dict(vocab)


def _merge(
    folder: str | Path, number: int, line: Any, vocab: dict[str, int]
) -> tuple[str, str]:
    """The two symbols of merge ``number``, a line or a list."""
    pair = line.split(" ") if isinstance(line, str) else line
    found = f"{folder}: merge {number}"
    if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
        raise ValueError(f"{found} is {excerpt(pair)}, expected two symbols")
    if not {*pair, "".join(pair)} <= vocab.keys():
        what = f"{found} {excerpt(pair)}"
        raise ValueError(f"{what} has symbols not in the vocabulary")
    return pair[0], pair[1]


def check_normalizer(path: Path, content: dict[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError for a step of tokenizer.json's normalizer that is not taken."""
    if not isinstance(whole := content.get("normalizer") or {}, dict):
        found = f"{path} has the normalizer {excerpt(repr(whole))}"
        raise ValueError(f"{found}; expected an object")
    other = [s.get("type") for s in _steps(content) if s.get("type") not in known]
    if other:
        what = f"{path} has the normalizer {excerpt(repr(other[0]))}"
        raise ValueError(f"{what}; expected {', '.join(known)}")


def _steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of tokenizer.json's normalizer, each with its type."""
    whole = content.get("normalizer")
    whole = whole if isinstance(whole, dict) else {}
    steps = whole.get("normalizers", [whole] if whole else [])
    return [step for step in steps if isinstance(step, dict)]


def write_bpe(
    folder: str | Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    settings: Settings,
) -> None:
    """Write vocab.json, merges.txt and the settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    (folder / "tokenizer.json").unlink(missing_ok=True)  # another one's would be read
    write_settings(folder, "CLIPTokenizer", settings, vocab)


def read_unigram(folder: str | Path) -> tuple[dict[str, float], bytes, Settings]:
    """Return the scores in order of id, the character map and the settings of T5's.

    The folder holds tokenizer.json, or spiece.model.
    """
    settings = read_tokenizer_settings(folder, T5_SETTINGS)
    path = first_file(folder, "tokenizer.json", "spiece.model")
    if path.name == "spiece.model":
        pieces, charsmap = read_model(path)
        extra = reversed(range(settings.extra_ids))
        pieces += [Piece(f"<extra_id_{number}>", 0.0) for number in extra]
    else:
        pieces, charsmap = _parse_unigram(path)
    if len(scores := dict(pieces)) < len(pieces):
        raise ValueError(f"{path}: the vocabulary lists a piece twice")
    if not scores or "" in scores:
        raise ValueError(f"{path}: the vocabulary is empty, or has an empty piece")
    if bad := [text for text, score in pieces if not math.isfinite(score)]:
        found = f"{path}: the score of {excerpt(repr(bad[0]))} is {scores[bad[0]]}"
        raise ValueError(f"{found}; expected a finite number")
    return scores, _checked_map(path, charsmap), settings


def _checked_map(path: Path, charsmap: bytes) -> bytes:
    try:
        return charsmap if not charsmap or CharacterMap(charsmap) else b""
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_unigram(path: Path) -> tuple[list[Piece], bytes]:
    content = read_json(path, LONGEST_TABLE)
    try:
        model = content["model"]
        if model["type"] != "Unigram":
            raise ValueError(f"model type {model['type']!r}")
        pieces = [Piece(str(text), float(score)) for text, score in model["vocab"]]
        maps = [
            base64.b64decode(step["precompiled_charsmap"], validate=True)
            for step in _steps(content)
            if step.get("type") == "Precompiled"
        ]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        found = excerpt(error)
        raise ValueError(f"{path}: expected a Unigram model, found {found}") from error
    check_normalizer(path, content, UNIGRAM_STEPS)
    return pieces, maps[0] if maps else b""


# Words are cut at spaces, for which ▁ stands
METASPACE = {
    "type": "Metaspace",
    "replacement": "▁",
    "prepend_scheme": "always",
    "split": True,
}
SPLITTER = {
    "type": "Sequence",
    "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE],
}


def write_unigram(
    folder: str | Path, scores: dict[str, float], charsmap: bytes, settings: Settings
) -> None:
    """Write tokenizer.json, as the ``tokenizers`` library reads it, and settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {piece: number for number, piece in enumerate(scores)}
    eos = settings.names["eos_token"]
    normalizer = {"type": "Precompiled"}
    normalizer["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": numbers[token.content], **entry(token)} for token in settings.added
        ],
        "normalizer": normalizer if charsmap else None,
        "pre_tokenizer": SPLITTER,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {
                eos: {"id": eos, "ids": [numbers[eos]], "tokens": [eos]}
            },
        },
        "decoder": METASPACE,
        "model": {
            "type": "Unigram",
            "unk_id": numbers[settings.names["unk_token"]],
            "vocab": [list(item) for item in scores.items()],
            "byte_fallback": False,
        },
    }
    write_json(folder / "tokenizer.json", content)
    write_settings(folder, "T5Tokenizer", settings, numbers)


# The words that a small model has seen in training: words.txt in its folder

WORDS = "words.txt"
# Letters and digits with their marks, or a run of symbols such as emoji; as in line.js
WORD = regex.compile(
    r"[\p{L}\p{N}_][\p{L}\p{N}\p{M}_\u200c\u200d]*"
    r"|[\p{So}\p{Sm}\p{Sc}][\p{S}\p{M}\u200d]*"
)


def words_of(text: str) -> list[str]:
    """The words of ``text`` in lower case and NFC, in order; hyphens part them."""
    return [unicodedata.normalize("NFC", word).lower() for word in WORD.findall(text)]


def write_words(folder: Path, texts: Iterable[str]) -> None:
    """Write every word of ``texts`` once, a line each, in order of the alphabet."""
    pieces = {piece for text in texts for piece in text.split()}  # few of many texts
    words = sorted({word for piece in pieces for word in words_of(piece)})
    write_text(folder / WORDS, "\n".join(words) + "\n")


def seen(model: Path | str) -> frozenset[str]:
    """The words that a model, its name or folder, has seen; none if it says none."""
    folder = shipped(model) or Path(model)
    path = part_folder(folder, WORDS) if (folder / INDEX).is_file() else folder / WORDS
    return (
        frozenset(words_of(read_text(path, LONGEST_TABLE)))
        if path.is_file()
        else frozenset()
    )


def unknown_words(texts: Iterable[str], words: Collection[str]) -> str:
    """One line that names what the model has not seen; "" for nothing."""
    asked = dict.fromkeys(word for text in texts for word in words_of(text))
    missing = [word for word in asked if words and word not in words]
    shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
    return f"the small model has not seen: {shown}" if missing else ""

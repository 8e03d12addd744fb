"""The files beside a tokenizer's vocabulary, as the hub lays them out.

``tokenizer_config.json`` names the special tokens and the length; which texts are added
tokens, and how they are sought, stands there (transformers 4), or in
``special_tokens_map.json`` (older), or in ``tokenizer.json`` (transformers 5).
"""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

from minidiff.support.sentencepiece import Piece

# What transformers' decoding replaces where ``clean_up_tokenization_spaces`` is set.
TIDY = tuple(
    (spaced, spaced.replace(" ", ""))
    for spaced in " .| ?| !| ,| ' | n't| 'm| 's| 've| 're".split("|")
)


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a damaged file is a ValueError that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content)}")
    return content


def first_file(folder: str | Path, *names: str) -> Path:
    """Return the first of these files that the folder holds."""
    folder = Path(folder)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no tokenizer in {folder}: expected {' or '.join(names)}")


def read_settings(folder: str | Path, defaults: Settings) -> Settings:
    """Read the settings of a tokenizer's folder; a missing file leaves the defaults.

    Raises:
        ValueError: a file is damaged, or asks for what is not supported.
    """
    folder = Path(folder)
    files = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    found = (read_json(folder / f) if (folder / f).is_file() else {} for f in files)
    config, special_map, whole = found
    if "added_tokens_decoder" in config:
        listed = sorted(config["added_tokens_decoder"].items(), key=lambda i: int(i[0]))
        known, special_map = [_added(entry) for _, entry in listed], {}
    else:
        known = [_added(entry) for entry in whole.get("added_tokens", [])]
    merged = config | special_map
    named = {
        name: merged[name] if merged.get(name) else text
        for name, text in defaults.names.items()
    }
    sentinels = config.get("extra_ids", defaults.extra_ids)
    extra = (
        merged.get("additional_special_tokens")
        or merged.get("extra_special_tokens")
        or [f"<extra_id_{number}>" for number in range(sentinels)]
    )
    added = {token.content: token for token in known}
    for entry in (*named.values(), *extra):
        token = _added(entry)
        added.setdefault(token.content, token)
    length = config.get("model_max_length", defaults.model_max_length)
    return Settings(
        {name: _added(entry).content for name, entry in named.items()},
        tuple(added.values()),
        # Some folders state 1e30 for "not known".
        length if length < 1_000_000 else defaults.model_max_length,
        sentinels,
        config.get("clean_up_tokenization_spaces", defaults.clean_up),
    )


def _added(entry: str | dict[str, Any]) -> AddedToken:
    if isinstance(entry, str):
        return AddedToken(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f"expected an added token with a content, found {entry!r}")
    if entry.get("single_word"):
        raise ValueError(
            f"added token {entry['content']!r}: single_word is unsupported"
        )
    flags = {name: bool(entry.get(name)) for name in AddedToken._fields[1:4]}
    return AddedToken(entry["content"], **flags, special=entry.get("special", True))


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
        **(more if settings.extra_ids else {}),
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, readable and in UTF-8."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def read_unigram(path: Path) -> tuple[list[Piece], bytes]:
    """Return the pieces and the character map of a Unigram model's tokenizer.json."""
    content = read_json(path)
    try:
        if content["model"]["type"] != "Unigram":
            raise ValueError(f"model type {content['model']['type']!r}")
        pieces = [
            Piece(str(text), float(score)) for text, score in content["model"]["vocab"]
        ]
        steps = content.get("normalizer") or {}
        maps = [
            base64.b64decode(step["precompiled_charsmap"])
            for step in steps.get("normalizers", [steps])
            if step.get("type") == "Precompiled"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a Unigram model, found {error}") from error
    return pieces, maps[0] if maps else b""


def write_unigram(
    path: Path, pieces: list[Piece], charsmap: bytes, settings: Settings
) -> None:
    """Write the tokenizer.json of T5, as the ``tokenizers`` library reads it."""
    numbers = {piece.text: number for number, piece in enumerate(pieces)}
    metaspace = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    }
    eos = settings.names["eos_token"]
    template = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": eos, "type_id": 0}},
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": numbers[token.content], **entry(token)} for token in settings.added
        ],
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(charsmap).decode(),
        }
        if charsmap
        else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 0}}, template[1]],
            "special_tokens": {
                eos: {"id": eos, "ids": [numbers[eos]], "tokens": [eos]}
            },
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": numbers[settings.names["unk_token"]],
            "vocab": [list(piece) for piece in pieces],
            "byte_fallback": False,
        },
    }
    write_json(path, content)

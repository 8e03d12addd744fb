"""Texts, JSON and prompts read from files. Nothing large is imported here."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def read_text(path: Path | str) -> str:
    """A text in UTF-8, with or without a byte order mark; ValueError for another."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None


def read_prompts(file: Path | str) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ValueError if there is none."""
    lines = read_text(file).split("\n")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{file} holds no prompt; expected one on each line")
    return prompts

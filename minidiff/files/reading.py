"""Files that others wrote: texts, JSON and prompts, read within bounds.

Nothing large is imported here.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

# Bytes: several times what real files have
LONGEST_CONFIG, LONGEST_TABLE, LONGEST_TEXT = 1_000_000, 10_000_000, 100_000_000
LONGEST_ECHO = 100  # characters of a file that an error repeats
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def excerpt(found: object, longest: int = LONGEST_ECHO) -> str:
    """What an error repeats of what was found: of a long text the beginning."""
    text = str(found)
    return text if len(text) <= longest else f"{text[:longest]}…"


def file_size(path: Path | str) -> int:
    """Bytes of an ordinary file; what is no file is refused before it is opened."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        what = "is a link to a file that is" if os.path.islink(path) else "is"
        raise FileNotFoundError(f"{path} {what} missing") from None
    except ValueError:  # a zero byte
        raise ValueError(f"{excerpt(repr(path))} is not a file's name") from None
    if kind := KINDS.get(stat.S_IFMT(found.st_mode)):
        raise ValueError(f"{path} is {kind}; expected a file")
    return found.st_size


def check_size(path: Path | str, limit: int) -> None:
    """Raise ValueError unless ``path`` is a file of at most ``limit`` bytes."""
    if (size := file_size(path)) > limit:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {limit:,}")


def read_bytes(path: Path | str, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes."""
    check_size(path, limit)
    return Path(path).read_bytes()


def read_text(path: Path | str, limit: int = LONGEST_TEXT) -> str:
    """A text in UTF-8, with or without a byte order mark; ValueError for another."""
    check_size(path, limit)
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None


def parse_json(text: str | bytes, name: object) -> dict[str, Any]:
    """The object that ``text`` is; ValueError naming ``name`` for anything else."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}; expected an object")
    return content


def read_json(path: Path | str, limit: int = LONGEST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file; raises FileNotFoundError or ValueError naming it."""
    return parse_json(read_text(path, limit), path)


def read_prompts(file: Path | str) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ValueError if there is none."""
    lines = read_text(file).split("\n")
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{file} holds no prompt; expected one on each line")
    return prompts

"""Prompts of a file, as a person types them, with what their pictures must show."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minidiff.data.language import OPPOSITE, Group, Meaning
from minidiff.data.scenes import COLORS, KINDS, SIDES
from minidiff.files.disk import parse_json, read_lines
from minidiff.interface.checks import as_texts, warn

NAMED = tuple(COLORS)
ASKED = {"color": NAMED, "place": SIDES}


def read_free_prompts(path: Path) -> list[tuple[str, Meaning]]:
    """Prompts of a JSON-lines file and what their pictures must show.

    A line is {"prompt", "things": [{"thing", "color", "place"}], "ground"}; colours,
    places and grounds that are missing or null are free, a repeated entry is a count.

    Raises ValueError naming the file and line of one that is not so.
    """
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                entry = parse_json(line, "it")
                found.append((check_prompt(entry["prompt"]), wanted(entry)))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                what = f"{path}, line {number}: {error}"
                raise ValueError(f"{what}; expected a prompt and its things") from None
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def wanted(entry: dict) -> Meaning:
    """What an entry of such a file asks for."""
    groups = Counter(map(check_thing, entry["things"]))
    if not 1 <= len(groups) <= 2:
        raise ValueError(f"{len(groups)} kinds of things")
    check_keys(entry, "prompt", "things", "ground")
    place, *others = (place for _, _, place in groups)
    if others and place and others[0] not in ("", OPPOSITE[place]):
        raise ValueError(f"places are {place!r} and {others[0]!r}")
    place = place or OPPOSITE.get("".join(others), "")
    found = tuple(Group(kind, n, color) for (kind, color, _), n in groups.items())
    return Meaning(found, place, check_free("ground", entry.get("ground"), NAMED))


def check_thing(thing: dict) -> tuple[str, ...]:
    """Its kind, colour and place. Raises ValueError for values that are not known."""
    check_keys(thing, "thing", *ASKED)
    kind = check_term("thing", thing["thing"], KINDS)
    return kind, *(check_free(k, thing.get(k), known) for k, known in ASKED.items())


def check_keys(entry: dict, *known: str) -> None:
    """Warn of a key that nothing reads, for a misspelt one is free."""
    if other := entry.keys() - {*known}:
        found = f"of a free prompt {min(other)!r} is not read"
        warn(f"{found}; known are {', '.join(known)}")


def check_prompt(value: Any) -> str:
    """``value``. Raises TypeError or ValueError unless it is a text in UTF-8."""
    if not isinstance(value, str):
        raise TypeError(f"prompt is {value!r}")
    return as_texts("prompt", value)[0]


def check_term(name: str, value: Any, known: Sequence[str]) -> str:
    """``value``. Raises ValueError unless it is known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}")
    return value


def check_free(name: str, value: Any, known: Sequence[str]) -> str:
    """As ``check_term``, but "" for what is free: None or ""."""
    return "" if value in (None, "") else check_term(name, value, known)

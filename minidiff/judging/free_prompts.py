"""Prompts of a file, as a person types them, with what their pictures must show."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from minidiff.data.language import OPPOSITE, Group, Meaning
from minidiff.data.scenes import COLORS, KINDS, SIDES
from minidiff.files.disk import parse_json, read_text

ASKED = {"color": tuple(COLORS), "place": SIDES}


def read_free_prompts(path: Path) -> list[tuple[str, Meaning]]:
    """Prompts of a JSON-lines file and what their pictures must show.

    A line is {"prompt", "things": [{"thing", "color", "place"}], "ground"}; keys that
    are missing or null are free, a repeated entry is a count.

    Raises ValueError naming the file and line of one that is not so.
    """
    lines = read_text(path).splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = parse_json(line, "it")
                found.append((str(entry["prompt"]), wanted(entry)))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                what = f"{path}, line {number}: {error}"
                raise ValueError(f"{what}; expected a prompt and its things") from None
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def wanted(entry: dict) -> Meaning:
    """What an entry of such a file asks for."""
    things = [
        (check_term("thing", t["thing"], KINDS),)
        + tuple(check_term(k, t.get(k), known) for k, known in ASKED.items())
        for t in entry["things"]
    ]
    groups = [(key, len(list(same))) for key, same in itertools.groupby(sorted(things))]
    order = sorted(groups, key=lambda group: things.index(group[0]))
    if not 1 <= len(order) <= 2:
        raise ValueError(f"{len(order)} kinds of things")
    places = [place for (_, _, place), _ in order]
    place = places[0] or (OPPOSITE.get(places[-1], "") if len(order) == 2 else "")
    found = tuple(Group(kind, n, color) for (kind, color, _), n in order)
    return Meaning(
        found, place, check_term("ground", entry.get("ground"), tuple(COLORS))
    )


def check_term(name: str, value: str | None, known: Sequence[str]) -> str:
    """``value``, or "" for none. Raises ValueError unless it is known."""
    if value and value not in known:
        raise ValueError(f"{name} is {value!r}")
    return value or ""

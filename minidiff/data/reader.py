"""Reading the language of the small model's world: from words to what they ask for.

The inverse of ``minidiff.data.language``; words that are not known mean nothing.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from minidiff.data.language import (
    ALONE,
    AT,
    BARE,
    GROUND_WORDS,
    GROUNDS,
    NAMES,
    NOUN_PHRASES,
    NUMBERS,
    OPPOSITE,
    OTHER_COLORS,
    PLURAL_ONLY,
    PREFIXES,
    RELATIONS,
    SEVERAL,
    SIZE_WORDS,
    Group,
    Meaning,
)
from minidiff.data.scenes import COLORS, KINDS


class Token(NamedTuple):
    """A piece of a caption: its sort, and its value.

    Sorts: "noun" (kind, plural), "color", "size", "count", "side" (left or right),
    "height" (above or below: "top", "upper"), "spot" (another place), "relation",
    "ground", "word" (anything else).
    """

    sort: str
    value: Any


@functools.cache
def lexicon() -> dict[tuple[str, ...], Token]:
    """Every phrase that means something, as words in lower case."""
    entries = {}

    def add(sort: str, value: object, *phrases: str) -> None:
        entries.update({split(phrase): Token(sort, value) for phrase in phrases})

    for kind, names in zip(KINDS, NAMES, strict=True):
        for noun, many in names:
            add("noun", (kind, True), many)
            add("noun", (kind, noun in PLURAL_ONLY), noun)
    for color in COLORS:
        add("color", color, color)
    for color, other in OTHER_COLORS.items():
        add("color", color, other)
    for size, adjectives in SIZE_WORDS.items():
        add("size", size, *adjectives)
    for number, numerals in NUMBERS.items():
        add("count", number, *numerals)
    add("count", 1, "an", "the")
    add("count", 0, *SEVERAL[:-1])
    add("pair", 0, "pair of", "pairs of")
    for side in ("left", "right"):
        add("side", side, side)
    add("height", "above", "top", "upper")
    add("height", "below", "bottom", "lower")
    add("relation", "above", "above", "over", "on top of")
    add("relation", "below", "below", "under", "beneath")
    add("relation", "beside", "beside", "next to")
    add("spot", "middle", "middle", "center", "centre")
    add("spot", "corner", "corner")
    add("ground", "", *GROUND_WORDS)
    return entries


LONGEST = 3  # words of a phrase in the lexicon


def split(text: str) -> tuple[str, ...]:
    """Words and commas of ``text``, in lower case; hyphens part words."""
    return tuple(re.findall(r"[a-z0-9]+|&|,", re.sub("[:;]", ",", text.lower())))


def tokens(text: str) -> list[Token]:
    """``text`` as tokens, the longest phrase at each place; places put together."""
    words, found, known = split(text), [], lexicon()
    while words:
        sizes = range(min(LONGEST, len(words)), 0, -1)
        size = next((n for n in sizes if words[:n] in known), 0)
        found.append(known[words[:size]] if size else Token("word", words[0]))
        words = words[size or 1 :]
    return join_places(found)


def join_places(found: list[Token]) -> list[Token]:
    """Heights, sides and corners as spots or relations; "the" before them is none."""
    joined: list[Token] = []
    for i, token in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else Token("word", "")
        last = joined[-1] if joined else Token("word", "")
        if token.sort == "height":
            token = Token("spot", token.value)
        elif token.sort == "side" and last.sort == "spot" and last.value in HEIGHTS:
            joined.pop()
            token = Token("spot", f"{HEIGHTS[last.value]} {token.value}")
        elif token.sort == "side":
            token = Token("relation" if after.value == "of" else "spot", token.value)
        elif token.value == "corner" and last.sort == "spot":
            continue
        elif token.sort == "relation" and not begins(found[i + 1 :]):
            token = Token("spot", token.value)
        if token.sort in ("spot", "ground") and joined and last.sort == "count":
            joined.pop()
        joined.append(token)
    return joined


HEIGHTS = {"above": "top", "below": "bottom"}


def begins(found: Iterable[Token]) -> bool:
    """Whether a noun phrase begins here."""
    first = next(iter(found), Token("word", ""))
    return first.sort in ("noun", "color", "size", "count", "pair")


def read(text: str) -> Meaning:
    """What ``text`` asks for; words that are not known mean nothing.

    Raises ValueError where it names no thing.
    """
    reader = Reader(tokens(text))
    if not reader.groups:
        raise ValueError(f"{text!r} names nothing that the small world has")
    return reader.meaning()


class Reader:
    """Walks through a caption's tokens and gathers what they say."""

    def __init__(self, found: list[Token]) -> None:
        self.found = found
        self.groups: list[Group] = []
        self.spots: list[str] = []
        self.pending: dict[str, Any] = {}
        self.relation, self.ground, self.inverse, self.front = "", "", False, False
        for i, token in enumerate(found):
            if handler := getattr(self, f"on_{token.sort}", None):
                handler(i, token.value)

    def near(self, i: int, step: int) -> Token:
        """The next token in a direction, "colored" left out."""
        i += step
        while 0 <= i < len(self.found) and self.found[i].value in SKIPPED:
            i += step
        inside = 0 <= i < len(self.found)
        return self.found[i] if inside else Token("word", "")

    def on_noun(self, i: int, value: tuple[str, bool]) -> None:
        kind, many = value
        count = self.pending.pop("count", None)
        if self.pending.pop("pair", False):
            alone = many and self.found[i].value in LONELY
            count = (count or 1) if alone else 2
        if count is None or (count == 1 and many and value not in LONELY):
            count = 0 if many and value not in LONELY else 1
        color, size = self.pending.pop("color", ""), self.pending.pop("size", "")
        self.groups.append(Group(kind, count, color, size))
        self.spots.append(self.pending.pop("spot", ""))

    def on_pair(self, i: int, value: object) -> None:
        self.pending["pair"] = True

    def on_count(self, i: int, value: int) -> None:
        self.pending["count"] = value

    def on_size(self, i: int, value: str) -> None:
        self.pending["size"] = value

    def on_color(self, i: int, value: str) -> None:
        after, before = self.near(i, 1), self.near(i, -1)
        if after.sort in ("noun", "size"):
            self.pending["color"] = value
        elif after.sort == "ground" or before.value in ("on", "against"):
            self.ground = value
            self.pending.pop("count", None)
        elif before.value == "is" and self.near(i, -2).sort == "ground":
            self.ground = value
        elif self.groups:
            self.groups[-1] = self.groups[-1]._replace(color=value)

    def on_spot(self, i: int, value: str) -> None:
        self.front = self.front or not self.groups
        if self.front:
            self.pending["spot"] = value
        else:
            self.spots[-1] = value

    def on_relation(self, i: int, value: str) -> None:
        self.relation, self.inverse = value, not self.groups

    def meaning(self) -> Meaning:
        """All that was gathered; of more than two groups the first two."""
        place, groups = self.spots[0], tuple(self.groups[:2])
        if len(groups) == 2:
            second = OPPOSITE.get(self.spots[1], self.spots[1])
            place = self.relation or place or second
            if self.inverse and self.relation:
                groups = groups[::-1]
        return Meaning(groups, place, self.ground)


SKIPPED = ("colored", "coloured")
LONELY = {
    (k, True) for k, n in zip(KINDS, NAMES, strict=True) if n[0][0] in PLURAL_ONLY
}


@functools.cache
def vocabulary() -> frozenset[str]:
    """Every word that captions can hold, in lower case."""
    parts = ["is", "are"] + [word for phrase in lexicon() for word in phrase]
    tables = (*NOUN_PHRASES.values(), *GROUNDS.values(), *ALONE.values(), PREFIXES)
    tables += tuple(forms for kind in RELATIONS.values() for forms in kind.values())
    tables += (*AT.values(), *BARE.values())
    texts = [re.sub(r"{\w+}", " ", form) for table in tables for form in table]
    return frozenset(parts) | {word for text in texts for word in split(text)} - {","}


def unseen(text: str) -> list[str]:
    """The words of ``text`` that training never showed, in order."""
    known = vocabulary()
    words = dict.fromkeys(split(text))
    return [word for word in words if word not in known and word not in ",&"]

"""The figures' colours: two values each, for light and dark grounds.

matplotlib is given the first; the SVG of a figure holds both (see ``BookFigure``).
"""

from collections.abc import Iterable
from typing import NamedTuple

GROUNDS = {"light": "#ffffff", "dark": "#121212"}  # the book's


class Color(NamedTuple):
    """One colour on the two grounds."""

    light: str
    dark: str


COLORS = {
    "ink": Color("#2b2f36", "#e2e4e8"),
    "grey": Color("#646a74", "#a2a8b2"),
    "blue": Color("#1d5c9c", "#7fb6ee"),
    "orange": Color("#a3450c", "#f2a679"),
    "green": Color("#1b6c47", "#74d1a4"),
    "red": Color("#ad2a40", "#f4929d"),
    "purple": Color("#6742a8", "#c0a5f4"),
    "ochre": Color("#735800", "#dcbc54"),
    "teal": Color("#0c6572", "#74d2de"),
}
INK, GREY = COLORS["ink"].light, COLORS["grey"].light
PALETTE = [color.light for name, color in COLORS.items() if name not in ("ink", "grey")]

# One colour for one thing, in every figure
THINGS = {
    "blue": ("text", "words", "noise", "AdaLN", "euler", "training", "prompt"),
    "orange": ("attention", "drawn", "heun", "validation", "guided"),
    "green": ("picture", "patches", "data", "true", "MLP", "linear maps", "dpmpp_2m"),
    "purple": ("exact", "upper", "learned"),
}
OF_THINGS = {thing: COLORS[k].light for k, names in THINGS.items() for thing in names}


def colors_of(names: Iterable[str]) -> list[str]:
    """A colour for each name: its own where it is a known thing, else one not taken.

    What follows a comma says more of the same thing: "euler, 8 steps".
    """
    names = list(names)
    own = [OF_THINGS.get(name.split(",")[0]) for name in names]
    free = [c for c in PALETTE if c not in own] or PALETTE
    rest = iter(free * len(names))
    return [color or next(rest) for color in own]

"""The language of the small model's world: one grammar, used in both directions.

``describe`` says in words what a scene shows; ``minidiff.data.reader`` finds what words
ask for. What a caption does not mention is free. Some whole constructions are never
trained on, so that one can measure whether the model follows sentences of a new shape.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from minidiff.data.rng import uniform
from minidiff.data.scenes import COLORS, KINDS, PLACES, SIZES, Attributes
from minidiff.data.things import NAMES as THING_NAMES
from minidiff.data.things import forms, plural

GARMENT_NAMES = (
    "t-shirt/tee/tshirt",
    "trousers+trousers/pants+pants/jeans+jeans",
    "pullover/sweater/jumper",
    "dress/gown",
    "coat/jacket",
    "sandal",
    "shirt/blouse",
    "sneaker/trainer/shoe",
    "bag/handbag/purse",
    "ankle boot/boot",
)
NAMES = tuple(forms(entry) for entry in GARMENT_NAMES) + THING_NAMES
# Words that have no singular; most come in pairs.
PAIRS = "trousers pants jeans headphones scissors glasses sunglasses".split()
PAIRS += ["gloves", "socks"]
PLURAL_ONLY = (*PAIRS, "grapes", "fries")
NUMBERS = {1: ("a", "one"), 2: ("two", "2"), 3: ("three", "3")}
SEVERAL = ("some", "several", "many", "")  # more than one: two or three
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
GROUND_WORDS = ("background", "background", "background", "backdrop", "ground", "wall")
OTHER_COLORS = {"gray": "grey", "purple": "violet", "cyan": "turquoise"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RANDOM = 48  # uniform numbers that one caption takes


Choice = TypeVar("Choice")


class Group(NamedTuple):
    """Items of one kind as a caption asks for them; "" for what it does not say.

    ``number`` 0 asks for more than one.
    """

    kind: str  # in KINDS
    number: int = 1
    color: str = ""  # in COLORS
    size: str = ""  # "small" or "big"


class Meaning(NamedTuple):
    """What a caption asks for.

    ``place`` is that of a single item (in PLACES, or "corner"), or where the first of
    two groups lies ("left", "right", "above", "below", or "beside" the other).
    """

    groups: tuple[Group, ...]
    place: str = ""
    ground: str = ""  # in COLORS

    def canonical(self) -> "Meaning":
        """The same for all orders in which one may name two groups."""
        if len(self.groups) < 2:
            return self
        if self.place in ("right", "below"):
            return Meaning(self.groups[::-1], OPPOSITE[self.place], self.ground)
        if self.place in ("", "beside"):
            return self._replace(groups=tuple(sorted(self.groups)))
        return self


# Constructions: those after "held" are never trained on. A and B are two groups, S all
# that was said before.

NOUN_PHRASES = {
    "trained": (
        *(("{article} {size} {color} {noun}",) * 12),
        "{article} {size} {noun} in {color}",
        "{article} {size} {noun} that {is_} {color}",
        "{article} {size} {color} colored {noun}",
    ),
    "held": ("{article} {size} {noun} colored {color}",),
}
GROUNDS = {
    "trained": (
        *(("{S} on {a_color} {ground}",) * 4),
        *(("{S} on {color}",) * 3),
        *(("{S}, {color} {ground}",) * 2),
        "{S} on {color} {ground}",
        "{S} with {a_color} {ground}",
        "{S} against {a_color} {ground}",
        "{S} in front of {a_color} {ground}",
        "{S}, the {ground} is {color}",
        "{S} against {color}",
        "on {a_color} {ground}, {S}",
        "on {color}: {S}",
        "{color} {ground}, {S}",
        "{a_color} {ground} with {S}",
    ),
    "held": ("in front of {a_color} {ground}, {S}", "the {ground} is {color}, {S}"),
}
ALONE = {
    "trained": (
        "{A} {at}",
        "{A} {at}",
        "{at}, {A}",
        "{at}: {A}",
        "{A}, {at}",
        "{A} {bare}",
    ),
    "held": ("{bare}: {A}",),
}
AT = {
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "above": ("at the top", "in the upper part"),
    "below": ("at the bottom", "in the lower part"),
    "top left": ("in the top left corner", "in the upper left", "at the top left"),
    "top right": ("in the top right corner", "in the upper right", "at the top right"),
    "bottom left": (
        "in the bottom left corner",
        "in the lower left",
        "at the bottom left",
    ),
    "bottom right": (
        "in the bottom right corner",
        "in the lower right",
        "at the bottom right",
    ),
    "middle": ("in the middle", "in the center", "in the centre"),
    "corner": ("in a corner", "in the corner"),
}
BARE = {place: (place,) for place in PLACES if " " in place}
BARE |= {"left": ("left",), "right": ("right",), "above": ("top",)}
BARE |= {"below": ("bottom",), "middle": ("center",), "corner": ("in a corner",)}
# A lies left of B, or above.
RELATIONS = {
    "left": {
        "trained": (
            *(("{A} left of {B}",) * 2),
            "{A} to the left of {B}",
            "{A} on the left of {B}",
            *(("{B} right of {A}",) * 2),
            "{B} to the right of {A}",
            "{B} on the right of {A}",
            "{A} on the left and {B} on the right",
            "{B} on the right and {A} on the left",
            "{A} on the left, {B} on the right",
            "{A} left and {B} right",
            "{A} left, {B} right",
            "on the left {A}, on the right {B}",
            "on the left {A} and on the right {B}",
        ),
        "held": ("left of {B} is {A}", "on the right {B}, on the left {A}"),
    },
    "above": {
        "trained": (
            *(("{A} above {B}",) * 3),
            "{A} over {B}",
            "{A} on top of {B}",
            *(("{B} below {A}",) * 2),
            "{B} under {A}",
            "{B} beneath {A}",
            "{A} at the top and {B} at the bottom",
            "{A} at the top, {B} at the bottom",
            "{A} above and {B} below",
            "at the top: {A}, at the bottom: {B}",
            "at the bottom: {B}, at the top: {A}",
        ),
        "held": ("below {A} is {B}", "at the top: {A} and at the bottom: {B}"),
    },
    "beside": {
        "trained": ("{A} next to {B}", "{A} beside {B}"),
        "held": ("next to {B} is {A}",),
    },
    "": {
        "trained": (
            *(("{A} and {B}",) * 4),
            "{A}, {B}",
            "{A} with {B}",
            "{A} & {B}",
            "{A} plus {B}",
            "{A}, and {B}",
            "{A} and also {B}",
        ),
        "held": ("there is {A} and there is {B}",),
    },
}
PREFIXES = (
    *(("{S}",) * 24),
    "a photo of {S}",
    "a picture of {S}",
    "a drawing of {S}",
    "an image of {S}",
    "a painting of {S}",
    "photo of {S}",
    "picture of {S}",
    "draw {S}",
    "show me {S}",
    "there is {S}",
)
# How a text begins that takes no prefix.
FRONT = "on at in to left right top bottom center below next there".split()


class Dice:
    """Choices made of uniform numbers, one for each."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers = iter(numbers)

    def chance(self, share: float) -> bool:
        """True in this share of all cases."""
        return next(self.numbers) < share

    def choose(self, options: Sequence[Choice]) -> Choice:
        """One of them, all as likely."""
        return options[int(next(self.numbers) * len(options))]


# From meanings to words


def describe(
    scene: Sequence, dice: Dice, held_out: bool = False, called: Sequence[str] = KINDS
) -> tuple[str, Meaning]:
    """A caption of a scene and what it asks for.

    Args:
        scene: one row of ``Attributes``, as lists and numbers.
        held_out: with a construction that is never trained on, or with none.
        called: the kinds' names, by their numbers.
    """
    meaning = mention(scene, dice, held_out, called)
    return say(meaning, dice, held_out), meaning


def mention(
    scene: Sequence, dice: Dice, held_out: bool = False, called: Sequence[str] = KINDS
) -> Meaning:
    """What a caption will say of ``scene``: some of its attributes."""
    kinds, counts, colors, sizes, place, ground = scene
    groups = []
    for kind, count, color, size in zip(kinds, counts, colors, sizes, strict=True):
        named = color >= 0 and (kind >= len(GARMENT_NAMES) or dice.chance(0.75))
        sized = SIZES[size] != "medium" and dice.chance(0.8)
        plain = all(noun != many for noun, many in names_of(called[kind]))
        few = count > 1 and plain and dice.chance(0.2)
        if count:
            color = list(COLORS)[color] if named else ""
            size = SIZES[size] if sized else ""
            groups.append(Group(called[kind], 0 if few else count, color, size))
    where = mention_place(PLACES[place], len(groups), counts[0], dice)
    other = where if len(groups) == 1 else True  # what else may be said anew
    named = dice.chance(0.7) or (held_out and not other)
    return Meaning(tuple(groups), where, list(COLORS)[ground] if named else "")


def mention_place(place: str, groups: int, count: int, dice: Dice) -> str:
    """What a caption says of the first group's ``place``: often it, or less."""
    said, vague = dice.chance(0.65), dice.chance(0.15)
    if groups == 2:
        if vague and place in ("left", "right"):
            return "beside"
        return place if said else ""
    if count > 1:
        return ""
    if place == "middle":
        return place if vague and said else ""
    if " " in place and vague:
        return "corner"
    return place if said or dice.chance(0.3) else ""


def say(meaning: Meaning, dice: Dice, held_out: bool = False) -> str:
    """``meaning`` in words; ``held_out`` as in ``describe``."""
    new = "held" if held_out else "trained"
    named = [noun_phrase(group, dice) for group in meaning.groups]
    if len(named) == 2:
        text = relate(meaning.place, named, dice, new)
    elif meaning.place:
        bare = dice.choose(BARE[meaning.place])
        at = dice.choose(AT[meaning.place])
        text = dice.choose(ALONE[new]).format(A=named[0], at=at, bare=bare)
    else:
        text = named[0]
    if text.split()[0] not in FRONT:
        text = dice.choose(PREFIXES).format(S=text)
    if meaning.ground:
        fresh = held_out and len(named) == 1 and not meaning.place
        text = on_ground(text, meaning.ground, dice, "held" if fresh else "trained")
    return dress(text, dice)


def relate(place: str, named: list[str], dice: Dice, new: str) -> str:
    """Two noun phrases with a word for how they lie."""
    first, second = named
    if place in ("right", "below"):
        place, first, second = OPPOSITE[place], second, first
    if place in ("", "beside") and dice.chance(0.5):
        first, second = second, first
    return dice.choose(RELATIONS[place][new]).format(A=first, B=second)


def on_ground(text: str, color: str, dice: Dice, new: str) -> str:
    """``text`` with a word about the ground."""
    form, ground = dice.choose(GROUNDS[new]), dice.choose(GROUND_WORDS)
    color = spelled(color, dice)
    return form.format(S=text, color=color, a_color=article(color), ground=ground)


def noun_phrase(group: Group, dice: Dice) -> str:
    """A group in words: "two small red cats", "a dress in blue"."""
    noun, many = choose_name(group.kind, dice)
    form = dice.choose(NOUN_PHRASES["trained"])
    size = dice.choose(SIZE_WORDS[group.size]) if group.size else ""
    color = spelled(group.color, dice) if group.color else ""
    if not color:
        form = "{article} {size} {noun}"
    words = form.format(
        article="{}",
        size=size,
        color=color,
        noun=noun if group.number == 1 else many,
        is_="is" if group.number == 1 and noun not in PLURAL_ONLY else "are",
    )
    words = " ".join(words.split())
    return with_number(words, group, noun, dice).strip()


def with_number(words: str, group: Group, noun: str, dice: Dice) -> str:
    """``words``, which begin with "{}", with an article or a number there."""
    rest = words.removeprefix("{} ")
    if group.number == 0:
        return f"{dice.choose(SEVERAL)} {rest}"
    if noun in PLURAL_ONLY:
        if group.number == 1:
            pair = noun in PAIRS and dice.chance(0.4)
            return f"a pair of {rest}" if pair else rest
        number = dice.choose(NUMBERS[group.number])
        return f"{number} pairs of {rest}" if noun in PAIRS else f"{number} {rest}"
    if group.number == 2 and dice.chance(0.15):
        return f"a pair of {rest}"
    if group.number > 1:
        return f"{dice.choose(NUMBERS[group.number])} {rest}"
    if dice.chance(0.25):
        return rest
    if dice.chance(0.08):
        return f"{dice.choose(('the', 'one'))} {rest}"
    return article(rest)


def choose_name(kind: str, dice: Dice) -> tuple[str, str]:
    """One of a kind's names, mostly the first, with its plural."""
    names = names_of(kind)
    return names[0] if dice.chance(0.6) else dice.choose(names)


@functools.cache
def names_of(kind: str) -> tuple[tuple[str, str], ...]:
    """A kind's names with their plurals; of one that does not ship its own name."""
    own = ((kind, plural(kind)),)
    return NAMES[KINDS.index(kind)] if kind in KINDS else own


def article(words: str) -> str:
    """``words`` after "a" or "an"."""
    vowel = words[0] in "aeiou" and not words.startswith(("unicorn", "ufo"))
    return f"an {words}" if vowel or words.startswith("hour") else f"a {words}"


def spelled(color: str, dice: Dice) -> str:
    """A colour's name, or the other one that it has."""
    return OTHER_COLORS.get(color, color) if dice.chance(0.3) else color


def dress(text: str, dice: Dice) -> str:
    """``text`` in capitals, with a full stop, as people write; mostly as it is."""
    if dice.chance(0.8):
        return text
    style = dice.choose(("First.", "First", "ALL", "ALL!", "end.", "end!"))
    if style.startswith("First"):
        text = text[0].upper() + text[1:]
    text = text.upper() if style.startswith("ALL") else text
    return text + style[-1] if style[-1] in ".!" else text


# Captions of scenes


def captions(
    attributes: Attributes,
    seed: int,
    indices: Tensor,
    held_out: bool = False,
    called: Sequence[str] = KINDS,
) -> tuple[list[str], list[Meaning]]:
    """A caption of each scene and what it asks for, chosen by (seed, index)."""
    rows = zip(
        _rows(attributes), uniform(seed, indices, RANDOM, "cpu").tolist(), strict=True
    )
    pairs = [describe(row, Dice(u), held_out, called) for row, u in rows]
    return [text for text, _ in pairs], [meaning for _, meaning in pairs]


def _rows(attributes: Attributes) -> Iterable[tuple]:
    """Every scene's attributes as lists and numbers."""
    return zip(*(x.tolist() for x in attributes), strict=True)


def shown(attributes: Attributes) -> list[Meaning]:
    """All that scenes show, as if their captions asked for it; sizes are left out."""
    return [everything(*row) for row in _rows(attributes)]


def everything(
    kinds: list[int],
    counts: list[int],
    colors: list[int],
    sizes: list[int],
    place: int,
    ground: int,
) -> Meaning:
    """What a scene shows: ``shown`` of one row."""
    names = [*COLORS, ""]  # −1 is a thing's own colour
    rows = zip(kinds, counts, colors, strict=True)
    groups = tuple(Group(KINDS[k], n, names[c]) for k, n, c in rows if n)
    lone = len(groups) == 1 and groups[0].number > 1
    return Meaning(groups, "" if lone else PLACES[place], names[ground])

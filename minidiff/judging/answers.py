"""Does a picture show what a sentence asks for? A question to what the judge found.

Right means every item, colour, place, count and ground that the sentence names, and
nothing more in the picture.
"""

import itertools
from collections.abc import Sequence

from minidiff.data.language import Group, Meaning
from minidiff.data.scenes import IMAGE_SIZE
from minidiff.judging.judge import Found, Item

EVERYTHING = ("things", "colors", "places", "ground")


def follows(found: Found, meaning: Meaning) -> dict[str, bool]:
    """Does a picture show what a sentence asks for? By what is asked, and "all"."""
    ground = meaning.ground in ("", found.ground)
    best = {"things": False, "colors": False, "places": False}
    for items in assignments(found.items, meaning.groups):
        pairs = [
            (i, g) for g, own in zip(meaning.groups, items, strict=True) for i in own
        ]
        answer = {
            "things": all(i.kind == g.kind for i, g in pairs),
            "colors": all(g.color in ("", i.color) for i, g in pairs),
            "places": placed(items, meaning.place),
        }
        best = max(best, answer, key=lambda a: (a["things"], sum(a.values())))
    right = best | {"ground": ground}
    return right | {"all": all(right.values())}


def assignments(
    items: tuple[Item, ...], groups: tuple[Group, ...]
) -> list[list[tuple[Item, ...]]]:
    """All ways to give all items to groups, each as many as it asks for."""
    if not groups:
        return [[]] if not items else []
    first, *rest = groups
    sizes = range(2, len(items) + 1) if first.number == 0 else (first.number,)
    ways = []
    for own in itertools.chain(*(itertools.combinations(items, n) for n in sizes)):
        left = tuple(item for item in items if item not in own)
        ways += [[own, *others] for others in assignments(left, tuple(rest))]
    return ways


def placed(items: Sequence[tuple[Item, ...]], place: str) -> bool:
    """Whether the groups' items lie as ``Meaning.place`` says."""
    if not place:
        return True
    centres = [
        (sum(i.x for i in own) / len(own), sum(i.y for i in own) / len(own))
        for own in items
    ]
    (x, y), *other = centres
    if other:
        dx, dy = other[0][0] - x, other[0][1] - y
        level = abs(dx) >= abs(dy)
        sides = {"left": level and dx > 0, "right": level and dx < 0}
        sides |= {"above": not level and dy > 0, "below": not level and dy < 0}
        return sides.get(place, level)  # "beside"
    half = IMAGE_SIZE / 2
    sides = {"left": x < half - 3, "right": x > half + 3}
    sides |= {"above": y < half - 3, "below": y > half + 3}
    if place == "middle":
        return max(abs(x - half), abs(y - half)) < 11
    if place == "corner":
        return min(abs(x - half), abs(y - half)) > 3
    names = {"top": "above", "bottom": "below"}
    return all(sides[names.get(word, word)] for word in place.split())


def shares(answers: Sequence[dict[str, bool]]) -> dict[str, float]:
    """How many of these answers are right, by what is asked."""
    names = (*EVERYTHING, "all")
    return {k: round(sum(a[k] for a in answers) / len(answers), 4) for k in names}

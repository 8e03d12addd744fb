"""The witness: a small network that finds a scene's items and says what they are.

It is trained on real scenes of the training split only and frozen before any
evaluation. Whether a picture shows what a sentence asks for is then a question to what
it has found: every item, colour, place, count and ground that the sentence names, and
nothing more. All pairs of kind and colour are among its scenes: shown only those that
the model is trained on, it would learn that the others do not exist.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data.language import Group, Meaning
from minidiff.data.scenes import COLORS, IMAGE_SIZE, KINDS, SceneBatch, item_groups
from minidiff.judging.judge import Residual, load_frozen, with_silhouette

WITNESS = Path(__file__).parent.parent / "pretrained" / "judge"
CELL = 8  # pixels along a side of a cell
SPREAD = 6.0  # of an item's trace around its centre, in pixels
EVERYTHING = ("things", "colors", "places", "ground")


@dataclass(frozen=True)
class WitnessConfig:
    """Widths and residual blocks at 32, 16 and 8 pixels; features of a cell."""

    widths: tuple[int, ...] = (24, 48, 96)
    blocks: tuple[int, ...] = (1, 2, 2)
    features: int = 128


class Reading(NamedTuple):
    """Logits of every cell (B, 8, 8, …) and of the ground (B, 12)."""

    presence: Tensor  # (B, 8, 8): is an item's centre here?
    kinds: Tensor  # (B, 8, 8, KINDS)
    colors: Tensor  # (B, 8, 8, 12)
    ground: Tensor  # (B, 12)


class Item(NamedTuple):
    """What the witness found at one place; x and y in pixels."""

    kind: str
    color: str
    x: float
    y: float


class Found(NamedTuple):
    """All that the witness found in one picture."""

    items: tuple[Item, ...]
    ground: str


class Witness(nn.Module):
    """Pictures (B, 3, 64, 64) in [−1, 1] → a ``Reading``.

    A convolutional trunk gives an 8 × 8 map. Each cell reads itself, with what lies
    around it, beside the mean of all cells.
    """

    def __init__(self, config: WitnessConfig = WitnessConfig()) -> None:  # noqa: B008
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.stem = nn.Conv2d(20, width, 3, 1, 1)
        blocks = []
        levels = zip(config.widths, config.blocks, strict=True)
        for level, (new, count) in enumerate(levels):
            for i in range(count):
                blocks += [Residual(width, new, 2 if level and i == 0 else 1)]
                width = new
        self.blocks = nn.Sequential(*blocks)
        self.around = nn.Conv2d(width, config.features, 3, 1, 1)
        self.presence = nn.Linear(2 * config.features, 1)
        self.kind = nn.Linear(2 * config.features, len(KINDS))
        self.color = nn.Linear(2 * config.features, len(COLORS))
        self.ground = nn.Linear(config.features, len(COLORS))

    def forward(self, images: Tensor) -> Reading:
        return self.read(images)[1]

    def read(self, images: Tensor) -> tuple[Tensor, Reading]:
        """Features (B, 2·features): the cells' mean and maximum; and the logits."""
        # (B, 5, 64, 64) → (B, 20, 32, 32): no detail of a small item is averaged
        x = F.pixel_unshuffle(with_silhouette(images), 2)
        x = F.relu(self.around(self.blocks(F.relu(self.stem(x)))))
        mean, most = x.mean((2, 3)), x.amax((2, 3))  # (B, F, 8, 8) → 2 × (B, F)
        cells = x.permute(0, 2, 3, 1)  # → (B, 8, 8, F)
        cells = torch.cat([cells, mean[:, None, None].expand_as(cells)], -1)
        presence = self.presence(cells)[..., 0]
        heads = presence, self.kind(cells), self.color(cells), self.ground(mean)
        return torch.cat([mean, most], 1), Reading(*heads)


def traces(centres: Tensor, present: Tensor) -> Tensor:
    """How near every cell's middle is to each item's centre, (B, 3, 8, 8) in [0, 1].

    ``centres`` (B, 3, 2), x and y in pixels; ``present`` (B, 3).
    """
    middles = torch.arange(CELL // 2, IMAGE_SIZE, CELL, device=centres.device)
    x, y = (centres[..., i, None] - middles for i in (0, 1))  # (B, 3, 8)
    square = y[..., :, None] ** 2 + x[..., None, :] ** 2  # → (B, 3, 8, 8)
    return torch.exp(-square / (2 * SPREAD**2)) * present[..., None, None]


def witness_targets(scenes: SceneBatch) -> dict[str, Tensor]:
    """What a reading should say: trace, kinds, colors (B, 8, 8), ground (B,).

    Kinds and colours are −1 away from the items; so are a thing's own colours.
    """
    groups = item_groups(scenes.attributes)
    trace, nearest = traces(scenes.centres, groups >= 0).max(1)  # (B, 8, 8)
    group = groups.gather(1, nearest.flatten(1)).clamp(min=0)
    near = trace > 0.4
    found = {"trace": trace, "ground": scenes.attributes.ground}
    for name in ("kinds", "colors"):
        value = getattr(scenes.attributes, name).gather(1, group).view_as(nearest)
        found[name] = value.masked_fill(~near, -1)
    return found


def witness_loss(witness: Witness, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropies of presence, kinds, colours and ground, summed.

    ``batch`` holds "images" (B, 3, 64, 64) and what ``witness_targets`` makes.
    """
    reading = witness(batch["images"])
    presence = F.binary_cross_entropy_with_logits(
        reading.presence.float(), batch["trace"]
    )
    kinds = F.cross_entropy(
        reading.kinds.float().movedim(-1, 1), batch["kinds"], ignore_index=-1
    )
    colors = F.cross_entropy(
        reading.colors.float().movedim(-1, 1), batch["colors"], ignore_index=-1
    )
    ground = F.cross_entropy(reading.ground.float(), batch["ground"])
    return 20 * presence + kinds + colors + ground


# What it found


@torch.no_grad()
def find(reading: Reading) -> list[Found]:
    """The items of each picture: where presence has a peak above one half."""
    p = reading.presence.float().sigmoid()
    peak = (p == F.max_pool2d(p[:, None], 3, 1, 1)[:, 0]) & (p > 0.5)
    kinds, colors = reading.kinds.argmax(-1), reading.colors.argmax(-1)
    grounds = [list(COLORS)[i] for i in reading.ground.argmax(-1).tolist()]
    items: list[list[Item]] = [[] for _ in grounds]
    rows, ys, xs = peak.nonzero(as_tuple=True)
    values = (rows, ys, xs, kinds[peak], colors[peak])
    for row, y, x, kind, color in zip(*(v.tolist() for v in values), strict=True):
        place = CELL * x + CELL / 2, CELL * y + CELL / 2
        items[row].append(Item(KINDS[kind], list(COLORS)[color], *place))
    return [Found(tuple(i), g) for i, g in zip(items, grounds, strict=True)]


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


def load_witness(folder: str | Path, device: str | torch.device = "cpu") -> Witness:
    """The trained witness: see ``load_frozen``."""
    return load_frozen(Witness, WitnessConfig, folder, device)

"""The small model's world: garments and everyday things on coloured grounds.

One group of up to three of a kind, or two groups, each item in a colour or, a thing,
in its own; sizes, places and a plain ground. A scene is a pure function of (seed,
index): nothing is stored, and any batch can be made anywhere, in any order. What
captions say of a scene is ``minidiff.data.language``'s.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.data.fashion_mnist import CLASSES, garments_by_class
from minidiff.data.rng import uniform
from minidiff.data.things import OPAQUE, SIZE, THINGS, cut_outs

IMAGE_SIZE = 64
COLORS = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (245, 215, 50),
    "purple": (130, 50, 170),
    "white": (245, 245, 245),
    "orange": (245, 130, 30),
    "pink": (250, 150, 190),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "brown": (125, 75, 40),
    "cyan": (60, 200, 220),
}
# Shades from the darkest to the lightest; other colours': see ``ramps``.
RAMPS = {"white": (140, 255), "black": (0, 90), "gray": (60, 180)}
KINDS = CLASSES + THINGS  # the first ten are garments
GARMENTS = len(CLASSES)
# Of a group beside another the sides; of one item alone any place.
SIDES = ("left", "right", "above", "below")
PLACES = (*SIDES, "top left", "top right", "bottom left", "bottom right", "middle")
MIDDLE = PLACES.index("middle")
SIZES = ("small", "medium", "big")
# Centres of PLACES, in quarters of the picture from its middle
DIRECTIONS = (
    *((-1, 0), (1, 0), (0, -1), (0, 1)),
    *((-1, -1), (1, -1), (-1, 1), (1, 1), (0, 0)),
)
# Of three items the first faces two corners: their places, by that of the first
THREE = ((0, 5, 7), (1, 4, 6), (2, 6, 7), (3, 4, 5))
SMALL, LARGE = 30.0, 50.0  # sides of items, in pixels
GARMENT_SHARE = 0.33  # of groups
# What a scene shows: one item, one each of two kinds, two or three of a kind, one and
# two. The numbers of items in the first group and in the second, and how often.
LAYOUTS = ((1, 0), (1, 1), (2, 0), (3, 0), (1, 2))
SHARES = (0.52, 0.30, 0.07, 0.05, 0.06)
# Colours of garments that training never shows, to measure composition.
HELD_OUT = "blue red pink green cyan purple brown yellow orange white".split()


class Attributes(NamedTuple):
    """What scenes show, as int64 tensors.

    Where there is no second group its kind and colour are −1 and its count is 0.
    """

    kinds: Tensor  # (B, 2): numbers in KINDS
    counts: Tensor  # (B, 2): items of each group
    colors: Tensor  # (B, 2): numbers in COLORS, −1 for a thing's own
    sizes: Tensor  # (B, 2): numbers in SIZES; of medium ones nothing is said
    place: Tensor  # (B,): of the first group; a number in PLACES
    ground: Tensor  # (B,): number in COLORS

    def to(self, device: torch.device | str) -> "Attributes":
        """The same on another device."""
        return Attributes(*(x.to(device) for x in self))

    def select(self, rows: Tensor | slice) -> "Attributes":
        """The scenes that ``rows`` (a mask, a slice or indices) chooses."""
        return Attributes(*(x[rows] for x in self))


# Which colours, places and grounds


def held_out_colors(things: int = len(THINGS)) -> Tensor:
    """The colour in which training never shows each kind, (KINDS,): one of twelve."""
    garments = torch.tensor([list(COLORS).index(name) for name in HELD_OUT])
    return torch.cat([garments, (5 * torch.arange(things) + 2) % len(COLORS)])


def held_out_places(things: int = len(THINGS)) -> Tensor:
    """The place where training never shows a kind, (KINDS,); −1 for two of three.

    That is a twelfth of the pairs of kind and place.
    """
    kinds = torch.arange(GARMENTS + things)
    return torch.where(kinds % 3 == 1, kinds // 3 % 4, -1)


@functools.cache
def ramps() -> Tensor:
    """The darkest and the lightest shade of every colour, (12, 2, 3) in [0, 1]."""
    colors = torch.tensor(list(COLORS.values())).float()
    shades = torch.stack([0.45 * colors, colors + 0.2 * (255 - colors)], 1)
    for name, (dark, light) in RAMPS.items():
        shades[list(COLORS).index(name)] = torch.tensor([[dark], [light]]).float()
    return shades / 255


@dataclass(frozen=True, eq=False)
class Things:
    """Named cut-outs: what scenes show beside garments.

    ``names`` (N); ``cut_outs`` (N, 4, 48, 48): see ``things.cut_outs``.
    """

    names: tuple[str, ...]
    cut_outs: Tensor

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def contrast(self) -> Tensor:
        """Which grounds may lie behind what: booleans (KINDS, 13, 12).

        The second axis counts colours, then a thing's own. Of its own colours six of
        ten opaque pixels must differ from the ground by a fifth of the range in some
        channel; of a thing that fits no ground so, as many as on the best.
        """
        grounds = torch.tensor(list(COLORS.values())) / 255
        middles = ramps().mean(1)
        far = (middles[:, None] - grounds).abs().amax(-1) > 0.2  # (12, 12)
        far = far & ~torch.eye(len(COLORS), dtype=torch.bool)
        pixels, alpha = self.cut_outs[:, :3], self.cut_outs[:, 3] > OPAQUE
        pixels = pixels[:, None] - grounds[:, :, None, None]  # → (N, 12, 3, 48, 48)
        differs = (pixels.abs().amax(2) > 0.2) & alpha[:, None]
        share = differs.sum((2, 3)) / alpha.sum((1, 2)).clamp(min=1)[:, None]
        enough = share >= share.amax(1, keepdim=True).clamp(max=0.6)
        own = torch.cat([torch.zeros(GARMENTS, 12, dtype=torch.bool), enough])
        tinted = far.expand(len(own), -1, -1)
        return torch.cat([tinted, own[:, None]], 1)

    @functools.cached_property
    def layers(self) -> Tensor:
        """Of every thing red, green, blue, shade and alpha, float32.

        (N, 48, 5, 48): rows, layers, columns, as ``render_things`` multiplies them. The
        shade is the luminance, stretched over [0, 1] with a mean near 0.6: where it
        lies between a tint's darkest and lightest. All are multiplied by alpha.
        """
        colors, alpha = self.cut_outs[:, :3], self.cut_outs[:, 3]
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        gray = (colors * weights).sum(1) / alpha.clamp(min=1e-3)
        shades = [_stretched(g, a) for g, a in zip(gray, alpha, strict=True)]
        shade = torch.stack(shades) * alpha
        whole = torch.cat([colors, torch.stack([shade, alpha], 1)], 1)
        return whole.transpose(1, 2).contiguous()


def _stretched(gray: Tensor, alpha: Tensor) -> Tensor:
    inside = gray[alpha > OPAQUE]
    inside = inside if len(inside) else gray.flatten()
    low, high = inside.quantile(0.02), inside.quantile(0.98)
    span = (high - low).clamp(min=0.15)
    mean = ((inside - low) / span).clamp(0, 1).mean().clamp(0.05, 0.95)
    power = (torch.tensor(0.6).log() / mean.log()).clamp(0.5, 2)
    return ((gray - low) / span).clamp(0, 1) ** power


@functools.cache
def shipped_things() -> Things:
    """The everyday things that ship with the package."""
    return Things(THINGS, cut_outs())


def _choose(u: Tensor, n: Tensor | int) -> Tensor:
    """A whole number in [0, n) from ``u`` in [0, 1)."""
    return (u * n).long()


def _pick(u: Tensor, allowed: Tensor) -> Tensor:
    """One of the columns that ``allowed`` (B, N) marks, by numbers ``u`` (B, N)."""
    return u.masked_fill(~allowed, -1).argmax(1)


def draw_attributes(
    u: Tensor,
    held_out: str | None = "",
    layouts: tuple[float, ...] = SHARES,
    garments: float = GARMENT_SHARE,
    things: Things | None = None,
) -> Attributes:
    """Attributes from uniform numbers (B, 33).

    ``held_out``: "" draws no pair that training never shows, "colors" or "places" one
    such pair in the first group, None any pairs.
    """
    device, things = u.device, things or shipped_things()
    bounds = torch.tensor(layouts, device=device).cumsum(0)[:-1]
    layout = (u[:, :1] >= bounds).sum(1)
    counts = torch.tensor(LAYOUTS, device=device)[layout]
    is_garment = u[:, 1:3] < garments
    kinds = torch.where(
        is_garment,
        _choose(u[:, 3:5], GARMENTS),
        GARMENTS + _choose(u[:, 3:5], len(things)),
    )
    if held_out == "places":
        with_place = (held_out_places(len(things)) >= 0).nonzero()[:, 0].to(device)
        few = with_place[with_place < GARMENTS]
        many = with_place[with_place >= GARMENTS]
        first = torch.where(
            is_garment[:, 0],
            few[_choose(u[:, 3], len(few))],
            many[_choose(u[:, 3], len(many))],
        )
        kinds = torch.stack([first, kinds[:, 1]], 1)
    held = held_out_colors(len(things)).to(device)[kinds]
    colors = _draw_colors(u[:, 5:9], held, is_garment, held_out)
    same = (kinds[:, 0] == kinds[:, 1]) & (colors[:, 0] == colors[:, 1])
    second = torch.where(kinds[:, 1] < GARMENTS, 0, GARMENTS)  # the first of its sort
    size = torch.where(kinds[:, 1] < GARMENTS, GARMENTS, len(things))
    other = second + (kinds[:, 1] - second + 1) % size
    kinds = torch.stack([kinds[:, 0], torch.where(same, other, kinds[:, 1])], 1)
    if held_out == "":  # the other kind may not be had in this colour
        banned = held_out_colors(len(things)).to(device)[kinds] == colors
        colors = torch.where(banned, (colors + 1) % len(COLORS), colors)
    absent = counts == 0
    held = held_out_places(len(things)).to(device)[kinds]
    place = _draw_places(u[:, 9:19], layout, held, held_out)
    allowed = things.contrast.to(device)[kinds, colors]  # −1 is the last: (B, 2, 12)
    allowed = (allowed | absent[:, :, None]).all(1)
    ground = _pick(u[:, 19:31], allowed)
    sizes = _draw_sizes(u[:, 31], layout, place)
    kinds, colors = kinds.masked_fill(absent, -1), colors.masked_fill(absent, -1)
    return Attributes(kinds, counts, colors, sizes, place, ground)


def _draw_colors(
    u: Tensor, held: Tensor, is_garment: Tensor, held_out: str | None
) -> Tensor:
    """Colours (B, 2) from ``u`` (B, 4); half of the things keep their own, −1."""
    if held_out is None:
        colors = _choose(u[:, :2], len(COLORS))
    else:  # eleven colours: those from the held one on are one further
        colors = _choose(u[:, :2], len(COLORS) - 1)
        colors = colors + (colors >= held)
    colors = torch.where(is_garment | (u[:, 2:] < 0.5), colors, -1)
    if held_out == "colors":
        colors = torch.stack([held[:, 0], colors[:, 1]], 1)
    return colors


def _draw_places(
    u: Tensor, layout: Tensor, held: Tensor, held_out: str | None
) -> Tensor:
    """The first group's places (B,) from ``u`` (B, 10).

    One item alone lies off the middle in two scenes of five; two groups lie left,
    right, above or below; several of a kind have no place. ``held`` (B, 2): never
    trained.
    """
    one, two = layout == 0, (layout == 1) | (layout == 4)
    numbers = torch.arange(4, device=u.device)
    opposite = held[:, 1] ^ 1  # of left right, of above below
    opposite = torch.where((held[:, 1] >= 0) & two, opposite, -1)
    banned = (numbers == held[:, :1]) | (numbers == opposite[:, None])
    if held_out is None:
        banned = torch.zeros_like(banned)
    # a corner is at two sides: (B, 4) → (B, 8)
    left, right, above, below = banned.unbind(1)
    corners = [above | left, above | right, below | left, below | right]
    allowed = ~torch.cat([banned, torch.stack(corners, 1)], 1)
    allowed = allowed & (one[:, None] | (torch.arange(8, device=u.device) < 4))
    place = _pick(u[:, :8], allowed)
    place = torch.where(two | (one & (u[:, 8] < 0.4)), place, MIDDLE)
    if held_out == "places":
        place = held[:, 0]
    return place


def _draw_sizes(u: Tensor, layout: Tensor, place: Tensor) -> Tensor:
    """Sizes (B, 2) from ``u`` (B,): one alone in the middle may be small or big."""
    alone = (layout == 0) & (place == MIDDLE)
    size = torch.where(u < 0.12, 0, torch.where(u < 0.24, 2, 1))
    return torch.stack([torch.where(alone, size, 1), torch.ones_like(size)], 1)


# Where the items lie


def item_groups(attributes: Attributes) -> Tensor:
    """The group of each of three items, (B, 3): 0, 1, or −1 for one that is not."""
    first, second = attributes.counts.unbind(1)
    slot = torch.arange(3, device=first.device)
    group = (slot >= first[:, None]).long()
    return group.masked_fill(slot >= (first + second)[:, None], -1)


def arrange(attributes: Attributes, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sides (B, 3) and centres (B, 3, 2; x and y) of the items in pixels.

    One item alone in the middle is large, unless it is called small. All others are
    small and lie on nine places: what is alike is alike in latents and in patches, too,
    and there is less to learn than with items anywhere. ``u`` (B,) chooses at which
    side of the others the first of several of a kind lies.
    """
    n, place, device = attributes.counts.sum(1), attributes.place, u.device
    large = (n == 1) & (place == MIDDLE) & (attributes.sizes[:, 0] > 0)
    sides = torch.where(large, LARGE, SMALL)[:, None].expand(-1, 3)
    side = torch.where(place < 4, place, _choose(u, 4))
    two = torch.stack([side, side ^ 1, side ^ 1], 1)  # left and right, above and below
    three = torch.tensor(THREE, device=device)[side]
    one = place[:, None].expand(-1, 3)
    slots = torch.stack([one, two, three])[n - 1, torch.arange(len(n), device=device)]
    directions = torch.tensor(DIRECTIONS, device=device)[slots]
    return sides, IMAGE_SIZE / 2 + IMAGE_SIZE / 4 * directions


# Pictures


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = −1/2 (1981, equation 15)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def resampling(centre: Tensor, side: Tensor, n: int) -> Tensor:
    """Matrices (…, 64, n) that place n samples over ``side`` pixels at ``centre``.

    Where the samples are closer than pixels the kernel is as wide as a pixel.
    """
    pixels = torch.arange(IMAGE_SIZE, device=side.device) + 0.5
    step = (n / side)[..., None]  # samples a pixel
    position = (pixels - centre[..., None]) * step + n / 2 - 0.5
    distance = position[..., None] - torch.arange(n, device=side.device)
    wide = step.clamp(min=1)[..., None]
    return cubic(distance / wide) / wide


def render_things(
    source: Tensor, colors: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Colours (N, 3, 64, 64), multiplied by alpha, and alpha (N, 1, 64, 64) of things.

    Args:
        source: their ``layers`` (N, 48, 5, 48).
        colors: in COLORS, −1 for their own (N,).
        rows, columns: (N, 64, 48), see ``resampling``.
    """
    # (N, 48·5, 48) · (N, 48, 64) → (N, 48, 5·64)
    drawn = (source.flatten(1, 2) @ columns.mT).view(len(source), SIZE, -1)
    # (N, 64, 48) · (N, 48, 5·64) → (N, 64, 5, 64) → (N, 5, 64, 64)
    drawn = (rows @ drawn).unflatten(2, (5, -1)).transpose(1, 2).clamp(0, 1)
    alpha = drawn[:, 4:]
    dark, light = ramps().to(rows.device)[colors][..., None, None].unbind(1)
    tinted = dark * alpha + (light - dark) * drawn[:, 3:4]
    own = (colors < 0)[:, None, None, None]
    return torch.where(own, drawn[:, :3].minimum(alpha), tinted), alpha


def render_garments(
    gray: Tensor, colors: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of garments, grey pictures (N, 28, 28): both shading and opacity."""
    gray = (rows @ gray @ columns.mT).clamp(0, 1)[:, None]  # → (N, 1, 64, 64)
    t = ((gray - 0.03) / 0.2).clamp(0, 1)
    alpha = t * t * (3 - 2 * t)
    dark, light = ramps().to(rows.device)[colors][..., None, None].unbind(1)
    return alpha * (dark + (light - dark) * gray), alpha


@dataclass(frozen=True)
class SceneBatch:
    """Pictures (B, 3, 64, 64) in [−1, 1] and what they show."""

    images: Tensor
    attributes: Attributes
    sides: Tensor  # (B, 3), in pixels
    centres: Tensor  # (B, 3, 2), x and y in pixels
    masks: Tensor  # (B, 3, 64, 64): opacity of each item, in [0, 1]


class World:
    """Scenes of one split, each a pure function of (seed, index).

    Args:
        split: "train" or "test", the garments to draw with. Things are the same.
        folder: where Fashion-MNIST is (see ``fashion_mnist``).
        held_out: "" for no pair never trained, "colors" or "places" for one in every
            scene, None for any pairs.
        layouts: how often each of LAYOUTS; ``garments``: their share among groups.
        things: what to show beside garments; those that ship if None.
    """

    def __init__(
        self,
        split: str,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        held_out: str | None = "",
        layouts: tuple[float, ...] = SHARES,
        garments: float = GARMENT_SHARE,
        things: Things | None = None,
    ) -> None:
        self.wardrobe = garments_by_class(split, folder, device)
        self.seed, self.held_out = seed, held_out
        self.layouts, self.garments = layouts, garments
        self.things = things or shipped_things()
        self.layers = self.things.layers.to(device)

    @property
    def device(self) -> torch.device:
        """Where the cut-outs are."""
        return self.layers.device

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each number of a kind stands for: garments, then things."""
        return CLASSES + self.things.names

    @property
    def content(self) -> tuple:
        """All that decides what ``batch`` returns."""
        return (
            *self.wardrobe.content,
            self.things.layers,
            self.seed,
            self.held_out,
            self.layouts,
            self.garments,
        )

    def attributes(self, indices: Tensor) -> Attributes:
        """What the scenes with the numbers ``indices`` (B,) show."""
        u = uniform(self.seed, indices, 33, self.device)
        how = self.held_out, self.layouts, self.garments, self.things
        return draw_attributes(u, *how)

    @torch.no_grad()
    def batch(self, indices: Tensor) -> SceneBatch:
        """The scenes with the numbers ``indices`` (B,), any non-negative integers."""
        attributes = self.attributes(indices)
        u = uniform(self.seed, indices, 64, self.device)[:, 36:]
        sides, centres = arrange(attributes, u[:, 3])
        groups = item_groups(attributes)
        kinds = attributes.kinds.gather(1, groups.clamp(min=0))
        colors = attributes.colors.gather(1, groups.clamp(min=0))
        grounds = torch.tensor(list(COLORS.values()), device=self.device) / 255
        images = grounds[attributes.ground][..., None, None]
        images = images.expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE).clone()
        masks = images.new_zeros(len(images), 3, IMAGE_SIZE, IMAGE_SIZE)
        for i in range(3):
            present, garment = groups[:, i] >= 0, kinds[:, i] < GARMENTS
            for rows in ((present & garment).nonzero(), (present & ~garment).nonzero()):
                if len(rows := rows[:, 0]):
                    chosen = kinds[rows, i], colors[rows, i], u[rows, 12 + i]
                    where = sides[rows, i], centres[rows, i]
                    drawn, alpha = self.draw(*chosen, *where)
                    images[rows] = drawn + (1 - alpha) * images[rows]
                    masks[rows, i] = alpha[:, 0]
        return SceneBatch(images * 2 - 1, attributes, sides, centres, masks)

    def draw(
        self, kinds: Tensor, colors: Tensor, u: Tensor, sides: Tensor, centres: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Items that are all garments or all things: see ``render_things``.

        ``u`` (N,) chooses the garment's picture.
        """
        is_garment = bool(kinds[0] < GARMENTS)
        n = 28 if is_garment else SIZE
        rows = resampling(centres[:, 1], sides, n)
        columns = resampling(centres[:, 0], sides, n)
        if is_garment:
            gray = self.wardrobe.pick(kinds, u)
            return render_garments(gray, colors, rows, columns)
        source = self.layers[kinds - GARMENTS]
        return render_things(source, colors, rows, columns)

"""The training data: captioned colour scenes composed from Fashion-MNIST.

One garment, or two side by side or one above the other, each in one of eight colours
on a plain background of another colour. A scene is a pure function of (seed, index):
nothing is stored, and any batch can be made anywhere, in any order.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minidiff.data import scenes
from minidiff.data.fashion_mnist import CLASSES, fashion_mnist
from minidiff.data.rng import uniform
from minidiff.files.disk import write_text
from minidiff.files.pictures import from_bytes, save_sheet, to_tensor

SAMPLES = Path(__file__).parent.parent / "pretrained" / "scenes"
IMAGE_SIZE = 64

COLORS = dict(islice(scenes.COLORS.items(), 8))
# The first six colours serve as backgrounds too, under the same numbers.
BACKGROUNDS = dict(islice(COLORS.items(), 6))
BACKGROUNDS |= {name: scenes.COLORS[name] for name in ("gray", "black")}
# Pairs that training never shows, to measure composition.
HELD_OUT = (
    ("blue", "t-shirt"),
    ("red", "trousers"),
    ("pink", "pullover"),
    ("green", "dress"),
    ("purple", "sandal"),
    ("yellow", "sneaker"),
    ("orange", "bag"),
    ("white", "ankle boot"),
)
LAYOUTS = ("single", "beside", "stacked")
TEMPLATES = {
    "single": (
        "{A} on {background}",
        "a photo of {A} on {background}",
        "{a} with {background}",
        "a picture of {A} against {background}",
    ),
    "beside": (
        "{A} left of {B} on {background}",
        "{B} right of {A} on {background}",
        "a photo of {A} left of {B} on {background}",
        "{a} left and {b} right on {background}",
    ),
    "stacked": (
        "{A} above {B} on {background}",
        "{B} below {A} on {background}",
        "a photo of {A} above {B} on {background}",
        "{a} above and {b} below on {background}",
    ),
}
SINGLES = 4 * len(COLORS) * len(CLASSES) * len(BACKGROUNDS)
NUM_CAPTIONS = SINGLES + 4 * 2 * (len(COLORS) * len(CLASSES)) ** 2 * len(BACKGROUNDS)


class Attributes(NamedTuple):
    """What scenes show, as int64 tensors; the first garment is left or above.

    Of a single garment, the second column of ``garments`` and ``colors`` is −1.
    """

    layout: Tensor  # (B,): number in LAYOUTS
    garments: Tensor  # (B, 2): numbers in CLASSES
    colors: Tensor  # (B, 2): numbers in COLORS
    background: Tensor  # (B,): number in BACKGROUNDS

    def to(self, device: torch.device | str) -> "Attributes":
        """The same on another device."""
        return Attributes(*(x.to(device) for x in self))

    def select(self, rows: Tensor | slice) -> "Attributes":
        """The scenes that ``rows`` (a mask, a slice or indices) chooses."""
        return Attributes(*(x[rows] for x in self))


# Captions


def caption_ids(attributes: Attributes, templates: Tensor) -> Tensor:
    """One number in [0, NUM_CAPTIONS) for every distinct caption, (B,)."""
    layout, garments, colors, background = attributes
    pair = (colors * len(CLASSES) + garments).clamp(min=0)  # (B, 2)
    pairs, grounds = len(COLORS) * len(CLASSES), len(BACKGROUNDS)
    single = (templates * pairs + pair[:, 0]) * grounds + background
    double = (templates * 2 + layout - 1) * pairs + pair[:, 0]
    double = (double * pairs + pair[:, 1]) * grounds + background
    return torch.where(layout == 0, single, SINGLES + double)


def caption_attributes(ids: Tensor) -> tuple[Attributes, Tensor]:
    """The inverse of ``caption_ids``: attributes and templates."""
    pairs, grounds = len(COLORS) * len(CLASSES), len(BACKGROUNDS)
    single = ids < SINGLES
    rest = torch.where(single, ids, ids - SINGLES)
    background, rest = rest % grounds, rest // grounds
    second = torch.where(single, 0, rest % pairs)
    rest = torch.where(single, rest, rest // pairs)
    first, rest = rest % pairs, rest // pairs
    layout = torch.where(single, 0, 1 + rest % 2)
    pair = torch.stack([first, second], 1)  # 2 × (B) → (B, 2)
    absent = torch.stack([torch.zeros_like(single), single], 1)
    garments = (pair % len(CLASSES)).masked_fill(absent, -1)
    colors = (pair // len(CLASSES)).masked_fill(absent, -1)
    attributes = Attributes(layout, garments, colors, background)
    return attributes, torch.where(single, rest, rest // 2)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


NOUNS = [[f"{color} {garment}" for garment in CLASSES] for color in COLORS]
GROUNDS = [f"a {name} background" for name in BACKGROUNDS]


def scene_captions(attributes: Attributes, templates: Tensor) -> list[str]:
    """The scenes in words, each by the template (B,) in 0…3 that is asked for."""
    rows = zip(*(x.tolist() for x in (*attributes, templates)), strict=True)
    return [_words(*row) for row in rows]


def _words(
    layout: int,
    garments: Sequence[int],
    colors: Sequence[int],
    background: int,
    template: int,
) -> str:
    a, b = (
        NOUNS[color][number] for color, number in zip(colors, garments, strict=True)
    )
    return TEMPLATES[LAYOUTS[layout]][template].format(
        a=a, b=b, A=_article(a), B=_article(b), background=GROUNDS[background]
    )


def all_captions() -> list[str]:
    """Every caption of the grammar: entry i is the caption with id i (1 second)."""
    return scene_captions(*caption_attributes(torch.arange(NUM_CAPTIONS)))


def token_table(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids of the captions ``texts``, int32 (N, tokenizer.model_max_length).

    Both kinds of tokenizer split at spaces first, so each word is encoded once;
    the result is compared with ``tokenizer`` itself on a sample of captions.
    """
    length = tokenizer.model_max_length
    ends = tokenizer.encode("")  # the special tokens alone
    start, end, pad = ends[:-1], ends[-1:], tokenizer.pad_token_id
    vocabulary = {word for text in texts for word in text.split()}
    ids = {w: tokenizer.encode(w)[len(start) : -1] for w in sorted(vocabulary)}

    def table(texts: list[str]) -> Tensor:
        rows = [start + [i for w in t.split() for i in ids[w]] + end for t in texts]
        lengths = torch.tensor([len(row) for row in rows])
        if lengths.max() > length:
            raise ValueError(
                f"a caption has {lengths.max()} tokens, more than {length}"
            )
        filled = torch.full((len(rows), length), pad, dtype=torch.int32)
        values = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        filled[torch.arange(length) < lengths[:, None]] = values
        return filled

    if not torch.equal(table(texts[::997]).long(), tokenizer(texts[::997])):
        raise ValueError("the tokenizer does not encode captions word by word")
    return table(texts)


# Scenes


def _choose(u: Tensor, n: Tensor | int) -> Tensor:
    """A whole number in [0, n) from ``u`` in [0, 1)."""
    return (u * n).long()


def held_out_pairs(device: torch.device | str | None = None) -> Tensor:
    """The colour that is never trained of each class (10,); len(COLORS) if none."""
    names = {garment: list(COLORS).index(color) for color, garment in HELD_OUT}
    return torch.tensor([names.get(c, len(COLORS)) for c in CLASSES], device=device)


def draw_garments(
    u: Tensor, two_garments: float, held_out: bool | None
) -> tuple[Attributes, Tensor]:
    """Attributes and caption templates from uniform numbers (B, 16).

    ``held_out`` asks for exactly one garment with a pair never trained (True), for none
    (False), or for any pairs (None).
    """
    held = held_out_pairs(u.device)
    if held_out is None:
        held = torch.full_like(held, len(COLORS))
    two = u[:, 0] < two_garments
    layout = two * (1 + _choose(u[:, 1], 2))
    garments = _choose(u[:, 2:4], len(CLASSES))  # (B, 2)
    slot = two & (u[:, 6] < 0.5)
    odd = torch.stack([~slot, slot], 1) & bool(held_out)  # (B, 2): never trained
    if held_out:
        chosen = (held < len(COLORS)).nonzero().flatten()  # classes with such a pair
        garments = torch.where(odd, chosen[_choose(u[:, 2:4], len(chosen))], garments)
    banned = held[garments]
    colors = _choose(u[:, 4:6], len(COLORS) - (banned < len(COLORS)).long())
    colors = torch.where(odd, banned, colors + (colors >= banned))
    absent = torch.stack([torch.zeros_like(two), ~two], 1)
    garments, colors = garments.masked_fill(absent, -1), colors.masked_fill(absent, -1)
    # A garment's colour is no background: (B, 2, 1) = (6) → (B, 6) → (B, 8)
    taken = (colors[:, :, None] == torch.arange(6, device=u.device)).any(1)
    background = u[:, 8:16].masked_fill(F.pad(taken, (0, 2)), -1).argmax(1)
    return Attributes(layout, garments, colors, background), _choose(u[:, 7], 4)


def _resampling(centre: Tensor, size: Tensor, n: int) -> Tensor:
    """Matrices (…, 64, n) that place n samples over ``size`` pixels at ``centre``."""
    pixels = torch.arange(IMAGE_SIZE, device=size.device) + 0.5
    position = (pixels - centre[..., None]) * (n / size[..., None]) + n / 2 - 0.5
    return scenes.cubic(position[..., None] - torch.arange(n, device=size.device))


def place(u: Tensor, layout: Tensor) -> tuple[Tensor, Tensor]:
    """Size and centre (x, y) of both garments in pixels: (B, 2) and (B, 2, 2).

    One garment measures 48 to 56 pixels, two measure 30 to 32 each in its half.
    ``u`` (B, 6): uniform numbers, two for the sizes, four for the positions.
    """
    single = (layout == 0)[:, None]
    size = torch.where(single, 48 + 8 * u[:, :2], 30 + 2 * u[:, :2])
    sign = torch.tensor([-16.0, 16.0], device=u.device)
    middle = torch.stack([sign * (layout == i)[:, None] for i in (1, 2)], -1)
    room = torch.where(middle != 0, 32, 64) - size[..., None]  # (B, 2, 2)
    jitter = (u[:, 2:].unflatten(1, (2, 2)) - 0.5) * room.clamp(max=10)
    return size, 32 + middle + jitter


def render(
    gray: Tensor, attributes: Attributes, size: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw garments ``gray`` (B, 2, 28, 28) in [0, 1] in their colours and places.

    The grey values become both shading and opacity. Returns pictures (B, 3, 64, 64)
    in [−1, 1] and each garment's opacity (B, 2, 64, 64) in [0, 1].
    """
    rows = _resampling(centre[..., 1], size, 28)  # (B, 2, 64, 28)
    columns = _resampling(centre[..., 0], size, 28)
    # (B, 2, 64, 28) · (B, 2, 28, 28) · (B, 2, 28, 64) → (B, 2, 64, 64)
    gray = (rows @ gray @ columns.mT).clamp(0, 1)[:, :, None]
    t = ((gray - 0.03) / 0.2).clamp(0, 1)
    present = (attributes.garments >= 0)[:, :, None, None, None]
    alpha = t * t * (3 - 2 * t) * present
    tints = torch.tensor(list(COLORS.values()), device=gray.device) / 255
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=gray.device) / 255
    cloth = tints[attributes.colors][..., None, None] * (0.35 + 0.65 * gray)
    image = grounds[attributes.background][..., None, None]  # (B, 3) → (B, 3, 1, 1)
    for i in range(2):
        image = image + alpha[:, i] * (cloth[:, i] - image)
    return image * 2 - 1, alpha.squeeze(2)


@dataclass(frozen=True)
class SceneBatch:
    """Pictures (B, 3, 64, 64) in [−1, 1] with what they show and how it is said."""

    images: Tensor
    attributes: Attributes
    templates: Tensor
    masks: Tensor  # (B, 2, 64, 64): opacity of each garment, in [0, 1]

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions as strings (waits for the device)."""
        return scene_captions(self.attributes, self.templates)

    @property
    def caption_ids(self) -> Tensor:
        """The captions as numbers (B,), rows of a ``token_table``."""
        return caption_ids(self.attributes, self.templates)

    @property
    def meanings(self) -> Tensor:
        """One number (B,) for all captions that say the same."""
        return caption_ids(self.attributes, torch.zeros_like(self.templates))


class Scenes:
    """Scenes of one split, each a pure function of (seed, index).

    Args:
        split: "train" or "test", the garments to draw with.
        folder: where the data set is (see ``fashion_mnist``).
        two_garments: the share of scenes with two garments.
        held_out: does one garment of every scene have a pair never trained (True),
            none (False), or is every pair as likely as any (None)?
    """

    def __init__(
        self,
        split: str,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        two_garments: float = 0.5,
        held_out: bool | None = False,
    ) -> None:
        images, labels = fashion_mnist(split, folder)
        order = labels.argsort(stable=True)
        gray = images[order].float()
        # (N, 28, 28) → (N, 1, 1): each garment's brightest value becomes one
        self.gray = (gray / gray.amax((1, 2), keepdim=True)).to(device)
        self.sizes = labels.bincount(minlength=len(CLASSES)).to(device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.seed, self.two_garments, self.held_out = seed, two_garments, held_out

    @property
    def device(self) -> torch.device:
        """Where the garments are."""
        return self.gray.device

    @property
    def content(self) -> tuple:
        """All that decides what ``batch`` returns."""
        kind = type(self).__name__
        return self.gray, kind, self.seed, self.two_garments, self.held_out

    def all_captions(self) -> list[str]:
        """Every caption: entry i is the one with number i."""
        return all_captions()

    @torch.no_grad()
    def batch(self, indices: Tensor) -> SceneBatch:
        """The scenes with the numbers ``indices`` (B,), any non-negative integers."""
        u = uniform(self.seed, indices, 24, self.gray.device)
        attributes, templates = draw_garments(u, self.two_garments, self.held_out)
        garments = attributes.garments.clamp(min=0)
        size, centre = place(u[:, 18:], attributes.layout)
        gray = self.pick(garments, u[:, 16:18])
        images, masks = render(gray, attributes, size, centre)
        return SceneBatch(images, attributes, templates, masks)

    def pick(self, garments: Tensor, u: Tensor) -> Tensor:
        """A grey picture (…, 28, 28) of each class in ``garments``, chosen by ``u``."""
        return self.gray[self.starts[garments] + _choose(u, self.sizes[garments])]

    def caption_pairs(self, indices: Tensor) -> Tensor:
        """The numbers of two captions of each scene that say the same, (B, 2)."""
        u = uniform(self.seed, indices, 16)
        attributes, templates = draw_garments(u, self.two_garments, self.held_out)
        both = templates, other_templates(templates, self.seed, indices)
        return torch.stack([caption_ids(attributes, t) for t in both], 1)


def other_templates(templates: Tensor, seed: int, indices: Tensor) -> Tensor:
    """Of the four templates one that is not the given one (B,)."""
    return (templates + 1 + _choose(uniform(seed + 1, indices, 1)[:, 0], 3)) % 4


@dataclass(frozen=True)
class GarmentBatch:
    """Pictures (B, 3, 64, 64) in [−1, 1], their classes (B,) and caption templates."""

    images: Tensor
    meanings: Tensor
    templates: Tensor

    @property
    def captions(self) -> list[str]:
        """The captions as strings."""
        texts = garment_captions()
        return [texts[i] for i in self.caption_ids.tolist()]

    @property
    def caption_ids(self) -> Tensor:
        """The captions as numbers (B,), rows of a ``token_table``."""
        return self.templates * len(CLASSES) + self.meanings


def garment_captions() -> list[str]:
    """Every class by every template: "a dress", "a photo of a dress", "dress", …"""
    templates = ("{A}", "a photo of {A}", "{a}", "a picture of {A}")
    return [t.format(a=c, A=_article(c)) for t in templates for c in CLASSES]


class Garments(Scenes):
    """Fashion-MNIST as it is: one grey garment on black, its class for a caption.

    The pictures are enlarged twice and lie in the middle of 64 × 64 pixels. Each is a
    pure function of (seed, index) too; the number of garments does not apply.
    """

    def all_captions(self) -> list[str]:
        return garment_captions()

    @torch.no_grad()
    def batch(self, indices: Tensor) -> GarmentBatch:  # type: ignore[override]
        u = uniform(self.seed, indices, 3, self.gray.device)
        garments = _choose(u[:, 0], len(CLASSES))
        gray = self.pick(garments, u[:, 1])[:, None]  # → (B, 1, 28, 28)
        large = F.interpolate(gray, scale_factor=2, mode="bicubic").clamp(0, 1)
        images = F.pad(large, (4, 4, 4, 4)).expand(-1, 3, -1, -1)  # → (B, 3, 64, 64)
        return GarmentBatch(images * 2 - 1, garments, _choose(u[:, 2], 4))

    def caption_pairs(self, indices: Tensor) -> Tensor:
        u = uniform(self.seed, indices, 3)
        garments, templates = _choose(u[:, 0], len(CLASSES)), _choose(u[:, 2], 4)
        both = templates, other_templates(templates, self.seed, indices)
        return torch.stack([t * len(CLASSES) + garments for t in both], 1)


SCENES = {"composed": Scenes, "plain": Garments}


def prompts(
    n: int, kind: str = "one", held_out: bool = False, seed: int = 1
) -> tuple[list[str], Attributes]:
    """``n`` captions with "one" or "two" garments, and what their pictures must show.

    ``held_out`` asks for one garment whose pair was never trained. These are the
    attributes of ``Scenes(…, two_garments=0 or 1, held_out, seed)`` at 0 … n − 1.
    """
    if kind not in ("one", "two"):
        raise ValueError(f"kind is {kind!r}, expected 'one' or 'two'")
    u = uniform(seed, torch.arange(n), 16)
    attributes, templates = draw_garments(u, float(kind == "two"), held_out)
    return scene_captions(attributes, templates), attributes


# Samples


def sample_scenes() -> tuple[Tensor, list[str]]:
    """Sixteen scenes of the test split that ship with the package.

    Returns pictures (16, 3, 64, 64) in [−1, 1] and their captions; the first shows
    "a red dress on a blue background". No data set is needed.
    """
    sheet = from_bytes(to_tensor(Image.open(SAMPLES / "scenes.png")))
    texts = json.loads((SAMPLES / "scenes.json").read_text())["captions"]
    # (3, 2·64, 8·64) → (3, 2, 64, 8, 64) → (2, 8, 3, 64, 64) → (16, 3, 64, 64)
    tiles = sheet.unflatten(2, (-1, 64)).unflatten(1, (-1, 64))
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous(), texts


def write_samples(folder: str | Path | None, output: Path = SAMPLES) -> None:
    """Make the files that ``sample_scenes`` reads."""
    first = prompts(20_000, seed=0)[0].index("a red dress on a blue background")
    numbers = torch.tensor([first, *range(7)])
    one = Scenes("test", folder, two_garments=0).batch(numbers)
    two = Scenes("test", folder, two_garments=1).batch(torch.arange(8, 16))
    images, texts = torch.cat([one.images, two.images]), one.captions + two.captions
    save_sheet((images + 1) / 2, 8, output / "scenes.png")
    text = json.dumps({"captions": texts}, indent=1)
    write_text(output / "scenes.json", text + "\n")


if __name__ == "__main__":
    import sys

    write_samples(sys.argv[1] if sys.argv[1:] else None)

"""How own pictures are learned from: shapes, captions, what is to stay."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.data import rng
from minidiff.data.captioned import read_each, repeats_of, resized
from minidiff.files.pictures import from_bytes, to_tensor
from minidiff.interface.checks import as_texts, check_range
from minidiff.interface.limits import MOST_PICTURES
from minidiff.recipes.features import (
    Features,
    FlowBatches,
    collect,
    encode_latents,
    epochs,
)
from minidiff.sampling import Pipeline
from minidiff.training import Batch

MOST_HELD_OUT = 32  # pictures: each costs eight looks at a validation
WIDEST = 2.0  # a side of a bucket over the other


@dataclass(frozen=True)
class PictureConfig:
    """What is made of a folder of captioned pictures.

    Args:
        crop: the pictures' middle, or all of them squeezed.
        buckets: each keeps about its shape, at the model's usual area.
        trigger: words before every caption, to call the style by.
        prior: a prompt for what is to stay as it is. ``prior_pictures`` that the model
            draws of it before it learns are every second sample.
        prompts: drawn at each validation, at fixed seeds; else four captions.

    Raises ValueError for words that say nothing or are no text, and for a number of
    pictures that cannot be.
    """

    crop: bool = True
    buckets: bool = False
    trigger: str = ""
    prior: str = ""
    prior_pictures: int = 50
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        texts = {"--trigger": [self.trigger], "--prior": [self.prior]}
        for name, given in (texts | {"--prompt": [*self.prompts]}).items():
            if any(text and not text.strip() for text in as_texts(name, given or "")):
                raise ValueError(f"{name} is empty; expected words")
        check_range("--prior-pictures", self.prior_pictures, 1, MOST_PICTURES)


# Shapes


def bucket_sizes(side: int, grid: int, largest: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels, multiples of ``grid`` up to ``largest``.

    For each width the tallest whose area is at most that of a square of ``side``, and
    no side more than twice the other.
    """
    found = []
    for width in range(grid, largest + 1, grid):
        height = min(side**2 // width // grid * grid, largest)
        if height and max(width, height) <= WIDEST * min(width, height):
            found.append((width, height))
    return found


def nearest_bucket(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """The number of the bucket nearest in shape to a picture (width, height)."""
    shape = math.log(size[0] / size[1])
    far = [abs(math.log(width / height) - shape) for width, height in sizes]
    return far.index(min(far))


def shaped(
    picture: Image.Image, size: tuple[int, int], how: PictureConfig
) -> Image.Image:
    """``picture`` of ``size`` (width, height): its middle, or all of it squeezed."""
    if not how.buckets:
        return resized(picture, size[0], how.crop)
    kind = Image.Resampling.BICUBIC
    return ImageOps.fit(picture, size, kind) if how.crop else picture.resize(size, kind)


class Sizes(NamedTuple):
    """In pixels: a usual side, what sides are multiples of, and the longest side."""

    side: int
    grid: int
    largest: int


class Pictures(NamedTuple):
    """Pictures of one shape, their captions, and how often each counts in an epoch."""

    images: Tensor  # uint8 (N, 3, H, W)
    captions: list[str]
    repeats: Tensor  # (N,)


def read_sets(
    folder: Path, captions: dict[str, str], known: Sizes, how: PictureConfig
) -> list[Pictures]:
    """The pictures with ``captions``, those of one shape together.

    ValueError if none can be read.
    """
    sizes = bucket_sizes(*known) if how.buckets else [(known.side, known.side)]
    sets: dict[int, list[tuple[Tensor, str, int]]] = {}
    for name, picture in read_each(folder, captions):
        number = nearest_bucket(picture.size, sizes)
        image = to_tensor(shaped(picture, sizes[number], how))
        text = f"{how.trigger} {captions[name]}".strip()
        sets.setdefault(number, []).append((image, text, repeats_of(name)))
    if not sets:
        raise ValueError(f"{folder}: none of its pictures can be read")
    columns = (zip(*sets[number], strict=True) for number in sorted(sets))
    return [Pictures(torch.stack(x), list(t), torch.tensor(n)) for x, t, n in columns]


# Encoded


def encode_pictures(
    pipe: Pipeline, images: Tensor, captions: list[str], ids: bool = False
) -> Features:
    """Pictures, uint8 (N, 3, H, W), and captions as ``pipe``'s encoders make them.

    All is in main memory: megabytes for each picture. ``ids``: with what both CLIPs
    read, for encoders that learn.
    """
    pictures = (from_bytes(x).to(pipe.device, pipe.dtype) for x in images.split(1))
    latents = encode_latents(pipe.vae, pictures, len(images), torch.empty(0))
    return features_of(pipe, latents, captions, ids)


def features_of(
    pipe: Pipeline, latents: Tensor, captions: list[str], ids: bool = False
) -> Features:
    """Latents (N, C, h, w) and their captions, each encoded once."""
    rows = {text: i for i, text in enumerate(dict.fromkeys(["", *captions]))}
    texts = list(rows)
    parts = (texts[i : i + 32] for i in range(0, len(texts), 32))  # T5 may be streamed
    pairs = (tuple(x.cpu() for x in pipe.encode_prompt(part)) for part in parts)
    place = torch.tensor([rows[caption] for caption in captions])
    read = torch.stack([t(texts) for t in pipe.tokenizers[:2]], 1) if ids else None
    context, pooled = collect(len(texts), pairs)
    return Features(latents, place, context, pooled, read)


@torch.no_grad()
def prior_latents(pipe: Pipeline, prompt: str, count: int, seed: int) -> Tensor:
    """What the model draws of ``prompt``, latents (count, C, h, w), one at a time."""
    guided = pipe.defaults.guidance_scale > 1
    text = pipe.encode_prompt([""] * guided + [prompt])
    noise = (pipe.prepare_latents(1, seed=seed + i) for i in range(count))
    return torch.cat([pipe.denoise(x, *text).cpu().float() for x in noise])


# Batches


def split_pictures(
    sets: Sequence[Features],
) -> tuple[list[Features], list[Features]]:
    """Of each set what is learned from, and what is not: every tenth picture of all
    sets together, 1 to 32.

    One picture alone is learned from.
    """
    sizes = [len(part) for part in sets]
    n = sum(sizes)
    count = min(MOST_HELD_OUT, max(1, n // 10)) if n > 1 else 0
    held = torch.zeros(n, dtype=torch.bool)
    held[[(i + 1) * n // count - 1 for i in range(count)]] = True
    pairs = list(zip(sets, held.split(sizes), strict=True))
    learned = [part.select(~out) for part, out in pairs]
    return learned, [part.select(out) for part, out in pairs]


@dataclass(frozen=True)
class MixedBatches:
    """Every step from one of ``parts``, drawn by its number: a batch has one shape.

    ``shares``: how often each is drawn; they add up to 1. ``size``: samples a step.
    """

    parts: Sequence[FlowBatches]
    shares: Sequence[float]
    size: int
    seed: int

    def __call__(self, indices: Tensor) -> Batch:
        step = indices[:1].cpu() // self.size
        u = rng.uniform(self.seed, step, 1).item()
        ends = list(itertools.accumulate(self.shares))
        number = next((i for i, end in enumerate(ends) if u < end), len(ends) - 1)
        return self.parts[number](indices)


def mixed_batches(
    learned: Sequence[Features],
    prior: Features | None,
    size: int,
    seed: int,
    drop: float,
    shift: float,
) -> MixedBatches:
    """The sets by their pictures, each as often as it counts; with a ``prior`` that in
    half the steps.

    ``drop`` and ``shift`` as for ``FlowBatches``.
    """

    def batches(part: Features) -> FlowBatches:
        order = epochs(part, seed + 2)
        return FlowBatches(part, order, seed, seed + 1, drop, shift=shift)

    counts, half = [len(part.pool()) for part in learned], 0.5 if prior else 1.0
    shares = [half * count / sum(counts) for count in counts]
    parts = [batches(part) for part in (*learned, *([prior] if prior else []))]
    return MixedBatches(parts, [*shares, 1 - half][: len(parts)], size, seed + 3)

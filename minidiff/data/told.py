"""Scenes of the small model's world with their captions, as training asks for them.

A fixed number of scenes is told, each in two ways that mean the same, so that captions
have numbers: see ``ToldScenes.all_captions``.
"""

import functools
import re
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from minidiff.data.captioned import captions_of
from minidiff.data.language import RANDOM, Dice, Meaning, captions, say
from minidiff.data.rng import fold_in, uniform
from minidiff.data.scenes import GARMENT_SHARE, SceneBatch, Things, World
from minidiff.data.things import cut_out, multiplied
from minidiff.files.pictures import open_picture

TEST = 1  # folded into the seed: test scenes are other scenes than training's
PHRASING, OTHER = 2, 3  # seeds of the words


@dataclass(frozen=True)
class ToldBatch(SceneBatch):
    """A batch of scenes with their captions, these captions' numbers and meanings."""

    captions: list[str]
    caption_ids: Tensor  # (B,)
    meanings: Tensor  # (B,): equal where captions mean the same


class ToldScenes(World):
    """The first scenes of the world, told in words.

    Args:
        told: how many training scenes have captions. ``held``: how many test scenes.
        things: what to show beside garments; those that ship if None. ``garments``:
            their share among groups.
    """

    def __init__(
        self,
        split: str,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        told: int = 2**17,
        held: int = 512,
        things: Things | None = None,
        garments: float = GARMENT_SHARE,
    ) -> None:
        own = fold_in(seed, TEST) if split == "test" else seed
        super().__init__(split, folder, device, own, garments=garments, things=things)
        self.root, self.told, self.held = seed, told, held
        self.first = 2 * told if split == "test" else 0

    @property
    def content(self) -> tuple:
        """All that decides what ``batch`` returns."""
        return (*super().content, self.told, self.held)

    def describe(self, indices: Tensor) -> tuple[list[str], list[Meaning]]:
        """Captions of the scenes ``indices`` (B,) and what they mean."""
        attributes = self.attributes(indices)
        seed = fold_in(self.seed, PHRASING)
        return captions(attributes, seed, indices, called=self.kinds)

    def batch(self, indices: Tensor) -> ToldBatch:
        """The scenes with these numbers, each below ``told`` (of a test ``held``)."""
        scenes = super().batch(indices)
        texts, meanings = self.describe(indices)
        known = {f.name: getattr(scenes, f.name) for f in fields(scenes)}
        numbers = torch.tensor([number(m) for m in meanings], device=self.device)
        return ToldBatch(
            **known,
            captions=texts,
            caption_ids=self.first + indices.to(self.device),
            meanings=numbers,
        )

    def all_captions(self) -> list[str]:
        """Those of the training scenes, once and in other words, then of the tests."""
        first, other = [], []
        for part in torch.arange(self.told).split(2**14):
            seed = fold_in(self.root, PHRASING)
            attributes = self._trained.attributes(part)
            texts, meanings = captions(attributes, seed, part, called=self.kinds)
            numbers = uniform(fold_in(self.root, OTHER), part, RANDOM).tolist()
            pairs = zip(meanings, numbers, strict=True)
            first += texts
            other += [say(meaning, Dice(u)) for meaning, u in pairs]
        return first + other + self._tests.describe(torch.arange(self.held))[0]

    @functools.cached_property
    def _trained(self) -> World:
        return self._with_seed(self.root)

    @functools.cached_property
    def _tests(self) -> "ToldScenes":
        return self._with_seed(fold_in(self.root, TEST))

    def _with_seed(self, seed: int) -> "ToldScenes":
        copy = object.__new__(ToldScenes)
        copy.__dict__ |= self.__dict__ | {"seed": seed}
        return copy

    def caption_pairs(self, indices: Tensor) -> Tensor:
        """The numbers of two captions of each scene that mean the same, (B, 2)."""
        return torch.stack([indices, indices + self.told], 1)


def number(meaning: Meaning) -> int:
    """One number for all captions that mean the same."""
    return zlib.crc32(repr(meaning.canonical()).encode())


@functools.lru_cache(maxsize=1)
def own_things(folder: str) -> Things:
    """The cut-outs of a folder, called by their captions.

    Pictures with transparency, with captions as ``captioned`` reads them: "a cat" or
    "cat". Raises FileNotFoundError or ValueError, naming the file or folder.
    """
    found = captions_of(Path(folder))
    pixels = [multiplied(cut_out(open_picture(Path(folder) / name))) for name in found]
    names: dict[str, str] = {}
    for file, text in found.items():
        name = re.sub(r"^(an?|the)( |$)", "", " ".join(text.lower().split()))
        if not name or re.match(r"(two|three|\d+)\b", name):
            what = f"the caption of {file} is {text!r}"
            raise ValueError(f"{folder}: {what}; expected one thing: a cat")
        if name in names:
            found_twice = f"{names[name]} and {file} are both called {name!r}"
            raise ValueError(f"{folder}: {found_twice}; expected a name for each")
        names[name] = file
    return Things(tuple(names), torch.stack(pixels))

"""Fashion-MNIST as it is: one grey garment on black, its class for a caption."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data.fashion_mnist import CLASSES, garments_by_class
from minidiff.data.language import article
from minidiff.data.rng import uniform

TEMPLATES = ("{A}", "a photo of {A}", "{a}", "a picture of {A}")


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
        """The captions as numbers (B,)."""
        return self.templates * len(CLASSES) + self.meanings


def garment_captions() -> list[str]:
    """Every class by every template: "a dress", "a photo of a dress", "dress", …"""
    return [t.format(a=c, A=article(c)) for t in TEMPLATES for c in CLASSES]


class Garments:
    """Garments of one split, each a pure function of (seed, index).

    The pictures are enlarged twice and lie in the middle of 64 × 64 pixels.

    Args:
        split: "train" or "test".
        folder: where the data set is (see ``fashion_mnist``).
    """

    def __init__(
        self,
        split: str,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.garments, self.seed = garments_by_class(split, folder, device), seed

    @property
    def device(self) -> torch.device:
        """Where the garments are."""
        return self.garments.order.device

    @property
    def content(self) -> tuple:
        """All that decides what ``batch`` returns."""
        return *self.garments.content, self.seed

    def all_captions(self) -> list[str]:
        """Every caption: entry i is the one with number i."""
        return garment_captions()

    def chosen(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes (B,), captions' templates (B,) and what chooses the garment (B,)."""
        u = uniform(self.seed, indices, 3, self.device)
        kinds, templates = (u[:, ::2] * u.new_tensor([len(CLASSES), 4])).long().T
        return kinds, templates, u[:, 1]

    @torch.no_grad()
    def batch(self, indices: Tensor) -> GarmentBatch:
        """The garments with the numbers ``indices`` (B,), any non-negative integers."""
        kinds, templates, u = self.chosen(indices)
        gray = self.garments.pick(kinds, u)[:, None]  # → (B, 1, 28, 28)
        large = F.interpolate(gray, scale_factor=2, mode="bicubic").clamp(0, 1)
        images = F.pad(large, (4, 4, 4, 4)).expand(-1, 3, -1, -1)  # → (B, 3, 64, 64)
        return GarmentBatch(images * 2 - 1, kinds, templates)

    def caption_pairs(self, indices: Tensor) -> Tensor:
        """The numbers of two captions of each garment that say the same, (B, 2)."""
        kinds, templates, _ = self.chosen(indices)
        other = (templates + 1 + indices.to(self.device) % 3) % len(TEMPLATES)
        return torch.stack([t * len(CLASSES) + kinds for t in (templates, other)], 1)

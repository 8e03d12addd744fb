"""What the pipeline shows: a progress bar while it works, and PIL pictures."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def progress_bar(steps: int, shown: bool) -> Any:
    """A progress bar on a terminal, nothing elsewhere (notebooks, files)."""
    from tqdm import tqdm

    return tqdm(total=steps, disable=None if shown else True, leave=False)


def to_pil(pictures: Tensor) -> "list[Image]":
    """Pictures (B, 3, H, W) in [0, 1] → PIL, rounded to the nearest of 256 levels."""
    from PIL import Image

    values = (pictures * 255).round().to(torch.uint8).cpu()
    values = values.permute(0, 2, 3, 1)  # (B, 3, H, W) → (B, H, W, 3)
    return [Image.fromarray(picture.numpy()) for picture in values]

"""What the pipeline shows: its progress, to people and to callbacks, and pictures."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def progress_bar(steps: int, shown: bool) -> Any:
    """A progress bar on a terminal, nothing elsewhere (notebooks, files)."""
    from tqdm import tqdm

    return tqdm(total=steps, disable=None if shown else True, leave=False)


# callback(pipe, step, timestep, {"latents": …, "denoised": x̂₀}), as in diffusers
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class Watch:
    """Follows a solver from ``latents`` along ``sigmas``: bar, callback, early end.

    Called by the solver after each step. As a context it swallows the StopIteration
    with which a callback ends the drawing; ``latents`` is then the step's state, or
    what the callback had put in its place in the tensors given to it.
    """

    def __init__(
        self, pipe: Any, latents: Tensor, sigmas: Tensor, callback: Callback | None
    ) -> None:
        self.pipe, self.callback = pipe, callback
        self.latents, self.tensors = latents, {"latents": latents}
        self.bar = progress_bar(len(sigmas) - 1, pipe.progress)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> bool:
        self.bar.close()
        ended = kind is not None and issubclass(kind, StopIteration)
        if ended:
            self.latents = self.tensors["latents"]
        return ended

    def __call__(
        self, step: int, sigma: Tensor, x: Tensor, x0_hat: Tensor
    ) -> Tensor | None:
        self.bar.update()
        if self.callback is None:
            return None
        self.tensors = {"latents": x, "denoised": x0_hat}
        changed = self.callback(self.pipe, step, 1000 * sigma, self.tensors) or {}
        return changed.get("latents")


def to_pil(pictures: Tensor) -> "list[Image]":
    """Pictures (B, 3, H, W) in [0, 1] → PIL, rounded to the nearest of 256 levels."""
    from PIL import Image

    values = (pictures * 255).round().to(torch.uint8).cpu()
    values = values.permute(0, 2, 3, 1)  # (B, 3, H, W) → (B, H, W, 3)
    return [Image.fromarray(picture.numpy()) for picture in values]

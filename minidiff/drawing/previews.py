"""Previews: what a latent shows, by one small matrix in place of the decoder.

A latent pixel's 16 numbers say, almost linearly, which colour its patch has. The matrix
is fitted to the autoencoder at hand by least squares, on the scenes of the package or
on any pictures.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff.files.disk import replacing
from minidiff.files.pictures import to_pil
from minidiff.interface.request import Callback
from minidiff.interface.terminal import tell
from minidiff.vae import VAE

if TYPE_CHECKING:
    from PIL.Image import Image


class Preview(NamedTuple):
    """Scaled latents (B, C, h, w) → small pictures (B, 3, h, w) in [0, 1]."""

    matrix: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        pixels = latents.float().cpu().movedim(1, -1)  # (B, C, h, w) → (B, h, w, C)
        colors = pixels @ self.matrix.T + self.bias  # (B, h, w, C) → (B, h, w, 3)
        return colors.movedim(-1, 1).clamp(0, 1)  # (B, h, w, 3) → (B, 3, h, w)


@torch.no_grad()
def fit_preview(vae: VAE, pictures: Tensor | None = None) -> Preview:
    """The matrix (3, C) and bias (3,) that best give each patch its mean colour.

    ``pictures`` (B, 3, H, W) in [−1, 1]; by default the scenes of the package.
    """
    if pictures is None:
        from minidiff.data.samples import sample_scenes

        pictures = sample_scenes()[0]
    weight = next(vae.parameters())
    latents = vae.scale(vae.encode(pictures.to(weight)).mode()).float().cpu()
    small = F.avg_pool2d(pictures, vae.config.factor)  # (B, 3, H, W) → (B, 3, h, w)
    x = F.pad(latents.movedim(1, -1).flatten(0, 2), (0, 1), value=1)  # → (N, C + 1)
    y = (small / 2 + 0.5).movedim(1, -1).flatten(0, 2)  # (B, 3, h, w) → (N, 3)
    # gelsd, for latents that do not use all of their channels; (N, C + 1) → (3, C + 1)
    fit = torch.linalg.lstsq(x.double(), y.double(), rcond=1e-6, driver="gelsd")
    solution = fit.solution.T.float()
    return Preview(solution[:, :-1], solution[:, -1])


def show_previews(
    preview: Preview, show: Callable[[int, "list[Image]"], None]
) -> Callback:
    """A callback that gives ``show(step, pictures)`` each step's estimate of the data.

    ``show`` may raise StopIteration to end the drawing there.
    """

    def callback(
        pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        show(step, to_pil(preview(tensors["denoised"])))

    return callback


def write_previews(file: Path) -> Callback:
    """A callback that writes each step's first estimate, enlarged, into ``file``."""
    fit = functools.cache(fit_preview)

    def callback(
        pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        small = to_pil(fit(pipe.vae)(tensors["denoised"][:1]))[0]
        side = pipe.vae.config.factor
        large = small.resize((small.width * side, small.height * side), resample=0)
        try:
            with replacing(file) as part:  # a viewer never sees half of it
                large.save(part, "PNG")
        except OSError as error:  # on Windows, say, a viewer has it open
            tell(f"no preview of this step: {error}")

    return callback

"""A large picture in overlapping tiles; a batch one picture at a time.

Tiles are cut and blended as diffusers' AutoencoderKL does it: neighbours overlap by a
quarter (or the next whole latent pixel), and over the overlap one fades linearly into
the next. Group norms then see one tile at a time, so the result differs slightly from
the whole.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minidiff.vae import VAE, Posterior


class Tiled(VAE):
    """An autoencoder that works on squares of ``tile`` latent pixels (None: on all).

    With ``slicing`` also on one picture at a time. Its layers are those of ``whole``.
    """

    def __init__(
        self, whole: VAE, tile: int | None = None, slicing: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.tile, self.slicing = whole.config, tile, slicing
        self.encoder, self.decoder = whole.encoder, whole.decoder
        self.train(whole.training)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W), as ``VAE.decode``."""
        return torch.cat([self._decode(z) for z in self._slices(latents)])

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, 3, H, W) → a Posterior (B, C, h, w), as ``VAE.encode``."""
        moments = torch.cat([self._moments(x) for x in self._slices(images)])
        mean, logvar = moments.chunk(2, dim=1)  # (B, 2·C, h, w) → 2 × (B, C, h, w)
        return Posterior(mean, logvar)

    def _slices(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(1) if self.slicing else [x]

    def _decode(self, latents: Tensor) -> Tensor:
        decode, factor = super().decode, self.config.factor
        if self.tile is None:
            return decode(latents)
        tile, step = self.tile, self.tile * 3 // 4
        return tiled(decode, latents, tile, step, tile * factor, step * factor)

    def _moments(self, images: Tensor) -> Tensor:
        encode, factor = super().encode, self.config.factor

        def moments(x: Tensor) -> Tensor:
            found = encode(x)
            return torch.cat([found.mean, found.logvar], dim=1)  # → (B, 2·C, h, w)

        if self.tile is None:
            return moments(images)
        tile, step = self.tile, self.tile * 3 // 4
        return tiled(moments, images, tile * factor, step * factor, tile, step)


def tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    step: int,
    size: int,
    kept: int,
) -> Tensor:
    """``run`` on a tile at each ``step`` of x (B, C, H, W), the results put together.

    A result has ``size`` rows and columns where a tile has ``tile``; the first ``kept``
    stay, and what comes behind them fades into the next.
    """
    if max(x.shape[2:]) <= tile:
        return run(x)
    columns = range(0, x.shape[3], step)
    rows = [
        [run(x[:, :, i : i + tile, j : j + tile]) for j in columns]
        for i in range(0, x.shape[2], step)
    ]
    bands = []
    for i, row in enumerate(rows):
        for j, piece in enumerate(row):
            if i > 0:
                blend(rows[i - 1][j], piece, size - kept, dim=2)
            if j > 0:
                blend(row[j - 1], piece, size - kept, dim=3)
        bands.append(torch.cat([piece[..., :kept, :kept] for piece in row], dim=3))
    return torch.cat(bands, dim=2)  # bands (B, C', kept, W') → (B, C', H', W')


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fade the end of ``before`` into the start of ``after``, in place."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    start = after.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = torch.arange(extent, device=after.device) / extent  # 0 … 1
    start.copy_(end.lerp(start, weight.to(after.dtype).view(shape)))

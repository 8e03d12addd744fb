"""A large picture in overlapping tiles; a batch one picture at a time.

Tiles are cut and blended as diffusers' AutoencoderKL does it: neighbours overlap by a
quarter (or the next whole latent pixel), and over the overlap one fades linearly into
the next. Group norms then see one tile at a time, so the result differs slightly from
the whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.vae import Posterior

Decode = Callable[[Tensor], Tensor]
Encode = Callable[[Tensor], Posterior]


def tiled_decode(decode: Decode, latents: Tensor, tile: int, factor: int) -> Tensor:
    """Latents (B, C, h, w) → images (B, 3, H, W), ``tile``² latent pixels at a time.

    ``factor`` is the number of image pixels along a side of a latent pixel.
    """
    step = tile * 3 // 4
    return tiled(decode, latents, tile, step, tile * factor, step * factor)


def tiled_encode(encode: Encode, images: Tensor, tile: int, factor: int) -> Posterior:
    """Images (B, 3, H, W) → a Posterior (B, C, h, w), in the same tiles."""

    def moments(x: Tensor) -> Tensor:
        found = encode(x)
        return torch.cat([found.mean, found.logvar], dim=1)  # → (B, 2·C, h, w)

    step = tile * 3 // 4
    blended = tiled(moments, images, tile * factor, step * factor, tile, step)
    return Posterior(*blended.chunk(2, dim=1))


def tiled(run: Decode, x: Tensor, tile: int, step: int, size: int, kept: int) -> Tensor:
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


def sliced_decode(decode: Decode, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) → images (B, 3, H, W), one picture at a time."""
    return torch.cat([decode(z) for z in latents.split(1)])


def sliced_encode(encode: Encode, images: Tensor) -> Posterior:
    """Images (B, 3, H, W) → a Posterior (B, C, h, w), one picture at a time."""
    parts = [encode(x) for x in images.split(1)]
    mean, logvar = ([getattr(p, name) for p in parts] for name in ("mean", "logvar"))
    return Posterior(torch.cat(mean), torch.cat(logvar))

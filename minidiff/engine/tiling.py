"""A large picture in overlapping tiles; a batch one picture at a time.

Tiles are cut and blended as diffusers' AutoencoderKL does it: neighbours overlap by a
quarter (or the next whole latent pixel), and over the overlap one fades linearly into
the next. Group norms then see one tile at a time, so the result differs slightly from
the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minidiff.efficiency import tiled
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

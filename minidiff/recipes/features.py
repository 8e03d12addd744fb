"""The transformer's samples: what frozen models make of them once, and their order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minidiff.data import rng
from minidiff.dit import MMDiT
from minidiff.flow_matching import shift_sigma
from minidiff.learning.steps import multiplies_bfloat16
from minidiff.training import Batch, drop_encoders, loss_by_level, noise_and_levels
from minidiff.vae import VAE


def place_in_pool(indices: Tensor, n: int) -> Tensor:
    """Places in a large pool of ``n`` for samples 0, 1, 2, …: each once an epoch.

    One walk through the pool, begun elsewhere in every epoch.
    """
    return ((indices % n) * 2654435761 + indices // n % n * 40503) % n


def shuffled(indices: Tensor, n: int, seed: int) -> Tensor:
    """Places in a pool of ``n`` for samples 0, 1, 2, …: each once an epoch.

    Every epoch has an order of its own, made of ``seed`` and the epoch's number.
    """
    places, epochs = torch.empty_like(indices), indices // n
    for epoch in epochs.unique().tolist():
        numbers = torch.arange(n, device=indices.device)
        order = rng.bits(rng.fold_in(seed, epoch), numbers, 1)[:, 0].argsort()
        own = epochs == epoch
        places[own] = order[indices[own] % n]
    return places


def epochs(features: "Features", seed: int) -> Callable[[Tensor], Tensor]:
    """An order in which each sample stands in an epoch as often as it counts."""
    pool = features.pool()
    return lambda indices: pool[shuffled(indices, len(pool), seed)]


def collect(n: int, parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The rows of all ``parts``, (n, …) each, written into memory taken only once."""
    whole: tuple[Tensor, ...] = ()
    done = 0
    for part in parts:
        whole = whole or tuple(x.new_empty(n, *x.shape[1:]) for x in part)
        for rows, x in zip(whole, part, strict=True):
            rows[done : done + len(x)] = x
        done += len(part[0])
    return whole


@dataclass(frozen=True)
class Features:
    """Encoded pictures, and the encodings of their captions.

    Sample i has ``latents[i]`` and the row ``place[i]`` of ``context`` and ``pooled``;
    row 0 is the empty prompt's. ``ids``: what both CLIPs read of each row, for
    encoders that learn. ``repeats``: how often each sample counts; once if None.
    """

    latents: Tensor  # (n, C, h, w), scaled
    place: Tensor  # (n,)
    context: Tensor  # (R, L, D)
    pooled: Tensor  # (R, P)
    ids: Tensor | None = None  # (R, 2, L)
    repeats: Tensor | None = None  # (n,)

    def __len__(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, Tensor]:
        """All that there is, by name."""
        return {name: x for name, x in vars(self).items() if x is not None}

    def select(self, samples: slice | Tensor) -> "Features":
        """Some of the samples, with the captions of all."""
        rows = {"latents": self.latents, "place": self.place, "repeats": self.repeats}
        some = {name: x[samples] for name, x in rows.items() if x is not None}
        return replace(self, **some)

    def pool(self) -> Tensor:
        """The samples' numbers, each as often as it counts."""
        once = torch.arange(len(self), device=self.latents.device)
        return once if self.repeats is None else once.repeat_interleave(self.repeats)

    def fixed(self, seed: int) -> Batch:
        """All samples with one noise each, for ``validation``."""
        noise = rng.normal(
            seed,
            torch.arange(len(self), device=self.latents.device),
            tuple(self.latents.shape[1:]),
        )
        rows = {"context": self.context[self.place], "pooled": self.pooled[self.place]}
        batch = {"x0": self.latents, "noise": noise} | rows
        batch = {name: x.float() for name, x in batch.items()}
        return batch if self.ids is None else batch | {"ids": self.ids[self.place]}


@torch.no_grad()
def encode_latents(
    vae: VAE, batches: Iterable[Tensor], n: int, like: Tensor, autocast: bool = False
) -> Tensor:
    """The most likely latents (n, C, h, w), scaled, of pictures in [−1, 1].

    They have the dtype and the device of ``like``. With ``autocast`` they are made in
    bfloat16 where that is faster.
    """
    autocast = autocast and multiplies_bfloat16(like.device)

    def encode(images: Tensor) -> tuple[Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            mode = vae.encode(images).mode()
        return (vae.scale(mode.float()).to(like),)

    return collect(n, map(encode, batches))[0]


@dataclass(frozen=True)
class FlowBatches:
    """Batches of rectified flow, each a function of its samples' numbers alone.

    Args:
        order: the samples' numbers → their places in ``features``.
        noise_seed, drop_seed: of noise and levels, and of what is left out.
        drop: how often the empty prompt takes the caption's place.
        drop_encoder: how often each encoder is left out by itself.
        widths: of CLIP-L and CLIP-G, for ``drop_encoder``.
        shift: moves levels towards 1.
    """

    features: Features
    order: Callable[[Tensor], Tensor]
    noise_seed: int
    drop_seed: int
    drop: float = 0.1
    drop_encoder: float = 0.0
    widths: tuple[int, int] = (0, 0)
    shift: float = 1.0

    def __call__(self, indices: Tensor) -> Batch:
        f = self.features
        numbers = indices.to(f.latents.device)
        place = self.order(numbers)
        u = rng.uniform(self.drop_seed, numbers, 4)
        row = torch.where(u[:, 0] < self.drop, 0, f.place[place])
        context, pooled = f.context[row], f.pooled[row]
        if self.drop_encoder:
            keep = u[:, 1:] >= self.drop_encoder
            context, pooled = drop_encoders(context, pooled, keep, self.widths)
        batch = {"x0": f.latents[place], "context": context, "pooled": pooled}
        batch = {name: x.to(indices.device).float() for name, x in batch.items()}
        if f.ids is not None:
            batch["ids"] = f.ids[row].to(indices.device)
        return batch | self.levels(indices)

    def levels(self, indices: Tensor) -> Batch:
        """The samples' noise (B, C, h, w), float32, and levels (B,)."""
        shape = tuple(self.features.latents.shape[1:])
        noise, sigma = noise_and_levels(indices, shape, self.noise_seed)
        return {"noise": noise, "sigma": shift_sigma(sigma, self.shift)}


def validation(
    model: MMDiT, fixed: Batch, device: torch.device | str, at_once: int
) -> dict[str, object]:
    """The mean loss on a fixed batch, looked at in parts, and the loss by level."""
    n = len(fixed["x0"])
    losses = [0.0] * 8
    for part in torch.arange(n).split(at_once):
        batch = {k: x[part.to(x.device)].to(device) for k, x in fixed.items()}
        found = loss_by_level(model, batch)
        losses = [a + b * (len(part) / n) for a, b in zip(losses, found, strict=True)]
    return {"validation": sum(losses) / len(losses), "by_level": losses}

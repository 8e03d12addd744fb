"""In which order samples are learned from: places in a pool, from numbers alone."""

import torch
from torch import Tensor

from minidiff.data import rng


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

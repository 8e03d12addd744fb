"""Diversity: how far apart the pictures of one prompt lie, beside another model's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.judging.metrics import Extract, generate

SEEDS = 8  # pictures of each prompt
MOST = 64  # prompts


def feature_spread(features: Tensor) -> float:
    """Root mean square distance of features (P, S, D) from their prompt's mean."""
    away = features - features.mean(1, keepdim=True)
    return away.square().sum(-1).mean().sqrt().item()


@torch.no_grad()
def features_by_prompt(
    pipe: Any, extract: Extract, texts: Sequence[str], seed: int, batch: int, **how: Any
) -> Tensor:
    """Features (P, S, D) of ``SEEDS`` pictures of each text; noise as elsewhere."""
    every = [text for text in texts for _ in range(SEEDS)]
    parts = [
        extract(generate(pipe, [every[j] for j in i], i, seed, **how))
        for i in torch.arange(len(every)).split(batch)
    ]
    return torch.cat(parts).unflatten(0, (len(texts), SEEDS))  # → (P, S, D)


def diversity(
    pipe: Any,
    other: Any,
    extract: Extract,
    texts: Sequence[str],
    seed: int,
    batch: int,
    **how: Any,
) -> float:
    """The spread of what ``pipe`` draws, as a share of what ``other`` does.

    Both draw the first ``MOST`` texts from the same noise, ``pipe`` as ``how`` says,
    ``other`` in its own usual way.
    """
    draw: Callable[..., Tensor] = features_by_prompt
    common = extract, texts[:MOST], seed, batch
    own = feature_spread(draw(pipe, *common, **how))
    theirs = feature_spread(draw(other, *common, **other.defaults._asdict()))
    return round(own / theirs, 4)

"""Muon: steps of equal size in all directions of a matrix (Jordan et al. 2024).

The gradient of a weight matrix is mostly long in a few directions, and Adam, which
looks at each number by itself, follows these. Muon replaces the averaged gradient
``U S Vᵀ`` by ``U Vᵀ``: the matrix nearest to it that is orthogonal.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from minidiff.learning import parallel
from minidiff.learning.steps import multiplies_bfloat16

A, B, C = 3.4445, -4.7750, 2.0315  # of Jordan: five rounds bring most of S near 1
MOMENTUM = 0.95
AT_ONCE = 32  # matrices
RMS = 0.2  # of AdamW's updates, so that the same rate serves both (Liu et al. 2025)
CONDITIONING = {"t_embedder", "y_embedder", "adaLN_modulation"}
CONDITIONING_RATE = 5e-4  # at most: with Muon at 0.01 SiLU(c) fell below 1e-10


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest orthogonal matrices: nearly all singular values near 1.

    Newton and Schulz's iteration, with Jordan's polynomial of fifth degree: singular
    values of at least 0.0015 of the norm end between 0.68 and 1.21, smaller ones below.

    Args:
        x: (N, R, C), R at least C.
    """
    y = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y.mT @ y  # → (N, C, C)
        change = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        y = torch.baddbmm(y, y, change, beta=A)
    return y


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """A weight (rows, columns) as matrices that are square or upright.

    Queries, keys and values, or shifts, scales and gates, are several maps in one
    weight: rows that are a multiple of the columns are cut into squares. So are those
    of an MLP's first layer, one map: stacked squares are orthogonal too, though not the
    nearest matrix that is.
    """
    rows, columns = x.shape
    if rows < columns:
        return (x.mT,)
    return x.split(columns) if rows % columns == 0 else (x,)


class Muon(torch.optim.AdamW):
    """Muon for the matrices and convolutions of layers, AdamW for all else.

    Args:
        named_parameters: of an MMDiT or a VAE. Muon takes those with two or four axes
            whose name holds a digit: all but the first layer of the text and of the
            picture and the last one, or ``conv_in`` and ``conv_out``. (In other models
            that may be tables, which it is not for.) Not those of ``CONDITIONING``,
            which AdamW moves at ``CONDITIONING_RATE`` at most. Of sharded ones each
            process holds all updates while it makes a step.
        settings: of AdamW. The rate and the weight decay are Muon's too.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        **settings: Any,
    ) -> None:
        layers: list[tuple[str, Tensor]] = []
        conditioning: list[Tensor] = []
        for name, x in named_parameters:
            if CONDITIONING.isdisjoint(name.split(".")):
                layers.append((name, x))
            else:
                conditioning.append(x)
        groups = [{"params": [x for _, x in layers]}, {"params": conditioning}]
        super().__init__(groups, **settings)
        self.matrices = [
            x for n, x in layers if x.ndim in (2, 4) and any(map(str.isdigit, n))
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients; those of Muon's matrices are gone after it."""
        matrices = [x for x in self.matrices if x.grad is not None]
        # A convolution is a matrix too: a row for each channel that it gives
        updates = orthogonal_parts([self._average(x).flatten(1) for x in matrices])
        rate, decay = (self.param_groups[0][key] for key in ("lr", "weight_decay"))
        self.param_groups[1]["lr"] = min(rate, CONDITIONING_RATE)
        super().step()
        for x, update in zip(matrices, updates, strict=True):
            update = parallel.shard_like(update.reshape(x.shape), x)
            x.mul_(1 - rate * decay).sub_(update, alpha=rate)

    def _average(self, x: Tensor) -> Tensor:
        """The averaged gradient of ``x``, a step ahead (Nesterov 1983); whole."""
        grad, x.grad = x.grad, None  # AdamW leaves what has no gradient
        assert grad is not None
        state = self.state[x]
        if not state:  # AdamW, which loads it, expects the count
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(x))
        state["step"] += 1
        average = state["exp_avg"].lerp_(grad, 1 - MOMENTUM)
        update = grad.lerp(average, MOMENTUM)
        # bfloat16 is precise enough
        short = update.dtype == torch.float32 and multiplies_bfloat16(update.device)
        return parallel.whole(update.bfloat16() if short else update)


def orthogonal_parts(updates: list[Tensor]) -> list[Tensor]:
    """Each matrix with orthogonal pieces, as long as AdamW's updates."""
    cut = [pieces(x) for x in updates]
    same = defaultdict(list)
    for piece in (x for parts in cut for x in parts):
        same[piece.shape].append(piece)
    done = {shape: together(parts) for shape, parts in same.items()}
    joined = [torch.cat([next(done[x.shape]) for x in parts]) for parts in cut]
    return [
        y if y.shape == x.shape else y.mT for x, y in zip(updates, joined, strict=True)
    ]


def together(parts: list[Tensor]) -> Iterator[Tensor]:
    """Pieces of one shape made orthogonal: of several processes each makes its share.

    As many at once as a CPU's caches hold.
    """
    whole, own = torch.stack(parts), slice(parallel.rank(), None, parallel.size())
    done = torch.zeros_like(whole)
    done[own] = torch.cat([orthogonal(x) for x in whole[own].split(AT_ONCE)])
    yield from parallel.total(done) * (RMS * whole.shape[1] ** 0.5)

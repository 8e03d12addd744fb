"""Small fused GPU kernels, each beside the same computation in plain PyTorch.

A matrix product reads and writes far fewer bytes than it computes operations; the
steps between two products do the opposite, and each separate one costs a pass through
memory. Here a residual, a gate, a norm and a modulation are one pass. Sums are taken in
float32 whatever the tensors' dtype. Without Triton, or on a CPU, the plain form runs;
``minidiff.engine.triton_kernels`` has the others and is imported where a card is.

Tokens are rows (R, D) with the samples of the batch next to one another: row r belongs
to sample r mod B. So the tokens of a stream, and the streams of a block, are slices.
"""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiff.efficiency import Rows, quantize

Given = ParamSpec("Given")
Made = TypeVar("Made")
TRITON = find_spec("triton") is not None  # PyTorch for the CPU comes without it
INTERPRET = TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels can run on ``x``."""
    return TRITON and (x.is_cuda or INTERPRET)


def fused(plain: Callable[Given, Made]) -> Callable[Given, Made]:
    """A pass in plain PyTorch; on a card the Triton form of its name runs instead."""

    @wraps(plain)
    def run(*args: Given.args, **named: Given.kwargs) -> Made:
        x: Any = args[0]
        if not has_kernels(x):
            return plain(*args, **named)
        from minidiff.engine import triton_kernels

        return getattr(triton_kernels, f"triton_{plain.__name__}")(*args, **named)

    return run


@fused
def residual_norm(
    x: Tensor,
    updates: Sequence[tuple[Tensor, Tensor]],
    modulations: Sequence[tuple[Tensor, Tensor]],
    fp8: bool = False,
) -> list[Rows]:
    """Add gated updates to ``x`` in place; return its norm under each modulation.

    x (R, D); updates (R, D) with gates (B, D); one or two modulations
    (shift, scale), each (B, D), slices of one tensor. x ← x + Σ gate · update, then
    LN(x) · (1 + scale) + shift for each; in fp8 with a scale for each row.
    """
    batch = len(modulations[0][0])
    sums = x.view(-1, batch, x.shape[-1]).float()  # (R, D) → (L, B, D)
    for update, gate in updates:
        sums.addcmul_(gate.float(), update.view_as(sums).float())
    if x.dtype != torch.float32:  # else the sums are ``x`` itself
        x.copy_(sums.view_as(x))
    normed = F.layer_norm(sums, sums.shape[-1:], eps=1e-6)
    rows = [
        torch.addcmul(shift.float(), normed, 1 + scale.float()).view_as(x)
        for shift, scale in modulations
    ]
    return [quantize(r) if fp8 else Rows(r.to(x.dtype)) for r in rows]


@fused
def norm_heads(qkv: Tensor, weight: Tensor, heads: int, boundary: int = 0) -> None:
    """RMS-normalise the queries and keys in ``qkv`` (R, 3·H·d), in place.

    ``weight`` (2, 2, d): [text, image] × [query, key]; rows before ``boundary`` are
    text.
    """
    width = weight.shape[-1]
    for stream, part in enumerate((qkv[:boundary], qkv[boundary:])):
        view = part.unflatten(-1, (3, heads, width))[:, :2]  # (R, 3·H·d) → (R, 2, H, d)
        power = view.float().square().mean(-1, keepdim=True)
        view.mul_((power + 1e-6).rsqrt()).mul_(weight[stream, :, None])


@fused
def quantize_rows(x: Tensor, gelu: bool = False) -> Rows:
    """Rows (R, D) to fp8, one scale a row, after tanh-GELU where asked for."""
    return quantize(F.gelu(x.float(), approximate="tanh") if gelu else x)


@fused
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    keep: bool = False,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """SiLU(GroupNorm(x + add + residual)), and the sum itself where ``keep`` is set.

    x and residual (B, C, H, W) in channels-last memory, ``add`` (C,): a convolution's
    bias that has not been added yet. The sum may be written over ``x``.
    """
    sums = x.float()
    sums = sums if residual is None else sums + residual
    sums = sums if add is None else sums + add.view(-1, 1, 1)
    normed = F.group_norm(sums, groups, weight.float(), bias.float(), eps=1e-6)
    normed = F.silu(normed, inplace=True) if silu else normed
    return sums.to(x.dtype), normed.to(x.dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU, or Triton on it, knows fp8: Ada, and what came after it."""
    return torch.cuda.get_device_capability(device) >= (8, 9)

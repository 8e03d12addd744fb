"""The fused passes of ``minidiff.engine.kernels`` in Triton, one kernel each or two.

Imported where a card will run them: Triton takes half a second to import.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from minidiff.efficiency import FLOAT8, Rows


@triton.jit
def _store_row(out, out_scale, row, h, cols, mask, width, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    if FP8:
        scale = tl.maximum(tl.max(tl.where(mask, tl.abs(h), 0.0)), 1e-12) / 448.0
        h = h / scale
        tl.store(out_scale + row, scale)
    tl.store(out + row * width + cols, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _residual_norm(  # type: ignore[no-untyped-def]
    x, y0, g0, y1, g1, t0, s0, h0, q0, t1, s1, h1, q1,
    batch, width, gate_stride0, gate_stride1, stride, eps,
    UPDATES: tl.constexpr, OUTPUTS: tl.constexpr, FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row % batch
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    at = row * width + cols
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if UPDATES > 0:
        gate = tl.load(g0 + sample * gate_stride0 + cols, mask=mask, other=0.0)
        y = tl.load(y0 + at, mask=mask, other=0.0)
        v += gate.to(tl.float32) * y.to(tl.float32)
    if UPDATES > 1:
        gate = tl.load(g1 + sample * gate_stride1 + cols, mask=mask, other=0.0)
        y = tl.load(y1 + at, mask=mask, other=0.0)
        v += gate.to(tl.float32) * y.to(tl.float32)
    if UPDATES > 0:
        tl.store(x + at, v.to(x.dtype.element_ty), mask=mask)
    mean = tl.sum(v, 0) / width
    centred = tl.where(mask, v - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    at = sample * stride + cols
    shift = tl.load(t0 + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(s0 + at, mask=mask, other=0.0).to(tl.float32)
    h = normed * (1.0 + scale) + shift
    _store_row(h0, q0, row, h, cols, mask, width, FP8)
    if OUTPUTS > 1:
        shift = tl.load(t1 + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(s1 + at, mask=mask, other=0.0).to(tl.float32)
        h = normed * (1.0 + scale) + shift
        _store_row(h1, q1, row, h, cols, mask, width, FP8)


@triton.jit
def _norm_heads(  # type: ignore[no-untyped-def]
    qkv, weight, boundary, row_stride, heads, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]  # queries' heads, then keys'
    channel = tl.arange(0, COLUMNS)[None, :]
    inside = channel < WIDTH
    mask = (head < 2 * heads) & inside
    at = qkv + row * row_stride + head * WIDTH + channel
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    power = tl.sum(v * v, 1)[:, None] / WIDTH
    stream = (row >= boundary).to(tl.int32)
    kind = (head >= heads).to(tl.int32)
    w = tl.load(weight + (2 * stream + kind) * WIDTH + channel, mask=inside)
    v = v * tl.rsqrt(power + eps) * w.to(tl.float32)
    tl.store(at, v.to(qkv.dtype.element_ty), mask=mask)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, out, out_scale, row_stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    h = tl.load(x + row * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # the tanh form; tanh(u) = 2·sigmoid(2u) − 1
        u = 0.7978845608028654 * (h + 0.044715 * h * h * h)
        h = h * tl.sigmoid(2.0 * u)
    _store_row(out, out_scale, row, h, cols, mask, width, True)


@triton.jit
def _group_sums(  # type: ignore[no-untyped-def]
    x, residual, bias, out, partial, pixels, channels,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, WRITE: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < channels
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((ROWS, BLOCK), tl.float32)
    if BIAS:
        b = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    for step in range(STEPS):
        pixel = (chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = inside & (pixel < pixels)
        at = (sample * pixels + pixel) * channels + cols
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            v += b
        if RESIDUAL:
            v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        if WRITE:
            tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)
        v = tl.where(mask, v, 0.0)
        total += v
        square += v * v
    at = (sample * tl.num_programs(0) + chunk) * 2 * channels + cols
    row_total = tl.sum(total, 0)[None, :]
    row_square = tl.sum(square, 0)[None, :]
    tl.store(partial + at, row_total, mask=inside)
    tl.store(partial + at + channels, row_square, mask=inside)


@triton.jit
def _scale_shift_silu(  # type: ignore[no-untyped-def]
    x, out, scale, shift, pixels, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < channels
    a = tl.load(scale + sample * channels + cols, mask=inside, other=0.0)
    b = tl.load(shift + sample * channels + cols, mask=inside, other=0.0)
    pixel = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    mask = inside & (pixel < pixels)
    at = (sample * pixels + pixel) * channels + cols
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * a + b
    if SILU:
        v = v * tl.sigmoid(v)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


# Calling them


def triton_residual_norm(
    x: Tensor,
    updates: Sequence[tuple[Tensor, Tensor]],
    modulations: Sequence[tuple[Tensor, Tensor]],
    fp8: bool = False,
) -> list[Rows]:
    """As ``kernels.residual_norm``; two updates in one pass, what is more before."""
    rows, width = x.shape
    batch = len(modulations[0][0])
    for update, gate in updates[:-2]:
        view = x.view(-1, batch, width)  # (R, D) → (L, B, D)
        view.addcmul_(gate, update.view_as(view))
    updates = updates[-2:]
    dtype = FLOAT8 if fp8 else x.dtype
    outputs = [
        Rows(
            torch.empty(rows, width, dtype=dtype, device=x.device),
            torch.empty(rows, 1, device=x.device) if fp8 else None,
        )
        for _ in modulations
    ]
    pairs = [*updates, (x, x), (x, x)][:2]
    slots = [
        (*modulation, out.values, x if out.scale is None else out.scale)
        for modulation, out in zip(modulations, outputs, strict=True)
    ]
    _residual_norm[(rows,)](
        x, *pairs[0], *pairs[1], *slots[0], *slots[-1],
        batch, width, pairs[0][1].stride(0), pairs[1][1].stride(0),
        modulations[0][0].stride(0), 1e-6,
        UPDATES=len(updates), OUTPUTS=len(modulations), FP8=fp8,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )  # fmt: skip
    return outputs


def triton_norm_heads(
    qkv: Tensor, weight: Tensor, heads: int, boundary: int = 0
) -> None:
    """As ``kernels.norm_heads``."""
    width = weight.shape[-1]
    _norm_heads[(len(qkv),)](
        qkv, weight, boundary, qkv.stride(0), heads, 1e-6,
        WIDTH=width, COLUMNS=triton.next_power_of_2(width),
        BLOCK=triton.next_power_of_2(2 * heads), num_warps=4,
    )  # fmt: skip


def triton_quantize_rows(x: Tensor, gelu: bool = False) -> Rows:
    """As ``kernels.quantize_rows``."""
    rows, width = x.shape
    out = Rows(
        torch.empty(rows, width, dtype=FLOAT8, device=x.device),
        torch.empty(rows, 1, device=x.device),
    )
    _quantize[(rows,)](
        x, *out, x.stride(0), width, GELU=gelu, BLOCK=triton.next_power_of_2(width),
        num_warps=16 if width > 4096 else 8,
    )  # fmt: skip
    return out


def triton_group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    keep: bool = False,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """As ``kernels.group_norm_silu``."""
    last = torch.channels_last  # nothing is copied where it is so already
    x = x.contiguous(memory_format=last)
    residual = residual if residual is None else residual.contiguous(memory_format=last)
    batch, channels, height, width = x.shape
    pixels = height * width
    block = triton.next_power_of_2(channels)
    rows = max(1, 4096 // block)
    steps = 16  # tiles a program
    chunks = -(-pixels // (rows * steps))
    partial = torch.empty(batch, chunks, 2, channels, device=x.device)
    write = residual is not None or (keep and add is not None)
    _group_sums[(chunks, batch)](
        x, x if residual is None else residual, x if add is None else add, x, partial,
        pixels, channels,
        RESIDUAL=residual is not None, BIAS=add is not None, WRITE=write,
        STEPS=steps, ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    count = pixels * (channels // groups)
    total, square = (
        partial.sum(1).unflatten(-1, (groups, -1)).sum(-1).unbind(1)
    )  # (B, G)
    mean = (total / count)[..., None]
    variance = ((square / count)[..., None] - mean * mean).clamp(min=0)
    rstd = (variance + 1e-6).rsqrt()
    scale = (rstd * weight.float().view(groups, -1)).flatten(1)  # → (B, C)
    shift = bias.float() - (mean * scale.unflatten(1, (groups, -1))).flatten(1)
    if add is not None and not write:
        shift = shift + scale * add.float()
    out = torch.empty_like(x)
    _scale_shift_silu[(-(-pixels // rows), batch)](
        x, out, scale, shift, pixels, channels,
        SILU=silu, ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return x, out

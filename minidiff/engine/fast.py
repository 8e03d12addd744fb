"""The transformer and the decoder of the chapters, arranged for speed.

The same weights and the same functions, in another order of memory. In the transformer
the samples of a batch are interleaved, (L, B, D) for (B, L, D): then the text's tokens
and the picture's are two slices of one tensor, products write straight into what
attention reads, and nothing is concatenated or split. What lies between two products
is one pass (``minidiff.engine.kernels``). The decoder keeps channels last, adds
biases and residuals inside the group norms, and folds each doubling of the sides into
the convolution behind it.
"""

import ctypes
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.attention import Attention
from minidiff.dit import MLP, MMDiT, Modulations, unpatchify
from minidiff.engine.kernels import (
    FLOAT8,
    Rows,
    group_norm_silu,
    norm_heads,
    quantize,
    quantize_rows,
    residual_norm,
)
from minidiff.engine.precision import Float8Linear, has_fp8
from minidiff.interface.checks import check_choice, check_fast
from minidiff.vae import VAE, AttentionBlock, Decoder, ResnetBlock, Upsample

LAST = torch.channels_last
ONEDNN = torch.backends.mkldnn.is_available()  # for float32 products on a CPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h; values in bytes
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def attention_backend(first: str | None) -> Iterator[None]:
    """Let attention try the backend ``first``, then the others; None: PyTorch's choice.

    Raises ValueError for a name that is not in ``BACKENDS``.
    """
    if first is None:
        yield
        return
    check_choice("attention backend", first, BACKENDS)
    rest = [b for name, b in BACKENDS.items() if name != first]
    with sdpa_kernel([BACKENDS[first], *rest], set_priority=True):
        yield


def linear(
    x: Rows, layer: nn.Module, gelu: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rows (R, in) → (R, out), then tanh-GELU where asked for; written to ``out``."""
    if layer._forward_hooks:  # LoRA that is not fused
        y = layer(x.values if x.scale is None else restore(x, layer.bias.dtype))
        y = y if out is None else out.copy_(y)
        return F.gelu(y, approximate="tanh") if gelu else y
    if x.scale is not None:
        return float8_product(x, layer, out)
    matrix, dtype = layer.weight, x.values.dtype
    if isinstance(layer, Float8Linear):
        matrix = matrix.to(dtype) * layer.scale.to(dtype)
    if gelu and x.values.is_cuda:  # cuBLAS applies it before writing the result
        return torch._addmm_activation(layer.bias, x.values, matrix.t(), use_gelu=True)
    if dtype == torch.float32 and not x.values.is_cuda and ONEDNN:
        kind = ("gelu", [], "tanh") if gelu else ("none", [], "")
        y = torch.ops.mkldnn._linear_pointwise(x.values, matrix, layer.bias, *kind)
        return y if out is None else out.copy_(y)
    y = torch.addmm(layer.bias, x.values, matrix.t(), out=out)
    return F.gelu(y, approximate="tanh") if gelu else y


def restore(x: Rows, dtype: torch.dtype) -> Tensor:
    """The rows that an fp8 form stands for."""
    return (x.values.float() * x.scale).to(dtype)


def float8_product(x: Rows, layer: nn.Module, out: Tensor | None = None) -> Tensor:
    """Product of fp8 rows and a ``Float8Linear``, scales applied to float32 sums."""
    dtype = layer.bias.dtype
    if x.values.is_cuda:
        return torch._scaled_mm(
            x.values,
            layer.weight.t(),
            x.scale,
            layer.scale.t(),
            bias=layer.bias,
            out_dtype=dtype,
            use_fast_accum=True,
            out=out,
        )
    y = x.values.float() @ layer.weight.float().t() * x.scale * layer.scale.t()
    y = (y + layer.bias.float()).to(dtype)
    return y if out is None else out.copy_(y)


def head_norms(*attentions: Attention) -> Tensor:
    """Weights of the query's and the key's norm of each, (A, 2, d)."""
    pairs = [torch.stack([a.ln_q.weight, a.ln_k.weight]) for a in attentions]
    return torch.stack(pairs)


class FastMMDiT:
    """An ``MMDiT``'s forward pass with interleaved samples and fused passes.

    Works on the model's own layers and has its ``forward``'s interface. With ``fp8``
    the products of the blocks take 8-bit inputs, scaled for each row of tokens and
    each output channel; those layers must then be ``Float8Linear``. ``attention`` is
    the backend to try first, by default the card's (``preferred_attention``). Where
    gradients are wanted or attention is recorded, the model's own forward pass runs.
    Raises ValueError for a model without q/k norms.
    """

    def __init__(
        self, model: MMDiT, fp8: bool = False, attention: str | None = None
    ) -> None:
        check_fast(model.config)
        self.model, self.heads = model, model.config.num_attention_heads
        weight = model.x_embedder.proj.weight
        self.fp8, self.attention = fp8, attention or preferred_attention(weight)

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        """As ``MMDiT.forward``: velocity (B, C, h, w)."""
        blocks = self.model.joint_blocks
        recorded = any(b.attention._forward_pre_hooks for b in blocks)
        if recorded or torch.is_grad_enabled():
            return MMDiT.forward(self.model, *given, **options)
        weight = self.model.x_embedder.proj.weight
        with torch.cuda.device_of(weight):  # Triton starts its kernels there
            return self.forward(*given, **options)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | None,
        context: Tensor,
        pooled: Tensor | None,
        *,
        skip_layers: Collection[int] = (),
        modulations: Modulations | None = None,
    ) -> Tensor:
        """Velocity (B, C, h, w), by the fused passes."""
        model = self.model
        height, width = model.check(latents, context, pooled)
        if modulations is None:
            modulations = model.modulations(sigma, pooled)
        x = model.x_embedder(latents)  # (B, C, h, w) → (B, N, D)
        x = (x + model.positions(height, width)).to(x.dtype)
        with attention_backend(self.attention):
            out = self.run(
                interleave(x),
                interleave(model.context_embedder(context)),
                modulations,
                skip_layers,
                len(latents),
            )
        out = out.unflatten(0, (-1, len(latents))).transpose(0, 1)  # → (B, N, p·p·C)
        return unpatchify(out, height, width, model.config.patch_size)

    def run(
        self,
        x: Tensor,
        c: Tensor,
        tables: Modulations,
        skip: Collection[int],
        batch: int,
    ) -> Tensor:
        """Image rows (N·B, D), text rows (L·B, D) → image rows (N·B, p·p·C).

        ``x`` and ``c`` are overwritten. An update (y, gate) is added by the norm that
        comes next: the lists hold what is still to be added.
        """
        to_x: list[tuple[Tensor, Tensor]] = []
        to_c: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.model.joint_blocks):
            if i in skip:
                continue
            text, image = block.context_block, block.x_block
            cm = tables.blocks[i][0].chunk(text.chunks, dim=-1)
            xm = tables.blocks[i][1].chunk(image.chunks, dim=-1)
            read, dual = self.attend(x, c, to_x, to_c, i, cm, xm, batch)
            to_x = [(self.product(read[-len(x) :], image.attn.proj), xm[2])]
            if dual is not None:
                to_x.append((self.product(dual, image.attn2.proj), xm[8]))
            to_x = [(self.mlp(x, to_x, image.mlp, xm), xm[5])]
            if not block.pre_only:
                to_c = [(self.product(read[: len(c)], text.attn.proj), cm[2])]
                to_c = [(self.mlp(c, to_c, text.mlp, cm), cm[5])]
        shift, scale = tables.final.chunk(2, dim=-1)  # (B, D) each
        rows = residual_norm(x, to_x, [(shift, scale)])[0]
        return self.model.final_layer.linear(rows.values)

    def attend(
        self,
        x: Tensor,
        c: Tensor,
        to_x: list[tuple[Tensor, Tensor]],
        to_c: list[tuple[Tensor, Tensor]],
        index: int,
        cm: Sequence[Tensor],
        xm: Sequence[Tensor],
        batch: int,
    ) -> tuple[Tensor, Tensor | None]:
        """What all tokens read, (L·B + N·B, D), and dual attention's (N·B, D).

        In the last block, where the text is dropped, only the image reads.
        """
        block = self.model.joint_blocks[index]
        text, image = block.context_block, block.x_block
        pairs = [(xm[i], xm[i + 1]) for i in range(0, len(xm), 6)]  # chunks 0, 1; 6, 7
        hx = residual_norm(x, to_x, pairs, self.fp8)
        hc = residual_norm(c, to_c, [(cm[0], cm[1])], self.fp8)
        qkv = x.new_empty(len(c) + len(x), 3 * x.shape[1])
        linear(hc[0], text.attn.qkv, out=qkv[: len(c)])
        linear(hx[0], image.attn.qkv, out=qkv[len(c) :])
        norm_heads(qkv, head_norms(text.attn, image.attn), self.heads, len(c))
        first = len(c) // batch if block.pre_only else 0
        read = self_attention(qkv, batch, self.heads, first)
        if image.chunks == 6:
            return read, None
        qkv = linear(hx[1], image.attn2.qkv)
        norm_heads(qkv, head_norms(image.attn2, image.attn2), self.heads)
        return read, self_attention(qkv, batch, self.heads)

    def product(self, read: Tensor, layer: nn.Module) -> Tensor:
        """Rows (R, D) through one linear layer."""
        return linear(quantize_rows(read) if self.fp8 else Rows(read), layer)

    def mlp(
        self,
        x: Tensor,
        updates: list[tuple[Tensor, Tensor]],
        layers: MLP,
        modulation: Sequence[Tensor],
    ) -> Tensor:
        """Add the updates to ``x``, then its normalised rows through the MLP."""
        (rows,) = residual_norm(x, updates, [modulation[3:5]], self.fp8)
        if not self.fp8:
            return linear(Rows(linear(rows, layers.fc1, gelu=True)), layers.fc2)
        hidden = quantize_rows(linear(rows, layers.fc1), gelu=True)
        return linear(hidden, layers.fc2)


def interleave(x: Tensor) -> Tensor:
    """Tokens (B, L, D) → rows (L·B, D), the batch's samples next to one another."""
    return x.transpose(0, 1).contiguous().flatten(0, 1)


def self_attention(qkv: Tensor, batch: int, heads: int, first: int = 0) -> Tensor:
    """Attention among rows: qkv (L·B, 3·H·d) → (L·B, H·d), heads side by side.

    The first tokens, ``first`` of every sample, are read but do not read: their rows
    are left out.
    """
    split = qkv.unflatten(1, (3, heads, -1)).unflatten(0, (-1, batch))
    q, k, v = split.permute(2, 1, 3, 0, 4)  # (L, B, 3, H, d) → 3 × (B, H, L, d)
    out = F.scaled_dot_product_attention(q[:, :, first:], k, v)
    return out.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)  # → (L, B, H·d) → rows


def accelerate(
    transformer: MMDiT, vae: VAE, fast: bool = True, compile: bool = False
) -> None:
    """Let a transformer and an autoencoder's decoder run in the forms of this module.

    A transformer whose blocks are in fp8 then also multiplies in fp8, where the device
    can. With ``compile`` the chapters' own blocks are compiled instead, each kind of
    block once for all sizes; ``fast`` then serves the decoder alone.
    """
    if compile:
        compile_blocks(transformer)
    elif fast:
        transformer.forward = FastMMDiT(transformer, multiplies_in_fp8(transformer))
    if fast:
        vae.decoder.forward = FastDecoder(vae.decoder)
        if not transformer.x_embedder.proj.weight.is_cuda:
            keep_freed_memory()


def compile_blocks(transformer: MMDiT) -> None:
    """Compile each kind of block once: for all blocks of the kind, and for all sizes.

    Two samples and one are two sizes to the compiler, all other numbers are one.
    """
    # Past its limit dynamo compiles no more, and the eight forms that it allows are for
    # all models of the process: three kinds with and without guidance are six of them
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)
    for block in transformer.joint_blocks:
        block.compile(dynamic=True)
    # Else the first block, whose text is a view, would be a kind of its own
    transformer.context_embedder.register_forward_hook(lambda *given: given[2].clone())
    transformer.forward = partial(told_apart, transformer.forward)


def told_apart(forward: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
    """``forward``; a length that happens to equal the width is compiled as no constant.

    A function of the module, for a copy of the model to call its own ``forward``.
    """
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        return forward(*given, **options)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next step to use.

    By default glibc gives large blocks back to the system as soon as they are free; the
    next block of that size is then cleared page by page while it is first written,
    which on a CPU costs as much time as a quarter of the products (man 3 mallopt). The
    process holds its peak from then on. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        for option, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**30)):
            ctypes.CDLL(None).mallopt(option, value)


def multiplies_in_fp8(model: MMDiT) -> bool:
    """Whether the blocks are in fp8, on a device with fp8 products for their dtype.

    On a GPU torch._scaled_mm takes a scale for each row where it writes bfloat16, and
    widths that 16 divides.
    """
    layer = model.joint_blocks[0].x_block.mlp.fc1
    weight = layer.weight
    if weight.dtype != FLOAT8 or not weight.is_cuda:
        return weight.dtype == FLOAT8
    fits = layer.bias.dtype == torch.bfloat16 and layer.in_features % 16 == 0
    return fits and has_fp8_products(weight.device)


def has_fp8_products(device: torch.device) -> bool:
    """Whether a GPU multiplies in fp8 with scales of rows: one product is tried."""
    if not has_fp8(device):
        return False
    rows = quantize(torch.ones(16, 16, device=device))
    bias = torch.zeros(16, device=device, dtype=torch.bfloat16)
    try:
        float8_product(rows, Float8Linear(rows, bias))
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return False
    return True


def preferred_attention(weight: Tensor) -> str | None:
    """The backend to try first where ``weight`` is: cuDNN's on an H100 or a B200.

    Before 9.15.1 it was wrong for lengths that 128 does not divide (PyTorch's issue
    169849), and PyTorch does not choose it either.
    """
    if not weight.is_cuda or (torch.backends.cudnn.version() or 0) <= 91500:
        return None
    major = torch.cuda.get_device_capability(weight.device)[0]
    return "cudnn" if major in (9, 10) else None


# The decoder


class Pending(NamedTuple):
    """Features x (B, C, H, W) whose bias (C,) and residual are still to be added."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def settle(self) -> Tensor:
        x = self.x if self.residual is None else self.x.add_(self.residual)
        return x if self.bias is None else x.add_(self.bias.view(1, -1, 1, 1))


class FastDecoder:
    """A ``Decoder``'s forward pass in channels-last memory with fused norms.

    Moves the decoder's weights to channels-last memory, in place; with ``fold`` each
    doubling is part of the convolution behind it: latents (B, C, h, w) → images.
    """

    def __init__(self, decoder: Decoder, fold: bool = True) -> None:
        self.decoder = decoder.to(memory_format=LAST)
        self.groups, self.fold = decoder.norm_out.num_groups, fold

    def __call__(self, latents: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return Decoder.forward(self.decoder, latents)
        with torch.cuda.device_of(latents):
            return self.forward(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images, by the fused passes."""
        d = self.decoder
        x = latents.contiguous(memory_format=LAST)
        x = self.resnet(Pending(d.conv_in(x)), d.mid["block_1"])
        x = self.attention(x, d.mid["attn_1"])
        x = self.resnet(x, d.mid["block_2"])
        for level in reversed(d.up):
            for block in level["block"]:
                x = self.resnet(x, block)
            if "upsample" in level:
                x = self.upsample(x.settle(), level["upsample"])
        _, h = self.norm(x, d.norm_out)
        return F.conv2d(h, d.conv_out.weight, d.conv_out.bias, padding=1)

    def norm(
        self, x: Pending, layer: nn.GroupNorm, keep: bool = False, silu: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The settled features, and SiLU of their norm."""
        weights = (self.groups, layer.weight, layer.bias)
        return group_norm_silu(x.x, *weights, x.bias, x.residual, keep, silu)

    def resnet(self, x: Pending, block: ResnetBlock) -> Pending:
        """(B, C, H, W) → (B, C', H, W), the sum still to be added."""
        settled, h = self.norm(x, block.norm1, keep=True)
        h = F.conv2d(h, block.conv1.weight, padding=1)
        _, h = self.norm(Pending(h, block.conv1.bias), block.norm2)
        h = F.conv2d(h, block.conv2.weight, padding=1)
        bias = block.conv2.bias
        if hasattr(block, "nin_shortcut"):
            settled = F.conv2d(settled, block.nin_shortcut.weight)
            bias = bias + block.nin_shortcut.bias
        return Pending(h, bias, settled)

    def attention(self, x: Pending, block: AttentionBlock) -> Pending:
        """Every pixel reads every other; scores for 2,048 pixels at a time."""
        settled, h = self.norm(x, block.norm, keep=True, silu=False)
        q, k, v = (pixels(f(h)) for f in (block.q, block.k, block.v))
        q = q * q.shape[-1] ** -0.5
        parts = [pixel_attention(part, k, v) for part in q.split(2048, dim=1)]
        read = torch.cat(parts, dim=1).unflatten(1, h.shape[2:])  # → (B, H, W, C)
        out = F.conv2d(read.permute(0, 3, 1, 2), block.proj_out.weight)
        return Pending(out, block.proj_out.bias, settled)

    def upsample(self, x: Tensor, layer: Upsample) -> Pending:
        """(B, C, H, W) → (B, C, 2H, 2W), the bias still to be added."""
        if not self.fold:
            x = F.interpolate(x, scale_factor=2.0)
            return Pending(F.conv2d(x, layer.conv.weight, padding=1), layer.conv.bias)
        y = F.conv2d(x, folded_kernel(layer), padding=1)  # → (B, 4·C, H+1, W+1)
        batch, channels, height, width = x.shape
        shape = batch, channels, 2 * height, 2 * width
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
        for i, phase in enumerate(y.chunk(4, dim=1)):
            a, b = divmod(i, 2)
            out[:, :, a::2, b::2] = phase[:, :, a : a + height, b : b + width]
        return Pending(out, layer.conv.bias)


def folded_kernel(layer: Upsample) -> Tensor:
    """Doubling the sides and then a 3×3 kernel, as four 2×2 kernels: (4·C, C, 2, 2).

    Output row 2i reads the rows i−1, i, i of the small picture: two taps, the second
    the sum of two of the three weights; row 2i+1 reads i, i, i+1. Columns likewise.
    """
    weight = layer.conv.weight.float()  # of which some are summed
    kernels = [k for rows in two_taps(weight, 2) for k in two_taps(rows, 3)]
    folded = torch.cat(kernels).to(layer.conv.weight.dtype)  # → (4·C, C, 2, 2)
    return folded.contiguous(memory_format=LAST)


def two_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along ``dim`` as two, for the even and for the odd outputs."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), a view where channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pixel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v with q (B, Q, C) scaled already; scores in float32 on a GPU."""
    if q.is_cuda:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.bmm(q, k.mT, out_dtype=wide)
    else:
        scores = q @ k.mT  # (B, Q, C) · (B, C, L) → (B, Q, L)
    return scores.softmax(-1).to(v.dtype) @ v

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.attention import Attention
from minidiff.dit import MLP, Chunks, FinalLayer, JointBlock, MMDiT
from minidiff.efficiency import (
    FLOAT8,
    Float8Linear,
    NF4Linear,
    Rows,
    double,
    interleave,
    quantize,
)
from minidiff.engine.kernels import (
    group_norm_silu,
    has_fp8,
    norm_heads,
    quantize_rows,
    residual_norm,
)
from minidiff.interface.checks import check_choice, check_fast
from minidiff.lora import AdaptedLinear
from minidiff.vae import VAE, AttentionBlock, Decoder, ResnetBlock, Upsample

Module = TypeVar("Module", bound=nn.Module)
LAST = torch.channels_last
PATCH = torch.fx.experimental._config.patch  # type: ignore[attr-defined]
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
    if isinstance(layer, AdaptedLinear):
        y = linear(x, layer.layer, out=out)
        given = x.values if x.scale is None else restore(x, layer.dtype)
        for beside in layer.updates:
            y = beside(given, y)
        y = y if out is None else out.copy_(y)
        return F.gelu(y, approximate="tanh") if gelu else y
    if x.scale is not None:
        return float8_product(x, layer, out)
    return multiply(x.values, *weights(layer, x.values.dtype), gelu, out)


def weights(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix (out, in) of a block's layer in ``dtype``, and its bias (out,)."""
    assert isinstance(layer, nn.Linear | Float8Linear | NF4Linear)
    assert layer.bias is not None
    if isinstance(layer, Float8Linear):
        return layer.weight.to(dtype) * layer.scale.to(dtype), layer.bias
    if isinstance(layer, NF4Linear):
        return layer.matrix().to(dtype), layer.bias
    return layer.weight, layer.bias


def multiply(
    x: Tensor, matrix: Tensor, bias: Tensor, gelu: bool, out: Tensor | None
) -> Tensor:
    """x (R, in) · matrixᵀ + bias → (R, out), then tanh-GELU where asked for."""
    if gelu and x.is_cuda:  # cuBLAS applies it before writing the result
        return torch._addmm_activation(bias, x, matrix.t(), use_gelu=True)
    if x.dtype == torch.float32 and not x.is_cuda and ONEDNN:
        kind = ("gelu", [], "tanh") if gelu else ("none", list[float](), "")
        y = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, *kind)
        return y if out is None else out.copy_(y)
    y = torch.addmm(bias, x, matrix.t(), out=out)
    return F.gelu(y, approximate="tanh") if gelu else y


def restore(x: Rows, dtype: torch.dtype) -> Tensor:
    """The rows that an fp8 form stands for."""
    assert x.scale is not None
    return (x.values.float() * x.scale).to(dtype)


def float8_product(x: Rows, layer: nn.Module, out: Tensor | None = None) -> Tensor:
    """Product of fp8 rows and a ``Float8Linear``, scales applied to float32 sums."""
    assert isinstance(layer, Float8Linear) and layer.bias is not None
    assert x.scale is not None
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
    layers = [layer for a in attentions for layer in (a.ln_q, a.ln_k)]
    norms = tuple(layer.get_parameter("weight") for layer in layers)
    return torch.stack(norms).unflatten(0, (-1, 2))  # (2·A, d) → (A, 2, d)


def same_weights(form: type[Module], model: nn.Module) -> Module:
    """A ``form`` made of the layers of ``model``: what changes in one does in both."""
    shared = form.__new__(form)
    shared.__dict__.update(model.__dict__)
    return shared


def is_ours(layer: nn.Module) -> bool:
    """Whether a layer is one of this package's or PyTorch's, and nobody listens to it.

    Else it may do, or tell, what a fused pass would go by.
    """
    own = type(layer).__module__.startswith(("minidiff.", "torch.nn."))
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return own and not hooked and "forward" not in layer.__dict__


def are_ours(*parts: Any) -> bool:
    """Whether all layers of modules are."""
    return all(is_ours(layer) for part in parts for layer in part.modules())


class FastMMDiT(MMDiT):
    """An ``MMDiT`` whose blocks run with interleaved samples and in fused passes.

    With ``fp8`` the products of the blocks take 8-bit inputs, scaled for each row of
    tokens and each output channel; those layers must then be ``Float8Linear``.
    ``attention`` is the backend to try first. Where gradients are wanted, or a layer of
    the blocks has a hook or is another's, the blocks run as they are.
    """

    fp8: bool = False
    attention: str | None = None

    @classmethod
    def of(
        cls, model: MMDiT, fp8: bool = False, attention: str | None = None
    ) -> "FastMMDiT":
        """``model``'s own layers in this form; None: ``preferred_attention``.

        Raises ValueError for a model without q/k norms.
        """
        check_fast(model.config)
        fast = same_weights(cls, model)
        weight = model.x_embedder.proj.weight
        fast.fp8, fast.attention = fp8, attention or preferred_attention(weight)
        return fast

    @property
    def runs_fast(self) -> bool:
        """Whether a call now takes the fused passes."""
        own = are_ours(self.joint_blocks, self.final_layer)
        return own and not torch.is_grad_enabled()

    def forward(self, *given: Any, **options: Any) -> Tensor:
        """As ``MMDiT.forward``: velocity (B, C, h, w)."""
        if not self.runs_fast:
            return super().forward(*given, **options)
        card = torch.cuda.device_of(self.x_embedder.proj.weight)
        with card, attention_backend(self.attention):  # Triton starts its kernels there
            return super().forward(*given, **options)

    def layers(self) -> tuple[Sequence[Callable], Callable]:
        """The same blocks and last layer, for tokens in rows."""
        if not self.runs_fast:
            return super().layers()
        heads = self.config.num_attention_heads
        blocks = [FastBlock(block, heads, self.fp8) for block in self.joint_blocks]
        return blocks, partial(read_out, self.final_layer)


@dataclass(frozen=True)
class Stream:
    """A stream's tokens as rows (L·B, D), the samples of the batch interleaved.

    ``updates`` (y, gate), (L·B, D) and (B, D), are still to be added to the rows: the
    norm that comes next does it, and overwrites them.
    """

    rows: Tensor
    batch: int
    updates: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, x: "Tensor | Stream") -> "Stream":
        """Tokens (B, L, D) as a stream; a stream as it is."""
        return cls(interleave(x), len(x)) if isinstance(x, Tensor) else x

    def __add__(self, control: Tensor) -> "Stream":
        """The stream with ``control`` (B, L, D) to be added."""
        update = interleave(control), torch.ones_like(control[:, 0])  # gate (B, D)
        return replace(self, updates=(*self.updates, update))


@dataclass(frozen=True)
class FastBlock:
    """A ``JointBlock`` on two streams. Takes and gives what a ``JointBlock`` does."""

    block: JointBlock
    heads: int
    fp8: bool = False

    def __call__(
        self,
        context: "Tensor | Stream",
        x: "Tensor | Stream",
        modulation: tuple[Tensor, Tensor],
    ) -> tuple[Stream | None, Stream]:
        """The streams one block on; tokens (B, L, D) become streams first."""
        c, x = Stream.of(context), Stream.of(x)
        text, image = self.block.context_block, self.block.x_block
        of_c, of_x = text.split(modulation[0]), image.split(modulation[1])
        read, dual = self.attend(c, x, of_c, of_x)
        updates = [(self.product(read[-len(x.rows) :], image.attn.proj), of_x.gate)]
        if dual is not None:
            updates.append((self.product(dual, image.attn2.proj), of_x.gate_dual))
        x = self.mlp(x, updates, image.mlp, of_x)
        if self.block.pre_only:
            return None, x
        read = self.product(read[: len(c.rows)], text.attn.proj)
        return self.mlp(c, [(read, of_c.gate)], text.mlp, of_c), x

    def attend(
        self, c: Stream, x: Stream, of_c: Chunks, of_x: Chunks
    ) -> tuple[Tensor, Tensor | None]:
        """What all tokens read, (L·B + N·B, D), and dual attention's (N·B, D).

        In the last block, where the text is dropped, only the image reads.
        """
        text, image = self.block.context_block, self.block.x_block
        dual = image.chunks == 9
        pairs = [(of_x.shift, of_x.scale), (of_x.shift_dual, of_x.scale_dual)]
        hx = residual_norm(x.rows, x.updates, pairs[: 1 + dual], self.fp8)
        hc = residual_norm(c.rows, c.updates, [(of_c.shift, of_c.scale)], self.fp8)
        words, width = c.rows.shape
        qkv = c.rows.new_empty(words + len(x.rows), 3 * width)
        linear(hc[0], text.attn.qkv, out=qkv[:words])
        linear(hx[0], image.attn.qkv, out=qkv[words:])
        norm_heads(qkv, head_norms(text.attn, image.attn), self.heads, words)
        first = words // c.batch if self.block.pre_only else 0
        read = self_attention(qkv, c.batch, self.heads, first)
        if not dual:
            return read, None
        qkv = linear(hx[1], image.attn2.qkv)
        norm_heads(qkv, head_norms(image.attn2, image.attn2), self.heads)
        return read, self_attention(qkv, x.batch, self.heads)

    def product(self, read: Tensor, layer: nn.Module) -> Tensor:
        """Rows (R, D) through one linear layer."""
        return linear(quantize_rows(read) if self.fp8 else Rows(read), layer)

    def mlp(
        self,
        stream: Stream,
        updates: Sequence[tuple[Tensor, Tensor]],
        layers: MLP,
        m: Chunks,
    ) -> Stream:
        """Add the updates; what the MLP answers is the stream's next update."""
        modulations = [(m.shift_mlp, m.scale_mlp)]
        (rows,) = residual_norm(stream.rows, updates, modulations, self.fp8)
        hidden = linear(rows, layers.fc1, gelu=not self.fp8)
        given = quantize_rows(hidden, gelu=True) if self.fp8 else Rows(hidden)
        update = linear(given, layers.fc2), m.gate_mlp
        return replace(stream, updates=(update,))


def read_out(layer: FinalLayer, x: "Tensor | Stream", modulation: Tensor) -> Tensor:
    """A ``FinalLayer`` on a stream: its tokens → (B, N, p·p·C)."""
    x = Stream.of(x)
    shift, scale = modulation.chunk(2, dim=-1)  # (B, D) each
    (rows,) = residual_norm(x.rows, x.updates, [(shift, scale)])
    out = layer.linear(rows.values).unflatten(0, (-1, x.batch))
    return out.transpose(0, 1)  # (N·B, p·p·C) → (N, B, p·p·C) → (B, N, p·p·C)


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
    transformer: MMDiT, vae: VAE, fast: bool | None = True, compile: bool = False
) -> MMDiT:
    """The transformer in a form of this module; the autoencoder's decoder, in place.

    With ``fast`` a transformer whose blocks are in fp8 also multiplies in fp8, where
    the device can, and on a CPU the process keeps the memory that it frees. None leaves
    both as they were, and a transformer without head norms too. With ``compile`` the
    chapters' own blocks are compiled instead, each kind of block once for all sizes;
    ``fast`` then serves the decoder alone.
    """
    if fast is not False:
        vae.decoder = FastDecoder.of(vae.decoder)
    if fast and not transformer.x_embedder.proj.weight.is_cuda:
        keep_freed_memory()
    if compile:
        return CompiledMMDiT.of(transformer)
    if fast is None and transformer.config.qk_norm != "rms_norm":
        return transformer
    return FastMMDiT.of(transformer, bool(fast) and multiplies_in_fp8(transformer))


class CompiledMMDiT(MMDiT):
    """An ``MMDiT`` of which each kind of block is compiled once, for all sizes.

    Two samples and one are two sizes to the compiler, all other numbers are one.
    """

    @classmethod
    def of(cls, model: MMDiT) -> "CompiledMMDiT":
        """``model``'s own layers, its blocks compiled."""
        # Past its limit dynamo compiles no more, and the eight forms that it allows are
        # for all models of the process: three kinds with and without guidance are six
        config = torch._dynamo.config
        config.recompile_limit = max(64, config.recompile_limit)
        for block in model.joint_blocks:
            block.compile(dynamic=True)
        return same_weights(cls, model)

    def forward(self, *given: Any, **options: Any) -> Tensor:
        """As ``MMDiT.forward``; no length that equals the width is taken for it."""
        with PATCH(use_duck_shape=False):
            return super().forward(*given, **options)

    def layers(self) -> tuple[Sequence[Callable], Callable]:
        """The blocks; a copy of the text, for a view would be of another kind."""
        first, *others = self.joint_blocks

        def begin(context: Tensor, *given: Any) -> tuple[Tensor | None, Tensor]:
            return first(context.clone(), *given)

        return [begin, *others], self.final_layer


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
    layer: Any = model.joint_blocks[0].x_block.mlp.fc1
    if isinstance(layer, NF4Linear):
        return False
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


class FastDecoder(Decoder):
    """A ``Decoder`` in channels-last memory with fused norms.

    With ``fold`` each doubling is part of the convolution behind it.
    """

    fold: bool = True
    mid: Any  # a ModuleDict

    @classmethod
    def of(cls, decoder: Decoder, fold: bool = True) -> "FastDecoder":
        """``decoder``'s own layers, their weights moved to channels-last memory."""
        decoder.to(memory_format=LAST)  # type: ignore[call-overload]
        fast = same_weights(cls, decoder)
        fast.fold = fold
        return fast

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images, by the fused passes but for gradients.

        With hooks, or layers of another's, it runs as it is, too.
        """
        if torch.is_grad_enabled() or not are_ours(*self.children()):
            return super().forward(latents)
        with torch.cuda.device_of(latents):
            return self.fused(latents)

    def fused(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images, by the fused passes."""
        first = self.conv_in(latents.contiguous(memory_format=LAST))
        x = self.resnet(Pending(first), self.mid["block_1"])
        x = self.attention(x, self.mid["attn_1"])
        x = self.resnet(x, self.mid["block_2"])
        for level in reversed(self.up):
            for block in level["block"]:
                x = self.resnet(x, block)
            if "upsample" in level:
                x = self.upsample(x.settle(), level["upsample"])
        _, h = self.norm(x, self.norm_out)
        return F.conv2d(h, self.conv_out.weight, self.conv_out.bias, padding=1)

    def norm(
        self, x: Pending, layer: nn.GroupNorm, keep: bool = False, silu: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The settled features, and SiLU of their norm."""
        weights = (layer.num_groups, layer.weight, layer.bias)
        return group_norm_silu(x.x, *weights, x.bias, x.residual, keep, silu)

    def resnet(self, x: Pending, block: ResnetBlock) -> Pending:
        """(B, C, H, W) → (B, C', H, W), the sum still to be added."""
        settled, h = self.norm(x, block.norm1, keep=True)
        h = F.conv2d(h, block.conv1.weight, padding=1)
        _, h = self.norm(Pending(h, block.conv1.bias), block.norm2)
        h = F.conv2d(h, block.conv2.weight, padding=1)
        bias = block.conv2.get_parameter("bias")
        if hasattr(block, "nin_shortcut"):
            settled = F.conv2d(settled, block.nin_shortcut.weight)
            own = block.nin_shortcut.get_parameter("bias")
            return Pending(h, bias + own, settled)
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
        return Pending(double(x, layer), layer.conv.bias)


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

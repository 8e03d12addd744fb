# %% [markdown]
r"""
# Attention: words and patches read one another

This chapter builds joint attention: the one operation through which text steers the
picture.
"""

# %%
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.text_encoders import RMSNorm


# %%
class Heads(NamedTuple):
    """Queries, keys and values of one stream, each (B, L, H, d)."""

    q: Tensor
    k: Tensor
    v: Tensor


# %%
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention in every head; Vaswani et al. 2017, section 3.2.

    ``q``, ``k``, ``v`` are (B, L, H, d); returns the heads side by side, (B, L, H·d).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)  # (B, L, H, d) → (B, H, L, d)
    return out.transpose(1, 2).flatten(2)  # (B, H, L, d) → (B, L, H·d)


# %%
class Attention(nn.Module):
    """One stream's projections: its tokens into heads, and the heads' answer back.

    ``dim`` = heads · head width. ``qk_norm`` is "rms_norm" (SD3.5: an RMS norm over the
    channels of each head; Esser et al. 2024, section 5.3.2) or None (SD3). With
    ``pre_only`` there is no output projection. Called on tokens (B, L, D) it is plain
    multi-head self-attention and returns (B, L, D).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: str | None = "rms_norm",
        pre_only: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {qk_norm!r}: expected 'rms_norm' or None")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm is not None:
            self.ln_q = RMSNorm(dim // num_heads, eps=1e-6)
            self.ln_k = RMSNorm(dim // num_heads, eps=1e-6)
        else:
            self.ln_q = self.ln_k = nn.Identity()
        if not pre_only:
            self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> Heads:
        """Tokens (B, L, D) → queries, keys and values, each (B, L, H, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)  # (B, L, 3·D) → (B, L, 3, H, d) → 3 × (B, L, H, d)
        return Heads(self.ln_q(q), self.ln_k(k), v)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.heads(x)))


# %%
class JointAttention(nn.Module):
    """All tokens of two streams attend to all tokens of both; Esser et al. 2024, §4.

    Takes the ``Heads`` of the context (L_c tokens) and of the image (L_x tokens),
    returns what each has read, (B, L_c, D) and (B, L_x, D), before the output
    projections. It holds no weights: those are the streams' own ``Attention``.
    """

    def forward(self, context: Heads, image: Heads) -> tuple[Tensor, Tensor]:
        q = torch.cat([context.q, image.q], dim=1)  # → (B, L_c + L_x, H, d)
        k = torch.cat([context.k, image.k], dim=1)
        v = torch.cat([context.v, image.v], dim=1)
        out = attend(q, k, v)
        length = context.q.shape[1]
        return out[:, :length].contiguous(), out[:, length:].contiguous()


# %%
def attention_map(
    context: Heads,
    image: Heads,
    queries: slice | Sequence[int] = slice(None),
    keys: slice | Sequence[int] = slice(None),
) -> Tensor:
    """The weights softmax(q kᵀ/√d) of chosen tokens, (B, H, queries, keys), float32.

    Tokens are counted over [context; image]. The softmax runs over all keys; only then
    are ``keys`` chosen.
    """
    q = torch.cat([context.q, image.q], dim=1)[:, queries].transpose(1, 2).float()
    k = torch.cat([context.k, image.k], dim=1).transpose(1, 2).float()
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, Q, d) · (B, H, d, L) → (B, H, Q, L)
    return scores.softmax(-1)[..., keys].contiguous()  # drop the full matrix


# %%
@contextmanager
def record_attention(
    model: nn.Module,
    blocks: Sequence[int] | None = None,
    queries: slice | Sequence[int] | None = None,
    keys: slice | Sequence[int] | None = None,
    average_heads: bool = False,
) -> Iterator[dict[int, list[Tensor]]]:
    """Collect attention maps while ``model`` (any module with ``JointAttention``) runs.

    Yields a dictionary from block number to a list with one map per forward call,
    (B, H, queries, keys) or, with ``average_heads``, (B, queries, keys), float32 on the
    CPU. None means all blocks or tokens. One block's matrix exists at a time. Works on
    eager modules: a compiled block does not run hooks.
    """
    layers = [m for m in model.modules() if isinstance(m, JointAttention)]
    chosen = range(len(layers)) if blocks is None else blocks
    if bad := [i for i in chosen if not 0 <= i < len(layers)]:
        raise ValueError(f"blocks {bad}: the model has blocks 0 to {len(layers) - 1}")
    queries, keys = (slice(None) if t is None else t for t in (queries, keys))
    maps: dict[int, list[Tensor]] = {i: [] for i in chosen}

    def record(index: int, heads: tuple[Heads, Heads]) -> None:
        with torch.no_grad():
            weights = attention_map(*heads, queries, keys)
        maps[index].append((weights.mean(1) if average_heads else weights).cpu())

    handles = [
        layers[i].register_forward_pre_hook(lambda _, heads, i=i: record(i, heads))
        for i in chosen
    ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()

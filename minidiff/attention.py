# %% [markdown]
r"""
# Attention: words and patches read one another

In this chapter you build **joint attention**, the one place in Stable Diffusion 3.5
where a patch of the picture can look at a word, and a word at a patch.

After it you will be able to

- **compute** attention by hand, with three loops;
- **turn** the loops into matrix products, and the products into one fused call;
- **explain** why SD3.5 normalises queries and keys;
- **join** two streams of tokens that keep their own weights;
- **record** what every word reads while the shipped model paints, and **break** it.
"""

# %% [markdown]
# ## Where we are
#
# You met attention in chapter 2, as a part of the text encoders. Here it is the
# subject: this time between two kinds of tokens, and inside the network that paints.
# Chapter 2 turned the prompt into *context*: a row of numbers for every text token.
# Chapter 3 turned pictures into latents; a latent cut into small squares, *patches*, is
# a row of numbers for every patch. So text and picture have become the same kind of
# thing: two lists of tokens. The transformer of chapter 5 is a stack of blocks, and
# every block does two things with these tokens. It lets them read one another, which is
# attention, and it lets each of them think alone, which is a small network per token.
# This chapter builds the first of the two.

# %%
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.text_encoders import RMSNorm

# %% tags=["active-ipynb"]
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT, SEED
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("attention")

# %% [markdown]
# One prompt travels through this book, and here is what arrives from chapter 2: the
# context of “a red dress on a blue background”, 64 tokens of 192 numbers. The first 32
# come from the two CLIP encoders, side by side; the last 32 come from T5. In SD3.5 they
# are 77 + 256 tokens of 4096 numbers. (Before the first block a linear layer of chapter
# 5 brings them to the transformer's width $D$, 160 here: see the table below.)

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# context, pooled = pipe.encode_prompt(PROMPT)
# print(journey.check("context", context))
# print(context[0, :2, :4].numpy().round(2))

# %% [markdown]
# ## A picture of the thing
#
# Lay all tokens in one line, text first, then patches. Attention is then one square
# table: the row of a token says how much it reads from each token. Joining two streams
# cuts the table into four fields. The drawing is to scale. In the tiny model words and
# patches are equally many. In SD3.5 at 1024 × 1024 pixels the words are a thin strip:
# whatever a single word has to say enters the picture through the narrow field on the
# left, patches reading words. (The pooled vector of chapter 2, one for the whole
# prompt, takes another way: chapter 5.)

# %% tags=["active-ipynb"]
# sizes = {"Tiny: 64 + 64": (64, 64), "SD3.5 at 1024²: 333 + 4096": (333, 4096)}
# viz.show_quadrants(sizes)

# %% [markdown]
# ## The mathematics
#
# A token $i$ sends out a *query* $q_i$, “what am I looking for?”; it holds out a *key*
# $k_i$, “what do I have?”, and a *value* $v_i$, “what do I tell?”. How well query $i$
# fits key $j$ is their dot product, divided by $\sqrt{d}$ where $d$ is the number of
# their entries:
#
# $$s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}}$$
#
# The softmax turns the scores of one row into weights: positive, summing to one.
#
# $$a_{ij} = \frac{e^{s_{ij}}}{\sum_l e^{s_{il}}}$$
#
# What token $i$ reads is the mean of all values, weighted so:
#
# $$o_i = \sum_j a_{ij}\, v_j$$
#
# Why divide by $\sqrt d$? If the entries of $q$ and $k$ are independent with mean 0 and
# variance 1, the dot product has variance $d$. Dividing by $\sqrt d$ brings the scores
# back to variance 1, whatever $d$ is, so that the softmax neither starts flat nor
# starts by choosing a single token.
#
# One table of weights can follow one question. A block therefore runs $H$ *heads* side
# by side, each on its own $d$ of the $D = H \cdot d$ channels, with its own table.
#
# | symbol | variable | meaning | Tiny | Medium | Large |
# |---|---|---|---|---|---|
# | $D$ | `dim` | channels of a token | 160 | 1536 | 2432 |
# | $H$ | `num_heads` | heads | 5 | 24 | 38 |
# | $d$ | `dim // num_heads` | channels of a head | 32 | 64 | 64 |
# | $L_c$ | `context.q.shape[1]` | text tokens | 64 | 333 | 333 |
# | $L_x$ | `image.q.shape[1]` | patches (1024² for SD3.5) | 64 | 4096 | 4096 |
# | $q, k, v$ | `q`, `k`, `v` | one stream's heads, (B, L, H, d) | | | |
# | $a$ | `weights` | the table, (B, H, L, L) | | | |

# %% [markdown]
# ## Build it, first with loops
#
# The three equations, literally, for a single head. Slow, and impossible to
# misunderstand.


# %%
def attend_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, one number at a time: (L, d) × 3 → (L, d)."""
    length, d = q.shape
    out = torch.zeros_like(v)
    for i in range(length):
        scores = [q[i] @ k[j] / d**0.5 for j in range(length)]
        total = sum(score.exp() for score in scores)
        for j in range(length):
            out[i] += scores[j].exp() / total * v[j]
    return out


# %% [markdown]
# Three tokens whose meaning we choose ourselves: the word *red* and two patches. The
# word's query asks for “garment” (first channel); the keys of the patches offer
# “garment” and “background”. The values are only names in numbers: 1, 10 and 100. The
# word reads almost nothing but the first patch, so its answer lies near 10.

# %% tags=["active-ipynb"]
# q = torch.tensor([[8.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # red, garment, background
# k = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
# v = torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 0.0]])
# print(attend_loops(q, k, v)[:, 0].numpy().round(1))

# %% [markdown]
# The patches ask for nothing ($q = 0$): all their scores are equal, and they read the
# plain mean, 37. A query of zero is not silence; it is indifference.
#
# ## Then with matrices
#
# All dot products of all queries with all keys are one matrix product, $q k^\top$; the
# weighted means are another, $a v$. Batch and heads are leading dimensions, which
# PyTorch carries along. The same sums, without a loop.


# %%
def attend_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with the whole table in memory: (B, H, L, d) × 3 → (B, H, L, d)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, L, d) · (B, H, d, L) → (B, H, L, L)
    return scores.softmax(-1) @ v  # (B, H, L, L) · (B, H, L, d) → (B, H, L, d)


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# q, k, v = torch.randn(3, 2, 5, 10, 32)  # B = 2, H = 5, L = 10, d = 32
# flat = (t.flatten(0, 1) for t in (q, k, v))  # (B, H, L, d) → (B·H, L, d)
# loops = torch.stack([attend_loops(*head) for head in zip(*flat)])
# same = torch.allclose(loops.view(q.shape), attend_matrices(q, k, v), atol=1e-6)
# print("loops and matrices agree:", same)

# %% [markdown]
# ## Then in one call
#
# The table is the trouble. It has $L^2$ entries per head; for one block of SD3.5 Large
# at 1024² with guidance, for which each step runs two samples (chapter 6), that is

# %% tags=["active-ipynb"]
# length, heads, samples = 333 + 4096, 38, 2
# print(f"{samples * heads * length**2 * 2 / 2**30:.1f} GiB in bfloat16, for one block")

# %% [markdown]
# and it is written, read, normalised, written and read again, although nobody wants it:
# only the weighted means go on. The fused kernels behind `scaled_dot_product_attention`
# compute them tile by tile. They keep a running maximum and a running sum per row, so
# that a tile of the table lives only in fast on-chip memory (Dao et al. 2022,
# FlashAttention). The numbers are the same up to rounding.
#
# It wants heads before tokens, (B, H, L, d). Our projections will deliver tokens before
# heads, (B, L, H, d). Swapping two dimensions is only another way to walk through the
# same memory, so nothing is copied on the way in.


# %%
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention in every head; Vaswani et al. 2017, section 3.2.

    ``q``, ``k``, ``v`` are (B, L, H, d); returns the heads side by side, (B, L, H·d).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, d)
    return out.transpose(1, 2).flatten(2)  # (B, H, L, d) → (B, L, H·d)


# %% tags=["active-ipynb"]
# fused = attend(*(t.transpose(1, 2) for t in (q, k, v)))  # (B, H, L, d) → (B, L, H·d)
# table = attend_matrices(q, k, v).transpose(1, 2).flatten(2)
# print("table and fused call agree:", torch.allclose(fused, table, atol=1e-6))

# %% [markdown]
# ## One stream: its queries, keys and values
#
# Where do $q$, $k$, $v$ come from? From three linear maps of the token. Three maps of
# the same input are one map with a taller matrix: the official files store it as `qkv`,
# its rows in thirds. One large product keeps a GPU busier than three small ones.
#
# Then comes *QK-norm*, which SD3 Medium lacks and SD3.5 has: each head's query and key
# are divided by their root mean square, and multiplied by learned weights $g$:
#
# $$\hat q = g_q \odot \frac{q}{\sqrt{\tfrac1d \sum_c q_c^2 + \epsilon}},
#   \qquad \epsilon = 10^{-6}$$
#
# and likewise $\hat k$. Without it nothing bounds the scores: they grow with the square
# of the weights of `qkv`. Then the softmax saturates, and in 16-bit arithmetic training
# becomes unstable (Esser et al. 2024, section 5.3.2). With it, $\lVert \hat q \rVert$
# is at most $\sqrt d \max|g_q|$, so by Cauchy and Schwarz
#
# $$|s_{ij}| \le \sqrt d \, \max|g_q| \, \max|g_k|,$$
#
# whatever the `qkv` matrix becomes. The values are left alone: they carry what is told,
# and nothing exponentiates them.


# %%
class Heads(NamedTuple):
    """Queries, keys and values of one stream, each (B, L, H, d)."""

    q: Tensor
    k: Tensor
    v: Tensor


# %%
class Attention(nn.Module):
    """One stream's projections: its tokens into heads, and the heads' answer back.

    ``dim`` = heads · head width. ``qk_norm`` is "rms_norm" (SD3.5: an RMS norm over the
    channels of each head; Esser et al. 2024, section 5.3.2) or None (SD3). With
    ``pre_only`` there is no output projection: in the last block nobody reads the text
    any more (chapter 5). Called on tokens (B, L, D) it is plain multi-head
    self-attention and returns (B, L, D).
    """

    ln_q: RMSNorm | nn.Identity
    ln_k: RMSNorm | nn.Identity

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


# %% [markdown]
# Two checks. First, the fused matrix is three matrices: its middle third alone gives
# the keys. Second, the norm at work: make the weights of `qkv` ten times as large and
# see what becomes of the scores, without the norm and with it.

# %% tags=["active-ipynb"]
# layer, x = Attention(160, 5, qk_norm=None), torch.randn(2, 10, 160)
# weight, bias = (t.chunk(3)[1] for t in (layer.qkv.weight, layer.qkv.bias))
# keys = F.linear(x, weight, bias).unflatten(-1, (5, 32))  # (B, L, D) → (B, L, H, d)
# print("the middle third is k:", torch.allclose(keys, layer.heads(x).k, atol=1e-6))

# %% tags=["active-ipynb"]
# for qk_norm in (None, "rms_norm"):
#     layer, largest = Attention(160, 5, qk_norm), []
#     for _ in range(2):
#         q, k, _ = (t.transpose(1, 2) for t in layer.heads(x))
#         largest.append((q @ k.mT / 32**0.5).abs().max().item())
#         bigger = {n: 10 * p for n, p in layer.qkv.state_dict().items()}
#         layer.qkv.load_state_dict(bigger)
#     print(f"{qk_norm}: the largest score grows {largest[1] / largest[0]:.0f} times")

# %% [markdown]
# ## Two streams, one table
#
# Words and patches are different things: what makes a good query for a word is not what
# makes one for a patch. MMDiT, the transformer of Stable Diffusion 3 (chapter 5),
# therefore gives each stream its own `qkv`, its own norms and its own output
# projection; only the table is common. To join them is to lay their heads end to end,
# attend once, and cut the result where the streams meet.
#
# $$q = \begin{bmatrix} q^c \\ q^x \end{bmatrix},\quad
#   k = \begin{bmatrix} k^c \\ k^x \end{bmatrix},\quad
#   v = \begin{bmatrix} v^c \\ v^x \end{bmatrix}$$
#
# Compare *cross-attention*, with which earlier diffusion models read text: there,
# patches read words, in a layer of their own, and words never read patches. That is the
# lower left field of the table alone. Here all four fields share one softmax, so that a
# patch weighs words against patches, and the words themselves change from block to
# block with what they have seen of the picture.


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


# %% [markdown]
# Time to use real tokens. A *hook*, a function that PyTorch calls when a module runs,
# keeps the tokens that reach the first block's two `qkv` when the shipped model starts
# to paint our prompt from pure noise. (It returns nothing: what such a hook returns
# would take the input's place.) Then *your* classes, the ones defined in the cells
# above, replace those in the model: from here on every figure comes from them.

# %% tags=["active-ipynb"]
# block, tokens = pipe.transformer.joint_blocks[0], {}
# for name in ("context_block", "x_block"):
#     keep = lambda _, given, name=name: tokens.update({name: given[0]})
#     getattr(block, name).attn.qkv.register_forward_pre_hook(keep)
# pipe(PROMPT, seed=SEED, num_inference_steps=1, guidance_scale=1.0)
# print({name: tuple(x.shape) for name, x in tokens.items()})

# %% tags=["active-ipynb"]
# for block in pipe.transformer.joint_blocks:
#     for stream in (block.context_block, block.x_block):
#         mine = Attention(160, 5, pre_only=not hasattr(stream.attn, "proj"))
#         mine.load_state_dict(stream.attn.state_dict())
#         stream.attn = mine
#     block.attention = JointAttention()

# %% tags=["active-ipynb"]
# block = pipe.transformer.joint_blocks[0]
# text_heads = block.context_block.attn.heads(tokens["context_block"])
# image_heads = block.x_block.attn.heads(tokens["x_block"])
# read_words, read_patches = JointAttention()(text_heads, image_heads)
# q, k, v = (torch.cat(t, dim=1)[0, :, 0] for t in zip(text_heads, image_heads))
# loops = attend_loops(q, k, v)[64:]  # head 0, the patches: (64, 32)
# print("the loops agree:", torch.allclose(loops, read_patches[0, :, :32], atol=1e-5))

# %% [markdown]
# ## Recording what is read
#
# The fused call never shows its table. To look at it, we compute the table a second
# time, from the same queries and keys, and only for the tokens we care about. The
# softmax must still run over *all* keys: leaving some out beforehand would make the
# rest look larger than it is.


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


# %% [markdown]
# `record_attention` hangs a hook on every `JointAttention` of a model, which gets the
# module's inputs each time it runs, and takes it off again at the end. One block's
# table exists at a time, so that this works on full-size models too, if you choose the
# few queries or keys that you want: what is kept goes to the CPU's memory.


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
    eager modules: a block that is compiled already does not notice a new hook.
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


# %% [markdown]
# ## Look at it
#
# We let the shipped model paint the prompt in 28 steps and record everything. With
# guidance (chapter 6) each step runs two samples, the empty prompt and ours; ours is
# the second.

# %% tags=["active-ipynb"]
# with record_attention(pipe.transformer, average_heads=True) as maps:
#     image = pipe(PROMPT, seed=SEED, output_type="pt")[0] * 2 - 1  # to [−1, 1]
# table = torch.stack([torch.stack(m)[:, 1] for m in maps.values()])
# print(tuple(table.shape), "block, step, reading token, token read")

# %% tags=["active-ipynb"]
# viz.show_heatmap(table[2, 14] ** 0.5, xlabel="token read", ylabel="reading token",
#     title="block 2, step 14: square root of the weights; 0–63 text, 64–127 patches")

# %% [markdown]
# The upper left field is words reading words, the lower left patches reading words. A
# long run of equal columns is padding: a reader gives all of it much the same weight.
# In the lower right field look for stripes along the diagonal: a patch reads its
# neighbours, and those above and below it stand eight places away, because a row has
# eight patches. In the upper right field, words reading patches, the bright columns
# also stand eight apart: all words read the same columns of the picture.
#
# Now the words themselves. T5's tokens stand behind CLIP's 32. For every word we ask
# how much each patch reads it, and lay the answer over the finished picture: one row
# per word, one column per block, in the middle of the way from noise to picture. Bright
# is where the word is read most; each map has a scale of its own.

# %% tags=["active-ipynb"]
# t5 = pipe.tokenizers[2]
# names = [piece.strip("▁") for piece in t5.tokens(t5.encode(PROMPT))]
# words = ["red", "dress", "blue", "background"]
# rows = [pipe.tokenizers[0].model_max_length + names.index(word) for word in words]
# maps = table[..., 64:, rows].mT.unflatten(-1, (8, 8))  # (block, step, word, 8, 8)
# by_block = maps[:, 14].transpose(0, 1)  # (block, word, 8, 8) → (word, block, 8, 8)
# viz.show_attention(by_block, [f"block {i}" for i in range(5)], image, rows=words)

# %% [markdown]
# In which block does the garment read *red*, and the rest *blue*, the colour of the
# background? Eyes are easily persuaded, so here is a number: the correlation, over the
# 64 patches, of each word's map with how much redder than blue the finished picture is
# there. A word that the dress reads comes near +1, a word that the background reads
# near −1.

# %% tags=["active-ipynb"]
# redness = F.avg_pool2d(image[:1] - image[2:], 8).flatten()  # (1, H, W) → (64,)
# for word, row in zip(words, by_block):
#     pairs = [torch.stack([heat.flatten(), redness]) for heat in row]
#     print(f"{word:>10}", [f"{torch.corrcoef(pair)[0, 1]:+.1f}" for pair in pairs])

# %% [markdown]
# Read the table by columns, a block at a time. In block 0 *red* is near +1 and *blue*
# near −1: the dress reads its own colour, the ground its own. In block 2 *red* is near
# 0: dress and ground read it alike. And a word need not be read where the thing that it
# names will be: the dress reads *background* in block 0 and again in the last two, and
# reads *dress* above all in block 0. T5 has let each token read the whole caption, so
# that its vector may stand for more than its own word.
#
# Now one block over the steps, block 2: first noise, at the end a picture. From which
# step on does a map keep the outline of the finished garment?

# %% tags=["active-ipynb"]
# steps = [0, 4, 9, 14, 20, 27]
# by_step = maps[2, steps].transpose(0, 1)  # (step, word, 8, 8) → (word, step, 8, 8)
# viz.show_attention(by_step, [f"step {i}" for i in steps], image, rows=words)

# %% [markdown]
# Touch it: choose a word and see where it is read; choose a block and a step; click a
# patch and see which words it reads.
# (Live, for any prompt, in shares that add up:
# <a href="../book/inside.html?open=attention&amp;block=0">what block 0 reads</a>.)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# explorer = viz.attention_explorer(maps[:, steps], words, image,
#     blocks=[f"block {i}" for i in range(5)], steps=[f"step {i}" for i in steps])
# explorer

# %% [markdown]
# ## Predict, then break it
#
# **One.** Shuffle the patches before they enter. Do the answers change? Write down your
# guess before you run the cell.

# %% tags=["active-ipynb"]
# order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
# mixed_heads = block.x_block.attn.heads(tokens["x_block"][:, order])
# _, mixed = JointAttention()(text_heads, mixed_heads)
# print("same, shuffled:", torch.allclose(mixed, read_patches[:, order], atol=1e-5))

# %% [markdown]
# Nothing changes but the order: a weighted mean does not know who stood where.
# Attention sees a *set* of tokens. Where a patch lies must be written into the token
# itself, which is what the position table of chapter 5 does.
#
# **Two.** Cut the table: let words read only words and patches only patches, in every
# block. The prompt can then no longer reach the picture through attention. What will
# the model paint: noise, some garment, a red dress? Remember that the pooled vector of
# chapter 2 takes another way.

# %% tags=["active-ipynb"]
# class Apart(JointAttention):
#     def forward(self, context: Heads, image: Heads) -> tuple[Tensor, Tensor]:
#         return attend(*context), attend(*image)
#
# def paint(attention: type[JointAttention]) -> Tensor:
#     for block in pipe.transformer.joint_blocks:
#         block.attention = attention()
#     return pipe(PROMPT, num_images_per_prompt=4, output_type="pt") * 2 - 1

# %% tags=["active-ipynb"]
# pictures = torch.cat([paint(Apart), paint(JointAttention)])
# viz.show_images(pictures, ["apart"] * 4 + ["joint"] * 4, columns=4)

# %% [markdown]
# Compare the rows. No patch in the upper one has read a word: what it still shows of
# the prompt has come through the pooled vector, by the modulation of chapter 5. What
# the lower row has in addition comes through the field “patches read words”. But not
# all of it is the prompt: without the words a patch spreads all its weight over
# patches, which it never did in training, and this alone spoils a picture.
#
# ## Parity
#
# The reference is diffusers' `Attention` with its joint processor. It keeps q, k and v
# in separate matrices and joins the streams in the order image, text; the order does
# not matter, as you have just seen. Both get the same random weights.

# %% tags=["active-ipynb"]
# from diffusers.models import attention_processor as reference
#
# theirs = reference.Attention(
#     query_dim=160, added_kv_proj_dim=160, heads=5, dim_head=32, out_dim=160,
#     context_pre_only=False, bias=True, qk_norm="rms_norm", eps=1e-6,
#     processor=reference.JointAttnProcessor2_0())
# streams = {"to_{}": Attention(160, 5), "add_{}_proj": Attention(160, 5)}
# norms, proj = ("norm_{}", "norm_added_{}"), (theirs.to_out[0], theirs.to_add_out)

# %% tags=["active-ipynb"]
# for (name, ours), norm, out in zip(streams.items(), norms, proj):
#     parts = [getattr(theirs, name.format(c)) for c in "qkv"]
#     ours.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
#     ours.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
#     ours.proj.load_state_dict(out.state_dict())
#     for c in "qk":
#         weight = getattr(theirs, norm.format(c)).weight.normal_(1, 0.2)
#         getattr(ours, f"ln_{c}").weight.copy_(weight)

# %% tags=["active-ipynb"]
# image_attn, text_attn = streams.values()
# x, c = torch.randn(2, 64, 160), torch.randn(2, 77, 160)
# read_c, read_x = JointAttention()(text_attn.heads(c), image_attn.heads(x))
# pairs = zip((image_attn.proj(read_x), text_attn.proj(read_c)), theirs(x, c))
# errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
# assert max(errors) < 1e-5, errors
# print("relative error below 1e-5 in both streams")

# %% [markdown]
# ## What production code does differently
#
# - **It chooses the kernel.** `scaled_dot_product_attention` picks one of several
#   implementations: FlashAttention, cuDNN's, a memory-efficient one, or the plain
#   formula. Which is fastest depends on card, dtype and head size. Ours leaves the
#   choice to PyTorch; `minidiff.engine.fast` makes it itself.
# - **It avoids the copies.** Joining the streams copies q, k and v once. Writing both
#   streams' projections straight into one buffer saves that, at the price of code that
#   no longer reads like the equations.
# - **It uses no mask, and neither do we.** The context is padded to a fixed length, and
#   the padding is read like any other token. That looks like an oversight, but the
#   published weights were trained with it: masking the padding now would change every
#   picture.
# - **It divides the table among cards** when pictures become videos: sequence
#   parallelism. For 4429 tokens there is no need.
#
# ## Exercises
#
# **4.1 Predict.** From 1024² to 2048² pixels the patches become four times as many; the
# 333 words remain. By what factor does the number of the table's entries grow?

# %% tags=["active-ipynb", "exercise"]
# def growth() -> float:
#     raise NotImplementedError  # your answer, one decimal is enough

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_4_1() -> None:
#     exact = (333 + 4 * 4096) ** 2 / (333 + 4096) ** 2
#     assert abs(growth() - exact) < 0.1, "count the tokens of both sizes, then square"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def growth() -> float:
#     return (333 + 16384) ** 2 / (333 + 4096) ** 2
#
# exercise_4_1()

# %% [markdown]
# **4.2 Code.** How many tokens does a token read? If it spreads its weights evenly over
# $n$ tokens, the *entropy* of its row, $-\sum_j a_j \ln a_j$, is $\ln n$; so $e$ to the
# entropy counts the tokens, evenly read or not. Write the entropy of each row; a weight
# of zero contributes nothing.

# %% tags=["active-ipynb", "exercise"]
# def entropy(weights: Tensor) -> Tensor:
#     """Entropy in nats of every row of a table: (…, K) → (…)."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_4_2() -> None:
#     even = entropy(torch.full((2, 5), 0.2))
#     assert even.shape == (2,), "one number for each row"
#     assert (even.exp() - 5).abs().max() < 1e-4, "it should be ln 5"
#     assert entropy(torch.eye(3)).abs().max() < 1e-6, "0 · ln 0 counts as 0"
#     uneven = entropy(torch.tensor([0.5, 0.25, 0.25]))
#     assert abs(uneven.item() - 1.0397) < 1e-3, "0.5 ln 2 + 2 · 0.25 ln 4 is expected"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def entropy(weights: Tensor) -> Tensor:
#     return -torch.xlogy(weights, weights).sum(-1)  # xlogy(0, 0) = 0
#
# exercise_4_2()

# %% tags=["active-ipynb", "hide-cell"]
# # patches of each block at step 14 (in the mean over heads: one head reads fewer)
# reach = entropy(table[:, 14, 64:]).exp().mean(-1)
# print("tokens read by a patch, block by block:", reach.round().int().tolist())

# %% [markdown]
# **4.3 Code.** Write a joint attention in which nobody reads the words marked False in
# `keep` (L_c,), by giving `F.scaled_dot_product_attention` an `attn_mask`: a boolean
# that broadcasts to (B, H, L, L), False where a key is not to be read.

# %% tags=["active-ipynb", "exercise"]
# def masked(context: Heads, image: Heads, keep: Tensor) -> Tensor:
#     """All tokens' answers, (B, L_c + L_x, H·d); only words in ``keep`` are read."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_4_3() -> None:
#     c, x = (Heads(*torch.randn(3, 2, n, 4, 8)) for n in (6, 9))
#     shorter = Heads(*(t[:, :4] for t in c))
#     wanted = torch.cat(JointAttention()(shorter, x), dim=1)
#     found = masked(c, x, torch.arange(6) < 4)[:, [0, 1, 2, 3, *range(6, 15)]]
#     assert torch.allclose(found, wanted, atol=1e-5), "hidden words are still read"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def masked(context: Heads, image: Heads, keep: Tensor) -> Tensor:
#     q, k, v = (torch.cat(t, dim=1).transpose(1, 2) for t in zip(context, image))
#     mask = F.pad(keep, (0, image.k.shape[1]), value=True)[None]  # → (1, L_c + L_x)
#     out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
#     return out.transpose(1, 2).flatten(2)  # (B, H, L, d) → (B, L, H·d)
#
# exercise_4_3()

# %% [markdown]
# **4.4 Explore.** Above the first cell of "Look at it" add one with two garments:
# `PROMPT = "a red dress left of a blue bag on a white background"`. Run it, and the
# cells from there down to the explorer. (Not further up: there `journey.check` expects
# our own prompt.) For other colours change the list `words` too; each must stand in the
# prompt. Do the two colours go to their own garments? From which block on?
#
# <details><summary>Answer</summary>
#
# Take the maps of both colours and correlate them with the picture as above, once with
# the left half's redness and once with the right half's. A model that binds colours to
# garments has, in some block, a large number for each colour on its own side and a
# small one on the other. If both colours look at both garments, expect pictures in
# which the colours are exchanged: try several seeds and count.
#
# </details>
#
# ## Summary
#
# You **computed** attention by hand with three loops, **turned** the loops into matrix
# products and the products into one fused call, and saw that all three agree. You
# **explained** the norm of queries and keys by a bound on the scores. You **joined**
# two streams that keep their own weights and put your classes into the shipped model.
# You **recorded** what its words and patches read, and **broke** it by cutting the
# table.
#
# The journey goes on: this is what the 64 patches have read in the first block. Chapter
# 5 builds the block around it, and the same tensor appears there again.

# %% tags=["active-ipynb"]
# print(journey.check("read", read_patches))
# print(read_patches[0, :2, :4].numpy().round(2))

# %% [markdown]
# ## Further reading
#
# - Vaswani et al. 2017, [Attention is all you need](https://arxiv.org/abs/1706.03762):
#   section 3.2, where all of this begins.
# - Esser et al. 2024, [Scaling rectified flow
#   transformers](https://arxiv.org/abs/2403.03206): section 4 for the two streams,
#   section 5.3.2 for the norm of queries and keys.
# - Zhang and Sennrich 2019, [Root mean square layer
#   normalization](https://arxiv.org/abs/1910.07467).
# - Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135): how to never
#   write the table.
# - Hertz et al. 2022, [Prompt-to-prompt](https://arxiv.org/abs/2208.01626): editing a
#   picture through its attention maps.

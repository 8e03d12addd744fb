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
- **record** what every patch reads while the shipped model paints, and **break** it.

On a first reading, jump from "The mathematics" to "Look at it": what lies between
builds the modules.
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

# %% tags=["hide-input"]
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.text_encoders import RMSNorm

# %% tags=["active-ipynb", "hide-input"]
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.classroom.exercises import check, seal
# from minidiff.classroom.journey import PROMPT, SEED
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("attention")

# %% [markdown]
# One prompt travels through this book, and here is what arrives from chapter 2: the
# context of “a red dress on a blue background”. The first half of its 64 tokens comes
# from the two CLIP encoders, side by side; the second half comes from T5. In SD3.5 they
# are 77 + 256 tokens of 4096 numbers. (Before the first block a linear layer of chapter
# 5 brings them to the transformer's width $D$.)

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# context, pooled = pipe.encode_prompt(PROMPT)
# print(journey.meets("context", context))
# print(context[0, :2, :4].numpy().round(2))
# config = pipe.transformer.config
# side = config.sample_size // config.patch_size  # patches along a side
# num_heads, blocks = config.num_attention_heads, config.num_layers
# dim, text = num_heads * config.attention_head_dim, context.shape[1]
# print(f"D = {dim}, H = {num_heads}, {blocks} blocks, {text} text tokens, "
#       f"{side}² patches")

# %% [markdown]
# ## A picture of the thing
#
# Lay all tokens in one line, text first, then patches. Attention is then one square
# table: the row of a token says how much it reads from each token. Joining two streams
# cuts the table into four fields. The drawing is to scale; "words" are all tokens of
# the text, padding too. In the tiny model they are as many as the patches. In SD3.5 at
# 1024 × 1024 pixels they are a thin strip: whatever a single word has to say enters the
# picture through the narrow field on the left, patches reading words. (The pooled
# vector of chapter 2, one for the whole prompt, takes another way: chapter 5.)

# %% tags=["active-ipynb"]
# sizes = {f"Tiny: {text} + {side**2}": (text, side**2)}
# sizes["SD3.5 at 1024²: 333 + 4096"] = 333, 4096
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
# One table holds one weight for each pair of tokens, so a token can follow only one
# question with it. A block therefore runs $H$ *heads* side by side. Each makes its own
# $q$, $k$ and $v$, of only $d = D / H$ numbers, from all $D$ channels of the token, and
# has its own table. The $H$ answers are laid side by side, $D$ numbers again; an
# *output projection* then mixes them. Without it head 3 could write into the third part
# of the channels and nowhere else, and nothing could weigh the answer of one head
# against another's.
#
# | symbol | variable | meaning | Medium | Large |
# |---|---|---|---|---|
# | $D$ | `dim` | channels of a token | 1536 | 2432 |
# | $H$ | `num_heads` | heads | 24 | 38 |
# | $d$ | `dim // num_heads` | channels of a head | 64 | 64 |
# | $L_c$ | `context.q.shape[1]` | text tokens | 333 | 333 |
# | $L_x$ | `image.q.shape[1]` | patches at 1024² | 4096 | 4096 |
# | $q, k, v$ | `q`, `k`, `v` | one stream's heads, (B, L, H, d) | | |
# | $a$ | `weights` | the table, (B, H, L, L) | | |

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
# Four tokens whose meaning we choose ourselves: the words *red* and *blue*, and two
# patches, one of the garment and one of the ground. The garment's patch asks for the
# colour of a garment (first channel); that is what the key of *red* offers in this
# sentence, while *blue* offers the colour of a ground. The values are only names in
# numbers: 1, 10, 100 and 1000. So the garment's patch reads almost nothing but *red*,
# and its answer, the third, lies near 1.

# %% tags=["active-ipynb"]
# q = torch.tensor([[0.0, 0.0], [0.0, 0.0], [12.0, 0.0], [0.0, 12.0]])
# k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
# v = torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 0.0], [1000.0, 0.0]])
# print(attend_loops(q, k, v)[:, 0].numpy().round(1))  # red, blue, garment, ground

# %% [markdown]
# The words ask for nothing ($q = 0$): all their scores are equal, and they read the
# plain mean, 277.8. A query of zero is not silence; it is indifference. And the patches
# read a little of everything, here of the ground's 1000: the softmax never gives a
# weight of 0.
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
    ``pre_only`` there is no output projection: what the text has read in the last block
    goes nowhere (chapter 5). Called on tokens (B, L, D) it is plain multi-head
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
# layer, x = Attention(dim, num_heads, qk_norm=None), torch.randn(2, 10, dim)
# weight, bias = (t.chunk(3)[1] for t in (layer.qkv.weight, layer.qkv.bias))
# keys = F.linear(x, weight, bias).unflatten(-1, (num_heads, -1))
# print("the middle third is k:", torch.allclose(keys, layer.heads(x).k, atol=1e-6))

# %% tags=["active-ipynb"]
# for qk_norm in (None, "rms_norm"):
#     layer, largest = Attention(dim, num_heads, qk_norm), []
#     for _ in range(2):
#         q, k, _ = (t.transpose(1, 2) for t in layer.heads(x))
#         largest.append((q @ k.mT / q.shape[-1] ** 0.5).abs().max().item())
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
# lower left field of the table alone. Here the two fields of a row share one softmax,
# so that a patch weighs words against patches. And words read patches too: they change
# from block to block with what they have seen of the picture.
#
# One softmax for both has a price. Words and patches share a total of 1: the more a
# patch reads of the text, the less it can read of its neighbours. SD3.5 *Medium* has a
# second attention in its first 13 blocks, whose softmax is the patches' own: on
# projections of their own (`attn2`), beside the joint one, and both answers are added.
# It is nothing new: an `Attention` called on one stream. Its makers say that it serves
# pictures of several resolutions and their coherence (model card of SD3.5 Medium). What
# it costs can be counted, in entries of the tables at 1024²:

# %% tags=["active-ipynb"]
# joint, alone = (333 + 4096) ** 2, 4096**2
# print(f"a block with the second attention: {1 + alone / joint:.2f} times the entries")
# print(f"all 24 blocks of Medium: {1 + 13 / 24 * alone / joint:.2f} times")


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
#         mine = Attention(dim, num_heads, pre_only=not hasattr(stream.attn, "proj"))
#         mine.load_state_dict(stream.attn.state_dict())
#         stream.attn = mine
#     block.attention = JointAttention()

# %% tags=["active-ipynb"]
# block = pipe.transformer.joint_blocks[0]
# text_heads = block.context_block.attn.heads(tokens["context_block"])
# image_heads = block.x_block.attn.heads(tokens["x_block"])
# read_words, read_patches = JointAttention()(text_heads, image_heads)
# q, k, v = (torch.cat(t, dim=1)[0, :, 0] for t in zip(text_heads, image_heads))
# loops = attend_loops(q, k, v)[text:]  # head 0, the patches: (L_x, d)
# found = read_patches[0, :, : loops.shape[1]]
# print("the loops agree:", torch.allclose(loops, found, atol=1e-5))

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
# We let the shipped model paint the prompt in its own number of steps and record
# everything. With guidance (chapter 6) each step runs two samples, the empty prompt and
# ours; ours is the second. Then we look at the middle of the way from noise to picture.

# %% tags=["active-ipynb"]
# with record_attention(pipe.transformer) as maps:
#     image = pipe(PROMPT, seed=SEED, output_type="pt")[0] * 2 - 1  # to [−1, 1]
# table = torch.stack([torch.stack(m)[:, 1] for m in maps.values()])
# middle = table.shape[1] // 2
# print(tuple(table.shape), "block, step, head, reading token, token read")

# %% [markdown]
# First the budget. Each patch has a weight of 1 to give. How much of it goes to the
# tokens of the prompt (marks of beginning and end included), to the padding behind
# them, to patches?

# %% tags=["active-ipynb"]
# clip, _, t5 = pipe.tokenizers
# behind = clip.model_max_length  # T5's tokens stand behind CLIP's
# used = [*range(len(clip.encode(PROMPT)))]
# used += [behind + i for i in range(len(t5.encode(PROMPT)))]
# padding = [i for i in range(text) if i not in used]
# parts = {"prompt": used, "padding": padding, "patches": slice(text, None)}
# now = table[:, middle, :, text:]  # (block, head, patches, tokens)
# read = {name: now[..., rows].sum(-1) for name, rows in parts.items()}
# even = {"prompt": len(used), "padding": len(padding), "patches": side**2}
# print("reading evenly:", {k: f"{n / now.shape[-1]:.2f}" for k, n in even.items()})
# for i in range(blocks):
#     shares = ", ".join(f"{name} {x[i].mean():.2f}" for name, x in read.items())
#     print(f"block {i}: a patch reads {shares}")

# %% tags=["active-ipynb"]
# names = [f"block {i}" for i in range(blocks)], [f"head {h}" for h in range(num_heads)]
# by_head = read["prompt"].mean(-1)  # (block, head, patches) → (block, head)
# title = f"share of a patch's weight for the {len(used)} prompt tokens, step {middle}"
# viz.show_heatmap(by_head, *names, title=title, digits=2)

# %% [markdown]
# The lines show which block listens to the prompt and which hardly does, and the figure
# that heads divide the labour: where the mean over heads is low, one head may still
# read several times as much as the others. The first line is what a patch would give if
# it read all tokens alike: less is avoided, more is sought. (In the last block, too,
# patches read text somewhat. What nobody reads there is what the *text* has learned in
# that block.)
#
# Now take the head that reads words most, and see where it reads which. One column a
# word, as CLIP and as T5 hand it over. All maps share one scale.

# %% tags=["active-ipynb"]
# block_read, head_read = divmod(by_head.argmax().item(), num_heads)
# pieces = [piece.strip("▁") for piece in t5.tokens(t5.encode(PROMPT))]
# words = [word for word in PROMPT.split() if len(word) > 2]  # red, dress, blue, …
# places = {"CLIP": [1 + PROMPT.split().index(word) for word in words]}
# places["T5"] = [behind + pieces.index(word) for word in words]
# weights = table[block_read, middle, head_read, text:]  # (patches, tokens)
# maps = torch.stack([weights[:, rows].T.unflatten(1, (side, side))
#     for rows in places.values()])  # (reader, word, side, side)
# print(f"block {block_read}, head {head_read}: weights up to {maps.max():.2f}")
# viz.show_attention(maps, words, image, rows=list(places), common=True)

# %% [markdown]
# A row that stays dark says that this head hardly reads these words as that reader
# hands them over. That is another question than chapter 2's, what is lost without them.
#
# Eyes are easily persuaded, and a word that everybody reads at 0.001 looks like any
# other once it has a scale of its own. So here are the weights themselves. The patches
# are divided by the finished picture into those redder than the mean, which are the
# dress, and the rest.

# %% tags=["active-ipynb"]
# redness = F.avg_pool2d(image[:1] - image[2:], image.shape[-1] // side).flatten()
# dress = redness > redness.mean()
# both = [list(rows) for rows in zip(*places.values())]  # a word's two tokens
# read = torch.stack([now[..., rows].sum(-1) for rows in both])
# read = read.mean(2)  # over heads: (word, block, patches)
# print(f"{'dress/rest':>10}", *(f"    block {b}" for b in range(len(read[0]))))
# for word, row in zip(words, read):
#     pairs = [f"{x[dress].mean():.3f}/{x[~dress].mean():.3f}" for x in row]
#     print(f"{word:>10}", *pairs)

# %% [markdown]
# Read a row from block to block. Where the first number of *red* is many times the
# second, the dress reads its own colour there and the rest does not; *blue* should do
# the reverse. Where both are small, this block hardly reads the word, whatever a map of
# it may look like. And a word need not be read where the thing that it names will be:
# its token has read the others (chapter 2), and may stand for more than its own word.
#
# The same over the steps, first noise, at the end a picture: the weight of *red*, in
# the mean over heads, in the first block and in the one that parts dress and rest most.

# %% tags=["active-ipynb"]
# curves, red = {}, words.index("red")
# parted = read[red][:, dress].mean(1) - read[red][:, ~dress].mean(1)  # (block,)
# for i in sorted({0, parted.argmax().item()}):
#     x = table[i, :, :, text:, both[red]].sum(-1).mean(1)  # (step, patches)
#     curves[f"block {i}, dress"] = x[:, dress].mean(1)
#     curves[f"block {i}, rest"] = x[:, ~dress].mean(1)
# viz.show_curves(curves, xlabel="step", ylabel="weight of “red” in a patch")

# %% [markdown]
# From which step on does a patch know whether it belongs to the dress? Where the two
# lines of a block part. Block 0 sees the patch itself, which is noise at first, and its
# lines part by degrees. Those of the later block stand apart from the first step on,
# when it has nothing to go by but places, noise and the prompt: the one thing of such a
# prompt usually stands in the middle.
#
# Touch it: press the prompt, and on the book's page the small model draws in place of
# the frames. Choose a word and see where it is read; choose a block, a head and a step;
# click a patch and see what it reads, in shares that add up to one. (In JupyterLab the
# frames stay; `viz.live(pipe, PROMPT)` opens the same there.) The frames are block 0 at
# the last step, the mean of its heads, for T5's tokens. Each map is relative to its own
# maximum, so compare places, not words.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# shown = table[0, -1].mean(0)[text:, places["T5"]].T  # (word, patches)
# viz.live_attention(shown.unflatten(-1, (side, side)), words, image, PROMPT)

# %% [markdown]
# ## Predict, then break it
#
# **One.** Shuffle the patches before they enter. Do the answers change? Write down your
# guess before you open the answer.

# %% tags=["active-ipynb", "hide-output"]
# order = torch.randperm(side**2, generator=torch.Generator().manual_seed(0))
# mixed_heads = block.x_block.attn.heads(tokens["x_block"][:, order])
# _, mixed = JointAttention()(text_heads, mixed_heads)
# print("same, shuffled:", torch.allclose(mixed, read_patches[:, order], atol=1e-5))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Nothing changes but the order: a weighted mean does not know who stood where.
# Attention sees a *set* of tokens. Where a patch lies must be written into the token
# itself, which is what the position table of chapter 5 does.
#
# </details>
#
# **Two.** Take the words away. The prompt can then reach the picture only through the
# pooled vector of chapter 2. There are two ways to do it. *Apart*: words read only
# words and patches only patches, in every block. *No words*: the context of the empty
# prompt, with our prompt's pooled vector; nothing is cut. What will the model paint in
# each: noise, some garment, a red dress? And which of the two is the fairer experiment?
# (We count without guidance, in 8 steps; the pictures have the model's defaults.)

# %% tags=["active-ipynb"]
# class Apart(JointAttention):
#     def forward(self, context: Heads, image: Heads) -> tuple[Tensor, Tensor]:
#         return attend(*context), attend(*image)
#
#
# def paint(texts: list[str], way: str, count: int = 1, **options: float) -> Tensor:
#     for block in pipe.transformer.joint_blocks:
#         block.attention = Apart() if way == "apart" else JointAttention()
#     states, vectors = pipe.encode_prompt(texts)
#     if way == "no words":
#         states, _ = pipe.encode_prompt([""] * len(texts))
#     given = {"prompt_embeds": states, "pooled_prompt_embeds": vectors}
#     options |= {"num_images_per_prompt": count, "output_type": "pt"}
#     return pipe(None, **given, **options) * 2 - 1

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# from minidiff.judging.exam import exam, share
#
# texts, grade = exam(24)
# pictures, titles, ways = [], [], ("joint", "no words", "apart")
# kinds = ("all", "things", "colors", "ground")
# print(f"{'right':9}", *(f"{kind:>15}" for kind in kinds))
# for way in ways:
#     right = grade(paint(texts, way, num_inference_steps=8, guidance_scale=1.0))
#     print(f"{way:9}", *(f"{share(right[kind]):>15}" for kind in kinds))
#     pictures.append(paint([PROMPT], way, 4))
#     titles += [way] * 4
# _ = paint([PROMPT], "joint", num_inference_steps=1)  # put the attention back
# viz.show_images(torch.cat(pictures), titles, columns=4)

# %% [markdown]
# <details><summary>Answer</summary>
#
# "No words" is the fairer one. Nothing is cut, and its tokens are known from training,
# though not together with this pooled vector. It paints shapes on a plain ground, but
# hardly ever what was asked, and of no prompt all of it. What is right there beyond
# chance must have come through the pooled vector, by the modulation of chapter 5. These
# 24 prompts show none of that: a guess hits one ground of twelve, and the interval
# under "ground" holds that. What is missing against "joint" would have come through the
# field "patches read words". "Apart" changes two things at once: without words a patch
# spreads all its weight over patches, which it never did in training. Compare the
# shapes in the two lower rows: what "apart" spoils beyond "no words" is this, and no
# proof that words were needed for it. A cut that makes a network meet what it never met
# says little about what the part was for; look for a control.
#
# </details>
#
# **Three.** Padding is read too: its share stands in the table above. Hide it, by a
# mask that gives its keys no weight. Does the picture change, and as much as another
# seed would change it? Two prompts, eight pictures each: ours, and one that names no
# ground. Both changes start from the same pictures, so compare them picture by picture.

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# class Masked(JointAttention):
#     def forward(self, context: Heads, image: Heads) -> tuple[Tensor, Tensor]:
#         kept = Heads(*(t[:, named] for t in context))
#         q = torch.cat([context.q, image.q], dim=1)
#         k, v = (torch.cat(t, dim=1) for t in zip(kept[1:], image[1:]))
#         out = attend(q, k, v)
#         return out[:, :text], out[:, text:]
#
#
# def draw(prompt: str, seed: int, layer: type = JointAttention) -> Tensor:
#     for block in pipe.transformer.joint_blocks:
#         block.attention = layer()
#     return pipe(prompt, seed=seed, num_images_per_prompt=8, num_inference_steps=8,
#         guidance_scale=1.0, output_type="pt")

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# print("pixels, from 0 to 1, move by the mean of eight pictures, with 95 % intervals")
# for prompt in ("a grey palm", PROMPT):
#     named = [*range(len(clip.encode(prompt)))]
#     named += [behind + i for i in range(len(t5.encode(prompt)))]
#     hidden, plain, other = draw(prompt, 0, Masked), draw(prompt, 0), draw(prompt, 8)
#     moved = [(x - plain).abs().mean((1, 2, 3)) for x in (hidden, other)]  # 2 × (8,)
#     rows = {"padding hidden": moved[0], "another seed": moved[1]}
#     print(prompt)
#     for name, x in (rows | {"difference": moved[0] - moved[1]}).items():
#         half = 2.36 * x.std() / 8**0.5  # Student's t
#         print(f"  {name:14} {x.mean():6.3f} ± {half:.3f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Pixels move with both prompts. "Nothing" it could not be, unless padding had no weight
# at all: training filled those places with something, and the weights took it for
# granted. Whether it is as much as with another seed depends on the prompt. Where the
# prompt leaves the ground open, another seed chooses another, and moves the picture
# far more. With ours the interval of the difference holds zero: eight pictures do not
# tell which of the two changes is the larger. As with "apart", what is measured is what
# padding gave *and* that the network meets weights it never met.
#
# </details>
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
#     query_dim=dim, added_kv_proj_dim=dim, heads=num_heads,
#     dim_head=dim // num_heads, out_dim=dim,
#     context_pre_only=False, bias=True, qk_norm="rms_norm", eps=1e-6,
#     processor=reference.JointAttnProcessor2_0())
# streams = {"to_{}": Attention(dim, num_heads)}
# streams["add_{}_proj"] = Attention(dim, num_heads)
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
# x, c = torch.randn(2, 64, dim), torch.randn(2, 77, dim)
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
#   published weights were trained with it (what hiding it does to ours you have seen).
# - **It divides the table among cards** when pictures become videos: sequence
#   parallelism. For 4429 tokens there is no need.
#
# ## Exercises
#
# **4.1 Predict.** From 1024² to 2048² pixels the patches become four times as many; the
# 333 words remain. By what factor does the number of the table's entries grow? One
# decimal.

# %% tags=["active-ipynb", "exercise"]
# def growth() -> float:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_4_1() -> None:
#     found = round(float(growth()), 1)
#     assert seal(found) == "de13561a", "count the tokens of both sizes"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def growth() -> float:
#     return (333 + 16384) ** 2 / (333 + 4096) ** 2
#
#
# exercise_4_1()
# print(f"{growth():.1f} times")
# # Every token meets every token, words included: the square of 16,717 over that of
# # 4,429. It stays below 16, because the words did not become more.

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
#     assert abs(uneven.item() - 1.0397) < 1e-3, "weights ½, ¼, ¼: 1.0397 is expected"
#     heads = entropy(torch.eye(4).expand(2, 3, 4, 4))
#     assert heads.shape == (2, 3, 4), "any dimensions may stand in front"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def entropy(weights: Tensor) -> Tensor:
#     return -torch.xlogy(weights, weights).sum(-1)  # xlogy(0, 0) = 0
#
#
# exercise_4_2()
# reach = entropy(table[:, middle, :, text:]).exp()  # (block, head, patches)
# each, mixed = reach.mean((1, 2)), entropy(table[:, middle, :, text:].mean(1)).exp()
# print("tokens that one head reads:    ", each.round().int().tolist(), "by block")
# print("tokens that all heads read:    ", mixed.mean(1).round().int().tolist())
# # A mean of tables never has less entropy than they have on average; what counts is
# # how much more. Heads that read the same tokens would leave the number where it is.
# # Here it grows in each block, so heads read different tokens; but by far less than
# # five times, so they share many. (Where one head reads half of the 128 tokens there
# # are, as in the first blocks, it could not grow much more.)

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
#     keep = torch.tensor([True, True, False, True, False, True])
#     visible = Heads(*(t[:, keep] for t in c))
#     shorter = torch.cat(JointAttention()(visible, x), dim=1)
#     found, rows = masked(c, x, keep), [0, 1, 3, 5, *range(6, 15)]
#     assert found.shape == (2, 15, 32), f"not {tuple(found.shape)}: (B, L, H·d)"
#     assert torch.allclose(found[:, rows], shorter, atol=1e-5), "a hidden word is read"
#     q = c.q.clone()
#     q[:, 2] = q[:, 0]  # a hidden word asks what a visible one asks
#     found = masked(Heads(q, c.k, c.v), x, keep)
#     same = torch.allclose(found[:, 2], found[:, 0], atol=1e-5)
#     assert same, "a hidden word still reads: only nobody reads it"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def masked(context: Heads, image: Heads, keep: Tensor) -> Tensor:
#     q, k, v = (torch.cat(t, dim=1).transpose(1, 2) for t in zip(context, image))
#     mask = F.pad(keep, (0, image.k.shape[1]), value=True)[None]  # → (1, L_c + L_x)
#     out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
#     return out.transpose(1, 2).flatten(2)  # (B, H, L, d) → (B, L, H·d)
#
#
# exercise_4_3()
# keep = torch.zeros(text, dtype=torch.bool)
# keep[used] = True
# whole = torch.cat([read_words, read_patches], dim=1)
# moved = masked(text_heads, image_heads, keep) - whole
# print(f"without padding, block 0 reads {moved.norm() / whole.norm():.0%} otherwise")
# # A mask takes columns from the table and the softmax makes up for them: what padding
# # had of each row goes to the rest in proportion.

# %% [markdown]
# **4.4 Explore.** Paint two garments, "a red dress left of a blue bag on a white
# background". Do the two colours go to their own garments? Measure it: record the maps,
# divide the patches into the left and the right half, and compare the weights that
# *red* and *blue* get from the two, block by block, for several seeds.

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# pair = "a red dress left of a blue bag on a white background"
# options = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "pt"}
# with record_attention(pipe.transformer, average_heads=True) as found:
#     views = pipe(pair, num_images_per_prompt=4, **options)
# left = (torch.arange(side**2) % side) < side // 2
# pieces = [piece.strip("▁") for piece in t5.tokens(t5.encode(pair))]
# print(f"{'left/right':>10}", *(f"    block {b}" for b in range(blocks)))
# for word in ("red", "blue"):
#     rows = [1 + pair.split().index(word), behind + pieces.index(word)]
#     x = torch.stack([m[4][:, text:, rows].sum(-1) for m in found.values()])
#     sides = [f"{b[:, left].mean():.3f}/{b[:, ~left].mean():.3f}" for b in x]
#     print(f"{word:>10}", *sides)
# viz.show_images(views, low=0)
# # Two tokens read evenly would get 2/128 = 0.016. Block 4 shows binding: *red* is read
# # many times as much on the left, where the dress is, as on the right, and *blue* the
# # other way round. In the first blocks the two sides differ little. And a colour may
# # come another way: a garment's own token has read its colour (chapter 2), and the
# # weights of one word do not tell what another carries.

# %% [markdown]
# ## Summary
#
# You **computed** attention by hand with three loops, **turned** the loops into matrix
# products and the products into one fused call, and saw that all three agree. You
# **explained** the norm of queries and keys by a bound on the scores. You **joined**
# two streams that keep their own weights and put your classes into the shipped model.
# You **recorded** what its patches read, in shares that add up, and **broke** it: with
# a control, because a cut alone says little.
#
# The journey goes on: this is what the patches have read in the first block. Chapter
# 5 builds the block around it, and the same tensor appears there again.

# %% tags=["active-ipynb"]
# print(journey.meets("read", read_patches))
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

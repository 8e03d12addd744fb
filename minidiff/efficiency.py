# %% [markdown]
r"""
# Memory and speed: a model that is larger than the card

In this chapter you make Stable Diffusion 3.5 **smaller and faster without changing what
it computes**, and where that is not possible, you **measure what it costs**.

After it you will be able to

- **count** the bytes and the operations of a model without a single weight in memory;
- **bound** the time of a step on any card from two published numbers;
- **store** weights in 8 and in 4 bits, and **stream** those that are seldom read;
- **compute** attention without its table, and a large picture in overlapping tiles;
- **fuse** what lies between two products, and **reuse** what hardly changes from one
  step to the next.
"""

# %% [markdown]
# ## Where we are
#
# Chapter 8 assembled everything, and at full size it asks for more than most cards
# have. Nothing in this chapter is a new kind of network. We take the classes of
# chapters 2 to 8 as they are and ask of each number three questions: must it be *here*,
# must it have *so many bits*, and must it be *computed again*?

# %%
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.vae import Upsample

# %% tags=["active-ipynb", "hide-input"]
# import minidiff
# from minidiff import viz
# from minidiff.classroom.exercises import check, seal
# from minidiff.classroom.journey import PROMPT, SEED
#
# _ = torch.set_grad_enabled(False)
# pipe = minidiff.load("tiny")
# viz.show_pipeline("efficiency")

# %% [markdown]
# ## Where the bytes are
#
# On PyTorch's *meta* device a tensor has a shape and nothing in it. So we can build
# everything that SD3.5 Large consists of, and weigh it: two bytes a number in bfloat16.

# %% tags=["active-ipynb"]
# from minidiff.text_encoders import (
#     CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder)
# from minidiff.vae import VAE, VAEConfig


# %%
def weigh(model: nn.Module, kind: Callable[[str], bool] = lambda name: True) -> int:
    """How many numbers the parameters and buffers of the chosen names hold."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.numel() for name, t in tensors if kind(name))


# %% tags=["active-ipynb"]
# with torch.device("meta"):
#     large, medium = (MMDiT(c) for c in
#         (MMDiTConfig.sd35_large(), MMDiTConfig.sd35_medium()))
#     others = {"T5": T5Encoder(T5Config.t5_xxl()), "VAE": VAE(VAEConfig.sd35()),
#         "CLIP-L": CLIPTextEncoder(CLIPTextConfig.clip_l()),
#         "CLIP-G": CLIPTextEncoder(CLIPTextConfig.clip_g())}
# in_adaln = lambda name: "adaLN" in name
# gib = {name: 2 * weigh(model) / 2**30 for name, model in others.items()}
# for name, model in {"Medium": medium, "Large": large}.items():
#     adaln = 2 * weigh(model, in_adaln) / 2**30
#     gib |= {name: 2 * weigh(model) / 2**30 - adaln, f"{name}'s AdaLN": adaln}
# viz.show_bars(gib, "GiB in bfloat16")

# %% [markdown]
# Two things stand out. T5, which reads the prompt once and then waits, is larger than
# everything that paints in Medium. And AdaLN, which reads nothing but the time and the
# pooled text (chapter 5), is a third of the painter. All times are known before the
# first step, so both need be read only *once a picture*, the rest once a step. That is
# the first lever: what is seldom read need not stay.

# %% [markdown]
# ## Where the operations are
#
# A matrix product of a row of $n$ numbers with a matrix of $n \times m$ takes $2nm$
# operations: a multiplication and an addition for each entry. With $L$ text tokens, $N$
# patches and width $D$, a block of chapter 5 takes
#
# $$\underbrace{2 \cdot 12 D^2 (L + N)}_{\text{qkv, output, MLP}}
#   + \underbrace{4 D (L + N)^2}_{\text{scores, weighted means}}$$
#
# since qkv has $3D^2$ weights, the output projection $D^2$ and the MLP $8D^2$. A second
# attention among the patches (Medium's first blocks) adds $2 \cdot 4 D^2 N + 4 D N^2$.
# In the last block the text is only read: its $9D^2$ for output and MLP fall away.


# %%
def step_operations(config: MMDiTConfig, patches: int, words: int) -> int:
    """Operations of one sample's step, AdaLN's and the embedders' of time left out.

    ``patches`` and ``words`` are numbers of tokens.
    """
    d, n, length = config.width, patches, patches + words
    block = 24 * d**2 * length + 4 * d * length**2
    dual = 8 * d**2 * n + 4 * d * n**2
    total = config.num_layers * block + len(config.dual_attention_layers) * dual
    total -= 18 * d**2 * words  # in the last block
    channels = config.in_channels + (config.out_channels or config.in_channels)
    pixels = channels * config.patch_size**2  # the first layer's, and the last one's
    return total + 2 * n * pixels * d + 2 * words * config.joint_attention_dim * d


# %% [markdown]
# PyTorch can count too: `FlopCounterMode` listens to every product, and on the meta
# device a step of Large costs nothing. Do we agree?

# %% tags=["active-ipynb"]
# from torch.utils.flop_counter import FlopCounterMode
#
# def counted(model: MMDiT, side: int, words: int) -> int:
#     c = model.config
#     sizes = (1, c.in_channels, side, side), (1, words, c.joint_attention_dim)
#     x, context = (torch.empty(size, device="meta") for size in sizes)
#     ones = torch.empty(1, device="meta")
#     pooled = torch.empty(1, c.pooled_projection_dim, device="meta")
#     ahead = model.modulations(ones, pooled)
#     with FlopCounterMode(display=False) as count:
#         model(x, None, context, None, modulations=ahead)
#     return count.get_total_flops()

# %% tags=["active-ipynb"]
# for name, model in {"Medium": medium, "Large": large}.items():
#     for side in (64, 128):
#         ours = step_operations(model.config, side**2 // 4, 333)
#         assert side > 64 or ours == counted(model, side, 333)
#         share = 4 * model.config.width * (side**2 // 4 + 333) ** 2
#         share *= model.config.num_layers / ours
#         print(f"{name} at {8 * side}²: {ours / 1e12:.2f} · 10¹² operations a sample,"
#               f" the table of the joint attention {share:.0%}")

# %% [markdown]
# To the last operation. From 512² to 1024² the patches become four times as many. Two
# things pull the work away from four times: the table grows with the square, and the
# text's tokens stay as they are. For Medium the first wins, for Large the second.
#
# ## The roofline
#
# A card is, to first order, two numbers: how many operations it computes in a second,
# and how many bytes it brings from its memory in a second. A step that computes $F$
# operations and moves $M$ bytes cannot take less than
#
# $$t \ge \max\!\left(\frac{F}{P}, \frac{M}{B}\right)$$
#
# with the peak $P$ and the bandwidth $B$ (Williams et al. 2009, *roofline*). Which term
# is larger is decided by $F / M$, the *intensity*, against the card's $P / B$.


# %%
@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it: gigabytes, operations a second, bytes a second.

    ``peak`` is that of dense products in bfloat16 with sums in float32.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float

    def least_seconds(self, operations: float, moved: float) -> float:
        """No computation of so many operations and bytes takes less (the roofline)."""
        return max(operations / self.peak, moved / self.bandwidth)


CARDS = (
    Card("RTX 3070", 8, 40.6e12, 448e9),
    Card("RTX 4080", 16, 97.5e12, 717e9),
    Card("L4", 24, 121e12, 300e9),
    Card("RTX 4090", 24, 165e12, 1008e9),
    Card("A100", 40, 312e12, 1555e9),
    Card("H100", 80, 989e12, 3350e9),
)

# %% [markdown]
# The peaks are those of NVIDIA's white papers and data sheets (without sparsity). For a
# guided step at 1024² both samples read the same weights, which move once. Nothing here
# has been measured on a card: these are floors, computed from published numbers, and
# real kernels stay above them.
#
# Beside them stands how many gigabytes a whole drawing takes, encoders and VAE
# included, by the plan that `minidiff.load(…, memory="8GB")` would take for the card.

# %% tags=["active-ipynb"]
# from minidiff.engine.loading import blueprint
# from minidiff.engine.memory import Call, choose, estimate, usual_size
#
# calls = {}
# for name in ("Medium", "Large"):
#     models = blueprint(f"sd3.5-{name.lower()}")  # shapes, no weights
#     calls[name] = Call(models, usual_size(models))

# %% tags=["active-ipynb"]
# print("least milliseconds of a guided step at 1024², what the roof is, GB by plan")
# for card in CARDS:
#     line = f"{card.name:>9}, {card.memory:2.0f} GB"
#     for name, model in {"Medium": medium, "Large": large}.items():
#         operations = 2 * step_operations(model.config, 4096, 333)
#         moved = 2 * (weigh(model) - weigh(model, in_adaln))
#         least = card.least_seconds(operations, moved)
#         roof = "products" if operations / card.peak == least else "memory"
#         plan = choose(f"{card.memory}GB", calls[name])
#         taken = estimate(plan, calls[name]) / 1e9
#         line += f" | {name} {1e3 * least:5.0f} ({roof}) {taken:4.1f}"
#     print(line)
# print("Large on 8 GB:", choose("8GB", calls["Large"]))

# %% [markdown]
# At 1024² the products decide on every card: each weight that arrives meets thousands
# of tokens. So fewer bits for the weights save *memory*, not time, unless the products
# themselves run in 8 bits. The other way round for a text encoder that reads one short
# prompt: few tokens, many weights. You will compute its intensity in an exercise.
#
# On the two largest cards all of Large stays where it is; on smaller ones its plan
# gives up, lever by lever, what costs the least time. The last line names those that
# bring it onto 8 GB, and the next sections build them.
#
# ## What is seldom read need not stay: streaming
#
# A linear layer whose weights remain in the file's memory map, and visit the device
# while they are used. It is the same product: only the address changes.


# %%
class StreamedLinear(nn.Module):
    """A linear layer whose weights are brought to the input's device at each call.

    They are not parameters: ``.to()`` leaves them where they are, in the memory map.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach()
        self.stored = layer.weight.detach(), bias
        self.out_features, self.in_features = layer.weight.shape

    def matrix(self) -> Tensor:
        """The weights (out, in), where and as they are stored."""
        return self.stored[0]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            None if t is None else t.to(x.device).to(x.dtype) for t in self.stored
        )
        return F.linear(x, weight, bias)


# %% [markdown]
# Exchange every linear layer of T5 for it. The model keeps only its table of words, the
# small one of distances and its norms on the card, and says the same, bit for bit. In
# SD3.5 the 9 GB of T5 cross the bus once a prompt: over PCIe 4.0 × 16, at most 32 GB/s,
# that is 0.3 s at least.


# %%
def swap(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where ``name`` is in ``model``."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


# %% tags=["active-ipynb"]
# t5, ids = pipe.text_encoders[2], pipe.tokenizers[2]([PROMPT])
# before, resident = t5(ids), weigh(t5)
# for name, layer in list(t5.named_modules()):
#     if isinstance(layer, nn.Linear):
#         swap(t5, name, StreamedLinear(layer))
# print("bit for bit:", torch.equal(before, t5(ids)))
# print(f"resident: {weigh(t5) / resident:.0%} of the numbers, its table of words")

# %% [markdown]
# AdaLN goes even further. A sampler knows its times before it starts, and the pooled
# text as well: it computes *all* modulations, keeps these few vectors and sends the
# matrices away (chapter 5's `modulations`). For Large and 28 guided steps:

# %% tags=["active-ipynb"]
# c = large.config
# vectors = 2 * 28 * (c.num_layers * 12 - 4 + 2) * c.width  # two samples, six a stream
# print(f"AdaLN's matrices: {2 * weigh(large, in_adaln) / 1e6:,.0f} MB, what they say "
#       f"to 28 steps: {2 * vectors / 1e6:,.0f} MB")

# %% [markdown]
# ## Eight bits
#
# bfloat16 spends 8 of its 16 bits on the exponent: a range of $10^{\pm 38}$, of which a
# layer's weights use a sliver. *e4m3*, a float of one sign, four exponent and three
# fraction bits, has values up to 448; so give every row of the matrix a *scale* that
# brings its largest weight there:
#
# $$s_i = \max_j |w_{ij}| / 448, \qquad \hat w_{ij} = s_i \cdot
#   \mathrm{e4m3}(w_{ij} / s_i)$$
#
# One scale for each output channel costs almost nothing, and no large row can push
# another below the smallest number that e4m3 has. (How much it matters we try at the
# end.) First a row by hand:


# %%
def quantize_loops(row: Tensor) -> tuple[Tensor, float]:
    """One row (D,) → its values in fp8, and its scale."""
    scale = max(abs(w.item()) for w in row) / 448
    return torch.stack([(w / scale).to(torch.float8_e4m3fn) for w in row]), scale


# %% [markdown]
# and then all rows at once:

# %%
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0


class Rows(NamedTuple):
    """Values (R, D); in fp8 each row is multiplied by its ``scale`` (R, 1), float32."""

    values: Tensor
    scale: Tensor | None = None


def quantize(x: Tensor) -> Rows:
    """Rows (R, D) → fp8 with one scale a row, so that the largest value becomes 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return Rows((x / scale).to(FLOAT8), scale)


# %%
class Float8Linear(nn.Module):
    """A linear layer that stores its matrix (out, in) in fp8 with ``scale`` (out, 1).

    Called, it brings the matrix back to the dtype of its input and multiplies.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, rows: Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", rows.values)
        self.register_buffer("scale", rows.scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.out_features, self.in_features = rows.values.shape

    def matrix(self) -> Tensor:
        """The weights (out, in) that the 8 bits stand for, float32."""
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, self.bias)


# %% tags=["active-ipynb"]
# matrix = pipe.transformer.joint_blocks[1].x_block.mlp.fc1.weight
# values, scale = quantize_loops(matrix[0])
# rows = quantize(matrix)
# print("loops and rows agree:", torch.equal(values.float(), rows.values[0].float()))
# restored = rows.values.float() * rows.scale
# normal = matrix.abs() >= 2**-6 * rows.scale  # the smallest that has all its bits
# off = (restored / matrix - 1).abs()[normal]
# print(f"a weight is off by {off.max():.4f} at most: half of an eighth is 0.0625")
# print(f"smaller are {(~normal).sum()} of {normal.numel():,} weights")

# %% [markdown]
# Three fraction bits divide each power of two into eight, so that rounding moves a
# weight by up to a sixteenth of its value. Large ones and small ones alike: that is
# what a *floating* point gives, down to $2^{-6}$ of the scale, where its exponents end.
# The few weights below keep fewer bits, or none. Errors of single weights are of either
# sign, and partly cancel in a sum; what is left in the picture we measure below,
# together with four bits.
#
# ## Four bits
#
# Sixteen values for all weights. Which? Trained weights are bell-shaped, row by row,
# roughly as normal numbers are. If normal numbers are to use each of the sixteen
# equally often, these are the distribution's *quantiles*: dense around zero and sparse
# outside. That is NF4, the "normal float" of QLoRA (Dettmers et al. 2023): eight
# quantiles for the positive side, seven for the negative one, and an exact zero, scaled
# to $[-1, 1]$.


# %%
@cache
def normal_levels() -> Tensor:
    """The sixteen values of NF4, ascending, (16,); Dettmers et al. 2023, section 3."""
    outer = 1 - 0.5 * (1 / 32 + 1 / 30)  # so far out, 0.5 being the middle
    half = [torch.linspace(outer, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    positive, negative = (torch.special.ndtri(p) for p in half)
    levels = torch.cat([-negative, torch.zeros(1), positive.flip(0)])
    return (levels / levels.abs().max()).float()


# %% [markdown]
# Rows are too long for so few values: one large weight would spoil its row for all
# others. So the scale, the largest absolute value, is kept for *blocks* of 64 weights.
# Two weights share a byte: $\tfrac{64 \cdot 4 + 16}{64} = 4.25$ bits a weight with a
# scale in float16.

# %%
BLOCK = 64  # weights that share a scale


class Nibbles(NamedTuple):
    """A matrix (R, D) in 4 bits: codes (R·D/2,) of two weights each, scales (R·D/64,).

    The even weight lies in the low half of its byte.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]


def quantize_nf4(x: Tensor) -> Nibbles:
    """A matrix (R, D) → the nearest of sixteen values, a scale for each 64 weights.

    Raises ValueError where 64 does not divide the number of weights.
    """
    if x.numel() % BLOCK:
        raise ValueError(f"a matrix of {x.numel()} weights: expected a multiple of 64")
    blocks = x.float().reshape(-1, BLOCK)  # (R, D) → (R·D/64, 64)
    scale = blocks.abs().amax(1).clamp(min=1e-12).half()
    unit = blocks / scale.float()[:, None]
    levels = normal_levels().to(x.device)
    between = (levels[1:] + levels[:-1]) / 2  # borders, (15,)
    codes = torch.bucketize(unit, between).to(torch.uint8).flatten()
    return Nibbles(codes[::2] | codes[1::2] << 4, scale, (x.shape[0], x.shape[1]))


def restore_nf4(x: Nibbles) -> Tensor:
    """The matrix (R, D) that ``x`` stands for, float32."""
    codes = torch.stack([x.codes & 15, x.codes >> 4], dim=1)  # (n/2,) → (n/2, 2)
    unit = normal_levels().to(x.codes.device)[codes.int()].view(-1, BLOCK)
    return (unit * x.scale.float()[:, None]).view(x.shape)


class NF4Linear(nn.Module):
    """A linear layer whose matrix (out, in) is stored in 4 bits a weight."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        stored = quantize_nf4(layer.weight.detach())
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scale", stored.scale)
        bias = None if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = stored.shape

    def matrix(self) -> Tensor:
        """The weights (out, in) that the 4 bits stand for, float32."""
        shape = self.out_features, self.in_features
        return restore_nf4(Nibbles(self.codes, self.scale, shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().to(x.dtype), self.bias)


# %% [markdown]
# Against what else one might do with so few bits, on weights of the shipped model: 15
# equally spaced values for each row, and for each block of 64. The error is that of the
# matrix, relative to its size.


# %% tags=["active-ipynb"]
# def evenly(x: Tensor, block: int, bits: int = 4) -> Tensor:
#     blocks = x.reshape(-1, block)  # (R, D) → (R·D/block, block)
#     scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
#     return ((blocks / scale).round() * scale).view(x.shape)
#
# def error(approximate: Tensor, exact: Tensor) -> float:
#     return ((approximate - exact).norm() / exact.norm()).item()

# %% tags=["active-ipynb"]
# forms = {"16 bits (bfloat16)": matrix.bfloat16().float(),
#     "8 bits, a scale a row": restored,
#     "4.25 bits, NF4": restore_nf4(quantize_nf4(matrix)),
#     "4.25 bits, evenly": evenly(matrix, 64),
#     "4 bits, evenly, a scale a row": evenly(matrix, matrix.shape[1])}
# for name, form in forms.items():
#     print(f"{name:>30}: {error(form, matrix):.4f}")
# blocks = matrix.view(-1, 64)
# viz.show_histogram({"": blocks / blocks.abs().amax(1, keepdim=True)},
#     xlabel="weight over the largest of its block")

# %% [markdown]
# Now the only question that matters: the picture. Store all matrices of the blocks in 8
# and in 4 bits, draw eight prompts, and compare with the weights as they are.


# %%
def store(model: MMDiT, form: Callable[[nn.Linear], nn.Module]) -> MMDiT:
    """Put ``form(layer)`` for each linear layer of the blocks but AdaLN's, in place."""
    for name, layer in list(model.named_modules()):
        chosen = name.startswith("joint_blocks") and "adaLN" not in name
        if chosen and isinstance(layer, nn.Linear):
            swap(model, name, form(layer))
    return model


# %% tags=["active-ipynb"]
# colors, things = ("red", "blue"), ("dress", "bag", "coat", "boot")
# prompts = [f"a {c} {t} on a white background" for c in colors for t in things]
#
# def draw(form: Callable[[nn.Linear], nn.Module] | None = None) -> Tensor:
#     pipe = minidiff.load("tiny")
#     if form:
#         store(pipe.transformer, form)
#     return pipe(prompts, seed=SEED, output_type="pt")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# in_float8 = lambda layer: Float8Linear(quantize(layer.weight), layer.bias)
# drawn = {"as stored": draw(), "8 bits": draw(in_float8), "4 bits": draw(NF4Linear)}
# for name in ("8 bits", "4 bits"):
#     squares = (drawn[name] - drawn["as stored"]).square().mean((1, 2, 3))
#     decibels = -10 * squares.log10()
#     print(f"{name}: {decibels.mean():.1f} dB from the picture of the stored weights, "
#           f"the worst of {len(prompts)} {decibels.min():.1f} dB")
# shown = torch.cat(list(drawn.values()))
# viz.show_images(shown * 2 - 1, [n for n in drawn for _ in prompts], columns=8)

# %% [markdown]
# Rounding is not noise that one sees: it is another model, a little beside the first,
# and the sampler follows it from the same noise to another picture. So a difference in
# decibels says how far the picture moved, not whether it became worse. Whether it did
# is a question for a judge (`minidiff evaluate`).
#
# ## Attention without its table
#
# Chapter 4 said that fused kernels never write the table. How can a softmax be taken
# before the whole row is known? It can be *corrected*. Walk through the keys in tiles
# and keep, for every query, the largest score $m$ so far, the sum $z$ of exponentials
# relative to it, and the weighted sum $o$ of values. When a tile brings a larger score
# $m'$, what was summed shrinks by $e^{m - m'}$ (Milakov and Gimelshein 2018):
#
# $$z \leftarrow z\, e^{m - m'} + \sum_j e^{s_j - m'}, \qquad
#   o \leftarrow o\, e^{m - m'} + \sum_j e^{s_j - m'} v_j$$


# %%
def attend_tiles(q: Tensor, k: Tensor, v: Tensor, tile: int = 128) -> Tensor:
    """Attention that holds ``tile`` columns of the table: (B, H, L, d) × 3 → the same.

    Dao et al. 2022, FlashAttention, without its second loop over the queries.
    """
    high = q.new_full((*q.shape[:-1], 1), -math.inf)  # m of each query
    total, out = torch.zeros_like(high), torch.zeros_like(q)
    for keys, values in zip(k.split(tile, dim=2), v.split(tile, dim=2), strict=True):
        scores = q @ keys.mT / q.shape[-1] ** 0.5  # → (B, H, L, tile)
        higher = torch.maximum(high, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - higher).exp(), (high - higher).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out, high = out * shrink + weights @ values, higher
    return out / total


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# q, k, v = 3 * torch.randn(3, 2, 5, 300, 32)
# exact = F.scaled_dot_product_attention(q, k, v)
# for tile in (1, 37, 128, 300):
#     same = error(attend_tiles(q, k, v, tile), exact) < 1e-5
#     print(f"tiles of {tile}: the same to 10⁻⁵: {same}")
# kept = 2 * 38 * 4429 * 128 * 4 / 2**30
# print(f"Large at 1024²: {kept:.2f} GiB of scores at once, not "
#       f"{2 * 38 * 4429**2 * 4 / 2**30:.1f}")

# %% [markdown]
# In Python this is slower than the table: each tile goes to memory and back. In a
# kernel a tile lives in the registers of one multiprocessor and is gone before the
# next.
#
# ## A large picture in tiles
#
# The decoder works at the full resolution of the picture, and its peak grows with the
# area. What a pixel shows comes mostly from the latents near it, so decode squares of
# them. Side by side they show seams; hence they *overlap* by a quarter, and over the
# overlap one fades linearly into the next.


# %%
def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fade the end of ``before`` into the start of ``after``, in place."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    start = after.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    weight = torch.arange(extent, device=after.device) / extent  # 0 … 1
    start.copy_(end.lerp(start, weight.to(after.dtype).view(shape)))


def tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    step: int,
    size: int,
    kept: int,
) -> Tensor:
    """``run`` on a tile at each ``step`` of x (B, C, H, W), the results put together.

    A result has ``size`` rows and columns where a tile has ``tile``; the first ``kept``
    stay, and what comes behind them fades into the next. As diffusers does it.
    """
    if max(x.shape[2:]) <= tile:
        return run(x)
    columns = range(0, x.shape[3], step)
    rows = [
        [run(x[:, :, i : i + tile, j : j + tile]) for j in columns]
        for i in range(0, x.shape[2], step)
    ]
    bands = []
    for i, row in enumerate(rows):
        for j, piece in enumerate(row):
            if i > 0:
                blend(rows[i - 1][j], piece, size - kept, dim=2)
            if j > 0:
                blend(row[j - 1], piece, size - kept, dim=3)
        bands.append(torch.cat([piece[..., :kept, :kept] for piece in row], dim=3))
    return torch.cat(bands, dim=2)  # bands (B, C', kept, W') → (B, C', H', W')


# %% [markdown]
# Four pictures side by side make a latent of 16 × 64. Whole, in tiles without overlap,
# and in tiles with it: the error against the whole, and the first of the four.

# %% tags=["active-ipynb"]
# four = pipe(prompts[:4], seed=SEED, output_type="latent")
# wide = pipe.vae.unscale(torch.cat([*four], dim=2)[None])  # → (1, C, h, 4·w)
# decode, factor = pipe.vae.decode, pipe.vae.config.factor
# whole = decode(wide)
# hard = tiled(decode, wide, 8, 8, 8 * factor, 8 * factor)
# soft = tiled(decode, wide, 8, 6, 8 * factor, 6 * factor)
# for name, x in {"side by side": hard, "overlapping": soft}.items():
#     print(f"{name}: error {error(x, whole):.3f}")
# names = "whole", "side by side", "overlapping"
# first = torch.cat([whole, hard, soft])[..., : wide.shape[2] * factor]
# viz.show_images(first, names, columns=3)

# %% [markdown]
# A seam becomes a soft band, and the error does not vanish with it: the group norms and
# the attention of chapter 3 look at the whole picture, and here at a tile. That is why
# a tile should be as large as fits. `minidiff.load(…, vae_tile=64)` does what you have
# just done.
#
# ## Between two products: fusing
#
# A product of a block computes more than a thousand operations for each byte. What lies
# between two products does not: residual, gate, norm, scale and shift are one or two
# operations for each number, and each of them, called alone, reads its input from
# memory and writes its output back. Count the passes between attention and MLP, for one
# stream:

# %% tags=["active-ipynb"]
# alone = {"gate · y": 2, "x + that": 3, "mean, variance": 1, "normalise": 2}
# alone |= {"scale": 2, "shift": 2}
# fused = {"read x and y, write x and its norm": 4}
# rows = 2 * (4096 + 333)  # two samples of Large, at 1024²
# for name, passes in {"one by one": alone, "fused": fused}.items():
#     moved = sum(passes.values()) * rows * large.config.width * 2
#     moved *= 2 * large.config.num_layers  # before attention and before the MLP
#     least = min(1e3 * moved / card.bandwidth for card in CARDS if card.name == "L4")
#     print(f"{name}: {sum(passes.values())} passes, {moved / 1e9:.0f} GB a step, "
#           f"at least {least:.0f} ms on an L4")

# %% [markdown]
# `minidiff.engine.fast` writes such passes as Triton kernels; `torch.compile` finds
# many of them by itself. Two more ideas of that module need no kernel at all. The first
# is an *order*. A batch of samples is (B, L, D); the text's tokens and the picture's
# then lie in pieces, one for each sample, and joining them copies everything.
# Interleave the samples, (L, B, D): now both streams are two slices of one tensor.


# %%
def interleave(x: Tensor) -> Tensor:
    """Tokens (B, L, D) → rows (L·B, D), the batch's samples next to one another."""
    return x.transpose(0, 1).contiguous().flatten(0, 1)


# %% tags=["active-ipynb"]
# text, image = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
# both = torch.empty(16, 4)
# both[:6], both[6:] = interleave(text), interleave(image)  # no copy would be needed
# joined = torch.cat([text, image], dim=1)  # (B, L_c, D), (B, L_x, D) → (B, L, D)
# print("two slices are the joined tokens:", torch.equal(both, interleave(joined)))

# %% [markdown]
# The second is an *identity*. The decoder doubles the sides of its features by
# repeating each pixel, and convolves the result with a 3 × 3 kernel. Of the nine pixels
# under the kernel several are copies of the same one: their weights can be added
# *before*. Output row $2i$ reads the small rows $i-1, i, i$; row $2i+1$ reads $i, i,
# i+1$. So a kernel of three rows is a kernel of two rows, another one for even and for
# odd rows; likewise the columns. Four kernels of 2 × 2 on the small picture, 16
# products a small pixel, replace one of 3 × 3 on the large one, 36.


# %%
def two_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three weights along ``dim`` as two, for the even and for the odd outputs."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)


def folded_kernel(layer: Upsample) -> Tensor:
    """Doubling the sides and then a 3×3 kernel, as four 2×2 kernels: (4·C, C, 2, 2)."""
    weight = layer.conv.weight.float()  # of which some are summed
    kernels = [k for rows in two_taps(weight, 2) for k in two_taps(rows, 3)]
    folded = torch.cat(kernels).to(layer.conv.weight.dtype)  # → (4·C, C, 2, 2)
    return folded.contiguous(memory_format=torch.channels_last)


def double(x: Tensor, layer: Upsample) -> Tensor:
    """``layer`` on x (B, C, H, W) → (B, C, 2·H, 2·W), by four kernels, without bias."""
    y = F.conv2d(x, folded_kernel(layer), padding=1)  # → (B, 4·C, H+1, W+1)
    batch, channels, height, width = x.shape
    shape = batch, channels, 2 * height, 2 * width
    out = torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    for i, phase in enumerate(y.chunk(4, dim=1)):
        a, b = divmod(i, 2)
        out[:, :, a::2, b::2] = phase[:, :, a : a + height, b : b + width]
    return out


# %% tags=["active-ipynb"]
# layer = pipe.vae.decoder.up[1]["upsample"]
# x = torch.randn(2, layer.conv.in_channels, 8, 8)
# plain = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.conv.weight, padding=1)
# print("the same convolution:", torch.allclose(double(x, layer), plain, atol=1e-5))

# %% [markdown]
# ## What hardly changes need not be computed again
#
# Streaming, tiles of attention, fusing and folding left the numbers alone. The last
# lever, like fewer bits, does not. From one step to the next the latent moves a little,
# and so does what the blocks say. If the first block, which is cheap, says nearly what
# it said before, then let the others repeat themselves: add what they added to the
# picture at the last step. (A *first-block cache*; the idea of reusing features over
# steps is DeepCache's, Ma et al. 2024.)


# %%
class FirstBlockCache(MMDiT):
    """An ``MMDiT`` that reuses its later blocks' answer where the first hardly changes.

    The first block's update of the picture is compared with that of the last step that
    was computed: a relative change below ``threshold`` skips the rest. ``skipped`` is
    how often it did.
    """

    threshold: float
    skipped: int
    first: Tensor | None  # the first block's update at the last computed step
    rest: Tensor  # what the others added then

    @classmethod
    def of(cls, model: MMDiT, threshold: float) -> "FirstBlockCache":
        """``model``'s own layers with a cache."""
        cached = cls.__new__(cls)
        cached.__dict__.update(model.__dict__)
        cached.threshold, cached.skipped, cached.first = threshold, 0, None
        return cached

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture notes of it."""
        return {"cache_threshold": self.threshold}

    def reuses(self, update: Tensor) -> bool:
        """Whether the first block's ``update`` (B, N, D) is nearly the one kept."""
        if self.first is None or self.first.shape != update.shape:
            return False
        return bool((update - self.first).norm() < self.threshold * self.first.norm())

    def layers(self) -> tuple[Sequence[Callable], Callable]:
        """The first block, then the others or nothing; the sum at the end."""
        (first, *others), final_layer = super().layers()

        def begin(context: Tensor, x: Tensor, modulation: Any) -> tuple[Any, Tensor]:
            context, self.start = first(context, x, modulation)
            self.hit = self.reuses(update := self.start - x)
            self.skipped += self.hit
            self.first = self.first if self.hit else update
            return context, self.start

        def go_on(block: Callable) -> Callable:
            return lambda c, x, m: (c, x) if self.hit else block(c, x, m)

        def end(x: Tensor, modulation: Tensor) -> Tensor:
            self.rest = self.rest if self.hit else x - self.start
            return final_layer(self.start + self.rest, modulation)

        return [begin, *map(go_on, others)], end


# %% [markdown]
# Off by default, for it has a price. Here it is, on the same eight prompts and 28
# steps: how many steps were skipped, and how far the pictures moved.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# exact, model = drawn["as stored"], minidiff.load("tiny").transformer
# for threshold in (0.0, 0.1, 0.2):
#     pipe.transformer = FirstBlockCache.of(model, threshold)
#     moved = (pipe(prompts, seed=SEED, output_type="pt") - exact).square()
#     near = -10 * moved.mean((1, 2, 3)).clamp(min=1e-9).log10()  # (8,)
#     found = f"{near.mean():.1f} dB, the worst {near.min():.1f} dB"
#     found = "the same pictures" if near.min() > 89 else found
#     print(f"threshold {threshold}: {pipe.transformer.skipped} of 28 skipped, {found}")
# pipe.transformer = model

# %% [markdown]
# A step that is skipped costs the first block: a sixth or less of the model. Compare
# with the honest alternative, *fewer steps*: the same solver with as many steps as cost
# the same is the bar that a cache has to clear. You will hold it against that in an
# exercise.
#
# ## Predict, then break it
#
# **One.** Store the weights in 8 bits with *one* scale for the whole matrix. Does the
# error grow? Write down a guess before you run the cell; then the same for even steps,
# `evenly`, with one scale.

# %% tags=["active-ipynb", "hide-output"]
# for name, x in {"as it is": matrix, "a row 1000 times": torch.cat(
#         [1000 * matrix[:1], matrix[1:]])}.items():
#     one = x.abs().max() / FLOAT8_MAX
#     forms = {"a scale a row": quantize(x), "one": Rows((x / one).to(FLOAT8), one)}
#     back = {n: f.values.float() * f.scale for n, f in forms.items()}
#     back["evenly, one"] = evenly(x, x.numel(), bits=8)
#     errors = {n: round(error(r[1:], x[1:]), 4) for n, r in back.items()}
#     print(f"{name}: {errors}")

# %% [markdown]
# A floating point carries its own scale, its exponent, so that one common scale hardly
# matters until numbers fall below the smallest that e4m3 has. Equal steps carry none: a
# single large row takes all of them, and the rest of the matrix becomes zero.
#
# **Two.** In `attend_tiles`, leave the correction away: keep `high` at zero. For which
# inputs does it still work, and how does it fail?

# %% tags=["active-ipynb", "hide-output"]
# def uncorrected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
#     weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
#     return (weights @ v) / weights.sum(-1, keepdim=True)
#
# for size in (1, 3, 10):
#     a, b = size * q / 3, size * k / 3
#     wanted = F.scaled_dot_product_attention(a, b, v)
#     off = error(uncorrected(a, b, v), wanted)
#     print(f"entries of size {size}:", "the same" if off < 1e-5 else f"off by {off}")

# %% [markdown]
# As long as the exponentials and their sum stay within float32 (whose largest number
# has the logarithm 88), nothing is lost: the sum is the same. Beyond it $e^s$ is
# infinite, and infinity over infinity is not a number. QK-norm (chapter 4) bounds the
# scores of SD3.5; without it one would meet this in training first.
#
# ## Parity
#
# NF4's sixteen values are published (Dettmers et al. 2023, appendix E), our tiles are
# cut as diffusers cuts them, and tile-by-tile attention is PyTorch's own.

# %% tags=["active-ipynb"]
# published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343,
#     -0.09105004, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983,
#     0.562617, 0.72295684, 1.0]
# assert torch.allclose(normal_levels(), torch.tensor(published), atol=1e-6)
# assert error(attend_tiles(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-5
# print("levels agree to 10⁻⁶, attention to 10⁻⁵")

# %% [markdown]
# ## What production code does differently
#
# - **It multiplies in 8 bits.** Cards since Ada and Hopper compute e4m3 products at
#   twice the rate; activations then need scales too, one for each token. Here that is
#   `fast=True, fp8=True`.
# - **It restores 4 bits inside the product.** Ours writes the whole matrix in full
#   width before each product; a kernel (bitsandbytes, torchao) expands a tile at a
#   time.
# - **It overlaps.** While a layer computes, the next one's weights cross the bus.
# - **It picks a plan.** `minidiff.load(…, memory="12GB")` tries the levers in the order
#   of what they cost in time, and takes the first plan whose count fits.
#
# ## Exercises
#
# **12.1 Predict.** A text encoder of 4.7 · 10⁹ weights reads one prompt of 256 tokens,
# two operations for each weight and token, two bytes a weight. What is its intensity in
# operations a byte, and is an L4 (121 · 10¹² operations, 300 · 10⁹ bytes a second) held
# up by products or by memory?

# %% tags=["active-ipynb", "exercise"]
# def intensity() -> tuple[float, str]:
#     raise NotImplementedError  # operations a byte, and "products" or "memory"

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_12_1() -> None:
#     found, roof = intensity()
#     assert found != 512, "each weight has two bytes"
#     assert seal(round(found)) == "51e8ea28", "a weight: operations, bytes; 256 tokens"
#     assert roof in ("products", "memory"), "say which of the two"
#     card = next(card for card in CARDS if card.name == "L4")
#     bound = "products" if found > card.peak / card.bandwidth else "memory"
#     assert roof == bound, "compare with the card's own ratio, peak over bandwidth"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def intensity() -> tuple[float, str]:
#     return 2 * 256 / 2, "memory"
#
# exercise_12_1()

# %% tags=["active-ipynb", "hide-cell"]
# l4 = next(card for card in CARDS if card.name == "L4")
# print(f"an L4 computes {l4.peak / l4.bandwidth:.0f} operations in the time of a byte:"
#       " with 256 it waits for weights, with 404 prompt tokens it would not")

# %% [markdown]
# **12.2 Code.** Attention over two halves of the keys was computed on two cards. Each
# sends its answer and, for every query, the logarithm of its sum of exponentials,
# $\ell = m + \ln z$. Merge them.

# %% tags=["active-ipynb", "exercise"]
# def merge(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
#     """Answers (…, L, d) with their logarithms (…, L, 1) → attention over all keys."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_12_2() -> None:
#     for size in (1, 30):  # with 30 the exponentials themselves overflow
#         q, k, v = size * torch.randn(3, 1, 2, 40, 32)
#         halves = []
#         for keys, values in zip(k.chunk(2, 2), v.chunk(2, 2)):
#             scores = q @ keys.mT / 32**0.5
#             answer = F.scaled_dot_product_attention(q, keys, values)
#             halves += [answer, scores.logsumexp(-1, keepdim=True)]
#         wanted = F.scaled_dot_product_attention(q, k, v)
#         found = merge(*halves)
#         assert found.isfinite().all(), "subtract the larger logarithm first"
#         assert error(found, wanted) < 1e-4, "weigh each half by its share of the sum"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def merge(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> Tensor:
#     share = torch.sigmoid(log_a - log_b)  # e^a / (e^a + e^b), never infinite
#     return share * a + (1 - share) * b
#
# exercise_12_2()

# %% [markdown]
# **12.3 Code.** Write int8 with one scale a row: values from −127 to 127, the scale a
# column. Is it better or worse than e4m3 on the matrix above, and why?

# %% tags=["active-ipynb", "exercise"]
# def quantize_int8(x: Tensor) -> Rows:
#     """Rows (R, D) → int8 values (R, D) and float32 scales (R, 1)."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_12_3() -> None:
#     values, scale = quantize_int8(matrix)
#     assert values.dtype == torch.int8, "the values are int8"
#     assert scale.shape == (len(matrix), 1), "a scale for each row, as a column"
#     largest = values.float().abs().amax(-1)
#     assert (largest == 127).all(), "the largest value of every row becomes 127"
#     rounded = error(values.float() * scale, matrix)
#     cut = error((matrix / scale).to(torch.int8).float() * scale, matrix)
#     assert rounded < 0.75 * cut, "round: a conversion to int8 cuts off"
#     zero = quantize_int8(torch.zeros(1, 4))
#     fine = zero.scale.isfinite() & (zero.scale > 0)
#     assert fine.all(), "a row of zeros is divided by zero"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def quantize_int8(x: Tensor) -> Rows:
#     scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
#     return Rows((x / scale).round().to(torch.int8), scale)
#
# exercise_12_3()

# %% tags=["active-ipynb", "hide-cell"]
# values, scale = quantize_int8(matrix)
# whole, eighths = error(values.float() * scale, matrix), error(restored, matrix)
# print(f"int8 {whole:.4f}, e4m3 {eighths:.4f}: equal steps are finer near a row's "
#       "largest weights, which carry most of the error")

# %% [markdown]
# **12.4 Explore.** A cache has to beat fewer steps. A skipped step still costs its
# first block, one of `num_layers`. For thresholds 0.1 and 0.2, draw the prompts plainly
# with as many steps as the cached run's blocks would pay for, and compare both with the
# pictures of 28 steps. Who is closer?

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# model, layers = pipe.transformer, pipe.transformer.config.num_layers
# for threshold in (0.1, 0.2):
#     pipe.transformer = FirstBlockCache.of(model, threshold)
#     cached = pipe(prompts, seed=SEED, output_type="pt")
#     skipped = pipe.transformer.skipped
#     steps = 28 - skipped + math.ceil(skipped / layers)
#     pipe.transformer = model
#     plain = pipe(prompts, seed=SEED, num_inference_steps=steps, output_type="pt")
#     errors = [(x - exact).square().mean((1, 2, 3)) for x in (cached, plain)]
#     found = [-10 * e.log10().mean() for e in errors]
#     print(f"{skipped} skipped, the cost of {steps} steps: cached {found[0]:.1f} dB, "
#           f"plain {found[1]:.1f} dB; the cached one is closer on "
#           f"{int((errors[0] < errors[1]).sum())} of {len(prompts)}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The lines say on how many of the prompts. Both cost the same. The plain run takes a
# few long steps, each with a fresh velocity; the cached one takes 28 short steps, most
# of them with an answer that is a little old, and a first block that is not. Which
# error is larger depends on how fast the blocks' answer changes against how much the
# path bends, and on the threshold: with a large one the answer grows as old as the long
# step is long.
#
# </details>
#
# ## Summary
#
# You **counted** bytes and operations without a weight in memory, to the last
# operation, and **bounded** the time of a step on six cards. You **streamed** weights,
# **stored** them in 8 and 4 bits and measured what that moves. You **computed**
# attention without its table, a picture in tiles, a doubling by four small kernels, and
# **reused** steps, at a price that you know.
#
# ## Further reading
#
# - Williams, Waterman and Patterson 2009,
#   [Roofline](https://doi.org/10.1145/1498765.1498785): two numbers that explain most
#   performance.
# - Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135), and Milakov and
#   Gimelshein 2018, [Online normalizer
#   calculation](https://arxiv.org/abs/1805.02867).
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): NF4, section 3.
# - Micikevicius et al. 2022, [FP8 formats for deep
#   learning](https://arxiv.org/abs/2209.05433): e4m3 and e5m2.
# - Ma et al. 2024, [DeepCache](https://arxiv.org/abs/2312.00858).

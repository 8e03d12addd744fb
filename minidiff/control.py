# %% [markdown]
r"""
# Control: a sketch decides the shape

In this chapter you build a **ControlNet**: a small second network that reads a sketch
and tells the first one where the edges go, without changing one of its weights.

After it you will be able to

- **make** the pictures that ControlNets read, with an edge detector of your own;
- **explain** why a network that begins with zeros can learn at all;
- **build** the ControlNets of Stable Diffusion 3.5 Large, and **open** their files;
- **train** one on edges, and **measure** whether drawings keep to them;
- **steer** with a strength, from a step to another, and by several sketches at once;
- **choose** between a sketch, a first picture, a mask and the weight of a word.
"""

# %% [markdown]
# ## Where we are
#
# Part I drew from words alone. Words are good at saying *what*: a dress, red, on blue.
# They are poor at saying *where exactly* and *in which outline*; the model decides that
# itself, from the noise of the seed. (Chapter 8 kept the noise and changed the words:
# the outlines were hardly more alike than with other noise.) A sketch says just this,
# and nothing about colour.
#
# Chapter 5 has left a place for it: `MMDiT.forward(..., controls=…)` adds a vector for
# each patch behind each block. This chapter is about where these vectors come from. On
# the way of the data it stands beside the transformer.

# %%
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.attention import attend
from minidiff.dit import (
    Embedder,
    MMDiT,
    MMDiTConfig,
    PatchEmbed,
    StreamBlock,
    timestep_embedding,
)
from minidiff.files import single_file, weights
from minidiff.files.disk import read_json, write_json
from minidiff.files.layout import CONTROL_KINDS, check_image_only, published_control
from minidiff.files.pictures import in_rgb, open_picture, to_tensor
from minidiff.files.weights import TensorFile
from minidiff.flow_matching import interpolate, velocity_target
from minidiff.interface import checks
from minidiff.interface.request import Request, as_text
from minidiff.text_encoders import assemble
from minidiff.training import Batch, precise
from minidiff.vae import VAE

if TYPE_CHECKING:
    from PIL.Image import Image

# %% tags=["active-ipynb", "hide-input"]
# import tempfile
#
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT, SEED
# from minidiff.data.language import article
# from minidiff.data.samples import sample_scenes
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("control")

# %% [markdown]
# The prompt of the journey arrives as in chapter 8. A ControlNet of SD3.5 reads of it
# the pooled vector only, never the context: the words' place is in the first network.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# pipe.progress = False
# context, pooled = pipe.encode_prompt(PROMPT)
# print(journey.meets("pooled", pooled))
# noise = pipe.prepare_latents(1, seed=SEED)
# print(journey.meets("noise", noise))

# %% [markdown]
# ## A picture of the thing
#
# ```text
#  sketch → VAE encoder → its latent ──┐  own patch embedding, zero at first
#                                      ▼
#  noisy patches with their places ─► (+) ─► block ──► block ──► block   ControlNet
#          │                                   │         │         │
#          │                                 zero      zero      zero    linear
#          │                                   │ u₁      │ u₂      │ u₃
#          └─► block ─+─ block ─+─ block ─+─ block ─+─ block ─+─ block ─► transformer
#                    u₁        u₁        u₂        u₂        u₃
# ```
#
# The second network looks at the same noisy patches as the first, and at the sketch.
# What it has to say is added behind the blocks of the first. Its last layers are zero
# when training begins: a ControlNet that has learned nothing changes nothing.
#
# In the first ControlNet (Zhang et al. 2023) the second network is a copy of the
# first one's encoder. Stability's three for SD3.5 Large are simpler. Their blocks are
# the *image's half* of a joint block: no text stream, no norms of queries and keys, and
# half as many blocks as the transformer has. Each of them serves for two.

# %% [markdown]
# ## The mathematics
#
# Let $x$ be the patches of the noisy latent, embedded and with their places by the
# transformer itself, $y$ the sketch's latent, and $c$ what time and pooled text say.
# With blocks $B_k$ and matrices $Z_k$,
#
# $$h_0 = x + E(y), \qquad h_k = B_k(h_{k-1}, c), \qquad u_k = Z_k\, h_k,$$
#
# and behind block $i = 0, \dots, N_b - 1$ of the transformer
#
# $$x \leftarrow x + s\, u_{\lfloor i K / N_b \rfloor + 1}.$$
#
# $E$ and all $Z_k$ begin at zero. **Can they learn?** Let $\delta_k$ be the gradient of
# the loss with respect to $u_k$; it is that of the transformer's tokens, and not zero.
# Then
#
# $$\frac{\partial \mathcal L}{\partial Z_k} = \delta_k\, h_k^\top \neq 0,
# \qquad \frac{\partial \mathcal L}{\partial h_k} = Z_k^\top \delta_k = 0.$$
#
# In the first step only the $Z_k$ move. After it they are no longer zero, a gradient
# passes through them, and from the second step on blocks and $E$ learn too. Zeros are
# no trap, as long as what they multiply is not zero.
#
# | symbol | variable | meaning | Tiny | Large |
# |---|---|---|---|---|
# | $y$ | `condition` | the sketch's latent, (B, C, h, w) | 16 × 16² | 16 × 128² |
# | $E$ | `pos_embed_input` | its patches, (B, N, D); zero at first | | |
# | $K$ | `num_layers` | blocks of the ControlNet | half of $N_b$ | 19 |
# | $N_b$ | `len(joint_blocks)` | blocks of the transformer | | 38 |
# | $Z_k$ | `controlnet_blocks` | (D, D); zero at first | | |
# | $u_k$ | `controls` | what is added, (B, N, D) | 64 × 160 | 4096 × 2432 |
# | $s$ | `strength` | how much of it | 1 | 1 |

# %% [markdown]
# ## Build it: what a ControlNet reads
#
# ### Edges, by hand
#
# The most used condition is a picture of edges, and the detector is forty years old
# (Canny 1986). Brightness first, in the whole numbers that cameras and OpenCV use; then
# its growth to the right and downwards, by two kernels of Sobel: a difference across,
# smoothed along.


# %%
def gray(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → brightness (B, 1, H, W) in whole numbers, 0 to 255."""
    parts = pictures.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (255 * (pictures * parts).sum(1, keepdim=True)).round()


def gradients(brightness: Tensor) -> tuple[Tensor, Tensor]:
    """How (B, 1, H, W) grows to the right and downwards, by Sobel's weights."""
    smooth, differ = brightness.new_tensor([[1, 2, 1], [-1, 0, 1]])
    right = smooth[:, None] * differ  # (3, 3)
    around = F.pad(brightness, (1, 1, 1, 1), "replicate")
    return F.conv2d(around, right[None, None]), F.conv2d(around, right.T[None, None])


# %% [markdown]
# A slope is wide, an edge should be one pixel thin. So of each slope only the *ridge*
# stays: the pixels that are steeper than both neighbours across it. Across is one of
# four directions, and tangents of 22.5° and 67.5° decide which.


# %%
def ridges(right: Tensor, down: Tensor) -> Tensor:
    """The size of gradients (B, 1, H, W) where they are steepest across; else 0."""
    size = right.abs() + down.abs()
    height, width = size.shape[2:]
    around = F.pad(size, (1, 1, 1, 1))

    def at(y: int, x: int) -> Tensor:
        return around[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    level = down.abs() < (2**0.5 - 1) * right.abs()
    upright = down.abs() > (2**0.5 + 1) * right.abs()
    falling = right * down >= 0  # across from the upper left to the lower right
    slanted = torch.where(
        falling,
        (size > at(-1, -1)) & (size > at(1, 1)),
        (size > at(-1, 1)) & (size > at(1, -1)),
    )
    sheer = (size > at(-1, 0)) & (size >= at(1, 0))
    flat = (size > at(0, -1)) & (size >= at(0, 1))
    return size * torch.where(level, flat, torch.where(upright, sheer, slanted))


# %% [markdown]
# Two thresholds finish it. What is steeper than the high one is an edge. What is only
# steeper than the low one is an edge if it hangs together with one: let the edges grow
# by a pixel, keep what is steep enough, until nothing changes any more.


# %%
def canny(pictures: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Edges of pictures (B, 3, H, W) in [0, 1]: (B, 1, H, W), 1 on an edge, else 0.

    Canny 1986: ridges steeper than ``high``, and what of those steeper than ``low``
    hangs together with them. Numbers as OpenCV's ``Canny`` has them.
    """
    steepness = ridges(*gradients(gray(pictures)))
    weak, edges = (steepness > low).float(), (steepness > high).float()
    while True:
        grown = F.max_pool2d(edges, 3, stride=1, padding=1) * weak
        if torch.equal(grown, edges):
            return edges
        edges = grown


# %% [markdown]
# On six scenes that the package ships, edge for edge what OpenCV's `Canny(…, 100, 200)`
# draws (the tests hold a drawing of it):

# %% tags=["active-ipynb"]
# scenes = (sample_scenes()[0][:6] + 1) / 2
# edges = canny(scenes)
# print(f"{edges.mean():.1%} of all pixels are edges")
# viz.show_images(torch.cat([scenes, edges.expand(-1, 3, -1, -1)]), columns=6, low=0)

# %% [markdown]
# ### What each kind is given as
#
# A condition goes through the autoencoder like any picture: the net reads latents. The
# three published nets were trained with different ranges of numbers, and one of them is
# an accident that the weights now depend on: the values of *canny* run from 0.5 to 128
# where the autoencoder expects −1 to 1. A quirk of this kind is kept and named.
#
# | kind | picture | values for the encoder |
# |---|---|---|
# | blur | a picture, blurred widely: to enlarge it, for example | −1 to 1 |
# | canny | white edges on black | 0.5 to 128 |
# | depth | dark is near (ComfyUI turns bright ones over) | −1 to 1 |
# | edges | ours for the tiny model: white edges on black | −1 to 1 |
#
# Published code draws a sample from the encoder's distribution, with no seed. We take
# the distribution's middle, so that a drawing can be repeated.


# %%
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "blur": lambda pictures: 2 * pictures - 1,
    "canny": lambda pictures: 255 * 0.5 * pictures + 0.5,
    "depth": lambda pictures: 2 * pictures - 1,
    "edges": lambda pictures: 2 * pictures - 1,
}


@torch.no_grad()
def encode_condition(vae: VAE, pictures: Tensor, kind: str) -> Tensor:
    """Scaled latents (B, C, h, w) of condition pictures (B, 1 or 3, H, W) in [0, 1]."""
    pictures = pictures.expand(-1, 3, -1, -1)
    return vae.scale(vae.encode(VALUES[kind](pictures)).mode())


# %% [markdown]
# ### One block
#
# Everything is there already. `StreamBlock` of chapter 5 prepares the heads of one
# stream and takes up what they have read. In the transformer a joint attention stands
# between; here the patches read one another.


# %%
class ImageBlock(StreamBlock):
    """A block of the image's stream alone: its patches read one another."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D), and c (B, D) of time and text → tokens, one block on."""
        modulation = self.adaLN_modulation(c)  # (B, D) → (B, 6·D)
        heads, x = self.before(x, modulation)
        return self.after(x, attend(*heads), modulation)


# %%
@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of a ControlNet; the names are the keys of the hub's config.json."""

    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 19
    attention_head_dim: int = 64
    num_attention_heads: int = 38
    pooled_projection_dim: int = 2048

    @classmethod
    def sd35_large(cls) -> "ControlNetConfig":
        """The three of Stable Diffusion 3.5 Large: blur, canny and depth."""
        return cls()

    @classmethod
    def of(cls, config: MMDiTConfig, num_layers: int) -> "ControlNetConfig":
        """One of ``num_layers`` blocks for a transformer of this configuration."""
        return cls(
            config.patch_size,
            config.in_channels,
            num_layers,
            config.attention_head_dim,
            config.num_attention_heads,
            config.pooled_projection_dim,
        )

    @property
    def block(self) -> MMDiTConfig:
        """What a block of the image's stream is made by."""
        heads = self.num_attention_heads
        return MMDiTConfig(
            attention_head_dim=self.attention_head_dim, num_attention_heads=heads
        )


# %% [markdown]
# ### The net
#
# Parameter names are diffusers' for time and text in the files of both kinds; the
# blocks' differ. One table in `minidiff.files` knows all of them.


# %%
class ControlNet(nn.Module):
    """Reads a condition, and says what to add behind a transformer's blocks.

    Zhang et al. 2023, in the layout of SD3.5 Large's three. ``kind`` says what its
    conditions show (a key of ``VALUES``), ``last`` whether it counts behind the
    transformer's last block too.
    """

    def __init__(
        self, config: ControlNetConfig, kind: str = "edges", last: bool = False
    ) -> None:
        super().__init__()
        self.config, self.kind, self.last = config, kind, last
        width = config.block.width
        self.pos_embed_input = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(config.pooled_projection_dim, width)
        count = range(config.num_layers)
        self.transformer_blocks = nn.ModuleList(ImageBlock(config.block) for _ in count)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in count)
        for layer in (self.pos_embed_input.proj, *self.controlnet_blocks):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, sigma: Tensor, pooled: Tensor, condition: Tensor
    ) -> list[Tensor]:
        """Tokens (B, N, D) with their places, levels (B,), pooled text (B, P) and a
        condition's latents (B, C, h, w) → what its blocks say, (B, N, D) each."""
        time = timestep_embedding(1000 * sigma.float()).to(pooled.dtype)
        c = self.t_embedder(time) + self.y_embedder(pooled)
        x = x + self.pos_embed_input(condition)  # (B, C, h, w) → (B, N, D)
        said = []
        for block, out in zip(
            self.transformer_blocks, self.controlnet_blocks, strict=True
        ):
            x = block(x, c)
            said.append(out(x))
        return said


# %% [markdown]
# ### Beside a transformer
#
# The net has no patch embedding and no positions of its own: it takes the
# transformer's. And then each of its $K$ answers is dealt out to the blocks.
#
# Here two implementations part. Stability's code adds behind *every* block. diffusers
# leaves the *last* block out. The weights are the same, the pictures are not. We keep
# both: a net from an official single file counts behind the last block, as its authors
# have it; one from diffusers' folder does not.


# %%
def spread(said: Sequence[Tensor], blocks: int, last: bool = False) -> list[Tensor]:
    """One of K tensors for each of ``blocks`` blocks, or for all but the last."""
    every = blocks / len(said)
    return [said[int(i / every)] for i in range(blocks if last else blocks - 1)]


def controls_of(
    net: ControlNet,
    transformer: MMDiT,
    latents: Tensor,
    sigma: Tensor,
    pooled: Tensor,
    condition: Tensor,
    strength: float = 1.0,
) -> list[Tensor]:
    """What ``net`` adds behind the blocks of ``transformer``, which is asked the same.

    ``condition`` (B, C, h, w) are scaled latents; the other arguments are those of
    both.
    """
    height, width = (n // net.config.patch_size for n in latents.shape[2:])
    x = transformer.x_embedder(latents)  # (B, C, h, w) → (B, N, D)
    x = x + transformer.positions(height, width)
    like = net.pos_embed_input.proj.weight
    said = net(x.to(like), sigma, pooled.to(like), condition.to(like))
    said = [strength * u for u in said]
    return spread(said, len(transformer.joint_blocks), net.last)


# %% [markdown]
# A fresh net, and what it changes. It begins as a copy: of every few blocks of the
# transformer, the image's half of the first.


# %%
def begin_control(transformer: MMDiT, num_layers: int | None = None) -> ControlNet:
    """A ControlNet that begins as a copy of the transformer's image stream.

    It has ``num_layers`` blocks, by default half as many. Of every few blocks the first
    is copied, without the norms of queries and keys and without dual attention. It
    changes nothing before it has learned.
    """
    num_layers = num_layers or len(transformer.joint_blocks) // 2
    net = ControlNet(ControlNetConfig.of(transformer.config, num_layers))
    for name in ("t_embedder", "y_embedder"):
        getattr(net, name).load_state_dict(getattr(transformer, name).state_dict())
    every = len(transformer.joint_blocks) / num_layers
    for k, block in enumerate(net.transformer_blocks):
        image = transformer.joint_blocks[math.ceil(k * every)].x_block.state_dict()
        own = {name: image[name][: len(x)] for name, x in block.state_dict().items()}
        block.load_state_dict(own)
    return net


# %% tags=["active-ipynb"]
# fresh = begin_control(pipe.transformer)
# sigma, sketch = torch.ones(1), encode_condition(pipe.vae, edges[:1], "edges")
# said = controls_of(fresh, pipe.transformer, noise, sigma, pooled, sketch)
# largest = max(u.abs().max().item() for u in said)
# count = weights.count_parameters(fresh)
# print(f"{count:,} parameters; the largest control: {largest}")

# %% [markdown]
# ### What it learns from
#
# The loss is chapter 7's, unchanged: the velocity from a noisy latent back to its
# picture. The transformer stays as it is; only the net learns. It is paid for one
# thing, to know from the sketch what the transformer cannot know from noise and words.


# %%
def control_loss(transformer: MMDiT, net: ControlNet, batch: Batch) -> Tensor:
    """Rectified flow (chapter 7) of ``transformer``, which stays, with ``net``.

    ``batch`` is that of ``transformer_loss`` with ``condition`` (B, C, h, w).
    """
    x0, noise, sigma = batch["x0"], batch["noise"], batch["sigma"]
    x, pooled = interpolate(x0, noise, sigma), batch["pooled"]
    said = controls_of(net, transformer, x, sigma, pooled, batch["condition"])
    v = transformer(x, sigma, batch["context"], pooled, controls=said)
    return (precise(v) - velocity_target(x0, noise)).square().mean()


# %% [markdown]
# Look at the first step, and find the argument about zeros in it. A gradient reaches
# the zero matrices and nothing behind them:

# %% tags=["active-ipynb"]
# with torch.enable_grad():
#     batch = {"x0": pipe.vae.scale(pipe.vae.encode(2 * scenes - 1).mode())}
#     batch |= {"noise": torch.randn_like(batch["x0"]), "sigma": torch.full((6,), 0.8)}
#     batch |= {"context": context.expand(6, -1, -1), "pooled": pooled.expand(6, -1)}
#     batch["condition"] = encode_condition(pipe.vae, edges, "edges")
#     control_loss(pipe.transformer.requires_grad_(False), fresh, batch).backward()
# for name, part in fresh.named_children():
#     moved = [p.grad is not None and bool(p.grad.any()) for p in part.parameters()]
#     print(f"{name}: {sum(moved)} of {len(moved)} tensors have a gradient")

# %% [markdown]
# ## In a pipeline
#
# `Control` puts picture and net together, with a strength and a part of the steps.
# `pipe(prompt, control=…)` takes one, or a list: what several nets say is added up, so
# that edges and depth can steer together. Nothing of the pipeline is copied. Chapter
# 8's loop asks each control before it asks the transformer. With guidance both prompts
# are steered, as in both published codes.
#
# First the picture: opened, brought to size, and refused where it is none.


# %%
def open_condition(image: Any) -> Any:
    """The picture in a file; PIL pictures and tensors as they are.

    TypeError or ValueError for what is none of these.
    """
    opened = open_picture(image) if isinstance(image, str | Path) else image
    if isinstance(opened, Tensor):
        checks.check_dense("control's image", opened)
    elif not hasattr(opened, "resize"):
        found = f"control's image is a {type(image).__name__}"
        raise TypeError(f"{found}; expected a PIL picture, a file or a tensor")
    return opened


def condition_pictures(image: Any, height: int, width: int) -> Tensor:
    """A picture, or tensors, as (B, 1 or 3, H, W) in [0, 1]; ValueError for others."""
    if not isinstance(image, Tensor):
        image = in_rgb(image).resize((width, height), resample=1)
        return to_tensor(image)[None] / 255  # (3, H, W) → (1, 3, H, W)
    found = image.float()[(None,) * (4 - image.ndim)]
    known = found.ndim == 4 and found.shape[1] in (1, 3)
    if not known or found.shape[2:] != (height, width):
        what = f"control's image has shape {tuple(image.shape)}"
        raise ValueError(f"{what}; expected (B, 1 or 3, {height}, {width})")
    low, high = found.aminmax()
    if not 0 <= low <= high <= 1:
        what = f"control's image has values from {low:g} to {high:g}"
        raise ValueError(f"{what}; expected 0 to 1")
    return found


def check_net(net: ControlNet, transformer: MMDiT) -> None:
    """Raise ValueError where a net was not made for such a transformer."""
    own, config = net.config, transformer.config
    wanted = ControlNetConfig.of(config, own.num_layers)
    for size in fields(own):
        found, expected = (getattr(c, size.name) for c in (own, wanted))
        if found != expected:
            found = f"the ControlNet's {size.name} is {found}"
            raise ValueError(f"{found}; this model needs {expected}")
    if own.num_layers > config.num_layers:
        found = f"the ControlNet has {own.num_layers} blocks"
        raise ValueError(f"{found}; expected at most {config.num_layers}")


# %%
def window(sigmas: Tensor, start: float, end: float) -> set[float]:
    """The levels at which steps i with start·N ≤ i and i + 1 ≤ end·N begin, of N."""
    steps = len(sigmas) - 1
    inside = [start <= i / steps and (i + 1) / steps <= end for i in range(steps)]
    return set(sigmas[:-1][inside].tolist())


# %% [markdown]
# For one drawing the sketch is encoded once. What comes back is a function that the
# loop asks at every level, and that says nothing outside its part of the steps.


# %%
def steering(
    control: "Control", pipe: Any, latents: Tensor, pooled: Tensor, sigmas: Tensor
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """What ``control`` adds behind the blocks, by a state x (R, C, h, w) and a level.

    ``latents`` (B, C, h, w) are as large as the drawing's, ``pooled`` (B or 2·B, P)
    is its text, ``sigmas`` (S + 1,) its levels.
    """
    size = (pipe.vae.config.factor * n for n in latents.shape[2:])
    text = pooled.to(pipe.device, pipe.dtype)
    pictures = condition_pictures(control.opened, *size).to(text)
    encode = partial(encode_condition, pipe.vae, pictures, control.net.kind)
    condition = encode()
    what = "the encoding of control's image"
    checks.warn_of_overflow(what, condition, encode, vae=pipe.vae)
    steered = window(sigmas, control.start, control.end)

    @torch.no_grad()
    def said(x: Tensor, sigma: Tensor) -> list[Tensor]:
        if sigma.item() not in steered:
            return []
        given = condition.repeat(len(x) // len(condition), 1, 1, 1)
        asked = x, sigma.expand(len(x)).to(x.device), text[-len(x) :]
        return controls_of(
            control.net, pipe.transformer, *asked, given, control.strength
        )

    return said


# %%
@dataclass(frozen=True, eq=False)
class Control:
    """A picture that steers a drawing besides its words, and the net that reads it.

    ``image``: a file, a PIL picture (both are resized), or a tensor (B, C, H, W) or
    (C, H, W) in [0, 1] of 1 or 3 channels; one, or one for each drawing. Of N steps
    those from ``start``·N to ``end``·N are steered. Raises ValueError or TypeError for
    what cannot be.
    """

    image: "Image | Tensor | Path | str"
    net: ControlNet
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    opened: Any = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.net, ControlNet):
            found = f"control's net is a {type(self.net).__name__}"
            raise TypeError(f"{found}; expected a ControlNet, as load_control returns")
        for name in ("strength", "start", "end"):
            checks.check_number(f"control_{name}", getattr(self, name))
        if not 0 <= self.start < self.end <= 1:
            found = f"control acts from {self.start} to {self.end}"
            raise ValueError(f"{found}; expected 0 ≤ start < end ≤ 1")
        object.__setattr__(self, "opened", open_condition(self.image))

    def __str__(self) -> str:
        when = f"{self.start:g} to {self.end:g}"
        return (
            f"{self.net.kind} {as_text(self.image)}, strength {self.strength:g}, {when}"
        )

    def check(self, pipe: Any, request: Request) -> None:
        """Raise ValueError where the net or the picture does not fit a drawing."""
        check_net(self.net, pipe.transformer)
        pictures = condition_pictures(self.opened, *request.size)
        if len(pictures) not in (1, request.count):
            found = f"control's image has {len(pictures)} pictures"
            raise ValueError(f"{found}; expected 1 or {request.count}")

    begin = steering


# %% [markdown]
# Files come in two forms, and each is known by what it is. The official single file
# says in a tensor of its own, `control_type`, what its conditions show; it also holds a
# patch embedding and a map for the context that nobody reads. diffusers' folder says
# nothing: it is known by the whole name under which it was published, or you say what
# it reads. Nets of other layouts, such as the first for SD3 Medium, whose blocks have a
# text stream and which read zeros for the pooled text, are refused by what their
# configuration says.


# %%
def load_control(
    source: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kind: str | None = None,
) -> ControlNet:
    """A ControlNet of SD3.5 Large's layout, ready to steer.

    ``source``: "tiny-edges", which ships; an official single file (it counts behind the
    last block too), or a folder in diffusers' layout (it does not). ``kind`` says what
    its conditions show, "blur", "canny", "depth" or "edges", where the file or folder
    does not and has no published name. All else is as for ``minidiff.load``.
    """
    device, dtype = checks.find_target(device, dtype)
    path = weights.shipped(source, weights.CONTROLS) or Path(source)
    kinds = ControlNet, ControlNetConfig
    if not path.exists():
        expected = f"{weights.CONTROLS[0]}, or a ControlNet's file or folder"
        raise FileNotFoundError(f"{path} is missing; expected {expected}")
    if single := not path.is_dir():
        opened = weights.open_tensors(path)
        prepared = single_file.prepare_part("controlnet", *kinds, opened)
        kind = kind or control_type(opened)
    else:
        content = check_image_only(path)
        prepared = weights.prepare_component(*kinds, path)
        kind = kind or content.get("_kind")
    kind = kind or published_control(path.resolve())
    if kind is None:
        found = f"{path} does not say what its conditions show"
        known = f"expected kind={' or '.join(map(repr, VALUES))}"
        raise ValueError(f"{found}; {known}, or _kind in its config.json")
    checks.check_choice("kind", str(kind), VALUES)
    net = prepared(device, dtype).requires_grad_(False)
    net.kind, net.last = str(kind), single
    return net


def control_type(file: TensorFile) -> str | None:
    """What a single file says that its conditions show; None if it says nothing."""
    if "control_type" not in file.entries:
        return None
    number = int(file.read("control_type").flatten()[0])
    if not 0 <= number < len(CONTROL_KINDS):
        raise ValueError(f"{file.path}: control_type is {number}; expected 0, 1 or 2")
    return CONTROL_KINDS[number]


def save_control(
    net: ControlNet, folder: Path | str, dtype: torch.dtype | None = None
) -> None:
    """Write a folder that ``load_control`` and diffusers' SD3ControlNetModel open."""
    weights.save_component(net, folder, "SD3ControlNetModel", dtype)
    path = Path(folder) / "config.json"
    write_json(path, read_json(path) | {"_kind": net.kind})


# %% [markdown]
# Large, on the meta device: every parameter, none of the weights. Chapter 8 has counted
# the transformer's own step.

# %% tags=["active-ipynb"]
# from torch.utils.flop_counter import FlopCounterMode
#
# with weights.on_meta():
#     large = ControlNet(ControlNetConfig.sd35_large())
#     given = (2, 4096, 2432), (2,), (2, 2048), (2, 16, 128, 128)
#     with FlopCounterMode(display=False) as counter:
#         large(*(torch.empty(size) for size in given))
# count = weights.count_parameters(large)
# print(f"{count:,} parameters in {len(large.state_dict())} tensors")
# print(f"{counter.get_total_flops() / 1e12:.1f} TFLOP for a guided step at 1024²")
# every = spread(range(19), 38, last=True)
# print("the first blocks hear answers", every[:6], "and the last two", every[-2:])

# %% [markdown]
# ## Look at it
#
# **A net of your own.** Drawings of the small model will do to learn from: their edges
# are the sketches, and their captions are known. The student of chapter 9 makes them,
# in two jumps each.

# %% tags=["active-ipynb"]
# from minidiff.data.samples import ONE, sample_captions
#
# student = minidiff.load("tiny-turbo")
# student.progress = False
#
# def lesson(count: int = 192) -> Batch:
#     """Latents, conditions and texts of the student's drawings."""
#     texts = sample_captions(count, ONE)
#     x0 = student(texts, num_inference_steps=2, seed=100, output_type="latent")
#     sketches = canny(pipe.decode(x0))
#     context, pooled = pipe.encode_prompt([*texts, ""])  # the empty prompt at the end
#     known = {"x0": x0, "context": context, "pooled": pooled}
#     return known | {"condition": encode_condition(pipe.vae, sketches, "edges")}

# %% tags=["active-ipynb"]
# def learned(steps: int = 80, size: int = 8) -> ControlNet:
#     """A net that has seen a few drawings, a few times."""
#     batch, generator = lesson(), torch.Generator().manual_seed(SEED)
#     net = begin_control(pipe.transformer)
#     optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.99))
#     for step in range(steps):
#         rows = torch.randint(len(batch["x0"]), (size,), generator=generator)
#         some = {name: batch[name][rows] for name in ("x0", "condition")}
#         told = torch.rand(size, generator=generator) > 0.5
#         text = torch.where(told, rows, -1)  # of half the sketch alone must do
#         some |= {name: batch[name][text] for name in ("context", "pooled")}
#         some["noise"] = torch.randn(some["x0"].shape, generator=generator)
#         logit = torch.randn(size, generator=generator)
#         some["sigma"] = torch.sigmoid(logit + 0.7)  # edges are decided early
#         rate = min(1, step / 10, 3 - 3 * step / steps)  # up, level, down
#         optimizer.param_groups[0]["lr"] = 2e-3 * rate
#         with torch.enable_grad():
#             optimizer.zero_grad()
#             control_loss(pipe.transformer, net, some).backward()
#         nn.utils.clip_grad_norm_(net.parameters(), 1.0)
#         optimizer.step()
#     return net

# %% [markdown]
# **A net that has learned for longer.** `minidiff train --stage control --start tiny`
# does the same on 32,768 scenes of the world, in 4,000 steps of 32. The net that ships
# was made so.

# %% tags=["active-ipynb"]
# brief, net = learned(), load_control("tiny-edges")

# %% [markdown]
# Sketches now, that neither has seen: edges of sixteen drawings, of things at places
# that their words name. The same things are then asked for in *other words*: other
# colours, other grounds, and not a word on the place. Without control, words and noise
# know nothing of the sketch, and things unplaced mostly come large and in the middle.
# How well a drawing keeps to its sketch is measured as the *intersection over union* of
# the drawing's edges with it; an edge counts as met within one pixel.

# %% tags=["active-ipynb"]
# from minidiff.judging.edges import agreement
#
# COLORS = "red green blue yellow purple white orange pink".split()
# THINGS = "dress cat guitar boot rocket bag star fish".split()
#
# WHERE = " at the top left, on the right, at the bottom left, on the left"
# WHERE += ", at the top right, at the top, at the bottom right, at the bottom"
#
# def ask(i: int, color: int, ground: int, where: str = "") -> str:
#     thing = f"{COLORS[(i + color) % 8]} {THINGS[(i + i // 8) % 8]}"
#     return f"{article(thing)}{where} on {COLORS[(i + ground) % 8]}"
#
# first = [ask(i, 0, 3, WHERE.split(",")[i % 8]) for i in range(16)]
# words = [ask(i, 5, 1) for i in range(16)]
# how = {"num_inference_steps": 8, "output_type": "pt"}
# sketches = canny(pipe(first, seed=900, **how))

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def steered(by: ControlNet = net, **control: float) -> Tensor:
#     """The prompts, drawn with their sketches."""
#     return pipe(words, seed=50, control=Control(sketches, by, **control), **how)
#
# def kept(pictures: Tensor) -> Tensor:
#     return agreement(pictures, sketches)  # (B,)
#
# def more(pictures: Tensor) -> str:
#     gain = kept(pictures) - kept(without)
#     half = 1.96 * gain.std() / len(gain) ** 0.5
#     return f"{kept(pictures).mean():.2f}, more by {gain.mean():.2f} ± {half:.2f}"
#
# without = pipe(words, seed=50, **how)
# drawn = {s: steered(strength=s) for s in (0.5, 1.0, 2.0)}
# print(f"agreement without control {kept(without).mean():.2f}")
# print("with the brief net", more(steered(brief)))
# print("with the shipped net", more(drawn[1.0]))
# rows = sketches.expand(-1, 3, -1, -1), without, drawn[1.0], drawn[2.0]
# viz.show_images(torch.cat([x[:8] for x in rows]), words[:8], columns=8, low=0)

# %% [markdown]
# In the top row stand the sketches; below what the words give alone, then what both
# give together, at strengths of 1 and 2. The lines over the figure have the means of
# all sixteen. Compare colours between the lower rows, outlines and places between the
# first row and the last. The brief net took 80 steps of 8, from 192 drawings of the
# student; the shipped one 4,000 of 32, from 32,768 scenes. The two gains compare the
# two trainings, and not the number of samples alone.
#
# **Sketch yourself.** The net serves the student of chapter 9 as well, whose
# transformer began as this one's. On a page of the book the student opens below, in
# your browser, with a pad beside it: draw, and it draws along, in four steps and at a
# strength of 2; or take the edges of the picture that it has drawn last, and say other
# words. *Save sketch* gives a file that `Control("sketch.png", net, 2.0)` reads.

# %% tags=["active-ipynb"]
# by = Control(sketches[1:2], net, 2.0)
# cat = student(words[1], seed=0, control=by, output_type="pt")[0]
# viz.live_sketch(sketches[1], 2 * cat - 1, words[1])

# %% [markdown]
# **How strongly, and when?** Words without a place want the thing in the middle. A
# strength of 0.5 moves few. At 1 the sketch wins in some of the drawings above,
# at 2 in all eight. Of the steps, the early ones decide the large forms (chapter 8), so
# a control that acts in the first half should achieve more than one that acts in the
# second. The numbers say whether it does, and what the second half adds to the first.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for strength, pictures in drawn.items():
#     print(f"strength {strength}: {more(pictures)}")
# for start, end in ((0.0, 0.5), (0.5, 1.0)):
#     part = steered(strength=2.0, start=start, end=end)
#     print(f"strength 2.0 from {start} to {end}: {more(part)}")

# %% [markdown]
# Several at once: two nets, or one net with two sketches. Their answers are added; each
# keeps its strength. Here each drawing gets its own sketch and, half as strongly, its
# neighbour's.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# pair = [Control(sketches, net, 2.0), Control(sketches.roll(1, 0), net)]
# both = pipe(words, seed=50, control=pair, **how)
# for name, x in {"own sketch alone": drawn[2.0], "with the neighbour's": both}.items():
#     other = agreement(x, sketches.roll(1, 0)).mean()
#     print(f"{name:20} agrees to {kept(x).mean():.2f}, with the neighbour {other:.2f}")

# %% [markdown]
# The neighbour's sketch gains a little, and costs the drawing's own more than that.
#
# ## Predict, then break it
#
# **One.** Give the net an empty sketch: black, no edge at all. It is not silence. To
# the net black may mean *no edge here*. What will be drawn?

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# nothing = Control(torch.zeros(1, 1, 64, 64), net, 2.0)
# blank = pipe(words, seed=50, control=nothing, **how)
# shares = [f"{canny(pictures).mean():.1%}" for pictures in (without, blank)]
# print("pixels on an edge:", " then ".join(shares))
# viz.show_images(torch.cat([without[:8], blank[:8]]), columns=8, low=0)

# %% [markdown]
# Most drawings are bare ground, in the colour that the words name: black says *no edge
# here*. Where you want silence, give no control.
#
# **Two.** Ask for nothing: the empty prompt, guided by nothing, with a sketch. What
# does a sketch alone decide? (The second number is what another picture's sketch would
# get; what lies above it, the sketch decided.)

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# mute = {"guidance_scale": 1.0, "control": Control(sketches, net)}
# alone = pipe([""] * len(words), seed=50, **mute, **how)
# chance = agreement(alone, sketches.roll(1, 0)).mean()
# print(f"agreement {kept(alone).mean():.2f}, with another's sketch {chance:.2f}")
# rows = torch.cat([sketches[:8].expand(-1, 3, -1, -1), alone[:8]])
# viz.show_images(rows, columns=8, low=0)

# %% [markdown]
# Where something stands, and its rough outline. Which thing, which colours and which
# ground the model chooses by itself.
#
# **Three.** Count the net behind the last block too, as Stability's code does, though
# it was trained without. How far do the pictures move?

# %% tags=["active-ipynb", "hide-output", "nbval-ignore-output"]
# net.last = True
# moved = steered()
# net.last = False
# change = (moved - drawn[1.0]).norm() / drawn[1.0].norm()
# print(f"relative difference {change.item():.3f}, agreement {more(moved)}")

# %% [markdown]
# The published pairs of net and code differ by just this. If a picture of yours differs
# from a friend's, this is one of the places to look.
#
# ## Other ways to steer
#
# A sketch is not the only thing besides words. Each of the following gives the model a
# different kind of hold.
#
# ### A picture to begin from
#
# *Image to image* (exercise 8.2; Meng et al. 2022) begins part of the way, at a noised
# picture. It keeps what survives the noise: places, large forms, and colours. A sketch
# keeps the outline alone. So: a variation of a picture, image to image; the same form
# in new colours, a sketch.

# %% tags=["active-ipynb"]
# from minidiff.drawing.image_to_image import image_to_image
#
# dress = pipe(PROMPT, seed=SEED, output_type="pt")
# coat, strengths = "a green coat on a white background", (0.4, 0.6, 0.8, 0.9)
# varied = [image_to_image(pipe, coat, dress, s, output_type="pt") for s in strengths]
# titles = ["begin here", *(f"strength {s}" for s in strengths)]
# viz.show_images(torch.cat([dress, *varied]), titles, low=0)

# %% [markdown]
# ### A mask
#
# *Inpainting* paints only where a mask is white. After each step all else is put back,
# at the noise level of that step, so that each step sees both parts equally noisy.
# Where words and kept part disagree, as here, a seam stays. Here the lower half may
# change:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# mask = torch.zeros(1, 64, 64)
# mask[:, 32:] = 1
# painted = image_to_image(pipe, coat, dress, 1.0, mask, output_type="pt")
# change = (painted - dress).abs().mean((0, 1, 3))
# print(f"mean change above {change[:28].mean():.3f}, below {change[36:].mean():.3f}")
# viz.show_images(torch.cat([dress, mask.expand(3, -1, -1)[None], painted]), low=0)

# %% [markdown]
# ### The weight of a word
#
# Other programs read `(red:1.3)` as *red, but more so*. The original SD3.5 code parses
# the parentheses and drops the numbers (chapter 1); diffusers reads them as text. The
# common meaning is this: where a token's row of the context is $e$, and the row at the
# same place of the *empty* prompt's context is $e_0$, take
#
# $$e_0 + w\,(e - e_0).$$
#
# With $w = 1$ nothing changes, with $w = 0$ the place reads as if nothing had been
# said, and beyond 1 the row is pushed further from the empty one: guidance, applied to
# a word instead of a velocity. The pooled vector belongs to the whole prompt and stays.
#
# Which rows are a word's? Tokenize the text up to the word, and with it; the rows in
# between are its own. This holds for all three tokenizers, whatever they put around.
# Weights within weights, which other programs multiply, are refused here.


# %%
def split_weights(prompt: str) -> list[tuple[str, float]]:
    """ "a (red:1.3) dress" → [("a ", 1.0), ("red", 1.3), (" dress", 1.0)]."""
    close = r"\s*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)"  # :1.3)
    if re.search(r"\(.*\)[^()]*" + close, prompt, re.DOTALL):
        raise ValueError(f"{prompt!r} weighs parentheses; expected words: (red:1.3)")
    pieces, end = [], 0
    for match in re.finditer(r"\(([^()]+?)" + close, prompt):
        pieces += [(prompt[end : match.start()], 1.0), (match[1], float(match[2]))]
        end = match.end()
    return [(text, weight) for text, weight in [*pieces, (prompt[end:], 1.0)] if text]


def token_weights(
    tokenizer: Any, pieces: Sequence[tuple[str, float]], length: int
) -> Tensor:
    """A weight for each of ``length`` tokens, (length,); 1 where no word stands."""
    found, text = torch.ones(length), ""
    for piece, weight in pieces:
        first = len(tokenizer.encode(text)) - 1  # the last of them is the end
        text += piece
        found[first : len(tokenizer.encode(text)) - 1] = weight
    return found


# %%
@torch.no_grad()
def encode_weighted(pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """Context (1, L, D) and pooled (1, P) of a prompt with weights: ``(word:1.3)``.

    For a call's ``prompt_embeds`` and ``pooled_prompt_embeds``. A weight around
    parentheses is a ``ValueError``.
    """
    pieces = split_weights(prompt)
    text = "".join(piece for piece, _ in pieces)
    context, pooled = pipe.encode_prompt(["", text])
    rows = []
    for i, encoder in enumerate(pipe.text_encoders):
        clip, tokenizer = i < 2, pipe.tokenizers[i]
        long = tokenizer.model_max_length if clip else pipe.max_sequence_length
        if tokenizer is None or encoder is None:
            weight = torch.ones(long)
        else:
            weight = token_weights(tokenizer, pieces, long)
        wide = encoder.config.hidden_size if clip else context.shape[-1]
        rows.append(weight[:, None].expand(1, -1, wide))  # (L,) → (1, L, D)
    empty, full = context.split(1)
    return torch.lerp(empty, full, assemble(*rows).to(context)), pooled[1:]


# %% tags=["active-ipynb", "nbval-ignore-output"]
# def weighted(prompt: str) -> Tensor:
#     read = encode_weighted(pipe, prompt)
#     names = "prompt_embeds", "pooled_prompt_embeds"
#     eight = {"num_images_per_prompt": 8, "num_inference_steps": 6}
#     return pipe(**dict(zip(names, read)), **eight, seed=SEED, output_type="pt")
#
# amounts = 0.0, 1.0, 2.5
# weighed = [weighted(f"a (red:{w}) dress on a blue background") for w in amounts]
# middle = torch.stack(weighed)[..., 24:40, 28:36].mean((3, 4))  # (3, 8, 3)
# red = middle[..., 0] - middle[..., 1:].mean(2)  # (3, 8)
# for w, x, gain in zip(amounts, red, red - red[0]):
#     half = 2.36 * gain.std() / 8**0.5  # Student's t, eight seeds
#     print(f"weight {w}: redness {x.mean():.2f}, "
#         f"more by {gain.mean():.2f} ± {half:.2f}")
# viz.show_images(torch.cat([x[:6] for x in weighed]), columns=6, low=0).captioned(
#     "Rows: the word “red” at a weight of 0, 1 and 2.5.")

# %% [markdown]
# The numbers say how much redder than green and blue the middle of a picture is, the
# mean of eight noises, and by how much it gained on the weight 0. At 2.5 it has gained;
# at 1 the interval holds zero. Even at 0 most are red. Its colour does not hang on
# these rows alone: the rows of the other words have read this one, for the encoders had
# the whole sentence, and so has the pooled vector.
#
# ## Parity
#
# A net of random weights, written to a folder, opened by diffusers, and both asked the
# same. (The tests do it for whole guided drawings with two nets at once, and for the
# single file by the published formula.)

# %% tags=["active-ipynb"]
# from diffusers import SD3ControlNetModel
#
# for parameter in fresh.parameters():
#     nn.init.normal_(parameter, std=0.05)
# with tempfile.TemporaryDirectory() as folder:
#     save_control(fresh, folder)
#     theirs = SD3ControlNetModel.from_pretrained(folder)
# tokens = pipe.transformer.x_embedder(noise) + pipe.transformer.positions(8, 8)
# ours = fresh(tokens, sigma, pooled, sketch)
# how_asked = {"controlnet_cond": sketch, "pooled_projections": pooled}
# said = theirs(tokens, timestep=1000 * sigma, return_dict=False, **how_asked)[0]
# errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, said)]
# print("all within 1e-5:", max(errors) < 1e-5)

# %% [markdown]
# ## What production code does differently
#
# - **Memory.** Large's net has a quarter of Large's parameters: 4.3 GB in 16 bits.
#   Production code moves it away when its last step is over, at `end`. (Our memory
#   plans count the nets as well, for the whole drawing.)
# - **Time.** Half as many blocks cost about half a step more. A control that ends early
#   saves that time.
# - **Guidance.** Both prompts get the control here. Some interfaces give it to the
#   prompt alone, so that guidance exaggerates the sketch as well.
# - **Preparation.** Edges in one line, as here. Depth and poses come from networks of
#   their own, and a control is no better than what prepared it.
# - **Many conditions in one net.** Newer nets take the kind as one more input, so that
#   one file serves for edges, depth and poses.
#
# ## Exercises
#
# **11.1 Predict.** A net of 3 blocks steers a transformer of 6. Write down, for each
# block of the transformer, the number of the answer that is added behind it, 0, 1 or 2,
# or `None` where nothing is: as diffusers does it.

# %% tags=["active-ipynb", "exercise"]
# def heard() -> list[int | None]:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_11_1() -> None:
#     found = heard()
#     assert len(found) == 6, "one entry for each block"
#     assert found[-1] is None, "diffusers leaves one block out"
#     assert found[:5] == spread(range(3), 6), "each answer serves for two blocks"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def heard() -> list[int | None]:
#     return [0, 0, 1, 1, 2, None]
#
# exercise_11_1()

# %% [markdown]
# <details><summary>Answer</summary>
#
# Each answer serves for $N_b / K = 2$ blocks, so block $i$ hears answer
# $\lfloor i/2 \rfloor$. The last block gives no text back, and diffusers takes this for
# the mark of a block that is not to be steered.
#
# </details>
#
# **11.2 Code.** The measure of this chapter. `drawn` and `wanted` are maps of edges
# (B, 1, H, W) of 0 and 1. An edge is *met* if the other map has one within `reach`
# pixels. With the share $p$ of drawn edges that are met and the share $r$ of wanted
# ones, return $p r / (p + r - p r)$ for each, (B,). Why is this intersection over union
# when the reach is 0?

# %% tags=["active-ipynb", "exercise"]
# def overlap(drawn: Tensor, wanted: Tensor, reach: int) -> Tensor:
#     raise NotImplementedError  # hint: F.max_pool2d grows an edge

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_11_2() -> None:
#     moved = edges.roll((1, 2), (-2, -1))
#     alike = overlap(edges, edges, 0)
#     assert torch.allclose(alike, torch.ones(6)), "a map meets itself"
#     both, either = edges * moved, (edges + moved).clamp(max=1)
#     plain = both.sum((1, 2, 3)) / either.sum((1, 2, 3))
#     assert torch.allclose(overlap(edges, moved, 0), plain), "reach 0 is plain"
#     left = moved * (torch.arange(64) < 36)  # fewer edges than the other map
#     found, known = overlap(edges, left, 1), agreement(scenes, left)
#     assert torch.allclose(found, known), "reach 1 meets the neighbours too"
#     assert overlap(edges, moved, 2).min() > 0.9, "reach 2 meets what has moved by two"
#     assert not overlap(0 * edges, edges, 1).any(), "without edges nothing is met: 0"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def overlap(drawn: Tensor, wanted: Tensor, reach: int) -> Tensor:
#     def met(a: Tensor, b: Tensor) -> Tensor:
#         near = F.max_pool2d(b, 2 * reach + 1, stride=1, padding=reach)
#         return (a * near).sum((1, 2, 3)) / a.sum((1, 2, 3)).clamp(min=1)
#
#     p, r = met(drawn, wanted), met(wanted, drawn)
#     return p * r / (p + r - p * r).clamp(min=1e-12)
#
# exercise_11_2()

# %% [markdown]
# <details><summary>Answer</summary>
#
# With $n$ common pixels, $a$ drawn and $b$ wanted, $p = n/a$ and $r = n/b$. Divide
# numerator and denominator by $p r$, and what is left is
# $1/(1/r + 1/p - 1) = n/(a + b - n)$; and $a + b - n$ counts the union.
#
# </details>
#
# **11.3 Code.** Weigh a word *without* the empty prompt: multiply its rows by $w$. Show
# on one row that this is not the same as $e_0 + w(e - e_0)$, and say which of the two
# leaves a word of weight 0 readable as silence.

# %% tags=["active-ipynb", "exercise"]
# def apart(w: float) -> float:
#     """‖w·e − (e₀ + w(e − e₀))‖ / ‖e₀‖ for the third row of the prompt's context."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_11_3() -> None:
#     assert apart(1.0) < 1e-6, "with weight 1 both leave the row as it is"
#     assert abs(apart(0.0) - 1) < 1e-5, "with weight 0 one of them is zero"
#     assert abs(apart(3.0) - 2) < 1e-5, "with weight 3 the two differ by more"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def apart(w: float) -> float:
#     empty, full = pipe.encode_prompt(["", PROMPT])[0][:, 2]
#     difference = w * full - (empty + w * (full - empty))
#     return (difference.norm() / empty.norm()).item()
#
# exercise_11_3()

# %% [markdown]
# <details><summary>Answer</summary>
#
# The difference is $(w - 1)\,e_0$, whatever the word. At $w = 0$ the product is a row
# of zeros, which training shows only where an encoder is left out altogether; $e_0$ is
# what the model has met at this place with every empty prompt, and reads as nothing
# said.
#
# </details>
#
# **11.4 Explore.** Let words and sketch contradict one another: a boot's sketch, the
# word *dress*. Which of them wins, at which strength? Print the agreement for
# strengths from 0 to 2, and look.

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# lines, first = sketches[3:4], {}  # a boot's
# for strength in (0.0, 0.5, 1.0, 2.0):
#     four = pipe([PROMPT] * 4, seed=50, control=Control(lines, net, strength), **how)
#     found = agreement(four, lines.expand(4, -1, -1, -1)).mean()
#     print(f"strength {strength}: agreement with the boot's lines {found:.2f}")
#     first[f"strength {strength:g}"] = four[0]
# viz.show_images(torch.stack(list(first.values())), list(first), low=0)
# # The word has won where the number is no higher than at strength 0. At 2 the lines
# # are met in part, and the dress is lost: place and size are the sketch's, and the
# # thing is neither. The net learned from pairs in which words and lines agreed:
# # nothing taught it a rule for this case.

# %% [markdown]
# ## Summary
#
# You **made** edges as OpenCV does, **explained** why zeros can learn, **built** the
# layout of SD3.5 Large's nets and know both kinds of their files, which differ behind
# the last block. You **trained** a net and **measured** it by intersection over union;
# you **steered** by strength, by a part of the steps and by two sketches. And you can
# now **choose**: outline, a sketch; places and colours, a first picture; one region, a
# mask; one word, its weight, where the model hangs on its rows.
#
# ```bash
# # sketch.png: white lines on black; turn a pencil drawing over first
# minidiff sample "a red dress" --control tiny-edges --control-image sketch.png
# minidiff train --stage control --start tiny --output my-control
# minidiff sample "a red dress" --control my-control/control --control-image sketch.png
# ```
#
# ## Further reading
#
# - Zhang et al. 2023, [Adding conditional control to text-to-image diffusion
#   models](https://arxiv.org/abs/2302.05543): ControlNet, and the zeros (section 3.1).
# - Mou et al. 2023, [T2I-Adapter](https://arxiv.org/abs/2302.08453): a smaller helper,
#   asked once a drawing and not once a step.
# - Canny 1986, [A computational approach to edge
#   detection](https://doi.org/10.1109/TPAMI.1986.4767851).
# - Meng et al. 2022, [SDEdit](https://arxiv.org/abs/2108.01073): image to image.
# - Lugmayr et al. 2022, [RePaint](https://arxiv.org/abs/2201.09865): inpainting by
#   putting back, and how to make the seam better.
# - Hertz et al. 2022, [Prompt-to-prompt](https://arxiv.org/abs/2208.01626): the weight
#   of a word, in attention instead of in the context.

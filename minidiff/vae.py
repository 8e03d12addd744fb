# %% [markdown]
r"""
# The autoencoder: pixels and latents

In this chapter a picture becomes a *latent*, a small stack of maps that holds what
matters in it, and the latent becomes a picture again. The transformer of the next
chapters never sees a pixel: all its work happens in this space.

After it you will be able to

- **compute** how many numbers a latent saves, and what that saves the transformer;
- **build** an encoder and a decoder from normalised convolutions and one attention,
  and load trained weights into them;
- **read** a latent channel by channel;
- **measure** in bits what a latent says, and set it beside JPEG;
- **explain** why latents are shifted and scaled before the transformer sees them.

On a first reading, jump from "A picture as a distribution" to "Look at it": what lies
between builds the network, block by block.
"""

# %% tags=["hide-input"]
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# ## Where we are
#
# We turn from the beginning of our prompt's journey to its end. What the transformer
# hands over is a latent of shape (16, 16, 16); the decoder of this chapter makes a
# picture of 64 × 64 pixels from it. The encoder, the decoder's other half, is needed in
# training: the transformer learns from encoded pictures.

# %% tags=["active-ipynb", "hide-input"]
# import copy
# import io
# import math
#
# from PIL import Image
#
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.files.pictures import from_bytes, to_pil, to_tensor
# from minidiff.files.weights import TINY, load_component
# from minidiff.data.samples import sample_scenes
# from minidiff.classroom.exercises import check, seal
# from minidiff.classroom.journey import PROMPT, SEED
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("vae")

# %% [markdown]
# Here is that latent for our prompt, drawn by the finished pipeline; the next chapters
# build what draws it. It has 16 channels of 16 × 16 numbers, each shown as a map (red
# above zero, blue below). An outline shows through, but not yet what each map says. By
# the end of the chapter you will have decoded it with a decoder of your own.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# pipe.progress = False
# drawn_latents = pipe(PROMPT, seed=SEED, output_type="latent")
# print(journey.meets("latents", drawn_latents))
# viz.show_latents(drawn_latents[0])

# %% [markdown]
# To learn what latents are we take them from pictures first: scenes that no part of the
# tiny model was trained on. Eight show one thing, the first what our prompt asks for;
# eight show two or more. (Their garments are of Fashion-MNIST's test set, grey pictures
# of 28 × 28 pixels, enlarged: do not look for threads. Of everything else there is one
# picture, which training has seen in other scenes.)

# %% tags=["active-ipynb"]
# images, captions = sample_scenes()
# print("images", tuple(images.shape), f"from {images.min():.2f} to {images.max():.2f}")
# viz.show_images(images[:4], captions[:4])

# %% [markdown]
# ## Why not pixels
#
# A picture holds far more numbers than things worth deciding. Neighbouring pixels are
# nearly equal; fine texture could be replaced by other fine texture without anyone
# noticing. A model that draws pixels spends most of its effort there. [Rombach et al.
# 2022](https://arxiv.org/abs/2112.10752) therefore split the work: an autoencoder,
# trained once, takes care of texture, and the generative model composes in its latent
# space.
#
# | | meaning | SD3.5 | tiny |
# |---|---|---|---|
# | $W = H$ | side of the picture in pixels | 1024 | 64 |
# | $f$ | pixels per latent pixel, along a side | 8 | 4 |
# | $w = h = W / f$ | side of the latent | 128 | 16 |
# | $C$ | latent channels | 16 | 16 |
# | $3HW$ | numbers in the picture | 3,145,728 | 12,288 |
# | $Chw$ | numbers in the latent | 262,144 | 4,096 |
# | $3 f^2 / C$ | compression, $3HW / Chw$ | 12 | 3 |
#
# The transformer's attention compares all positions with one another. A factor of $f$
# along each side leaves $f^2$ times fewer positions and $f^4$ times fewer pairs: 4,096
# times fewer for SD3.5.
#
# Each earlier Stable Diffusion had $C = 4$ channels. With $f = 8$ that is a compression
# of 48, and small text or faces at a distance were lost before the generative model had
# begun. Stable Diffusion 3 pays for 16 channels; its authors show that reconstruction
# improves with every step from 4 to 16, and that a larger transformer can make use of
# it ([Esser et al. 2024](https://arxiv.org/abs/2403.03206), section 5.2.1).

# %% [markdown]
# ## A picture as a distribution
#
# The encoder does not return one latent. For each of the $Chw$ numbers it gives a mean
# $\mu$ (`mean`) and a log-variance $\ln s^2$ (`logvar`), and the latent is drawn from
# that normal distribution:
#
# $$ z = \mu + s\,\epsilon, \qquad \epsilon \sim \mathcal N(0, 1). $$
#
# Written this way, with the randomness in $\epsilon$ alone, gradients reach $\mu$
# and $s$ ([Kingma and Welling 2014](https://arxiv.org/abs/1312.6114)). Training asks
# the decoder $D$ to restore the picture $x$ from $z$, and holds the distribution near a
# standard normal:
#
# $$
# \mathcal L = \lVert x - D(z) \rVert +
# \beta \sum \tfrac12 \left( \mu^2 + s^2 - 1 - \ln s^2 \right).
# $$
#
# The sum is the Kullback–Leibler divergence $\mathrm{KL}\big(\mathcal N(\mu, s^2)
# \,\|\, \mathcal N(0, 1)\big)$, a measure of how far the first distribution is from the
# second; it is zero for $\mu = 0$, $s = 1$. The two terms pull against one another. The
# first wants large, exact latents, the second latents that say nothing. The weight
# $\beta$ is small (chapter 7 takes 0.0005, with means for the sums), so that it costs
# little detail. A generative model needs latents that stay in bounds, and a decoder
# that forgives: what it draws will always be a little off. Whether the noise teaches
# that is tried out below, beside a control that trains without it. Chapter 7 trains
# with such a loss.
#
# The divergence has a unit. In *nats*, or divided by $\ln 2$ in *bits*, it counts how
# much the latent tells about the picture: to send a draw of $\mathcal N(\mu, s^2)$ to
# somebody who expects $\mathcal N(0, 1)$ costs that many bits on average, for the best
# of codes ([Hinton and van Camp 1993](https://doi.org/10.1145/168304.168306)). So
# $\mathcal L$ weighs distortion against rate.
#
# ### What pixels do not ask for
#
# Why do the autoencoders of Stable Diffusion not stop at $\lVert x - D(z) \rVert$? Take
# a texture that no latent can hold in full, such as fine noise. The decoder may paint a
# texture of the same kind, or plain grey:

# %% tags=["active-ipynb"]
# cloth, other = 0.3 * torch.randn(2, 1, 1, 64, 64, generator=torch.manual_seed(0))
# edge = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
# roughness = lambda x: F.conv2d(x, edge).abs().mean()
# for name, painted in {"another such cloth": other, "plain grey": 0 * cloth}.items():
#     error, rough = (cloth - painted).square().mean(), roughness(painted)
#     away = (rough - roughness(cloth)).abs()
#     print(f"{name:19} squared error {error:.3f}, roughness is off by {away:.3f}")

# %% [markdown]
# Squared error prefers the grey, and by a factor of two: a texture that is right in
# kind and wrong in place is wrong at both places. So a loss on pixels alone blurs what
# it cannot hold. Two additions mend it (Rombach et al. 2022, section 3.1). A
# *perceptual* loss compares features of an image network instead of pixels; our
# roughness is the poorest of such features, and already prefers the texture. An
# *adversarial* loss trains a second network, the discriminator, to tell restored
# pictures from real ones, and pays the decoder for deceiving it: plain grey is quickly
# found out. Both cost faithfulness, pixel by pixel, for what looks right. The book's
# own autoencoder does with pixels, colours and edges (chapter 7).

# %% [markdown]
# ## Build it
#
# The sizes, under the names of the published `config.json`:


# %%
@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder; fields are the keys of the hub's config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    @classmethod
    def sd35(cls) -> "VAEConfig":
        """The autoencoder that Medium, Large and Large Turbo share."""
        return cls()

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """The shipped model's autoencoder, before its scale and shift are measured."""
        return cls(
            block_out_channels=(16, 32, 64),
            norm_num_groups=8,
            scaling_factor=1.0,
            shift_factor=0.0,
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)


# %% [markdown]
# ### Group normalisation
#
# Deep stacks of convolutions only train well if the size of their activations is held
# in check. Group normalisation ([Wu and He 2018](https://arxiv.org/abs/1803.08494))
# cuts the $C$ channels into $G$ groups. In each picture, and each group $g$, it
# subtracts the mean $m_g$ over channels and places, divides by the standard deviation
# $\sigma_g$, and gives every channel a learned weight and bias (here $\epsilon$ is
# $10^{-6}$, against a division by zero):
#
# $$ y_c = w_c\, \frac{x_c - m_g}{\sqrt{\sigma_g^2 + \epsilon}} + b_c. $$
#
# Once as it is written, group by group, and once for all groups, both with the weights
# 1 and biases 0 of a new layer:


# %%
def group_norm_in_loops(x: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Normalise ``x`` (B, C, H, W) over each of its ``groups`` of channels."""
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for b in range(len(x)):
        for c in range(0, x.shape[1], size):
            group = x[b, c : c + size]
            variance = group.var(correction=0)
            out[b, c : c + size] = (group - group.mean()) / (variance + eps).sqrt()
    return out


def group_norm_at_once(x: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """The same on a view (B, G, C/G, H, W)."""
    cut = x.unflatten(1, (groups, -1))  # (B, C, H, W) → (B, G, C/G, H, W)
    variance, mean = torch.var_mean(cut, (2, 3, 4), correction=0, keepdim=True)
    return ((cut - mean) / (variance + eps).sqrt()).flatten(1, 2)  # → (B, C, H, W)


# %%
def group_norm(config: VAEConfig, channels: int) -> nn.GroupNorm:
    """Group normalisation of ``channels`` with weights and biases."""
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# x = 3 + 2 * torch.randn(2, 32, 8, 8)
# loops, tensors = group_norm_in_loops(x, 8), group_norm_at_once(x, 8)
# print("loops = tensors:", torch.allclose(loops, tensors, atol=1e-5))
# layer = group_norm(VAEConfig.tiny(), 32)
# print("tensors = class:", torch.allclose(tensors, layer(x), atol=1e-5))

# %% [markdown]
# ### The residual block
#
# Normalise, activate, convolve; twice; and add the result to what came in. The
# activation is $\mathrm{SiLU}(x) = x \cdot \mathrm{sigmoid}(x)$. Where the number of
# channels changes, a 1 × 1 convolution brings the input to the new width before the
# sum.


# %%
class ResnetBlock(nn.Module):
    """Two normalised convolutions added to ``x``: (B, C, H, W) → (B, C', H, W).

    He et al. 2016, in its pre-activation form.
    """

    def __init__(self, config: VAEConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(config, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(config, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W) → (B, C', H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)  # (B, C, H, W) → (B, C', H, W)
        return x + h


# %% [markdown]
# ### One attention, in the middle
#
# A convolution sees three pixels across. At the coarsest level, where a picture is
# small, one attention lets every place see every other. (What that is worth here is
# measured further down.) It is the attention of chapter 2 with one head as wide as all
# channels and without a mask; queries, keys and values are made by 1 × 1 convolutions,
# which are matrices applied to each pixel.


# %%
class AttentionBlock(nn.Module):
    """Every pixel of ``x`` (B, C, H, W) attends to every other, with one head."""

    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (pixels_to_tokens(f(h)) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # → (B, C, H, W)
        return x + self.proj_out(h)


def pixels_to_tokens(x: Tensor) -> Tensor:
    """One head of H·W tokens from the picture ``x`` (B, C, H, W).

    A token's channels lie side by side in memory, as fused attention wants them.
    """
    x = x.flatten(2).transpose(1, 2)[:, None]  # (B, C, H, W) → (B, 1, H·W, C)
    return x.contiguous()


# %% tags=["active-ipynb"]
# from minidiff.text_encoders import attend_all
#
# layer, x = AttentionBlock(VAEConfig.tiny(), 64), torch.randn(1, 64, 6, 5)
# q, k, v = (pixels_to_tokens(f(layer.norm(x))) for f in (layer.q, layer.k, layer.v))
# tokens = attend_all(q, k, v, torch.zeros(30, 30), s=64**-0.5)
# by_hand = x + layer.proj_out(tokens[:, 0].mT.unflatten(2, (6, 5)))
# print("matrices = class:", torch.allclose(by_hand, layer(x), atol=1e-5))

# %% [markdown]
# ### Half and double
#
# A convolution with stride 2 halves the sides. It needs one more row and column than
# the picture has, and here lies a quirk: the zeros are added on the right and below
# only, not all around. With a border all around, every window would lie one pixel
# further up and to the left. The weights were trained with this padding, so it stays.
#
# On the way back every pixel is repeated twice along each side, and a convolution
# smooths the steps.


# %%
class Downsample(nn.Module):
    """Halve the sides of ``x``: (B, C, H, W) → (B, C, H/2, W/2).

    The border of zeros lies right and below only: a quirk that the weights expect.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H, W) → (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double the sides of ``x``: (B, C, H, W) → (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0)  # (B, C, H, W) → (B, C, 2H, 2W)
        return self.conv(x)


# %% [markdown]
# ### Encoder and decoder
#
# The encoder goes down level by level, two residual blocks each; then the middle; then
# a convolution to twice the latent channels, means and log-variances. The decoder
# mirrors it, with one block more per level. That is inherited from the U-Net of DDPM
# ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)), whose way up has one more block
# to take in its skip connections; an autoencoder has none. It does no harm: the
# decoder's task is the harder one, for it must invent what the encoder dropped. In
# SD3.5 it holds 49.5 of the 83.8 million parameters.


# %%
def middle(config: VAEConfig, channels: int) -> nn.ModuleDict:
    """The coarsest level: a residual block, attention, a residual block."""
    return nn.ModuleDict(
        {
            "block_1": ResnetBlock(config, channels, channels),
            "attn_1": AttentionBlock(config, channels),
            "block_2": ResnetBlock(config, channels, channels),
        }
    )


# %%
class Encoder(nn.Module):
    """Images (B, 3, H, W) → moments (B, 2·C, h, w): means, then log-variances."""

    down: Any  # a ModuleList of levels, each a ModuleDict

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        inputs = widths[0]
        for i, width in enumerate(widths):
            sizes = [inputs] + [width] * depth
            level: dict[str, nn.Module] = {"block": residual_blocks(config, sizes)}
            if i < len(widths) - 1:
                level["downsample"] = Downsample(width)
            self.down.append(nn.ModuleDict(level))
            inputs = width
        self.mid = middle(config, widths[-1])
        self.norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, 3, H, W) → (B, C_0, H, W)
        for level in self.down:
            for block in level["block"]:
                x = block(x)  # (B, C, H, W) → (B, C', H, W)
            if "downsample" in level:
                x = level["downsample"](x)  # (B, C', H, W) → (B, C', H/2, W/2)
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # → (B, 2·C, h, w)


def residual_blocks(config: VAEConfig, sizes: list[int]) -> nn.ModuleList:
    """Residual blocks from ``sizes[0]`` channels to ``sizes[1]``, and so on."""
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return nn.ModuleList(ResnetBlock(config, a, b) for a, b in pairs)


# %%
class Decoder(nn.Module):
    """Latents (B, C, h, w) → images (B, 3, H, W)."""

    up: Any  # a ModuleList of levels, each a ModuleDict

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(config, widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = widths[min(i + 1, len(widths) - 1)]
            sizes = [inputs] + [width] * (depth + 1)
            level: dict[str, nn.Module] = {"block": residual_blocks(config, sizes)}
            if i > 0:
                level["upsample"] = Upsample(width)
            self.up.append(nn.ModuleDict(level))
        self.norm_out = group_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # (B, C, h, w) → (B, C_n, h, w)
        for block in self.mid.values():
            x = block(x)
        for level in reversed(self.up):  # up.0 is the finest level
            for block in level["block"]:
                x = block(x)  # (B, C, H, W) → (B, C', H, W)
            if "upsample" in level:
                x = level["upsample"](x)  # (B, C', H, W) → (B, C', 2H, 2W)
        return self.conv_out(F.silu(self.norm_out(x)))  # → (B, 3, H, W)


# %% [markdown]
# Between the two stands the distribution; then the whole:


# %%
@dataclass(frozen=True)
class Posterior:
    """A normal distribution for every latent number: mean and logvar (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (B, C, h, w); Kingma and Welling 2014, section 2.4."""
        device = generator.device if generator else self.mean.device
        shape, dtype = self.mean.shape, self.mean.dtype
        noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most probable latents (B, C, h, w): the mean."""
        return self.mean


# %%
class VAE(nn.Module):
    """The autoencoder of SD3.5; Rombach et al. 2022, section 3.1.

    Raises ValueError where the configuration or a size cannot be honoured.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, 3, H, W) in [−1, 1] → a Posterior over latents (B, C, h, w)."""
        check_image(images, self.config)
        mean, logvar = self.encoder(images).chunk(2, dim=1)  # → 2 × (B, C, h, w)
        return Posterior(mean, logvar.clamp(-30, 20))  # so that exp stays finite

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W), about [−1, 1], not clamped."""
        return self.decoder(latents)

    def scale(self, z: Tensor) -> Tensor:
        """What the transformer works on, from the encoder's latents."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, x: Tensor) -> Tensor:
        """The decoder's latents from the transformer's: the inverse of ``scale``."""
        return x / self.config.scaling_factor + self.config.shift_factor


# %%
def check_config(config: VAEConfig) -> None:
    """Raise ValueError for values that the classes above cannot honour."""
    if not config.block_out_channels or config.layers_per_block < 1:
        raise ValueError(
            "block_out_channels and layers_per_block must not be empty, found "
            f"{config.block_out_channels} and {config.layers_per_block}"
        )
    if config.scaling_factor == 0:
        raise ValueError("scaling_factor is 0; expected another number")
    groups = config.norm_num_groups
    for width in config.block_out_channels:
        if width % groups:
            raise ValueError(f"{groups} norm groups do not divide {width} channels")


def check_image(images: Tensor, config: VAEConfig) -> None:
    """Raise ValueError unless ``images`` is (B, 3, H, W) with sides that fit."""
    sides = [side % config.factor for side in images.shape[2:]]
    if len(sides) != 2 or images.shape[1] != config.in_channels or any(sides):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: expected (B, "
            f"{config.in_channels}, H, W), sides multiples of {config.factor}"
        )


# %% [markdown]
# The shapes of SD3.5, on the meta device, where tensors have no values and cost no
# memory: each line is a place in the decoder where the shape changes. (Its first and
# last convolution, 16 → 512 and 128 → 3 channels, are not listed.)

# %% tags=["active-ipynb"]
# def report(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
#     if inputs[0].shape != output.shape:
#         shapes = f"{tuple(inputs[0].shape)} → {tuple(output.shape)}"
#         print(f"{type(layer).__name__:11} {shapes}")
#
# with torch.device("meta"):
#     large, picture = VAE(VAEConfig.sd35()), torch.zeros(1, 3, 1024, 1024)
# for layer in large.decoder.modules():
#     if isinstance(layer, (ResnetBlock, Upsample)):
#         layer.register_forward_hook(report)
# _ = large.decode(large.encode(picture).mode())

# %% [markdown]
# ## Look at it
#
# The trained weights go into the classes above. First the round trip: picture, latent,
# picture. Its quality is measured as the peak signal-to-noise ratio: the mean squared
# error, compared with the square of the range of values (2, from −1 to 1), in decibels:
#
# $$ \mathrm{PSNR}(a, b) = 10 \log_{10} \frac{2^2}{\operatorname{mean}\,(a - b)^2}. $$
#
# Ten decibels more are a tenth of the error. Above the pictures, below what comes back:
# three with one thing, and three with more.


# %%
def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (…, 3, H, W) in [−1, 1].

    Of several pictures it is the mean of their ratios.
    """
    error = (a - b).square().mean((-3, -2, -1))
    return (10 * torch.log10(4 / error)).mean().item()


# %% tags=["active-ipynb"]
# vae = load_component(VAE, VAEConfig, TINY / "vae")
# posterior = vae.encode(images)
# latents = posterior.mode()
# restored = vae.decode(latents)
# each = [psnr(*pair) for pair in zip(images, restored)]
# for kind, some in {"one thing": each[:8], "two or more": each[8:]}.items():
#     mean = sum(some) / 8
#     print(f"{kind:12} n = 8, mean PSNR {mean:.1f} dB, worst {min(some):.1f} dB")
# rows = [0, 1, 2, 8, 9, 8 + each[8:].index(min(each[8:]))]
# titles = [""] * 6 + [f"{each[i]:.1f} dB" for i in rows]
# viz.show_images(torch.cat([images[rows], restored[rows]]), titles, columns=6)

# %% [markdown]
# The last column is the worst of the second eight. Single pictures differ by several
# decibels, so that eight of each are too few to tell a small difference of the two
# means. Look for what is lost in what is fine, prints, seams, edges. This autoencoder
# is small and learned on a CPU ([how](../book/training_log.md)).
#
# How wide are the distributions? Compare the noise $s$ with the spread of the means,
# look at what a draw does to the picture, and count bits.

# %% tags=["active-ipynb"]
# def bits(mean: Tensor, s: Tensor) -> Tensor:
#     nats = 0.5 * (mean.square() + s.square() - 1) - s.log()
#     return nats.sum((1, 2, 3)) / math.log(2)  # (B, C, h, w) → (B,)
#
#
# s = (0.5 * posterior.logvar).exp()
# print(f"spread of the means {latents.std():.2f}, mean noise {s.mean():.3f}")
# drawn = vae.decode(posterior.sample(torch.Generator().manual_seed(0)))
# print(f"PSNR decoded from the mean {psnr(images, restored):.1f} dB")
# print(f"PSNR decoded from a draw   {psnr(images, drawn):.1f} dB")
# rate = bits(latents, s).mean().item()
# print(f"{rate:,.0f} bits, {rate / 8:,.0f} bytes,", end=" ")
# print(f"{rate / latents[0].numel():.1f} bits for each number")

# %% [markdown]
# If $s$ were 1 and the means 0, a latent would tell nothing: 0 bits. The smaller the
# noise beside the spread, the more it tells, about $\log_2$ of their ratio for each
# number. (The transformer of this book learns from the means, `mode`; diffusers'
# training scripts take a draw.)
#
# ### How far the middle sees
#
# Now for the attention in the middle. Restrict it to the 3 × 3 pixels around each, or
# take its answer away altogether, in encoder and decoder, and see what the round trip
# loses. (No weights are trained anew, so the rest does not adapt.)

# %% tags=["active-ipynb"]
# class Local(AttentionBlock):
#     reach = 1
#
#     def forward(self, x: Tensor) -> Tensor:
#         h, (height, width) = self.norm(x), x.shape[2:]
#         place = torch.cartesian_prod(torch.arange(height), torch.arange(width))
#         far = (place - place[:, None]).abs().amax(-1) > self.reach
#         bias = torch.zeros(far.shape).masked_fill(far, -torch.inf)
#         q, k, v = (pixels_to_tokens(f(h)) for f in (self.q, self.k, self.v))
#         h = attend_all(q, k, v, bias, q.shape[-1] ** -0.5)
#         return x + self.proj_out(h[:, 0].mT.unflatten(2, (height, width)))
#
#
# class Averaged(AttentionBlock):
#     def forward(self, x: Tensor) -> Tensor:
#         return x + self.proj_out(self.v(self.norm(x)).mean((2, 3), keepdim=True))
#
#
# class Removed(AttentionBlock):
#     def forward(self, x: Tensor) -> Tensor:
#         return x

# %% tags=["active-ipynb"]
# kinds = {"all": AttentionBlock, "the mean of all": Averaged}
# kinds |= {"3 × 3": Local, "none": Removed}
# before = None
# for name, kind in kinds.items():
#     cut = copy.deepcopy(vae)
#     for half in (cut.encoder, cut.decoder):
#         half.mid["attn_1"].__class__ = kind
#     views = cut.decode(cut.encode(images).mode())
#     found = torch.tensor([psnr(*pair) for pair in zip(images, views)])
#     print(f"the middle sees {name:15} {found.mean():.1f} dB", end="")
#     print(f", less in {(found < before).sum()} of 16" if before is not None else "")
#     before = found

# %% [markdown]
# The last number compares a line with the one above it, scene by scene. It is tempting
# to say that "3 × 3" lost what far places told, and "none" also what near ones did. The
# second line forbids it. It takes the plain mean over all places, the same for each
# place, near or far, and does at least about as well as "3 × 3", and better than
# "none". So the lines do not divide into far and near: a good part of what the middle
# adds is an average that later layers count on.
#
# ### Channel by channel
#
# A latent is a stack of 16 small pictures. Here are those of the red dress; all maps
# share one scale.

# %% tags=["active-ipynb"]
# viz.show_latents(latents[0])

# %% [markdown]
# Look for the outline of the dress: a channel may be strong inside it, around it, or
# only along its edge. To find out what a channel is *for*, take it away: set it to its
# mean over the picture, decode, and count the decibels lost. One row is one scene.

# %% tags=["active-ipynb"]
# chosen, lost = (0, 1, 2, 3, 8, 9), torch.zeros(6, 16)
# for row, scene in enumerate(chosen):
#     without = latents[scene].repeat(16, 1, 1, 1)  # one copy for each channel
#     for c in range(16):
#         without[c, c] = latents[scene, c].mean()
#     views = vae.decode(without)
#     left = [psnr(images[scene], view) for view in views]
#     lost[row] = each[scene] - torch.tensor(left)
# for scene in chosen:
#     print(f"{scene} {captions[scene]} ({each[scene]:.0f} dB with all channels)")
# names, title = map(str, chosen), "decibels lost without a channel"
# channels = [str(c) for c in range(16)]
# viz.show_heatmap(lost, list(names), channels, "channel", "scene", title, digits=0)

# %% tags=["active-ipynb"]
# most, least = lost[0].argmax().item(), lost[0].argmin().item()
# views = latents[[0, 0, 0]].clone()
# for view, channel in ((1, most), (2, least)):
#     views[view, channel] = latents[0, channel].mean()
# titles = ["all channels", f"without {most}", f"without {least}"]
# print("the strongest channel of each row:", lost.argmax(1).tolist())
# viz.show_images(vae.decode(views), titles)

# %% [markdown]
# A column that is high in each row is a channel that all scenes need; where the maximum
# moves from row to row, a channel is needed for what *this* scene shows. Small numbers
# mean that a channel carries little, or only what others carry too. Nothing in the loss
# asks for meanings, so test a name on several scenes before you give it.

# %% [markdown]
# ## Rate and distortion
#
# Is that latent a good code? For pictures there is an honest rival, JPEG. At each
# quality it spends so many bytes and restores so many decibels. Our latent can also be
# made cheaper: turn up the noise. If a draw has noise $\max(s, t)$, its bits are fewer
# and its picture worse. (Counted are the bits that the best of codes would need; the
# files that JPEG writes are real, with several hundred bytes of headers and tables at
# their beginning.)

# %% tags=["active-ipynb"]
# def jpeg(picture: Tensor, quality: int) -> tuple[int, float]:
#     file = io.BytesIO()
#     whole = to_pil((picture[None] + 1) / 2)[0]
#     whole.save(file, "JPEG", quality=quality, subsampling=0)  # full colour
#     back = from_bytes(to_tensor(Image.open(file)))
#     return len(file.getvalue()), psnr(picture, back)
#
#
# curves, table = {}, []
# for quality in (5, 10, 20, 35, 50, 65, 80, 90, 95):
#     table.append([jpeg(x, quality) for x in images])
# curves["JPEG"] = torch.tensor(table).mean(1).unbind(1)

# %% tags=["active-ipynb"]
# points, noise = [], torch.randn(latents.shape, generator=torch.manual_seed(0))
# for t in (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 0.9):
#     wide = s.clamp(min=t)
#     views = vae.decode(latents + wide * noise)
#     points.append((bits(latents, wide).mean() / 8, psnr(images, views)))
# curves["latent, noise turned up"] = torch.tensor(points).unbind(1)
# flat, _ = jpeg(torch.zeros(3, 64, 64), 50)
# print(f"a plain grey picture as JPEG: {flat} bytes; pixels without any code: 12288")
# viz.show_curves(curves, xlabel="bytes", ylabel="PSNR in dB", markers=True)

# %% [markdown]
# Higher and further left is better; where the curves cross, the other one takes over.
# (The latent's bits are a bound that no real code quite reaches.) Beating JPEG is the
# aim of an autoencoder that is to save bytes. Ours was trained for something else: its
# room is fixed (16 numbers for each 4 × 4 pixels) and it uses the room that it has;
# nobody sends its latents anywhere. What the curve teaches is its slope: how much a
# picture suffers when its latent gets noisy. The transformer's latents are always a
# little off, and that is the noise that counts.
#
# ### A control without noise
#
# Does noise in training make a decoder forgiving? To know, let two copies of the
# decoder go on learning for ninety steps, from the same weights, on the same crops of
# twelve of our scenes. One is given latents with noise, the other, the control, the
# same latents without. Then disturb the latents of the four other scenes more and more.

# %% tags=["active-ipynb"]
# def tuned(level: float, steps: int = 90) -> nn.Module:
#     random, net = torch.manual_seed(1), copy.deepcopy(vae.decoder)
#     optimizer = torch.optim.AdamW(net.requires_grad_(True).parameters(), lr=2e-4)
#     for _ in range(steps):
#         rows = 2 + torch.randint(12, (4,), generator=random)
#         y, x = torch.randint(9, (2,), generator=random).tolist()
#         crop = images[rows, :, 4 * y : 4 * y + 32, 4 * x : 4 * x + 32]
#         z = latents[rows, :, y : y + 8, x : x + 8]
#         z = z + level * torch.randn(z.shape, generator=random)
#         with torch.enable_grad():
#             loss = (net(z) - crop).square().mean()
#             optimizer.zero_grad()
#             loss.backward()
#         optimizer.step()
#     return net

# %% tags=["active-ipynb", "nbval-ignore-output"]
# rows, curves = [0, 1, 14, 15], {}
# levels, unseen = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.1), images[rows]
# noise = torch.randn(latents[rows].shape, generator=torch.manual_seed(2))
# nets = {"learned with noise 0.5": tuned(0.5), "control": tuned(0.0)}
# for name, net in (nets | {"as it was": vae.decoder}).items():
#     decibels = [psnr(unseen, net(latents[rows] + t * noise)) for t in levels]
#     curves[name] = levels, decibels
#     print(f"{name:22}", *[f"{p:.1f}" for p in decibels])
# xlabel = "deviation of the noise added"
# viz.show_curves(curves, xlabel=xlabel, ylabel="PSNR in dB", markers=True)

# %% [markdown]
# At the left end nothing is disturbed, and the control, which learned for that, should
# be ahead of the other. Then look where the curves cross, and how far apart they are
# beyond. If the control is ahead at the left, a more forgiving decoder costs sharpness,
# in this one trial; how much noise one trains with is a choice, and the weight $\beta$
# makes it. The third curve is the decoder with which both began: where the control
# falls short of it, ninety steps on crops of twelve scenes are to blame, and no noise.

# %% [markdown]
# ## A walk between two latents
#
# Between two latents lies a straight line; every point on it can be decoded. Above: the
# decoded walk from one scene to another. Below, for comparison: the pixels themselves,
# mixed in the same proportions.

# %% tags=["active-ipynb"]
# steps = torch.linspace(0, 1, 7)[:, None, None, None]
# walk = vae.decode(torch.lerp(latents[0], latents[3], steps))
# fade = torch.lerp(images[0], images[3], steps)
# viz.show_images(torch.cat([walk, fade]), columns=7)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# again = vae.encode(walk).mode()
# moved = (again - torch.lerp(latents[0], latents[3], steps)).flatten(1).norm(dim=1)
# share = moved / torch.lerp(latents[0], latents[3], steps).flatten(1).norm(dim=1)
# print("encoded again, a latent of the walk moves by", *[f"{x:.0%}" for x in share])
# middles = (latents + latents.roll(1, 0)) / 2
# for name, z in {"latents": latents, "middles of two": middles}.items():
#     moved = (vae.encode(vae.decode(z)).mode() - z).flatten(1).norm(dim=1)
#     shares = moved / z.flatten(1).norm(dim=1)
#     print(f"{len(z)} {name}: by {shares.mean():.0%}, from {shares.min():.0%} to "
#         f"{shares.max():.0%}")

# %% [markdown]
# The mixture of pixels is a double exposure: both garments, half transparent. The
# decoded walk is hardly better: near its ends one garment wins, in the middle both show
# through. The printed lines tell ends from middles. The two ends are latents of
# pictures: decoded and encoded again they come back nearly where they were. In the
# middle they do not: a point between two latents is mostly not the latent of what the
# decoder makes of it. Which latents are a scene's, and how to draw one, is what the
# transformer has to learn.

# %% [markdown]
# ## Why scale and shift
#
# Chapter 6 mixes data and noise along a straight line, $x_\sigma = (1 - \sigma)\,x_0 +
# \sigma\,\epsilon$, with noise of variance 1. How much of the picture survives at a
# given $\sigma$ then depends on the variance of $x_0$: the ratio of signal to noise is
# $(1 - \sigma)^2 \operatorname{Var}(x_0) / \sigma^2$, at $\sigma = 0.5$ the variance
# itself. Schedules, step sizes and the network's initialisation all assume that $x_0$
# has mean 0 and variance 1. In the training of the autoencoder only the divergence
# pulls that way, with a small weight, and nothing guarantees it. Hence two constants,
# the same for all channels, measured once over the training data and stored beside the
# weights:
#
# $$
# x = (z - \text{shift}) \cdot \text{scale}, \qquad
# \text{shift} = \operatorname{mean}(z), \quad \text{scale} = 1 / \operatorname{std}(z).
# $$
#
# For SD3.5 they are 0.0609 and 1.5305, so its latents have a standard deviation of
# about 0.65. Early versions of Stable Diffusion had a scale, 0.18215, and no shift.

# %% tags=["active-ipynb"]
# scaled = vae.scale(latents)
# print(f"shift {vae.config.shift_factor:.4f}, scale {vae.config.scaling_factor:.4f}")
# for name, x in {"latents": latents, "scaled": scaled}.items():
#     ratio = 10 * torch.log10(x.var())
#     print(f"{name}: mean {x.mean():5.2f}, deviation {x.std():.2f}, ", end="")
#     print(f"signal to noise at σ = 0.5: {ratio:5.1f} dB")
# normal = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
# sets = {"latents": latents, "scaled": scaled, "noise": normal}
# own = scaled.std((0, 2, 3))
# print(f"deviation of single channels, scaled: {own.min():.2f} to {own.max():.2f}")
# viz.show_histogram(sets, xlabel="value")

# %% [markdown]
# After shift and scale the values cover the range of the noise. How much that changes
# depends on the scale printed above: at 1 nothing, while SD3.5's unscaled latents are a
# third narrower. The values need not be normally distributed: of their spread only the
# variance enters the ratio. And one scale for all leaves channels of unlike spread; the
# weaker of them drown earlier in the noise.

# %% [markdown]
# ## Predict, then break it
#
# Two mistakes that programs really make. **First**: the decoder is given the
# transformer's latents as they are, without `unscale`. **Second**: `Downsample` pads on
# the left and above instead of on the right and below. Which of the two costs more, and
# what will the pictures look like? (The scale is printed above.) Write your guess down
# before you open the answer.

# %% tags=["active-ipynb"]
# class Misplaced(Downsample):
#     def forward(self, x: Tensor) -> Tensor:
#         return self.conv(F.pad(x, (1, 0, 1, 0)))
#
# shifted = load_component(VAE, VAEConfig, TINY / "vae")
# for level in list(shifted.encoder.down)[:-1]:
#     level["downsample"].__class__ = Misplaced

# %% tags=["active-ipynb", "hide-output"]
# forgotten, moved = vae.decode(scaled), vae.decode(shifted.encode(images).mode())
# as_sd35 = vae.decode((latents - latents.mean()) * 1.5305 + latents.mean())
# known = {"intact": restored, "no unscale": forgotten}
# known |= {"scaled by 1.53": as_sd35, "border": moved}
# for name, views in known.items():
#     print(f"{name:15} {psnr(images, views):.1f} dB")
# names = [name for name in known for _ in range(4)]
# viz.show_images(torch.cat([views[:4] for views in known.values()]), names, columns=4)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Without `unscale` all contrasts in the latent are multiplied by the scale. Where that
# is close to 1 hardly anything is seen; the third row shows a scale like SD3.5's, for
# which contrasts grow by half. Outlines stay. Padding on the wrong side moves every
# picture three pixels to the right and down, one at the first level and one of twice
# the size at the second, and smears the border above and on the left. The things
# themselves look nearly as before, but a shift makes every edge wrong, and decibels
# count that. Neither mistake raises an error.
#
# </details>
#
# ## Parity
#
# The official files and diffusers name the same tensors differently; one table in the
# package translates. With the same random weights both give the same means and the same
# pictures. The tests repeat this for several sizes, and show that another epsilon, a
# border on the other side or a missing scale in the attention would be noticed.

# %% tags=["active-ipynb", "hide-input"]
# import warnings
# from dataclasses import asdict
#
# warnings.filterwarnings("ignore", "IProgress not found")  # there is no progress here
# import diffusers
#
# from minidiff.files.weights import vae_sources
#
# options = {"use_quant_conv": False, "use_post_quant_conv": False}
# options["down_block_types"] = ["DownEncoderBlock2D"] * 3
# options["up_block_types"] = ["UpDecoderBlock2D"] * 3
# theirs = diffusers.AutoencoderKL(**asdict(VAEConfig.tiny()), **options).eval()

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# for p in theirs.parameters():
#     nn.init.normal_(p, std=0.1)
# twin, weights = VAE(VAEConfig.tiny()).eval(), theirs.state_dict()
# sources = vae_sources(twin.state_dict())
# for name, p in twin.named_parameters():
#     p.data = weights[sources[name].names[0]].reshape(p.shape)

# %% tags=["active-ipynb"]
# def same(a: Tensor, b: Tensor) -> bool:
#     return bool((a - b).norm() / b.norm() <= 1e-5)
#
# z, other = twin.encode(images).mode(), theirs.encode(images).latent_dist.mode()
# assert same(z, other) and same(twin.decode(z), theirs.decode(z).sample)
# print("encoder and decoder: relative error at most 1e-5")

# %% [markdown]
# ## What production code does differently
#
# - **It watches memory.** At 1024² the decoder's largest tensors hold 256 × 1024 × 1024
#   numbers, half a gigabyte each in 16 bits. Larger pictures are decoded in overlapping
#   *tiles* that are blended, batches one picture at a time. Tiles are an approximation:
#   group normalisation and the attention see a tile, not the picture.
# - **It chooses the memory layout.** GPUs convolve fastest when the channels of a pixel
#   lie side by side (`channels_last`). Converting back and forth costs more than it
#   saves, so the whole decoder must keep to one layout.
# - **It chooses the precision.** SDXL's autoencoder overflows in float16 and has to run
#   in float32 or bfloat16. This one runs in float16 too.
# - **It turns numbers into bytes.** Stability's reference cuts off the decimals,
#   diffusers rounds: about half of all values differ by one grey level, which nobody
#   sees but a test that compares pictures.
# - **It previews.** Programs that show every step of a drawing do not run the full
#   decoder each time: a matrix from 16 channels to red, green and blue, or a very small
#   decoder, is good enough for a thumbnail. (<a
#   href="../book/inside.html?open=steps&amp;step=0">The estimates of any drawing</a>,
#   decoded in full, live.)

# %% [markdown]
# ## Exercises
#
# **3.1 Predict.** SD3.5 draws a picture 1344 pixels wide and 768 high. What shape is
# its latent, (C, h, w), and how many times fewer numbers is that?

# %% tags=["active-ipynb", "exercise"]
# def latent_of() -> tuple[tuple[int, int, int], float]:
#     raise NotImplementedError  # the shape, and the compression

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_3_1() -> None:
#     shape, times = latent_of()
#     assert seal(tuple(map(int, shape))) == "4db9d71d", "channels, height, width"
#     assert seal(float(times)) == "77c52f3f", "the picture's numbers over the latent's"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def latent_of() -> tuple[tuple[int, int, int], float]:
#     return (16, 768 // 8, 1344 // 8), 3 * 8**2 / 16
#
#
# exercise_3_1()
# with torch.device("meta"):
#     latent = large.encode(torch.zeros(1, 3, 768, 1344)).mode()
# print(tuple(latent.shape), "compression", 3 * 768 * 1344 / latent.numel())
# # Compression is 3 f² / C, whatever the sides: each latent pixel stands for 8 × 8
# # pixels of three numbers, and holds sixteen.

# %% [markdown]
# **3.2 Code.** Which channel carries how much? Write `channel_bits`: from means and
# log-variances (B, C, h, w) the bits of every channel of every picture, (B, C).

# %% tags=["active-ipynb", "exercise"]
# def channel_bits(posterior: Posterior) -> Tensor:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_3_2() -> None:
#     mean, logvar = torch.zeros(2, 2, 3, 5, 5)
#     mean[0, 0, 0, 0], logvar[1, 2, 1, 1], logvar[0, 1] = 1.0, 2.0, -2.0
#     found = channel_bits(Posterior(mean, logvar))
#     assert found.shape == (2, 3), f"(2, 3) is expected, not {tuple(found.shape)}"
#     assert found[1, :2].abs().max() < 1e-6, "mean 0 and deviation 1 tell nothing"
#     for place, expected in (((0, 0), 0.721), ((1, 2), 3.167), ((0, 1), 20.475)):
#         value = found[place].item()
#         assert abs(value - expected) < 0.01, f"{place}: {expected}, not {value:.3f}"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def channel_bits(posterior: Posterior) -> Tensor:
#     mean, logvar = posterior.mean, posterior.logvar
#     nats = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
#     return nats.sum((2, 3)) / math.log(2)  # (B, C, h, w) → (B, C)
#
#
# exercise_3_2()
# found = channel_bits(posterior)[list(chosen)]
# pairs = torch.stack([found.flatten(), lost.flatten()])
# print("bits of each channel:", found.mean(0).round().int().tolist())
# print(f"correlation with the decibels lost: {torch.corrcoef(pairs)[0, 1]:.2f}")
# # Bits say how exactly a channel is sent, decibels what its message is worth to the
# # picture. Here they mostly agree. The exception would be a channel that only repeats
# # others: exact, and useless.

# %% [markdown]
# **3.3 Code.** Write `to_bytes`, which turns decoded pictures into bytes from 0 to 255,
# to the nearest one, as diffusers does: −1 becomes 0 and 1 becomes 255. Decoded values
# may stray a little outside [−1, 1]. How many values change if you cut off the decimals
# instead?

# %% tags=["active-ipynb", "exercise"]
# def to_bytes(images: Tensor) -> Tensor:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_3_3() -> None:
#     known = {-1.2: 0, -1.0: 0, -0.996: 1, -0.5: 64, 0.004: 128, 0.01: 129}
#     known |= {0.5: 191, 0.99: 254, 1.0: 255, 1.01: 255}
#     values = torch.tensor(list(known))
#     before, found = values.clone(), to_bytes(values)
#     assert found.dtype == torch.uint8, f"torch.uint8, not {found.dtype}"
#     assert torch.equal(values, before), "the pictures themselves were changed"
#     pairs = zip(known.items(), found.tolist())
#     wrong = [f"{value} → {byte}" for (value, right), byte in pairs if byte != right]
#     assert not wrong, "not the nearest byte: " + ", ".join(wrong)

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def to_bytes(images: Tensor) -> Tensor:
#     return ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
#
#
# exercise_3_3()
# cut = ((restored + 1) * 127.5).clamp(0, 255).to(torch.uint8)
# print(f"changed by cutting off: {(cut != to_bytes(restored)).float().mean():.0%}")
# # Were decimals spread evenly, one half would be rounded up. Large plain grounds,
# # where one value counts many times, can move the share either way.

# %% [markdown]
# **3.4 Explore.** Exchange half of the channels between two latents before decoding:
# whose colours and whose outline appear? Walk on beyond the second picture, with steps
# up to 1.5. Keep every second row and column of a latent, repeat each twice, and
# decode. Say before each what you expect.

# %% tags=["active-ipynb", "hide-cell"]
# mixed = latents[[0, 3]].clone()
# mixed[0, 8:], mixed[1, 8:] = latents[3, 8:], latents[0, 8:]
# beyond = torch.lerp(latents[0], latents[3], torch.tensor(1.5))[None]
# coarse = latents[:1, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
# views = vae.decode(torch.cat([latents[[0, 3]], mixed, beyond, coarse]))
# names = ["first", "second", "8 channels of each", "the other way"]
# viz.show_images(views, [*names, "1.5 times as far", "half the pixels"])

# %% tags=["active-ipynb", "hide-cell"]
# print(f"range beyond the second: {views[4].min():.1f} to {views[4].max():.1f}")
# half = {"half the latent": vae.decode(F.interpolate(latents[:, :, ::2, ::2], 16))}
# fours, eights = F.avg_pool2d(images, 4), F.avg_pool2d(images, 8)
# half["half of 4 × 4 blocks"] = F.interpolate(fours[:, :, ::2, ::2], 64)
# half["plain 8 × 8 blocks"] = F.interpolate(eights, 64)
# table = [torch.tensor([psnr(*p) for p in zip(images, x)]) for x in half.values()]
# for name, found in zip(half, table):
#     ahead = (found > table[0]).sum()
#     print(f"{name:21} {found.mean():.1f} dB, above the first in {ahead} of 16")
# # In the two mixtures look for traces of both: if there are, channels do not divide
# # into colour and outline. Beyond the second picture nothing holds the values but the
# # decoder itself: the printed range says whether it still does. Half the latent (every
# # second row and column) does no better than the picture's own 4 × 4 blocks treated
# # alike, worse than plain blocks of 8 × 8 pixels, and speckles in foreign colours. So
# # latents are pictures only roughly: the decoder also counts on how neighbours fit.

# %% [markdown]
# ## Summary
#
# You **computed** that a latent of SD3.5 holds twelve times fewer numbers than its
# picture, and that attention then compares 4,096 times fewer pairs. You **built**
# encoder and decoder from normalised convolutions and one attention, and loaded trained
# weights into them. You **read** latents channel by channel, and **measured** them in
# bits and decibels, beside JPEG and beside a control without noise. You **explained**
# by the ratio of signal to noise why latents are shifted and scaled. What is left is
# the end of the journey: the latent that arrived at the beginning of this chapter,
# through the decoder that you have built.

# %% tags=["active-ipynb"]
# picture = (vae.decode(vae.unscale(drawn_latents)) / 2 + 0.5).clamp(0, 1)
# print(journey.meets("picture", picture))
# viz.show_images(picture, [PROMPT], low=0)

# %% [markdown]
# ## Further reading
#
# - Kingma and Welling 2014, [Auto-Encoding Variational
#   Bayes](https://arxiv.org/abs/1312.6114): the distribution, its divergence and the
#   trick with the noise.
# - Rombach et al. 2022, [High-Resolution Image Synthesis with Latent Diffusion
#   Models](https://arxiv.org/abs/2112.10752): the two-stage design, and the losses that
#   keep pictures sharp.
# - Esser et al. 2024, [Scaling Rectified Flow
#   Transformers](https://arxiv.org/abs/2403.03206), section 5.2.1: four, eight and
#   sixteen channels compared.
# - Wu and He 2018, [Group Normalization](https://arxiv.org/abs/1803.08494).

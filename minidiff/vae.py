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
- **measure** what a smaller latent costs in the picture;
- **explain** why latents are shifted and scaled before the transformer sees them.
"""

# %%
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

# %% tags=["active-ipynb"]
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.files.weights import TINY, load_component
# from minidiff.data.garments import sample_scenes
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT, SEED
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("vae")

# %% [markdown]
# Here is that latent for our prompt, drawn by the finished pipeline; the next chapters
# build what draws it. It has 16 channels of 16 × 16 numbers, each shown as a map (red
# above zero, blue below), and says little yet. By the end of the chapter you will have
# decoded it with a decoder of your own.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny")
# pipe.progress = False
# drawn_latents = pipe(PROMPT, seed=SEED, output_type="latent")
# print(journey.check("latents", drawn_latents))
# viz.show_latents(drawn_latents[0])

# %% [markdown]
# To learn what latents are we take them from pictures first: scenes composed from the
# test set of Fashion-MNIST, which no part of the tiny model was trained on. The first
# shows what our prompt asks for.

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
# | $3HW / Chw = 3 f^2 / C$ | compression | 12 | 3 |
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
# little detail; but it is enough to keep latents from growing without bound, and the
# noise $s$ makes sure that latents close to one another decode to pictures close to one
# another. A generative model needs both, since what it draws will always be a little
# off. Chapter 7 trains with such a loss. Three terms take the place of the first: two
# ask for the right colours, one for the right edges. The autoencoders of Stable
# Diffusion add a *perceptual* distance, between features of an image network, and a
# *discriminator* that learns to tell restored pictures from real ones; a loss on pixels
# alone blurs fine texture (Rombach et al. 2022, section 3.1).

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
# small, one attention lets every place see every other: the left sleeve may know the
# colour of the right one. It is the attention of chapter 2 with one head as wide as all
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
# Ten decibels more are a tenth of the error. Above the pictures, below what comes back.


# %%
def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [−1, 1], of one shape."""
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


# %% tags=["active-ipynb"]
# vae = load_component(VAE, VAEConfig, TINY / "vae")
# posterior = vae.encode(images)
# latents = posterior.mode()
# restored = vae.decode(latents)
# print("latents", tuple(latents.shape), f"PSNR {psnr(images, restored):.1f} dB")
# viz.show_images(torch.cat([images[:6], restored[:6]]), columns=6)

# %% [markdown]
# Hardly a difference is seen. Look for it in what is fine, prints, seams, edges: fine
# detail is lost first. This autoencoder is small and learned on a CPU
# ([how](../book/training_log.md)).
#
# How wide are the distributions? Compare the noise $s$ with the spread of the means,
# and look at what a draw does to the picture.

# %% tags=["active-ipynb"]
# noise = (0.5 * posterior.logvar).exp()
# print(f"spread of the means {latents.std():.2f}, mean noise {noise.mean():.3f}")
# drawn = vae.decode(posterior.sample(torch.Generator().manual_seed(0)))
# print(f"PSNR decoded from the mean {psnr(images, restored):.1f} dB")
# print(f"PSNR decoded from a draw   {psnr(images, drawn):.1f} dB")

# %% [markdown]
# The noise is a small fraction of the spread: the encoder is nearly certain, and a draw
# costs almost nothing. So small a weight on the divergence does not press the latents
# into a standard normal; it only keeps them from drifting apart and makes the decoder
# robust to small errors. (The transformer of this book learns from the means, `mode`;
# diffusers' training scripts take a draw.)
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
# mean over the picture, decode, and see what is missing.

# %% tags=["active-ipynb"]
# without = latents[:1].repeat(16, 1, 1, 1)  # (16, C, h, w): one copy per channel
# for c in range(16):
#     without[c, c] = latents[0, c].mean()
# views = vae.decode(without)
# losses = [f"{c}: {psnr(images[:1], views[c : c + 1]):.0f} dB" for c in range(16)]
# viz.show_images(views, losses, columns=8)

# %% [markdown]
# One channel carries most: without it the dress fades. Some cost about ten decibels
# each; the others can be removed with hardly a trace: they carry little, or only what
# others carry too. Is the strongest the channel for red? One picture does not show it:
# try another scene before you name a channel. Nothing in the loss asks for such
# meanings.

# %% [markdown]
# ## Reconstruction against compression
#
# How much of the latent could be dropped? The 16 channels are not independent.
# Principal component analysis turns them into 16 new ones, ordered by variance; keep
# the first $k$ and set the rest to their mean. As a rival take the plainest compression
# there is: shrink the picture itself until it has equally many numbers, and enlarge it
# again. (A component has 16 × 16 = 256 numbers, a small picture of side $n$ has
# $3 n^2$.)


# %%
def keep_components(latents: Tensor, k: int) -> Tensor:
    """Project ``latents`` (B, C, h, w) on the ``k`` directions of greatest variance."""
    flat = latents.movedim(1, -1)  # (B, C, h, w) → (B, h, w, C)
    mean = flat.mean((0, 1, 2))
    axes = torch.linalg.svd((flat - mean).flatten(0, 2), full_matrices=False).Vh[:k]
    return ((flat - mean) @ axes.T @ axes + mean).movedim(-1, 1)  # → (B, C, h, w)


# %% tags=["active-ipynb"]
# ours, rival = [], []
# for k in (kept := [1, 2, 3, 4, 6, 8, 12, 16]):
#     ours.append(psnr(images, vae.decode(keep_components(latents, k))))
#     small = F.interpolate(images, size=round((256 * k / 3) ** 0.5), mode="area")
#     rival.append(psnr(images, F.interpolate(small, size=64, mode="bicubic")))
# numbers = [256 * k for k in kept]

# %% tags=["active-ipynb"]
# curves = {"latent, k components": (numbers, ours), "small picture": (numbers, rival)}
# viz.show_curves(curves, xlabel="numbers kept", ylabel="PSNR in dB", markers=True)

# %% [markdown]
# From a few components on the latent lies above the small picture: for the same number
# of numbers it gives the better one. With fewer, plain shrinking wins; but this decoder
# never learned to do with so few, and an autoencoder trained with $k$ channels should
# beat ours cut to $k$ components. Ours rises to the end: the autoencoder makes use of
# all its room. (The bump at 3,072 numbers is a side of 32, exactly half of 64.) Measure
# your own autoencoder against plain shrinking before you trust it.

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

# %% [markdown]
# The mixture of pixels is a double exposure: both garments, half transparent. The
# decoded walk is hardly better: near its ends one garment wins, in the middle both show
# through. A point between two latents is in general no picture's latent. Which latents
# are, and how to draw one, is what the transformer has to learn.

# %% [markdown]
# ## Why scale and shift
#
# Chapter 6 mixes data and noise along a straight line, $x_\sigma = (1 - \sigma)\,x_0 +
# \sigma\,\epsilon$, with noise of variance 1. How much of the picture survives at a
# given $\sigma$ then depends on the variance of $x_0$: the ratio of signal to noise is
# $(1 - \sigma)^2 \operatorname{Var}(x_0) / \sigma^2$, at $\sigma = 0.5$ the variance
# itself. Schedules, step sizes and the network's initialisation all assume that $x_0$
# has mean 0 and variance 1. Nothing in the training of the autoencoder made it so.
# Hence two constants, the same for all channels, measured once over the training data
# and stored beside the weights:
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
# viz.show_histogram(sets, xlabel="value")

# %% [markdown]
# After shift and scale the values cover the range of the noise. Here they did nearly so
# before, since the scale is near 1; SD3.5's unscaled latents would be a third narrower.
# They need not be normally distributed: of their spread only the variance enters the
# ratio.

# %% [markdown]
# ## Predict, then break it
#
# Two mistakes that programs really make. **First**: the decoder is given the
# transformer's latents as they are, without `unscale`. **Second**: `Downsample` pads on
# the left and above instead of on the right and below. Which of the two costs more, and
# what will the pictures look like? Write your guess down before you run the cells.

# %% tags=["active-ipynb"]
# class Misplaced(Downsample):
#     def forward(self, x: Tensor) -> Tensor:
#         return self.conv(F.pad(x, (1, 0, 1, 0)))
#
# shifted = load_component(VAE, VAEConfig, TINY / "vae")
# for level in list(shifted.encoder.down)[:-1]:
#     level["downsample"].__class__ = Misplaced

# %% tags=["active-ipynb"]
# forgotten, moved = vae.decode(scaled), vae.decode(shifted.encode(images).mode())
# print(f"nothing broken:    {psnr(images, restored):.1f} dB")
# print(f"unscale forgotten: {psnr(images, forgotten):.1f} dB")
# print(f"border misplaced:  {psnr(images, moved):.1f} dB")
# names = [row for row in ("intact", "no unscale", "border") for _ in range(4)]
# viz.show_images(torch.cat([restored[:4], forgotten[:4], moved[:4]]), names, columns=4)

# %% [markdown]
# Without `unscale` all contrasts in the latent are multiplied by the scale. Here that
# is close to 1, and hardly anything is seen; with SD3.5's 1.53 contrasts would grow by
# half. Outlines stay. Padding on the wrong side moves every picture three pixels to the
# right and down, one at the first level and one of twice the size at the second, and
# smears the border above and on the left. The garments themselves look nearly as
# before, but a shift makes every edge wrong, and decibels count that. Neither mistake
# raises an error.

# %% [markdown]
# ## Parity
#
# The official files and diffusers name the same tensors differently; one table in the
# package translates. With the same random weights both give the same means and the same
# pictures. The tests repeat this for several sizes, and show that another epsilon, a
# border on the other side or a missing scale in the attention would be noticed.

# %% tags=["active-ipynb"]
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
#   decoder, is good enough for a thumbnail.

# %% [markdown]
# ## Exercises
#
# **3.1 Predict.** SD3.5 draws a picture 1344 pixels wide and 768 high. What shape is
# its latent, and how many times fewer numbers is that? Work it out, then unfold the
# solution.

# %% tags=["active-ipynb", "hide-cell"]
# with torch.device("meta"):
#     latent = large.encode(torch.zeros(1, 3, 768, 1344)).mode()
# print(tuple(latent.shape), "compression", 3 * 768 * 1344 / latent.numel())

# %% [markdown]
# **3.2 Code.** Write `divergence`, the second term of the loss without $\beta$: from
# means and log-variances (B, C, h, w) the divergence from a standard normal, summed
# over each picture's latent, (B,). Run the check after each attempt.

# %% tags=["active-ipynb", "exercise"]
# def divergence(posterior: Posterior) -> Tensor:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# from torch.distributions import Normal, kl_divergence
#
# @check
# def exercise_3_2() -> None:
#     some = Posterior(*torch.randn(2, 3, 16, 4, 4))
#     ours = Normal(some.mean, (0.5 * some.logvar).exp())
#     expected = kl_divergence(ours, Normal(0.0, 1.0)).sum((1, 2, 3))
#     found = divergence(some)
#     assert found.shape == expected.shape, f"one per picture, not {found.shape}"
#     same = torch.allclose(found.float(), expected, rtol=1e-3)
#     assert same, "another value is expected"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def divergence(posterior: Posterior) -> Tensor:
#     mean, logvar = posterior.mean, posterior.logvar
#     each = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
#     return each.sum((1, 2, 3))  # (B, C, h, w) → (B,)
#
#
# exercise_3_2()
# mean = divergence(posterior).mean() / latents[0].numel()
# print(f"on average {mean:.1f} per number")

# %% [markdown]
# **3.3 Code.** Write `to_bytes`, which turns decoded pictures into bytes from 0 to 255
# by rounding, as diffusers does. Decoded values may stray a little outside [−1, 1]. How
# many values change if you cut off the decimals instead?

# %% tags=["active-ipynb", "exercise"]
# def to_bytes(images: Tensor) -> Tensor:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_3_3() -> None:
#     found = to_bytes(torch.tensor([-1.2, -1.0, 0.004, 0.01, 1.0, 1.01]))
#     assert found.dtype == torch.uint8, f"torch.uint8, not {found.dtype}"
#     assert found.tolist() == [0, 0, 128, 129, 255, 255], f"found {found.tolist()}"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def to_bytes(images: Tensor) -> Tensor:
#     return ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
#
#
# exercise_3_3()
# cut = ((restored + 1) * 127.5).clamp(0, 255).to(torch.uint8)
# print(f"changed by cutting off: {(cut != to_bytes(restored)).float().mean():.0%}")

# %% [markdown]
# **3.4 Explore.** Exchange half of the channels between two latents before decoding:
# whose colours and whose outline appear? Walk on beyond the second picture, with steps
# up to 1.5. Keep every second row and column of a latent, repeat each twice, and
# decode.

# %% [markdown]
# ## Summary
#
# You **computed** that a latent of SD3.5 holds twelve times fewer numbers than its
# picture, and that attention then compares 4,096 times fewer pairs. You **built**
# encoder and decoder from normalised convolutions and one attention, and loaded trained
# weights into them. You **read** latents channel by channel, and **measured** what
# dropping a part costs in decibels. You **explained** by the ratio of signal to noise
# why latents are shifted and scaled. What is left is the end of the journey: the latent
# that arrived at the beginning of this chapter, through the decoder that you have
# built.

# %% tags=["active-ipynb"]
# picture = (vae.decode(vae.unscale(drawn_latents)) / 2 + 0.5).clamp(0, 1)
# print(journey.check("picture", picture))
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

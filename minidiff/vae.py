# %% [markdown]
r"""
# The autoencoder: pixels and latents
"""

# %%
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
            block_out_channels=(32, 64, 64),
            norm_num_groups=16,
            scaling_factor=1.0,
            shift_factor=0.0,
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)


# %%
def group_norm(config: VAEConfig, channels: int) -> nn.GroupNorm:
    """Group normalisation of ``channels``; Wu and He 2018."""
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


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
    """One head of H·W tokens from the picture ``x`` (B, C, H, W)."""
    return x.flatten(2).transpose(1, 2)[:, None]  # (B, C, H, W) → (B, 1, H·W, C)


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

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        inputs = widths[0]
        for i, width in enumerate(widths):
            sizes = [inputs] + [width] * depth
            level = {"block": residual_blocks(config, sizes)}
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

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(config, widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = widths[min(i + 1, len(widths) - 1)]
            sizes = [inputs] + [width] * (depth + 1)
            level = {"block": residual_blocks(config, sizes)}
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
        return Posterior(mean, logvar.clamp(-30, 20))

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
    groups = config.norm_num_groups
    for width in config.block_out_channels:
        if width % groups:
            raise ValueError(f"{groups} norm groups do not divide {width} channels")


def check_image(images: Tensor, config: VAEConfig) -> None:
    """Raise ValueError unless ``images`` is (B, 3, H, W) with sides that fit."""
    height, width = images.shape[-2:]
    if images.ndim != 4 or height % config.factor or width % config.factor:
        raise ValueError(
            f"images of shape {tuple(images.shape)}: expected (B, "
            f"{config.in_channels}, H, W), sides multiples of {config.factor}"
        )

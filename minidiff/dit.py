# %% [markdown]
r"""
# The diffusion transformer: MMDiT

This chapter builds the network that paints: from a noisy latent, a time and a text to a
velocity.
"""

# %%
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.attention import Attention, Heads, JointAttention


# %%
@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the names are the keys of the hub's config.json.

    Lengths are in latent pixels (``sample_size``) or patches (``pos_embed_max_size``).
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "dual_attention_layers", tuple(self.dual_attention_layers)
        )
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {self.qk_norm!r}: expected 'rms_norm' or null")
        if self.width % 4:
            raise ValueError(
                f"width {self.width} (num_attention_heads · attention_head_dim) is not "
                "a multiple of 4, which the sin-cos position table needs"
            )
        if bad := [i for i in self.dual_attention_layers if i >= self.num_layers]:
            raise ValueError(
                f"dual_attention_layers {bad}: the model has {self.num_layers} layers"
            )

    @property
    def width(self) -> int:
        """Channels D of every token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def sd35_medium(cls) -> "MMDiTConfig":
        """Stable Diffusion 3.5 Medium: MMDiT-X, dual attention in blocks 0 to 12."""
        return cls(
            num_layers=24,
            num_attention_heads=24,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )

    @classmethod
    def sd35_large(cls) -> "MMDiTConfig":
        """Stable Diffusion 3.5 Large and Large Turbo."""
        return cls(num_layers=38, num_attention_heads=38, qk_norm="rms_norm")

    @classmethod
    def tiny(cls) -> "MMDiTConfig":
        """The model that ships with the package: 64×64 pictures, 9 M parameters."""
        return cls(
            sample_size=16,
            num_layers=7,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=192,
            pooled_projection_dim=160,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )


# %%
def sincos(position: Tensor, frequencies: Tensor) -> Tensor:
    """Positions (N,) seen at K frequencies: [sin, cos], (N, 2·K)."""
    angles = position[:, None] * frequencies  # (N, K)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def position_table(size: int, width: int, base: int) -> Tensor:
    """The sin-cos table of a size × size grid, (1, size·size, width), float32.

    The first half of the channels tells the column, the second half the row. Positions
    run from 0 to ``base``, as in diffusers; published checkpoints bring their own.
    """
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    position = torch.arange(size) / (size / base)
    line = sincos(position.double(), 1 / 10000**exponent).float()  # (M, D/2)
    column, row = line[None], line[:, None]
    table = torch.cat(
        [t.expand(size, size, -1) for t in (column, row)], dim=-1
    )  # → (M, M, D)
    return table.flatten(0, 1)[None]  # (M, M, D) → (1, M·M, D)


# %%
class PatchEmbed(nn.Module):
    """Latents (B, C, h, w) → one token per patch, (B, (h/p)·(w/p), D).

    The weights are those of a convolution whose stride equals its kernel; computed as a
    matrix product on flattened patches, the tokens come out in memory order.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        p = self.patch_size
        x = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # → (B, C, h, p, w, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # → (B, h·w, C·p·p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Tokens (B, h·w, p·p·C) of a grid height × width → latents (B, C, h·p, w·p)."""
    p = patch_size
    x = tokens.unflatten(2, (p, p, -1)).unflatten(1, (height, width))
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, h, w, p, p, C) → (B, C, h, p, w, p)
    return x.flatten(4).flatten(2, 3)  # → (B, C, h·p, w·p)


# %%
def timestep_embedding(timestep: Tensor, width: int = 256) -> Tensor:
    """Timesteps (…) in [0, 1000] → [cos, sin] features (…, width), float32.

    Frequencies 10000^(−k/K), K = width/2; Ho et al. 2020 after Vaswani et al. 2017.
    """
    k = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10000) * k / (width // 2))
    angles = timestep.float()[..., None] * frequencies  # (…) → (…, K)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linear layers with SiLU between: (…, in) → (…, D)."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


# %%
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift: tokens (B, L, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate · update: tokens (B, L, D), gate (B, 1, D)."""
    return torch.addcmul(x, gate, update)


# %%
class MLP(nn.Module):
    """Per-token network D → 4·D → D with the tanh form of GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without weights of its own: the modulation supplies them."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def adaln(width: int, chunks: int) -> nn.Sequential:
    """c (…, D) → modulation (…, chunks·D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


# %%
class StreamBlock(nn.Module):
    """One stream's half of a joint block.

    The modulation is 6·D numbers per sample: shift, scale, gate of the attention, then
    of the MLP. With ``dual`` 9·D: three more for self-attention of this stream alone
    (MMDiT-X). With ``pre_only`` 2·D, shift and scale: the stream is read and dropped.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        pre_only: bool = False,
        dual: bool = False,
    ) -> None:
        super().__init__()
        width = config.width
        sizes = (width, config.num_attention_heads, config.qk_norm)
        self.chunks = 2 if pre_only else 9 if dual else 6
        self.norm1 = layer_norm(width)
        self.attn = Attention(*sizes, pre_only)
        if dual:
            self.attn2 = Attention(*sizes)
        if not pre_only:
            self.norm2 = layer_norm(width)
            self.mlp = MLP(width)
        self.adaLN_modulation = adaln(width, self.chunks)

    def before(self, x: Tensor, modulation: Tensor) -> tuple[Heads, Tensor]:
        """Tokens (B, L, D) → heads for joint attention, and the tokens.

        Dual attention has already been added to the tokens: it reads the same
        normalised input as joint attention does.
        """
        parts = modulation.unsqueeze(1).chunk(self.chunks, dim=-1)  # (B, 1, D) each
        normed = self.norm1(x)
        heads = self.attn.heads(modulate(normed, parts[0], parts[1]))
        if self.chunks == 9:
            shift, scale, gate = parts[6:]
            x = gated(x, gate, self.attn2(modulate(normed, shift, scale)))
        return heads, x

    def after(self, x: Tensor, read: Tensor, modulation: Tensor) -> Tensor:
        """Add to the tokens what attention has read, then the MLP's answer."""
        parts = modulation.unsqueeze(1).chunk(self.chunks, dim=-1)  # (B, 1, D) each
        gate_msa, shift, scale, gate_mlp = parts[2:6]
        x = gated(x, gate_msa, self.attn.proj(read))
        return gated(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift, scale)))


# %%
class JointBlock(nn.Module):
    """A block of MMDiT: two streams with their own weights, one attention.

    In the last block (``pre_only``) the text is read for the last time and dropped.
    """

    def __init__(
        self, config: MMDiTConfig, pre_only: bool = False, dual: bool = False
    ) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.context_block = StreamBlock(config, pre_only=pre_only)
        self.x_block = StreamBlock(config, dual=dual)
        self.attention = JointAttention()

    def modulation(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """c (…, D) → modulation of the context and of the image, (…, chunks·D)."""
        return (
            self.context_block.adaLN_modulation(c),
            self.x_block.adaLN_modulation(c),
        )

    def forward(
        self, context: Tensor, x: Tensor, modulation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor]:
        """Context (B, L, D) and image tokens (B, N, D) → the same, one block on."""
        context_modulation, x_modulation = modulation
        context_heads, context = self.context_block.before(context, context_modulation)
        x_heads, x = self.x_block.before(x, x_modulation)
        context_read, x_read = self.attention(context_heads, x_heads)
        x = self.x_block.after(x, x_read, x_modulation)
        if self.pre_only:
            return None, x
        context = self.context_block.after(context, context_read, context_modulation)
        return context, x


# %%
class FinalLayer(nn.Module):
    """Tokens (B, N, D) → patches (B, N, p·p·C)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.norm_final = layer_norm(config.width)
        self.linear = nn.Linear(
            config.width, config.patch_size**2 * config.out_channels
        )
        self.adaLN_modulation = adaln(config.width, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))


# %%
class Modulations(NamedTuple):
    """All that time and pooled text say to the network, per block and at the end.

    ``blocks`` holds (context, image) tensors (…, chunks·D), ``final`` is (…, 2·D).
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    final: Tensor

    def step(self, index: int) -> "Modulations":
        """Those of one step, where the leading dimension counts steps."""
        blocks = tuple((context[index], x[index]) for context, x in self.blocks)
        return Modulations(blocks, self.final[index])


# %%
class MMDiT(nn.Module):
    """The transformer of Stable Diffusion 3.5; Esser et al. 2024, section 4.

    Called on latents (B, C, h, w), noise levels ``sigma`` (B,) in [0, 1], ``context``
    (B, L, joint_attention_dim) and ``pooled`` (B, pooled_projection_dim) it predicts
    the velocity (B, C, h, w). Parameters are named as in the official single files.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, last = config.width, config.num_layers - 1
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(config.pooled_projection_dim, width)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        base = config.sample_size // config.patch_size
        table = position_table(config.pos_embed_max_size, width, base)
        self.register_buffer("pos_embed", table)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                config, pre_only=i == last, dual=i in config.dual_attention_layers
            )
            for i in range(config.num_layers)
        )
        self.final_layer = FinalLayer(config)
        self.initialize()

    def initialize(self) -> None:
        """Initial weights as in DiT (Peebles & Xie 2023): every block an identity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for layer in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[layer].weight, std=0.02)

    def positions(self, height: int, width: int) -> Tensor:
        """The middle of the position table, (1, height·width, D), sizes in patches."""
        size = self.config.pos_embed_max_size
        top, left = (size - height) // 2, (size - width) // 2
        table = self.pos_embed.unflatten(1, (size, size))  # (1, M·M, D) → (1, M, M, D)
        crop = table[:, top : top + height, left : left + width]
        return crop.flatten(1, 2)  # (1, h, w, D) → (1, h·w, D)

    def conditioning(self, sigma: Tensor, pooled: Tensor) -> Tensor:
        """Noise level (…) and pooled text (…, P) → c (…, D)."""
        time = timestep_embedding(1000 * sigma.float()).to(pooled.dtype)
        return self.t_embedder(time) + self.y_embedder(pooled)

    def modulations(self, sigma: Tensor, pooled: Tensor) -> Modulations:
        """All blocks' modulations, so that a sampler can compute them ahead.

        Leading dimensions broadcast: ``sigmas[:, None]`` (S, 1) with ``pooled`` (B, P)
        gives (S, B, …), and ``.step(i)`` is what ``forward`` takes at step i.
        """
        c = self.conditioning(sigma, pooled)
        blocks = tuple(block.modulation(c) for block in self.joint_blocks)
        return Modulations(blocks, self.final_layer.adaLN_modulation(c))

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
        """Velocity (B, C, h, w); given ``modulations``, ``sigma`` and ``pooled`` are
        not read. Blocks in ``skip_layers`` are left out. Raises ValueError for sizes
        that the configuration cannot take."""
        height, width = self.check(latents, context, pooled, modulations)
        if modulations is None:
            modulations = self.modulations(sigma, pooled)
        x = self.x_embedder(latents)  # (B, C, h, w) → (B, N, D)
        x = (x + self.positions(height, width)).to(x.dtype)
        context = self.context_embedder(context)  # (B, L, joint) → (B, L, D)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                context, x = block(context, x, modulations.blocks[i])
        x = self.final_layer(x, modulations.final)  # (B, N, D) → (B, N, p·p·C)
        return unpatchify(x, height, width, self.config.patch_size)

    def check(
        self,
        latents: Tensor,
        context: Tensor,
        pooled: Tensor | None,
        modulations: Modulations | None,
    ) -> tuple[int, int]:
        """Raise ValueError for sizes that do not fit; return the grid, in patches."""
        c, p = self.config, self.config.patch_size
        if latents.ndim != 4 or latents.shape[1] != c.in_channels:
            raise ValueError(
                f"latents {tuple(latents.shape)}: expected (B, {c.in_channels}, h, w)"
            )
        if latents.shape[2] % p or latents.shape[3] % p:
            raise ValueError(
                f"latents {tuple(latents.shape)}: height and width must be multiples "
                f"of the patch size {p}"
            )
        height, width = latents.shape[2] // p, latents.shape[3] // p
        if not 0 < max(height, width) <= c.pos_embed_max_size or not height * width:
            raise ValueError(
                f"latents {tuple(latents.shape)} make a grid of {height}×{width} "
                f"patches: the position table has {c.pos_embed_max_size} a side"
            )
        if context.ndim != 3 or context.shape[2] != c.joint_attention_dim:
            raise ValueError(
                f"context {tuple(context.shape)}: expected "
                f"(B, L, {c.joint_attention_dim})"
            )
        if len(context) != len(latents):
            raise ValueError(
                f"context holds {len(context)} samples, latents {len(latents)}"
            )
        if modulations is None and pooled.shape[-1] != c.pooled_projection_dim:
            raise ValueError(
                f"pooled {tuple(pooled.shape)}: expected (B, {c.pooled_projection_dim})"
            )
        return height, width

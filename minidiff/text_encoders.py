# %% [markdown]
r"""
# Text encoders: from ids to meaning
"""

# %%
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# %%
@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a CLIP text encoder; fields are the keys of the hub's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407

    @classmethod
    def clip_l(cls) -> "CLIPTextConfig":
        """OpenAI's CLIP ViT-L/14, SD3.5's ``text_encoder``."""
        return cls(49408, 768, 3072, 12, 12, projection_dim=768, eos_token_id=2)

    @classmethod
    def clip_g(cls) -> "CLIPTextConfig":
        """OpenCLIP's ViT-bigG/14, SD3.5's ``text_encoder_2``."""
        return cls(49408, 1280, 5120, 32, 20, 77, "gelu", 1e-5, 1280, eos_token_id=2)

    @classmethod
    def tiny_l(cls) -> "CLIPTextConfig":
        """The shipped model's ``text_encoder``."""
        return cls(704, 64, 256, 3, 4, 32, "quick_gelu", 1e-5, 64, eos_token_id=2)

    @classmethod
    def tiny_g(cls) -> "CLIPTextConfig":
        """The shipped model's ``text_encoder_2``."""
        return cls(704, 96, 384, 3, 6, 32, "gelu", 1e-5, 96, eos_token_id=2)


# %%
def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), elementwise: OpenAI's approximation of GELU.

    Hendrycks and Gimpel 2016, section 2.
    """
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
}


# %%
def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut the features of ``x`` (B, L, H·D) into heads (B, H, L, D); no copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, H·D) → (B, H, L, D)


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads of ``x`` (B, H, L, D) side by side again: (B, L, H·D)."""
    return x.transpose(1, 2).flatten(2)  # (B, H, L, D) → (B, L, H·D)


# %%
class CLIPAttention(nn.Module):
    """Causal self-attention over ``x`` (B, L, D); Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (split_heads(f(x), self.heads) for f in projections)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(merge_heads(x))


# %%
class CLIPMLP(nn.Module):
    """Linear, activation, Linear on each token of ``x`` (B, L, D) alone."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """One pre-norm transformer layer: attention, then MLP, each added to ``x``."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


# %%
class CLIPTextEncoder(nn.Module):
    """CLIP's text tower with its projection; Radford et al. 2021, section 2.4.

    Called on ids (B, L), it returns the hidden state (B, L, D) that enters the last
    layer, without the final norm, and the pooled vector (B, projection_dim).

    Raises ValueError where the configuration or the length cannot be honoured.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        check_clip_config(config)
        self.config = config
        width = config.hidden_size
        tokens = nn.Embedding(config.vocab_size, width)
        positions = nn.Embedding(config.max_position_embeddings, width)
        nn.init.normal_(tokens.weight, std=0.02)
        nn.init.normal_(positions.weight, std=0.01)
        layers = [CLIPLayer(config) for _ in range(config.num_hidden_layers)]
        parts = {"token_embedding": tokens, "position_embedding": positions}
        self.text_model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(parts),
                "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
                "final_layer_norm": nn.LayerNorm(width, config.layer_norm_eps),
            }
        )
        self.text_projection = nn.Linear(width, config.projection_dim, bias=False)

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """The embedded ``ids`` (B, L), then the output of every layer: (B, L, D)."""
        embeddings = self.text_model.embeddings
        length, longest = ids.shape[1], self.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"{length} tokens: this CLIP reads at most {longest}")
        positions = embeddings.position_embedding.weight[:length]  # (L, D)
        states = [embeddings.token_embedding(ids) + positions]  # (B, L) → (B, L, D)
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def pool(self, last: Tensor, ids: Tensor) -> Tensor:
        """Project ``last`` (B, L, D) at each prompt's end: (B, projection_dim)."""
        rows = torch.arange(len(ids), device=ids.device)
        end = end_positions(ids, self.config.eos_token_id)
        at_end = last[rows, end]  # (B, L, D) → (B, D)
        return self.text_projection(self.text_model.final_layer_norm(at_end))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.hidden_states(ids)
        return states[-2], self.pool(states[-1], ids)


# %%
def end_positions(ids: Tensor, eos_token_id: int) -> Tensor:
    """Where each row of ``ids`` (B, L) ends: the first end token's position, (B,).

    Older configurations state ``eos_token_id`` 2, which never was the end token's id;
    there the largest id marks the end, as in OpenAI's code.
    """
    if eos_token_id == 2:
        return ids.argmax(-1)  # (B, L) → (B,)
    return (ids == eos_token_id).int().argmax(-1)  # (B, L) → (B,)


def check_clip_config(config: CLIPTextConfig) -> None:
    """Raise ValueError for values that the classes above cannot honour."""
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"hidden_act {config.hidden_act!r}: expected one of {known}")
    check_heads(config.hidden_size, config.num_attention_heads)


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError where ``heads`` do not divide ``width``."""
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")


# %%
@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; fields are the keys of the hub's config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    @classmethod
    def t5_xxl(cls) -> "T5Config":
        """T5 v1.1 XXL, SD3.5's ``text_encoder_3``."""
        return cls(32128, 4096, 64, 10240, 24, 64)

    @classmethod
    def tiny(cls) -> "T5Config":
        """The shipped model's ``text_encoder_3``."""
        return cls(512, 192, 32, 256, 4, 6)


# %%
class RMSNorm(nn.Module):
    """Divide ``x`` (…, D) by its root mean square over D, taken in float32.

    Zhang and Sennrich 2019, equation 4, with ``eps`` under the root.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


# %%
def relative_buckets(
    length: int, buckets: int, max_distance: int, device: torch.device | None = None
) -> Tensor:
    """Bucket (L, L) of each key as seen by each query; Raffel et al. 2020, 2.1.

    Half of the buckets look back and half ahead; in each half the nearer ones hold
    one distance each, the others grow as the logarithm, up to ``max_distance``.
    """
    position = torch.arange(length, device=device)
    offset = position - position[:, None]  # key minus query, (L, L)
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    log_ratio = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = exact + (log_ratio * (half - exact)).clamp(min=0).long()
    bucket = torch.where(distance < exact, distance, far.clamp(max=half - 1))
    return bucket + half * (offset > 0)


# %%
class T5Attention(nn.Module):
    """Self-attention over ``x`` (B, L, D) with a bias (1, H, L, L) and no 1/√d."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            table = config.relative_attention_num_buckets, config.num_heads
            self.relative_attention_bias = nn.Embedding(*table)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(merge_heads(x))


# %%
class T5MLP(nn.Module):
    """The gated MLP of T5 v1.1 on ``x`` (B, L, D); Shazeer 2020, GEGLU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.wi_0(x), approximate="tanh")
        return self.wo(gate * self.wi_1(x))


class T5Block(nn.Module):
    """Attention, then MLP, each on a normalised ``x`` (B, L, D) and added to it."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        width, eps = config.d_model, config.layer_norm_epsilon
        attention = T5Attention(config, has_bias)
        first = {"SelfAttention": attention, "layer_norm": RMSNorm(width, eps)}
        second = {"DenseReluDense": T5MLP(config), "layer_norm": RMSNorm(width, eps)}
        self.layer = nn.ModuleList([nn.ModuleDict(first), nn.ModuleDict(second)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias)
        return x + second.DenseReluDense(second.layer_norm(x))


# %%
class T5Encoder(nn.Module):
    """The encoder of T5 v1.1 on ids (B, L): (B, L, d_model); Raffel et al. 2020.

    Raises ValueError where the configuration cannot be honoured.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        if config.feed_forward_proj != "gated-gelu":
            found = config.feed_forward_proj
            raise ValueError(f"feed_forward_proj {found!r}: expected 'gated-gelu'")
        self.config = config
        blocks = [T5Block(config, i == 0) for i in range(config.num_layers)]
        norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleDict(
            {"block": nn.ModuleList(blocks), "final_layer_norm": norm}
        )

    def position_bias(self, length: int) -> Tensor:
        """What each head adds to the logit of each pair of positions: (1, H, L, L)."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        c = self.config
        buckets = relative_buckets(
            length,
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
            table.weight.device,
        )
        return table(buckets).permute(2, 0, 1)[None]  # (L, L, H) → (1, H, L, L)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)  # (B, L) → (B, L, D)
        bias = self.position_bias(ids.shape[1]).contiguous()
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


# %%
def assemble(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Join the hidden states of the three encoders into one context.

    clip_l (B, L, D_l), clip_g (B, L, D_g), t5 (B, M, D) → (B, L + M, D); D is at
    least D_l + D_g. Esser et al. 2024, figure 2.
    """
    clip = torch.cat([clip_l, clip_g], dim=-1)  # → (B, L, D_l + D_g)
    missing = t5.shape[-1] - clip.shape[-1]
    if missing < 0:
        width = clip.shape[-1]
        raise ValueError(f"CLIP states of width {width} exceed T5's {t5.shape[-1]}")
    clip = F.pad(clip, (0, missing))  # → (B, L, D)
    return torch.cat([clip, t5], dim=1)  # → (B, L + M, D)

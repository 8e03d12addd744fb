# %% [markdown]
r"""
# Text encoders: from ids to meaning

In this chapter the ids of a prompt become what the picture is drawn from: a sequence
of vectors, one per token, and one vector for the sentence as a whole.

After it you will be able to

- **write** attention with a bias, from two loops to one fused call;
- **build** the text tower of CLIP and the encoder of T5, and load trained weights
  into them;
- **explain** why the states are taken one layer before the end, and the sentence's
  vector at the end token;
- **compute** the bucket of a relative position, and show that T5 loses the order of
  the words without it;
- **assemble** the context and the pooled vector that Stable Diffusion 3.5 expects;
- **measure** what each reader knows, by leaving it out and by a linear probe.

On a first reading, jump from "Three readers of one sentence" to "One context for the
transformer", and come back for how the readers are made.
"""

# %% tags=["hide-input"]
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# ## Where we are
#
# The tokenizers of chapter 1 hand over three rows of ids: one for each of the text
# encoders of Stable Diffusion 3.5. This chapter turns them into two tensors: the
# *context*, which leaves our box on the arrow in the map, and the *pooled vector*,
# which goes the same way and is not drawn. Our prompt's journey goes on with the same
# words as before.
# (<a href="../book/inside.html?open=context">See the context</a> of any other, live.)

# %% tags=["active-ipynb", "hide-input"]
# import copy
#
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.files.weights import TINY, load_component
# from minidiff.classroom.exercises import check, seal
# from minidiff.classroom.journey import PROMPT
# from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
#
# viz.show_pipeline("text_encoders")

# %% tags=["active-ipynb"]
# tokenize_l = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
# tokenize_g = CLIPTokenizer.from_pretrained(TINY / "tokenizer_2")
# tokenize_t5 = T5Tokenizer.from_pretrained(TINY / "tokenizer_3")
# ids_l, ids_g, ids_t5 = (f([PROMPT]) for f in (tokenize_l, tokenize_g, tokenize_t5))
# print(PROMPT)
# for name, ids in {"ids_l": ids_l, "ids_g": ids_g, "ids_t5": ids_t5}.items():
#     print(journey.meets(name, ids), ids[0, :12].tolist(), "…")

# %% [markdown]
# ## Three readers of one sentence
#
# An id is only a number in a list. What a word *means* to a picture depends on the
# words around it: "white" in "a white bag on a black background" must end up at the
# bag. A text encoder lets the tokens exchange information until each vector describes
# its token *in this sentence*. SD3.5 employs three, because they learned different
# things:
#
# | encoder | learned from | a token sees | gives |
# |---|---|---|---|
# | CLIP-L, CLIP-G | captions, pictures | itself, what precedes it | states, a vector |
# | T5 | gaps in text | everything | states |
#
# (A token's vector on its way through the layers is called its *state*.) CLIP learned
# two encoders at once, one for captions and one for pictures: the vector of a caption
# should point in the direction of its own picture's, and away from all others' (chapter
# 7 does it). This ties words to what can be *seen*, and leaves the encoder free to
# forget what does not help to tell pictures apart. T5 never saw a picture; it learned
# to fill gaps in texts, for which it must keep track of what belongs to what. The paper
# on Stable Diffusion 3 finds that leaving T5 out costs little on simple prompts, and
# most on long ones and on written words in the picture ([Esser et al.
# 2024](https://arxiv.org/abs/2403.03206), section 5.3). That is the plan. What each of
# the three knows in the model that ships with this book is measured near the end.
#
# The symbols of this chapter, with the sizes of SD3.5:
#
# | | meaning | CLIP-L | CLIP-G | T5-XXL |
# |---|---|---|---|---|
# | $L$ | tokens | 77 | 77 | 256 |
# | $D$ | width of a state | 768 | 1280 | 4096 |
# | $H$ | attention heads | 12 | 20 | 64 |
# | $d$ | width of a head | 64 | 64 | 64 |
# | $N$ | layers | 12 | 32 | 24 |
# | $M$ | width inside the MLP | 3072 | 5120 | 10240 |
#
# A batch of $B$ prompts adds an axis in front: states are tensors `(B, L, D)`. In the
# configurations, which keep the names of the published files, $D$ is `hidden_size` or
# `d_model`, $H$ is `num_attention_heads` or `num_heads`, $d$ is `d_kv` in T5, $N$ is
# `num_hidden_layers` or `num_layers`, and $M$ is `intermediate_size` or `d_ff`.
# `vocab_size` counts the rows of a table of which the tokenizer may use fewer (32,100
# of 32,128 in T5-XXL).

# %% [markdown]
# ## Attention with a bias
#
# All three encoders are stacks of the same two steps: *attention*, in which tokens read
# one another, and an *MLP*, which works on every token alone. An MLP (multi-layer
# perceptron) is two linear maps with a nonlinear function, the *activation*, between.
# For attention each token makes three vectors of width $d$: a query $q_i$ (what am I
# looking for), a key $k_j$ (what do I offer) and a value $v_j$ (what do I pass on).
# Token $i$ receives a weighted mean of all values:
#
# $$
# o_i = \sum_j \frac{e^{\ell_{ij}}}{\sum_{j'} e^{\ell_{ij'}}}\, v_j,
# \qquad \ell_{ij} = s\, q_i \cdot k_j + b_{ij}.
# $$
#
# The two families differ only in $s$ and $b$:
#
# - **CLIP**: $s = 1/\sqrt d$, and $b_{ij} = -\infty$ for $j > i$, so that a token reads
#   only itself and what precedes it (the *causal mask*); 0 otherwise.
# - **T5**: $s = 1$, and $b_{ij}$ is a learned number that depends on the distance $j -
#   i$.
#
# Why $1/\sqrt d$: if the entries of $q$ and $k$ are independent with mean 0 and
# variance 1, their dot product has variance $d$, and the softmax would *saturate*: one
# key takes most of the weight, and the gradient shrinks. (The derivative of a
# weight $a_j$ by its own logit is $a_j (1 - a_j)$.) T5 does without: its query weights
# were *initialised* smaller by that factor, and training went on from there.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# q, k = torch.randn(1000, 1, 64), torch.randn(1000, 77, 64)  # d = 64, 77 keys
# for name, s in {"s = 1/√d": 64**-0.5, "s = 1": 1.0}.items():
#     a = (s * q @ k.mT).softmax(-1)
#     most, slope = a.amax(-1).mean(), (a * (1 - a)).sum(-1).mean()
#     print(f"{name:9} the largest of 77 weights {most:.2f}, slopes' sum {slope:.2f}")

# %% [markdown]
# First as it is written, one pair of tokens at a time:


# %%
def attend_in_loops(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: float) -> Tensor:
    """One head, pair by pair: q, k, v (L, d) and bias b (L, L) → (L, d)."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        weights = [torch.exp(s * q[i] @ k[j] + b[i, j]) for j in range(len(k))]
        for j in range(len(k)):
            out[i] += weights[j] / sum(weights) * v[j]
    return out


# %% [markdown]
# Two matrix products say the same for all pairs, and for any number of heads and
# prompts in front:


# %%
def attend_all(q: Tensor, k: Tensor, v: Tensor, b: Tensor, s: float) -> Tensor:
    """Softmax attention with bias; q, k, v (…, L, d), b (…, L, L) → (…, L, d)."""
    logits = s * q @ k.mT + b  # (…, L, d) → (…, L, L)
    return logits.softmax(dim=-1) @ v  # (…, L, L) → (…, L, d)


# %% [markdown]
# PyTorch's `scaled_dot_product_attention` computes the same, and where it has a fused
# kernel it never stores the matrix of logits. It is what the package uses.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# q, k, v = torch.randn(3, 5, 16)  # one head, five tokens
# causal = torch.full((5, 5), -torch.inf).triu(1)
# loops, matrix = (f(q, k, v, causal, 16**-0.5) for f in (attend_in_loops, attend_all))
# fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
# print("loops = matrices:       ", torch.allclose(loops, matrix, atol=1e-6))
# print("matrices = fused kernel:", torch.allclose(matrix, fused, atol=1e-6))

# %% [markdown]
# A layer has $H$ such heads. Each makes its own queries, keys and values, $d$ numbers
# of each, from the whole state, so that one may look for the colour before a noun while
# another looks for the preposition. The matrices of all heads lie in one, $D = H d$
# wide; cutting and joining costs nothing or one copy:


# %%
def split_heads(x: Tensor, heads: int) -> Tensor:
    """Cut the features of ``x`` (B, L, H·d) into heads (B, H, L, d); no copy."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, L, H·d) → (B, H, L, d)


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads of ``x`` (B, H, L, d) side by side again: (B, L, H·d)."""
    return x.transpose(1, 2).flatten(2)  # (B, H, L, d) → (B, L, H·d)


# %% [markdown]
# ## CLIP
#
# The configuration holds the sizes. Its fields are the keys of the `config.json` that
# lies beside published weights, so that any such file can build the model.


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
        return cls(1536, 64, 256, 3, 4, 32, "quick_gelu", 1e-5, 64, 1535)

    @classmethod
    def tiny_g(cls) -> "CLIPTextConfig":
        """The shipped model's ``text_encoder_2``."""
        return cls(1536, 96, 384, 3, 6, 32, "gelu", 1e-5, 96, 1535)


# %% [markdown]
# Attention needs four matrices: three make queries, keys and values of all heads at
# once, one mixes the heads' answers.


# %%
class CLIPAttention(nn.Module):
    """Causal self-attention over ``x`` (B, L, D); Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (split_heads(f(x), self.heads) for f in projections)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(merge_heads(x))


# %% tags=["active-ipynb"]
# config = CLIPTextConfig.tiny_l()
# layer, x = CLIPAttention(config), torch.randn(1, 5, config.hidden_size)
# projections = layer.q_proj, layer.k_proj, layer.v_proj
# q, k, v = (split_heads(f(x), layer.heads) for f in projections)
# heads = attend_all(q, k, v, causal, q.shape[-1] ** -0.5)
# by_hand = layer.out_proj(merge_heads(heads))
# print("matrices = class:", torch.allclose(by_hand, layer(x), atol=1e-6))

# %% [markdown]
# The MLP widens each state fourfold, activates it and narrows it again. The activation
# of CLIP-G is $\mathrm{GELU}(x) = x\,\Phi(x)$, where $\Phi$ is the distribution
# function of the standard normal distribution. OpenAI trained CLIP-L with a cheaper
# curve, $x \cdot \mathrm{sigmoid}(1.702\,x)$. T5 takes a third form,
# $\tfrac12 x\,(1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3)))$, much closer to GELU.


# %%
def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), elementwise; Hendrycks and Gimpel 2016, section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
}

# %% tags=["active-ipynb"]
# x = torch.linspace(-4, 4, 401)
# forms = {"GELU": F.gelu(x), "quick": quick_gelu(x)}
# forms["tanh"] = F.gelu(x, approximate="tanh")
# apart = {name: f"{(y - forms['GELU']).abs().max():.4f}" for name, y in forms.items()}
# print("largest difference from GELU:", apart)
# viz.show_curves({name: (x, y) for name, y in forms.items()}, xlabel="x")

# %% [markdown]
# Small negative inputs pass a little, large ones not at all. The curves lie nearly on
# one another; how far the wrong one moves the states of our three layers is measured
# below, when they are trained. Weights are used with the activation that they were
# trained with.


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


# %% [markdown]
# A layer normalises before each step and *adds* the step's result. LN, layer norm,
# subtracts from a state the mean of its $D$ features, divides by their standard
# deviation, and gives each feature a learned scale and shift:
#
# $$ x \leftarrow x + \mathrm{attention}(\mathrm{LN}(x)), \qquad
#    x \leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)). $$
#
# So a state is a sum to which every layer contributes, and the network can leave a
# token as it is by contributing little.


# %%
class CLIPLayer(nn.Module):
    """One pre-norm transformer layer on ``x`` (B, L, D)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


# %% [markdown]
# ### The end token speaks for the sentence
#
# Apart from the mask, attention does not know where a token stands: it is a sum over a
# *set*. CLIP adds a learned vector for each of the 77 positions to the token's own.
#
# One vector for the whole sentence must come from a token that has read all of it. With
# the causal mask only the last one has: the *end token*. Its state, normalised and
# multiplied by a projection (in SD3.5's CLIP-L the identity), is the **pooled** vector.
# Two quirks are needed to find it:
#
# - Behind the end token stands padding. CLIP-L pads with the end token itself, so the
#   *first* one counts.
# - The published `config.json` states `eos_token_id` 2, which is wrong (it is 49407).
#   Since the end token has the largest id of all, transformers looks for the largest id
#   instead when it reads that 2. The weights are fine either way; a re-implementation
#   that searches for id 2 pools at the first token, which has read nothing.


# %%
def end_positions(ids: Tensor, eos_token_id: int) -> Tensor:
    """Position (B,) of the first end token of each row of ``ids`` (B, L)."""
    if eos_token_id == 2:
        return ids.argmax(-1)  # (B, L) → (B,)
    return (ids == eos_token_id).int().argmax(-1)  # (B, L) → (B,)


# %% [markdown]
# Now the whole tower. The nested names (`text_model`, `embeddings`, …) are those of the
# published weights, so that loading them needs no translation. `forward` returns the
# states that *enter* the last layer, for a reason that comes next.


# %%
class CLIPTextEncoder(nn.Module):
    """CLIP's text tower with its projection; Radford et al. 2021, section 2.4.

    Called on ids (B, L), it returns the hidden state (B, L, D) that enters the last
    layer, without the final norm, and the pooled vector (B, projection_dim).
    Raises ValueError where the configuration or the length cannot be honoured.
    """

    text_model: Any  # a ModuleDict: its parts are addressed by their names

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
        embeddings = {"token_embedding": tokens, "position_embedding": positions}
        parts = {
            "embeddings": nn.ModuleDict(embeddings),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
            "final_layer_norm": nn.LayerNorm(width, config.layer_norm_eps),
        }
        self.text_model = nn.ModuleDict(parts)
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
def check_clip_config(config: CLIPTextConfig) -> None:
    """Raise ValueError for values that the classes above cannot honour."""
    width, heads = config.hidden_size, config.num_attention_heads
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"hidden_act {config.hidden_act!r}: expected one of {known}")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")


# %% [markdown]
# The trained weights go into the classes that you have just run; change one above, run
# from there, and every figure below changes with it.

# %% tags=["active-ipynb"]
# clip_l = load_component(CLIPTextEncoder, CLIPTextConfig, TINY / "text_encoder")
# clip_g = load_component(CLIPTextEncoder, CLIPTextConfig, TINY / "text_encoder_2")
# for name, model in {"CLIP-L": clip_l, "CLIP-G": clip_g}.items():
#     c = model.config
#     sizes = f"D {c.hidden_size}, H {c.num_attention_heads}, N {c.num_hidden_layers}"
#     print(f"the book's {name}: {sizes}, {c.hidden_act}")
# (hidden_l, pooled_l), (hidden_g, pooled_g) = clip_l(ids_l), clip_g(ids_g)
# print("end token at position", end_positions(ids_l, eos_token_id=2).item())
# print("states", tuple(hidden_l.shape), tuple(hidden_g.shape))
# print("pooled", tuple(pooled_l.shape), tuple(pooled_g.shape))

# %% tags=["active-ipynb"]
# for layer in clip_l.text_model.encoder.layers:
#     layer.mlp.activation = F.gelu
# other, _ = clip_l(ids_l)
# for layer in clip_l.text_model.encoder.layers:
#     layer.mlp.activation = ACTIVATIONS[clip_l.config.hidden_act]
# moved = (other - hidden_l).norm() / hidden_l.norm()
# print(f"with GELU for its own activation CLIP-L's states move by {moved:.1%}")

# %% [markdown]
# ### One layer early
#
# Why the states that enter the last layer, and not the ones that leave it? Look at what
# training could reach. CLIP's loss sees nothing but the pooled vector, and that is made
# from *one* position of the last layer's output. At all other positions the last layer
# computes something that no loss ever looked at. The states *before* it, however, are
# read by the end token through attention, so all of them up to the end token were
# trained. (The padding behind it never was, in any layer; the transformer reads it all
# the same.) Gradients tell it without words ("after layer 0" are the embeddings):

# %% tags=["active-ipynb"]
# states = clip_l.hidden_states(ids_l)
# for state in states:
#     state.retain_grad()
# clip_l.pool(states[-1], ids_l).square().sum().backward()
# for i, state in enumerate(states):
#     reached = (state.grad[0].abs().sum(-1) > 0).sum()
#     print(f"after layer {i}: a gradient reaches {reached:2} positions")
# _ = torch.set_grad_enabled(False)

# %% [markdown]
# In the last line a gradient reaches the end token alone, in the lines before it every
# position up to the end token. So the last layer's output at the words is a by-product:
# no loss ever asked for it. That says nothing yet of how bad it is. The probe near the
# end of the chapter compares the layers by what can be read from them.
#
# ### Captions compared
#
# The pooled vector is what CLIP was trained for: captions of like pictures should point
# the same way. The cosine of two vectors, 1 for the same direction and 0 for
# perpendicular ones, measures it.


# %%
def similarity(vectors: Tensor) -> Tensor:
    """Cosine between all pairs of ``vectors`` (B, D): (B, B)."""
    vectors = F.normalize(vectors, dim=-1)
    return vectors @ vectors.T  # (B, D) → (B, B)


# %% tags=["active-ipynb"]
# captions = [PROMPT, "a photo of a red dress on a blue background"]
# captions += ["a blue background with a red dress", "a red coat on a blue background"]
# captions += ["a blue dress on a red background", "a green bag on a white background"]
# numbers = [str(i) for i in range(6)]
# rows = [f"{i} {text}" for i, text in enumerate(captions)]
# print(*rows, sep="\n")
# near = similarity(clip_l(tokenize_l(captions))[1])
# viz.show_heatmap(near, numbers, numbers, "caption", "caption", digits=2)

# %% [markdown]
# Read row 0: caption 1 says the same, 3 changes only the garment, 4 has the same words
# with the colours exchanged, and 5 has nothing in common with it. A good sentence
# vector puts them in an order: 1 near, 5 far, and 4 farther than 1. Six captions are an
# anecdote, though. Count: over many scenes, how often does a caption lie nearer to
# another caption of the same scene than to one with the two colours exchanged? (Both
# rivals are worded alike, so that the wording cannot decide.)

# %% tags=["active-ipynb"]
# from minidiff.data.rng import uniform
# from minidiff.data.samples import ONE, TWO
# from minidiff.data.scenes import COLORS, KINDS, draw_attributes
# from minidiff.judging.exam import exam, share
#
# ONES = "{0} {2} on {4}", "{4} background, {0} {2}"
# TWOS = "{0} {2} left of {1} {3} on {4}", "on {4}, {1} {3} right of {0} {2}"
#
# def named_scenes(layouts: tuple, n: int) -> list[tuple]:
#     """Colours, kinds and ground of n scenes; each thing has a named colour."""
#     scenes = draw_attributes(uniform(1, torch.arange(8 * n), 33), "", layouts)
#     named = ((scenes.colors >= 0) | (scenes.counts == 0)).all(1)
#     colors, names = list(COLORS), scenes.select(named.nonzero()[:n, 0])
#     rows = zip(names.colors.tolist(), names.kinds.tolist(), names.ground.tolist())
#     return [(*(colors[i] for i in c), *(KINDS[i] for i in k), colors[g])
#         for c, k, g in rows]

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name, layouts, forms in (("one", ONE, ONES), ("two", TWO, TWOS)):
#     rows = [r for r in named_scenes(layouts, 450) if name == "one" or r[0] != r[1]]
#     turn = (4, 1, 2, 3, 0) if name == "one" else (1, 0, 2, 3, 4)
#     texts = [[form.format(*row) for row in rows] for form in forms]
#     texts.append([forms[1].format(*(row[i] for i in turn)) for row in rows])
#     first, same, other = (clip_l(tokenize_l(t))[1] for t in texts)
#     near, far = (F.cosine_similarity(first, x) for x in (same, other))
#     print(f"{name:3} in the picture, n = {len(near)}: {share(near > far)} are nearer")

# %% [markdown]
# In brackets stands the interval in which the true share lies 19 times of 20. Half
# would be chance. Near one half the *cosine* does not tell which colour belongs to
# which thing; a network that reads single numbers of the vector may still find it, and
# the transformer has the states as well.

# %% [markdown]
# ## T5
#
# T5 is a transformer for text alone, of which SD3.5 uses the encoder, in version 1.1,
# whose MLP is not the first T5's. There is no mask: every token reads the whole
# sentence, forwards and backwards. Three parts differ from those of CLIP.


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
        return cls(1536, 192, 32, 256, 4, 6)


# %% [markdown]
# ### A simpler norm
#
# LayerNorm subtracts the mean, divides by the standard deviation, scales and shifts.
# RMSNorm keeps only the division and the scale:
#
# $$
# \mathrm{RMSNorm}(x)_i = w_i\, \frac{x_i}{\sqrt{\tfrac1D \sum_j x_j^2 + \epsilon}}.
# $$
#
# The squares must be summed in float32: in float16 the largest number is 65504, so that
# an entry of 256 overflows when it is squared. `F.rms_norm` takes care of it. Chapter 4
# uses the same class inside the transformer.


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


# %% tags=["active-ipynb"]
# norm, x = RMSNorm(64, eps=1e-6), 300 * torch.randn(5, 64)
# formula = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
# print("formula = class:", torch.allclose(formula, norm(x), atol=1e-6))
# half = x.half()
# print("squared in float16:", half.square().mean(-1)[:3].tolist())
# print("the class in float16 stays finite:", norm(half).isfinite().all().item())

# %% [markdown]
# ### Distances in buckets
#
# T5 has no position vectors. Instead each head $h$ adds to the logit of query $i$ and
# key $j$ a learned number that depends on how far apart they are: $b^h_{ij} =
# T_{\mathrm{bucket}(j - i),\,h}$. The table $T$ has 32 rows: 0 to 15 for keys at the
# query's own place or behind it, 16 to 31 for keys ahead (row 16, "ahead by 0", is
# never used). In each half the distances $n = |j - i|$ from 0 to 7 have a row each. The
# eight rows after them cover ever wider ranges, equally wide in $\ln n$ up to 128; the
# last, which begins at 91, also takes everything beyond:
#
# $$
# \mathrm{bucket}(n) = \min\left(15,\;
# 8 + \left\lfloor 8\, \frac{\ln (n/8)}{\ln (128/8)} \right\rfloor\right)
# \quad \text{for } n \ge 8,
# $$
#
# plus 16 if the key is ahead.
#
# Whether a word is 2 or 3 places away matters; whether 100 or 101, hardly. And a text
# of 512 tokens needs no more rows than one of 100.


# %%
def bucket_of(offset: int) -> int:
    """T5's row for a key ``offset`` places after the query (32 rows, reach 128)."""
    n, ahead = abs(offset), 16 * (offset > 0)
    if n < 8:
        return n + ahead
    return min(8 + int(8 * math.log(n / 8) / math.log(128 / 8)), 15) + ahead


# %% [markdown]
# For all pairs at once, and for any number of rows. The logarithm is taken in float32,
# in transformers' order of operations: at $n = 16, 32, 64$ it falls on a whole number,
# where another rounding would choose another row.


# %%
def relative_buckets(
    length: int, buckets: int, reach: int, device: torch.device | None = None
) -> Tensor:
    """Row (L, L) of each key as seen by each query; Raffel et al. 2020, section 2.1."""
    position = torch.arange(length, device=device)
    offset = position - position[:, None]  # key minus query: (L,) → (L, L)
    half = buckets // 2
    exact = half // 2
    n = offset.abs()
    fraction = torch.log(n.float() / exact) / math.log(reach / exact)  # −∞ at n = 0
    far = exact + (fraction * (half - exact)).clamp(min=0).long()
    return torch.where(n < exact, n, far.clamp(max=half - 1)) + half * (offset > 0)


# %% tags=["active-ipynb"]
# rows = relative_buckets(200, buckets=32, reach=128)
# loops = torch.tensor([[bucket_of(j - i) for j in range(200)] for i in range(200)])
# print("loops = tensors:", torch.equal(loops, rows))
# offsets, row = torch.arange(-150, 150), [bucket_of(n) for n in range(-150, 150)]
# viz.show_curves({"": (offsets, row)}, xlabel="key − query", ylabel="row")

# %% [markdown]
# The table belongs to block 0 and serves all blocks: the bias is computed once and
# passed along.


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
            rows = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(rows, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(merge_heads(x))


# %% tags=["active-ipynb"]
# config = T5Config.tiny()
# layer, x = T5Attention(config, has_bias=True), torch.randn(1, 5, config.d_model)
# bias = layer.relative_attention_bias(relative_buckets(5, 32, 128)).permute(2, 0, 1)
# q, k, v = (split_heads(f(x), layer.heads) for f in (layer.q, layer.k, layer.v))
# by_hand = layer.o(merge_heads(attend_all(q, k, v, bias, s=1.0)))
# print("matrices = class:", torch.allclose(by_hand, layer(x, bias), atol=1e-5))

# %% [markdown]
# ### A gate in the MLP
#
# CLIP's MLP activates $x W_1$. T5 v1.1 computes two products and lets one open or close
# the other: $(\mathrm{GELU}(x W_0) \odot x W_1)\, W_2$, with the tanh form of GELU and,
# as everywhere in T5, no additive biases. ($W_0$, $W_1$, $W_2$ are `wi_0`, `wi_1`,
# `wo`.)


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

    layer: Any  # two ModuleDicts

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        norms = [RMSNorm(config.d_model, config.layer_norm_epsilon) for _ in range(2)]
        first = {"SelfAttention": T5Attention(config, has_bias), "layer_norm": norms[0]}
        second = {"DenseReluDense": T5MLP(config), "layer_norm": norms[1]}
        self.layer = nn.ModuleList([nn.ModuleDict(first), nn.ModuleDict(second)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias)
        return x + second.DenseReluDense(second.layer_norm(x))


# %% [markdown]
# The encoder: look the ids up, compute the bias, run the blocks, normalise. Unlike
# CLIP's, these states are taken after the last layer and its norm: T5's decoder read
# exactly them, at every position, so all of them were trained.


# %%
class T5Encoder(nn.Module):
    """The encoder of T5 v1.1 on ids (B, L): (B, L, d_model); Raffel et al. 2020.

    Raises ValueError where the configuration cannot be honoured.
    """

    encoder: Any  # a ModuleDict, as in CLIPTextEncoder

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        if (found := config.feed_forward_proj) != "gated-gelu":
            raise ValueError(f"feed_forward_proj {found!r}: expected 'gated-gelu'")
        self.config = config
        blocks = [T5Block(config, i == 0) for i in range(config.num_layers)]
        norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        parts = {"block": nn.ModuleList(blocks), "final_layer_norm": norm}
        self.encoder = nn.ModuleDict(parts)

    def position_bias(self, length: int) -> Tensor:
        """What each head adds to the logit of each pair of positions: (1, H, L, L)."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        reach = self.config.relative_attention_max_distance
        rows = relative_buckets(
            length, table.num_embeddings, reach, table.weight.device
        )
        bias = table(rows).permute(2, 0, 1)[None]  # (L, L, H) → (1, H, L, L)
        return bias.contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)  # (B, L) → (B, L, D)
        bias = self.position_bias(ids.shape[1])
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


# %% [markdown]
# What did the heads of the book's T5 learn about distance? One row per head: what it
# adds to the logit of a key that stands so many places from the query.

# %% tags=["active-ipynb"]
# t5 = load_component(T5Encoder, T5Config, TINY / "text_encoder_3")
# bias = t5.position_bias(31)[0]  # (H, L, L)
# names = [f"head {h}" for h in range(len(bias))]
# ticks = [f"{n:+d}" if n % 5 == 0 else "" for n in range(-15, 16)]
# viz.show_heatmap(bias[:, 15], names, ticks, xlabel="key − query", signed=True)

# %% [markdown]
# From a distance of eight on, columns are equal in groups, since several offsets share
# a row. A peak is no more than a head start: the logit has a second term, $q_i \cdot
# k_j$. So look at the weights themselves. Take the head and the place with the highest
# peak, among the words before the query, and print the mean weight that words give to
# that place, block by block.

# %% tags=["active-ipynb"]
# def t5_weights(ids: Tensor) -> list[Tensor]:
#     x, bias, weights = t5.shared(ids), t5.position_bias(ids.shape[1]), []
#     for block in t5.encoder.block:
#         attention, h = block.layer[0].SelfAttention, block.layer[0].layer_norm(x)
#         projections = attention.q, attention.k
#         q, k = (split_heads(f(h), attention.heads) for f in projections)
#         weights.append((q @ k.mT + bias).softmax(-1)[0])  # → (H, L, L)
#         x = block(x, bias)
#     return weights

# %% tags=["active-ipynb"]
# text = tokenize_t5.encode(PROMPT)
# weights, n = t5_weights(ids_t5), len(text)
# head, place = divmod(bias[:, 15, 10:15].argmax().item(), 5)
# back = 5 - place  # the highest peak, at most five places back
# reads = [w[head, :n, :n].diagonal(-back).mean().item() for w in weights]
# print(f"head {head}, {back} back: bias {bias[head, 15, 15 - back]:.2f},", end=" ")
# even = 1 / ids_t5.shape[1]
# print("mean weight by block:", *[f"{r:.2f}" for r in reads], f"(even: {even:.2f})")

# %% tags=["active-ipynb"]
# tokens = [piece.strip("▁") for piece in tokenize_t5.tokens(text)]
# shown = weights[-1][head, :n, :n]
# title = f"head {head} in the last block: rows read columns"
# viz.show_heatmap(shown, tokens, tokens, title=title, digits=2)

# %% [markdown]
# Each row of this *attention map* shows one token reading the others. (What a row lacks
# to 1 goes to padding, here next to nothing.) Where bias alone decided, a diagonal line
# would be all that is seen, in every block alike; where the weights differ from block
# to block and from row to row, queries and keys have their say. Here several rows read
# one word with nearly all their weight, from wherever they stand: in the last block
# this head looks for a word. So the mean printed above is one of hits and of zeros, and
# does not say that the head looks to one place.

# %% [markdown]
# ## One context for the transformer
#
# The transformer wants one sequence of equally wide vectors. Stable Diffusion 3 lays
# the states of the two CLIPs side by side (they describe the same token positions),
# fills the missing width with zeros, and puts T5's states behind them:
#
# $$ \mathrm{context} =
#    \begin{bmatrix} \text{CLIP-L} & \text{CLIP-G} & 0 \\ & \text{T5} & \end{bmatrix},
#    \qquad (77 + 256) \times 4096. $$
#
# The pooled vectors are joined too, to $768 + 1280 = 2048$ numbers. They do not enter
# the sequence: they tell every block, together with the noise level, what the whole is
# about (chapter 5).


# %%
def assemble(clip_l: Tensor, clip_g: Tensor, t5: Tensor) -> Tensor:
    """Join the hidden states of the three encoders into one context.

    clip_l (B, L, D_l), clip_g (B, L, D_g), t5 (B, L_t, D) → (B, L + L_t, D). Where D is
    less than D_l + D_g, the rest of CLIP-G is cut off. Esser et al. 2024, figure 2.
    """
    clip = torch.cat([clip_l, clip_g], dim=-1)  # → (B, L, D_l + D_g)
    missing = t5.shape[-1] - clip.shape[-1]  # below zero, ``pad`` cuts
    clip = F.pad(clip, (0, missing))  # (B, L, D_l + D_g) → (B, L, D)
    return torch.cat([clip, t5], dim=1)  # → (B, L + L_t, D)


# %% tags=["active-ipynb"]
# context = assemble(hidden_l, hidden_g, t5(ids_t5))
# pooled = torch.cat([pooled_l, pooled_g], dim=-1)
# print("context", tuple(context.shape), "pooled", tuple(pooled.shape))
# ends = [0, hidden_l.shape[-1], hidden_l.shape[-1] + hidden_g.shape[-1]]
# ticks = [{0: "CLIP-L", ends[1]: "CLIP-G", ends[2]: "zeros"}.get(i, "")
#     for i in range(context.shape[-1])]
# begins = {0: "CLIP", ids_l.shape[1]: "T5"}
# rows = [begins.get(i, "") for i in range(context.shape[1])]
# viz.show_heatmap(context[0].clamp(-3, 3), rows, ticks, ylabel="token", signed=True)

# %% tags=["active-ipynb"]
# sets = {"CLIP-L": (hidden_l, tokenize_l), "CLIP-G": (hidden_g, tokenize_g)}
# sets["T5"] = t5(ids_t5), tokenize_t5
# for name, (x, tokenize) in sets.items():
#     end = len(tokenize.encode(PROMPT))  # behind it stands padding
#     alike = F.cosine_similarity(x[0, end:], x[0, -1:], dim=-1)
#     print(f"{name:6} padding against its last row:", end=" ")
#     print(f"cosine {alike[0]:.2f} at the first, {alike.mean():.2f} in the mean")

# %% [markdown]
# Above (colours stop at ±3) the tokens of the two CLIPs, with zeros up to the width of
# T5; below, the tokens of T5. The first rows of each half are words. Behind them stands
# padding, whose rows resemble one another. It is there in SD3.5 too, and nobody masks
# it: the transformer reads it with the rest.
#
# On the meta device tensors have shapes but no values, so that we can send a prompt
# through the encoders of SD3.5 itself:

# %% tags=["active-ipynb"]
# with torch.device("meta"):
#     big_l = CLIPTextEncoder(CLIPTextConfig.clip_l())
#     big_g = CLIPTextEncoder(CLIPTextConfig.clip_g())
#     big_t5 = T5Encoder(T5Config.t5_xxl())
#     ids_77, ids_256 = (torch.zeros(1, n, dtype=torch.long) for n in (77, 256))
# (l, p), (g, r) = big_l(ids_77), big_g(ids_77)
# context_shape = tuple(assemble(l, g, big_t5(ids_256)).shape)
# print("context", context_shape, "pooled", (1, p.shape[1] + r.shape[1]))

# %% [markdown]
# ## What does each reader know?
#
# The direct way to find out is to leave a reader out. The finished pipeline draws the
# pictures of 32 prompts that ask for two things each, each from a noise of its own, the
# same in every line, in eight steps and without guidance (chapters 6 and 8); the
# *judge*, a small network that was trained on real scenes alone, says what each picture
# shows. A reader is left out by zeros in its place; in one line T5 loses its table of
# positions, in another the pooled vector is that of the empty prompt. Colours are
# graded without regard to the kinds of things, and a colour that the prompt does not
# name counts as right; so a share above 0 is no proof of reading.

# %% tags=["active-ipynb"]
# from minidiff.data.rng import normal
#
# pipe = minidiff.load("tiny")
# pipe.progress = False
# texts, grade = exam(32, two=True)
# context_all, pooled_all = pipe.encode_prompt(texts)
# length, wide = ids_l.shape[1], hidden_l.shape[-1] + hidden_g.shape[-1]
# table = pipe.text_encoders[2].encoder.block[0].layer[0].SelfAttention
# table = table.relative_attention_bias.weight
# kept = table.clone()
# table.data.zero_()
# unordered, _ = pipe.encode_prompt(texts)
# _ = table.data.copy_(kept)

# %% tags=["active-ipynb"]
# def without(rows: slice, features: slice = slice(None)) -> Tensor:
#     changed = context_all.clone()
#     changed[:, rows, features] = 0
#     return changed
#
#
# clips, empty = slice(length), pipe.encode_prompt([""] * len(texts))[1]
# trials = {"everything": (context_all, pooled_all)}
# trials["no T5"] = without(slice(length, None)), pooled_all
# trials["T5 without order"] = unordered, pooled_all
# trials["no CLIP states"] = without(clips), pooled_all
# trials["no CLIP at all"] = without(clips), torch.zeros_like(pooled_all)
# trials["pooled of no words"] = context_all, empty

# %% tags=["active-ipynb", "nbval-ignore-output"]
# channels, *sides = pipe.prepare_latents(1).shape[1:]
# noise = normal(0, torch.arange(len(texts)), (channels, *sides))
# print(f"{'n = 32':19}{'all right':23}{'things':23}{'colours':16}")
# for name, (states, vector) in trials.items():
#     options = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "pt"}
#     given = {"prompt_embeds": states, "pooled_prompt_embeds": vector}
#     right = grade(pipe(None, latents=noise, **given, **options) * 2 - 1)
#     whole = right if name == "everything" else whole
#     line = f"{name:18}"
#     for kind in ("all", "things", "colors"):
#         a, b = whole[kind], right[kind]
#         line += f" {share(b):14} {(a & ~b).sum():2}:{(b & ~a).sum():<2} "
#     print(line.rstrip())

# %% [markdown]
# Read down a column. The first line is what this model can do in eight steps. The other
# lines share its prompts and its noises, so compare them with it in pairs: the two
# numbers behind a share count the pictures that are right in the first line alone, and
# in this line alone. If what was taken away made no difference, each of these pictures
# would fall to either side like a coin, and 6:0, 8:1 or 10:2 would come once in 20
# times at most, counting both ways round. So where the first number is that much
# larger, the transformer listened there. Where it is not, the thing was not missed, or
# its loss is too small to be seen with 32 prompts.
#
# The transformer need not listen to the reader who knows best. A model that gets
# colours right without any T5 takes them from the CLIPs; whether it could take them
# from T5 the lines without CLIP say. Read two lines with care: in training a CLIP's
# states and its pooled vector were left out together, so that "no CLIP states" and
# "pooled of no words" are inputs that the model never met.
#
# So the second question: what *could* be read? A *linear probe* is a matrix, fitted by
# least squares, that guesses a property from a state; the better it guesses on captions
# that it was not fitted to, the more plainly the state says it. We ask the token of
# each first thing for the thing's own colour. Only what flowed through attention can
# tell it: the embedding of "dress" is the same in each caption.

# %% tags=["active-ipynb"]
# def t5_states(ids: Tensor) -> list[Tensor]:
#     states, bias = [t5.shared(ids)], t5.position_bias(ids.shape[1])
#     for block in t5.encoder.block:
#         states.append(block(states[-1], bias))
#     return states
#
#
# rows = named_scenes(TWO, 1600)
# texts = [TWOS[0].format(*row) for row in rows]
# heads = ["{0} {2}".format(*row) for row in rows]  # "red dress"
# named = torch.tensor([[[*COLORS].index(row[i]) for i in (0, 1, 4)] for row in rows])

# %% tags=["active-ipynb"]
# def probe(states: Tensor, answers: Tensor) -> Tensor:
#     x = F.pad(states - states.mean(0), (0, 1), value=1.0)
#     wanted = F.one_hot(answers).float()
#     square = x[:1200].T @ x[:1200] + 1e-2 * torch.eye(x.shape[1])
#     fit = torch.linalg.solve(square, x[:1200].T @ wanted[:1200])
#     return (x[1200:] @ fit).argmax(1)  # one guess for each of the other captions

# %% tags=["active-ipynb", "nbval-ignore-output"]
# asked = {"its own": named[:, 0], "the other's": named[:, 1]}
# readers = {"CLIP-L": (tokenize_l, clip_l.hidden_states)}
# readers["CLIP-G"] = tokenize_g, clip_g.hidden_states
# readers["T5"] = tokenize_t5, t5_states
# found = {}
# print("after the last layer, n = 400:    right            a colour of the sentence")
# for name, (tokenize, states_of) in readers.items():
#     places = torch.tensor([len(tokenize.encode(head)) - 2 for head in heads])
#     layers = [x[torch.arange(1600), places] for x in states_of(tokenize(texts))]
#     for whose, answers in asked.items():
#         guesses = torch.stack([probe(x, answers) for x in layers])
#         right = guesses == answers[1200:]
#         found[f"{name}, {whose}"] = F.pad(right.float().mean(1), (0, 9 - len(right)))
#         any_of_three = (guesses[-1, :, None] == named[1200:]).any(1)
#         print(f"{name:6} {whose:25} {share(right[-1]):16} {share(any_of_three)}")

# %% tags=["active-ipynb"]
# depth = max(len(clip_g.text_model.encoder.layers), len(t5.encoder.block))
# ticks = ["embedding", *(f"layer {i + 1}" for i in range(depth))]
# shown = torch.stack([*found.values()])[:, : depth + 1]
# title = "colour guessed rightly from the thing's token (0: no such layer)"
# viz.show_heatmap(shown, list(found), ticks, title=title, digits=2)

# %% [markdown]
# There are twelve colours, so that a blind guess is right once in twelve, and is one of
# the sentence's three colours (two of things, one of the ground) about once in four.
# The embeddings are near one in twelve: a thing's token does not know its colour before
# it has read. Then look how far each reader comes, and where. In CLIP the caption's
# second colour cannot reach the first thing, which stands before it (the causal mask);
# T5's tokens see it. There,
#
# - if "its own" is much higher than "the other's", T5 binds;
# - if both are high, its tokens know each colour and whose it is;
# - about one third for both is what a token reaches that knows the sentence's three
#   colours and not whose they are: then most guesses are a colour of the sentence;
# - at one twelfth for both, and one quarter in the last column of the printed table,
#   the token says no colours, at least not in a way that a matrix can read.
#
# The book's T5 comes near the third case: it knows which colours, and hardly whose. And
# compare the last two columns that CLIP has in the heatmap: they say whether taking the
# states one layer early matters for this property, in this model.
#
# Two measures, two questions: a probe says what is *there*, leaving out says what is
# *used*. A reader can know much and be ignored, because another is easier to read.

# %% [markdown]
# ## Predict, then break it
#
# Two captions use the same words in another order. In the first "red" belongs to the
# dress, in the second to the background. We compare T5's states of the token "red" in
# the two.
#
# Before you open the answers, predict: what happens to their difference when the table
# of relative positions is set to zero? And why could no amount of training mend it?

# %% tags=["active-ipynb", "hide-output"]
# swapped = [PROMPT, "a blue dress on a red background"]
# ids = tokenize_t5(swapped)
# at_red = ids == tokenize_t5.encode("red")[0]  # (2, 32), one True per row
#
# def gap(model: T5Encoder) -> float:
#     first, second = model(ids)[at_red]
#     return ((first - second).norm() / first.norm()).item()
#
# print(f"with the table:    {gap(t5):.4f}")

# %% tags=["active-ipynb", "hide-output"]
# broken = copy.deepcopy(t5)
# table = broken.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
# nn.init.zeros_(table.weight)
# print(f"without the table: {gap(broken):.4f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Nothing else in T5 knows about places. Without the table a query meets the same *set*
# of keys in both captions, and a weighted mean does not depend on the order in which it
# is taken. Every layer maps equal states to equal states, so that "red" is the same
# vector in both captions, whatever the weights are: such a T5 reads a bag of words.
# How far ours is from that, the first number says: it is the part of the state that
# depends on order here. (In the table above the line "T5 without order" has the shares
# of the first line: without order as many pictures are right.)
#
# </details>

# %% [markdown]
# ## Parity
#
# Hugging Face's classes are what most programs run. With the same random weights ours
# must give the same states; the tests do this for many sizes, and show that each
# comparison notices a wrong epsilon, a wrong activation, a missing mask.

# %% tags=["active-ipynb", "hide-input"]
# import warnings
# from dataclasses import asdict
#
# warnings.filterwarnings("ignore", "IProgress not found")  # there is no progress here
# import transformers as hf

# %% tags=["active-ipynb"]
# def same(ours: nn.Module, theirs: nn.Module) -> bool:
#     torch.manual_seed(0)
#     for p in theirs.parameters():
#         nn.init.normal_(p, std=0.2)
#     ours.load_state_dict(theirs.state_dict(), strict=False)
#     ids = torch.randint(0, 512, (2, 32))
#     found, out = ours.eval()(ids), theirs.eval()(ids, output_hidden_states=True)
#     expected = (out.hidden_states[-2], out.get("text_embeds"))
#     if isinstance(ours, T5Encoder):
#         found, expected = [found], [out.last_hidden_state]
#     pairs = zip(found, expected, strict=True)
#     return all((a - b).norm() / b.norm() <= 1e-5 for a, b in pairs)

# %% tags=["active-ipynb"]
# for config in (CLIPTextConfig.tiny_l(), CLIPTextConfig.tiny_g()):
#     settings = hf.CLIPTextConfig(bos_token_id=0, **asdict(config))
#     theirs = hf.CLIPTextModelWithProjection(settings)
#     assert same(CLIPTextEncoder(config), theirs)
# theirs = hf.T5EncoderModel(hf.T5Config(**asdict(T5Config.tiny())))
# assert same(T5Encoder(T5Config.tiny()), theirs)
# print("CLIP-L, CLIP-G and T5: relative error at most 1e-5")

# %% [markdown]
# ## What production code does differently
#
# - **It encodes once.** States depend on the prompt alone, not on the noise: programs
#   keep those of the negative prompt, and of prompts that are drawn again. Training on
#   a fixed set of captions stores them on disk.
# - **It moves T5 away.** With 4.76 billion parameters T5-XXL is larger than the
#   transformer of SD3.5 Medium. It is kept in main memory or in 8 bits, loaded for a
#   moment, or left out: diffusers then puts zeros in the place of its states.
# - **It passes no padding mask.** One would expect padding tokens to be hidden. Neither
#   Stability's reference nor diffusers does so: the states of padding are part of what
#   SD3.5 was trained with, and hiding them changes the picture.
# - **It keeps some matrices in float32.** transformers holds T5's `wo` in float32 when
#   the rest is float16, because its products can overflow there. In bfloat16, with the
#   range of float32, this is not needed.
# - **It fuses.** One matrix product for queries, keys and values instead of three. We
#   keep the published names here; in chapter 4, where the time goes, they are fused.

# %% [markdown]
# ## Exercises
#
# **2.1 Predict.** How many numbers does the context of one prompt hold in SD3.5, and
# how many of them are zeros that `assemble` filled in?

# %% tags=["active-ipynb", "exercise"]
# def two_numbers() -> tuple[int, int]:
#     raise NotImplementedError  # all, and the zeros among them

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_2_1() -> None:
#     every, zeros = two_numbers()
#     assert seal(every) == "02b97719", "all: tokens times features"
#     assert seal(zeros) == "a2069d05", "zeros: in which rows, in which columns?"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def two_numbers() -> tuple[int, int]:
#     return (77 + 256) * 4096, 77 * (4096 - 768 - 1280)
#
#
# exercise_2_1()
# print(two_numbers(), f"{two_numbers()[1] / two_numbers()[0]:.1%} zeros")
# # Only CLIP's 77 rows are filled, from 768 + 1280 features up to T5's 4096. A row of
# # zeros would have cost nothing less: attention reads it like any other.

# %% [markdown]
# **2.2 Code.** Pooled vectors make a search engine. Write `nearest`: which row of a
# shelf of vectors (N, D) points most nearly in the direction of the query (D,)? Vectors
# may have any length.

# %% tags=["active-ipynb", "exercise"]
# def nearest(query: Tensor, shelf: Tensor) -> int:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_2_2() -> None:
#     shelf = torch.tensor([[0.9, 0.5], [9, 7], [0.1, 0], [-5, 0], [2, -3]])
#     for query, expected in (((1.0, 0.0), 2), ((2.0, 1.1), 0), ((-0.1, 0.01), 3)):
#         found = int(nearest(torch.tensor(query), shelf))
#         assert found == expected, f"{query} points like row {expected}, not {found}"
#         longer = int(nearest(torch.tensor(query) * 50, shelf))
#         assert longer == expected, f"fifty times {query} points elsewhere: {longer}"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def nearest(query: Tensor, shelf: Tensor) -> int:
#     return int(F.cosine_similarity(query[None], shelf).argmax())
#
#
# exercise_2_2()
# rows = dict.fromkeys(named_scenes(ONE, 300))
# shelf, queries = ([form.format(*row) for row in rows] for form in ONES)
# (_, rows), (_, asked) = (clip_l(tokenize_l(t)) for t in (shelf, queries))
# right = [shelf[nearest(q, rows)] == text for q, text in zip(asked, shelf)]
# print(f"found in other words, n = {len(right)}: {share(torch.tensor(right))}")
# # The captions of one scene point the same way because CLIP's loss compared directions
# # only; lengths were free, and without the norm a long vector may win though another
# # points more nearly the same way.

# %% [markdown]
# **2.3 Code.** Rearrange a table of relative positions (32, H) so that T5, given the
# ids in reverse, returns the old states in reverse, for texts of any length. Beware of
# distance zero.

# %% tags=["active-ipynb", "exercise"]
# def mirrored(table: Tensor) -> Tensor:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_2_3() -> None:
#     table = torch.arange(64.0).view(32, 2)
#     found = mirrored(table.clone())
#     assert found.shape == (32, 2), f"(32, 2) is expected, not {tuple(found.shape)}"
#     rows = relative_buckets(200, 32, 128)  # of each pair of places
#     wrong = (found[rows] != table[rows].transpose(0, 1)).any(-1)
#     far = (torch.arange(200) - torch.arange(200)[:, None])[wrong].tolist()
#     assert not far, f"read backwards, a key {far[0]:+d} away has another bias"

# %% tags=["active-ipynb", "solution", "hide-cell"]
# def mirrored(table: Tensor) -> Tensor:
#     swapped = table.roll(16, dims=0)  # rows 0 … 15 ↔ rows 16 … 31
#     swapped[0] = table[0]  # distance zero is neither behind nor ahead
#     return swapped
#
#
# exercise_2_3()
# other = copy.deepcopy(t5)
# table = other.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
# table.weight.data = mirrored(table.weight.data)
# apart = (other(ids_t5.flip(1)).flip(1) - t5(ids_t5)).abs().max()
# print("read backwards, the states are the same:", apart.item() < 1e-4)
# # The table is all that T5 knows of order: behind and ahead change places, no more.

# %% [markdown]
# **2.4 Explore.** What does the causal mask do? Take it away from CLIP-L (a subclass of
# `CLIPAttention` without `is_causal`, set as the layers' `__class__`) and compare the
# pooled vectors of the six captions. Put it back, and put a word between two others in
# our prompt ("a red *long* dress …"): which states of the words *before* it change, in
# CLIP and in T5?

# %% tags=["active-ipynb", "hide-cell"]
# class Unmasked(CLIPAttention):
#     def forward(self, x: Tensor) -> Tensor:
#         projections = self.q_proj, self.k_proj, self.v_proj
#         q, k, v = (split_heads(f(x), self.heads) for f in projections)
#         return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
#
#
# blind = copy.deepcopy(clip_l)
# for layer in blind.text_model.encoder.layers:
#     layer.self_attn.__class__ = Unmasked
# ids, alone = tokenize_l(captions), map(tokenize_l.encode, captions)
# trials = {"masked": clip_l(ids)[1], "unmasked": blind(ids)[1]}
# rows = [blind(torch.tensor([row]))[1] for row in alone]
# trials["unmasked, no padding"] = torch.cat(rows)
# for name, vectors in trials.items():
#     alike = similarity(vectors)[0, 1:]
#     print(f"{name:20} caption 0 against 1 … 5:", *[f"{c:.2f}" for c in alike])

# %% tags=["active-ipynb", "hide-cell"]
# longer = PROMPT.replace("red ", "red long ")
# both = {"CLIP-L": (lambda ids: clip_l(ids)[0], tokenize_l), "T5": (t5, tokenize_t5)}
# for name, (encode, tokenize) in both.items():
#     n = len(tokenize.encode("a red")) - 1  # without the end token
#     a, b = encode(tokenize([PROMPT, longer]))
#     moved = (a - b)[:n].norm(dim=-1) / a[:n].norm(dim=-1)
#     moved = ", ".join(f"{m:.3f}" for m in moved)
#     print(f"{name:6} the tokens before the new word move by {moved}")
# # With the mask, nothing that comes later can reach an earlier token: exactly 0.
# # Without it each token reads 31 others, the padding among them, which it never did in
# # training. It is the padding that makes all captions alike to the end token: without
# # mask and padding only the one with colours exchanged wrongly passes for the same.

# %% [markdown]
# ## Summary
#
# You **wrote** attention with a bias three times, in loops, with two matrix products
# and as one fused call, and saw them agree. You **built** CLIP's text tower and T5's
# encoder and loaded trained weights into them. You **explained** by their gradients why
# the states are taken before CLIP's last layer and the pooled vector at the end token.
# You **computed** the buckets of relative positions and showed that T5 without them
# reads a bag of words. You **assembled** the context and the pooled vector, and
# **measured** what each reader knows and which of them is listened to. This is what our
# prompt hands on to the next chapters:

# %% tags=["active-ipynb"]
# rounded = [[round(x, 2) for x in v[:5].tolist()] for v in (context[0, 1], pooled[0])]
# print(journey.meets("context", context), "first word:", rounded[0])
# print(journey.meets("pooled", pooled), rounded[1])

# %% [markdown]
# ## Further reading
#
# - Radford et al. 2021, [Learning Transferable Visual Models From Natural Language
#   Supervision](https://arxiv.org/abs/2103.00020): CLIP.
# - Raffel et al. 2020, [Exploring the Limits of Transfer Learning with a Unified
#   Text-to-Text Transformer](https://arxiv.org/abs/1910.10683): T5 and its relative
#   positions.
# - Shazeer 2020, [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202),
#   and Zhang and Sennrich 2019, [Root Mean Square Layer
#   Normalization](https://arxiv.org/abs/1910.07467).
# - Saharia et al. 2022, [Photorealistic Text-to-Image Diffusion Models with Deep
#   Language Understanding](https://arxiv.org/abs/2205.11487): why a text-only encoder
#   helps pictures.
# - Esser et al. 2024, [Scaling Rectified Flow Transformers for High-Resolution Image
#   Synthesis](https://arxiv.org/abs/2403.03206), sections 4 and 5: three encoders
#   together.

# %% [markdown]
r"""
# LoRA: a few numbers beside the weights

In this chapter you teach the finished model a new manner from twenty pictures, and keep
what it learned in a **LoRA**: a file of thin matrices beside the weights.

After it you will be able to

- **see** that what fine-tuning changes is nearly of low rank, and **derive** LoRA;
- **attach** it to a model's layers, in 8 bits too, and **train** it;
- **weigh**, switch off, take out, add up and fuse several by name;
- **read** the files of the common trainers, and **write** two of their forms;
- **tell** LoRA from rsLoRA, LoHa, LoKr and DoRA by one formula each.
"""

# %% [markdown]
# ## Where we are
#
# Part I is done: words become a picture. Part II is about what people do with such a
# model. They want it to draw in their manner, or to know their dog. Chapter 7's loss
# would do it: go on training on their pictures. But then every weight changes. Of SD3.5
# Medium that is a file of gigabytes for each manner, and an optimiser that needs
# several times the model's memory. LoRA (Hu et al. 2021) learns a few thousandths of
# the numbers, leaves the weights alone, and can be taken off again.

# %%
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiff.dit import MMDiT
from minidiff.files.disk import excerpt
from minidiff.files.layout import ENCODERS
from minidiff.files.lora_files import METADATA, Stored, notes_of, read_updates
from minidiff.files.weights import (
    Source,
    same_names,
    transformer_sources,
    write_tensors,
)
from minidiff.interface.checks import check_range

# %% tags=["active-ipynb", "hide-input"]
# import copy
# import tempfile
#
# import minidiff
# from minidiff import viz
# from minidiff.classroom import journey
# from minidiff.classroom.exercises import check
# from minidiff.classroom.journey import PROMPT
# from minidiff.data import rng
# from minidiff.training import Batch, noise_and_levels, transformer_loss
#
# _ = torch.set_grad_enabled(False)
# viz.show_pipeline("lora")

# %% [markdown]
# What arrives is the whole pipeline of chapter 8, and from chapter 2 the context of a
# prompt: words will mean what they meant. A LoRA usually changes the transformer alone.

# %% tags=["active-ipynb"]
# pipe = minidiff.load("tiny", fast=False)  # the chapters' own blocks, to the last bit
# pipe.progress = False
# print(journey.meets("context", pipe.encode_prompt(PROMPT)[0]))

# %% [markdown]
# ## A picture of the thing
#
# A linear layer is a matrix $W$. A LoRA leaves it as it is and lays a second way beside
# it, through a bottleneck of $r$ numbers: a wide, flat matrix $A$ and a tall, thin one,
# $B$. To scale, for the first layer of a block's MLP in the tiny model and in SD3.5
# Medium, at rank 8:

# %% tags=["active-ipynb"]
# sizes = {"Tiny: 640 × 160": (640, 160), "Medium: 6144 × 1536": (6144, 1536)}
# viz.show_factors(sizes, rank=8)

# %% [markdown]
# ## Is the change really of low rank?
#
# Let us look before we believe. First a manner to learn: *line drawings*. Twenty
# garments, drawn by the shipped model itself, are turned into drawings: dark where the
# brightness changes, white elsewhere. The captions say nothing of lines.

# %% tags=["active-ipynb"]
# def line_drawing(pictures: Tensor) -> Tensor:
#     """Dark lines on white where (B, 3, H, W), in [0, 1], changes its brightness."""
#     gray = F.avg_pool2d(pictures.mean(1, keepdim=True), 3, 1)
#     gray = F.pad(gray, (2, 2, 2, 2), mode="replicate")  # → (B, 1, H + 2, W + 2)
#     across = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
#     down = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
#     return (1 - 4 * torch.hypot(across, down)).clamp(0, 1).expand(-1, 3, -1, -1)
#
# def draw(prompts: list[str], seed: int = 0) -> Tensor:
#     return pipe(prompts, seed=seed, num_inference_steps=10, output_type="pt")

# %% tags=["active-ipynb"]
# garments = ("dress", "coat", "bag", "shirt", "sneaker")
# colours = ("red", "blue", "green", "yellow")
# named = [f"a {colour} {garment}" for garment in garments for colour in colours]
# captions = [f"{name} on a white background" for name in named]
# photos = draw(captions, seed=100)
# lines = line_drawing(photos)
# pairs = torch.cat([photos[::4], lines[::4]])
# viz.show_images(pairs, named[::4] * 2, columns=5, low=0)

# %% [markdown]
# Then chapter 7's training in its smallest form. Every batch is 6 of the 20 drawings
# with fresh noise; the loss is chapter 6's. We first let *all* weights learn, in a copy
# of the transformer.

# %% tags=["active-ipynb"]
# def lesson(pictures: Tensor) -> Callable[[int], Batch]:
#     latents = pipe.vae.scale(pipe.vae.encode(pictures * 2 - 1).mode())
#     context, pooled = pipe.encode_prompt(captions)
#
#     def batch(step: int) -> Batch:
#         numbers = torch.arange(6 * step, 6 * step + 6)
#         noise, sigma = noise_and_levels(numbers, tuple(latents.shape[1:]), seed=0)
#         i = rng.bits(1, numbers, 1)[:, 0] % len(captions)
#         return {"x0": latents[i], "noise": noise, "sigma": sigma,
#                 "context": context[i], "pooled": pooled[i]}
#
#     return batch

# %% tags=["active-ipynb"]
# def learn(model: nn.Module, batch: Callable, steps: int, rate: float) -> None:
#     learning = [p for p in model.parameters() if p.requires_grad]
#     optimizer = torch.optim.AdamW(learning, weight_decay=0)
#     with torch.enable_grad():
#         for step in range(steps):
#             warm, left = min(1, (step + 1) / 10), 1 - step / steps
#             optimizer.param_groups[0]["lr"] = rate * warm * left
#             transformer_loss(model, batch(step)).backward()
#             optimizer.step()
#             optimizer.zero_grad()
#
# full = copy.deepcopy(pipe.transformer).requires_grad_(True)
# learn(full, lesson(lines), steps=50, rate=3e-3)

# %% [markdown]
# Now take a layer, the queries, keys and values of a block in the middle, and subtract:
# $\Delta W = W_\text{after} - W$. Its *singular value decomposition* writes it as a sum
# of directions,
#
# $$\Delta W = \sum_i s_i\, u_i v_i^\top, \qquad s_1 \ge s_2 \ge \dots \ge 0,$$
#
# each a column times a row, a matrix of rank one. The squares of the $s_i$ add up to
# the square of the matrix's size, so they say what share of it the first few directions
# hold. We compare $\Delta W$ with $W$ itself and with random numbers.

# %% tags=["active-ipynb"]
# def share(matrix: Tensor) -> Tensor:
#     """How much of a matrix its first 1, 2, 3, … directions hold."""
#     power = torch.linalg.svdvals(matrix) ** 2
#     return power.cumsum(0) / power.sum()
#
# name = "joint_blocks.2.x_block.attn.qkv"
# before = pipe.transformer.get_submodule(name).weight
# change = full.get_submodule(name).weight - before
# kept = {"the change": share(change), "the weights": share(before),
#         "random numbers": share(torch.randn_like(change))}
# counted = {name: (torch.arange(1, 161), curve) for name, curve in kept.items()}
# viz.show_curves(counted, xlabel="directions", ylabel="share held")

# %% tags=["active-ipynb"]
# first = {name: curve[7].item() for name, curve in kept.items()}
# assert first["the change"] > first["the weights"]
# print("of 160 directions 8 hold more of the change than of the weights: True")

# %% [markdown]
# In this layer the weights need many directions; what twenty pictures changed needs
# few. (Nothing forces it: an optimiser that moves every number by about as much could
# fill all directions.) What do the few suffice for? By the theorem of Eckart and Young
# the first $r$ directions are the *best* matrix of rank $r$, and cutting $\Delta W$
# there costs $s_{r+1}^2 + s_{r+2}^2 + \dots$ of its square. So cut the change of every
# matrix in the blocks to rank 1, 8 and (nothing is cut) 160, and draw. All else
# (biases, the layers outside the blocks) keeps its whole change.

# %% tags=["active-ipynb"]
# def cut(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
#     """The nearest product of up (out, rank) and down (rank, in) to a change."""
#     u, s, v = torch.linalg.svd(change, full_matrices=False)
#     return u[:, :rank] * s[:rank], v[:rank]
#
# things = ("a purple dress", "an orange coat", "a black bag")  # in no caption
# tests = [f"{thing} on a white background" for thing in things]
# base, original = draw(tests), pipe.transformer
# columns = {"the model": base}
# for rank in (1, 8, 160):
#     pipe.transformer = copy.deepcopy(full)
#     for name, layer in original.named_modules():
#         if isinstance(layer, nn.Linear) and name.startswith("joint_blocks"):
#             learned = pipe.transformer.get_submodule(name)
#             up, down = cut(learned.weight - layer.weight, rank)
#             learned.weight.copy_(layer.weight + up @ down)
#     columns[f"rank {rank}"] = draw(tests)
# pipe.transformer = original

# %% tags=["active-ipynb"]
# def table(columns: dict[str, Tensor]) -> "viz.BookFigure":
#     rows = torch.stack(list(columns.values()), 1).flatten(0, 1)  # a row a prompt
#     return viz.show_images(rows, list(columns), columns=len(columns), low=0)
#
# table(columns)

# %% [markdown]
# Compare rank 8 with all 160 directions: of the lines little is missing. If the change
# is of low rank anyway, we need not compute it in full first: let only a matrix of low
# rank *learn*.
#
# ## The mathematics
#
# LoRA writes the change as a product and learns its two factors:
#
# $$W' = W + \frac{\alpha}{r}\, B A,\qquad A \in \mathbb R^{r \times \text{in}},\;
#   B \in \mathbb R^{\text{out} \times r}$$
#
# A product of these shapes has at most rank $r$, and every matrix of rank $r$ is one.
# For $x$ a token, $W'x = Wx + \frac\alpha r B(Ax)$: the second way, of the picture
# above. $A$ begins random and $B$ at zero, so the first picture is the model's own.
# Were both zero, nothing could learn: with $G$ the gradient of $W'$,
#
# $$\frac{\partial \mathcal L}{\partial A} = \frac\alpha r B^\top G, \qquad
#   \frac{\partial \mathcal L}{\partial B} = \frac\alpha r\, G A^\top,$$
#
# and each needs the other.
#
# Why $\alpha / r$? A choice of scale, so that a rate found for one rank may serve for
# another: each of the $r$ directions adds its share, and their sum is divided by their
# number. Kalajdzievski (2023) shows that this divides by too much. With plain gradient
# descent the scale counts twice, in what $B$ learns and again in what it adds, so that
# the change grows like $r$ times the scale's square; it keeps its size with
# $\alpha/\sqrt r$: *rsLoRA*. In a file the rank can be read off the shapes; $\alpha$
# cannot, and a reader that loses it draws with the wrong strength.
#
# | symbol | variable | meaning | Tiny | Medium |
# |---|---|---|---|---|
# | $W$ | `layer.weight` | the layer's weights, (out, in) | 480 × 160 | 4608 × 1536 |
# | $A$ | `down` | (r, in) | 8 × 160 | 8 × 1536 |
# | $B$ | `up` | (out, r); not the batch, here | 480 × 8 | 4608 × 8 |
# | $r$ | `rank` | the bottleneck | 8 | 4 to 64 |
# | $\alpha$ | `alpha` | strength; $r$ if nothing is said | 8 | |
# | $w$ | `weight` | how much of the whole is wanted, when drawing | 0 to 1 | 0 to 1 |

# %% [markdown]
# ## Build it, first with the whole matrix
#
# The formula, literally: build the changed matrix and multiply. It costs a matrix as
# large as the layer at every call.


# %%
def adapt_naively(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """Tokens (…, in) through the changed matrix (out, in) itself → (…, out)."""
    return F.linear(x, weight + scale * up @ down)


# %% [markdown]
# ## Then by the bottleneck
#
# $(BA)x = B(Ax)$: two thin products, never a large matrix. For a token that is
# $r\,(\text{in} + \text{out})$ multiplications more than the layer's own
# $\text{in} \cdot \text{out}$.


# %%
def adapt(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The same through ``down`` (r, in) and ``up`` (out, r), beside the matrix."""
    return F.linear(x, weight) + scale * F.linear(F.linear(x, down), up)


# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# x, w = torch.randn(2, 64, 160), torch.randn(480, 160)
# a, b = torch.randn(8, 160), torch.randn(480, 8)
# pairs = adapt_naively(x, w, a, b, 0.5), adapt(x, w, a, b, 0.5)
# print("both ways agree:", torch.allclose(*pairs, rtol=1e-4, atol=1e-2))

# %% [markdown]
# ## Then as a module
#
# Exported, it is an `Update`: a module that can be called on tokens and can say which
# change of the matrix it stands for. `LowRank` is the one that learns. It computes in
# the dtype of its own weights: a model in bfloat16 or 8 bits may have an update that
# learns in float32.


# %%
class Update(nn.Module):
    """What is added to a linear layer's answer: tokens (…, in) → (…, out).

    It computes in the dtype of its own weights, which may be another than the model's.
    """

    casts = True

    def matrix(self) -> Tensor:
        """The change of the layer's weights (out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        change = self.matrix()
        return F.linear(x.to(change.dtype), change)


class LowRank(Update):
    """(α/r)·B·A·x; Hu et al. 2021, section 4.1. B begins at zero: nothing changes."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, alpha: float | None = None
    ) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.alpha = rank if alpha is None else alpha
        self.scale = self.alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.down.weight.dtype)
        return self.up(self.down(x)) * self.scale

    def matrix(self) -> Tensor:
        return self.up.weight @ self.down.weight * self.scale


# %% [markdown]
# ## Where it attaches
#
# To which layers? To any that is linear; where the weights are (in memory, in 8 bits,
# still in their file) does not matter to a way beside them. An `AdaptedLinear` takes
# the layer's place, holds it, and adds what stands beside it. It is an ordinary module:
# it moves and is copied with its model, and when its last update goes the layer stands
# again where it stood.


# %%
@runtime_checkable
class Linear(Protocol):
    """A layer (…, in) → (…, out) that can be adapted, wherever its weights are."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Target:
    """A linear layer ``name`` of a model, or the rows of it that have a name of theirs.

    ``layer`` is the layer itself, without the updates beside it.
    """

    name: str
    layer: Linear
    rows: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer, or of its rows."""
        return len(self.rows), self.layer.in_features

    def matrix(self) -> Tensor:
        """The weights (out, in), in whatever form they are stored."""
        layer: Any = self.layer
        whole = layer.weight if isinstance(layer, nn.Linear) else layer.matrix()
        return whole[self.rows.to(whole.device)]


# %%
class Beside(nn.Module):
    """An update, its ``weight``, and the rows of the layer's output that it changes."""

    rows: Tensor

    def __init__(self, rows: Tensor, update: Update) -> None:
        super().__init__()
        self.update, self.weight = update, 1.0
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if not self.weight:
            return out
        added = self.update(x).to(out.dtype)
        return out.index_add(-1, self.rows, added, alpha=self.weight)


class AdaptedLinear(nn.Module):
    """A linear layer with updates beside it; it stands where the layer stood.

    ``layer`` is PyTorch's, or one whose weights are in 8 bits or stay in their file.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, Linear)
        self.layer, self.updates = layer, nn.ModuleList()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    @property
    def dtype(self) -> torch.dtype:
        """In what the updates compute."""
        return next(self.updates.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        for beside in self.updates:
            out = beside(x, out)
        return out


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """The layers that have updates beside them, with their names."""
    named = model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, AdaptedLinear)]


# %% [markdown]
# Layers have two sets of names: the official files', which are ours, and diffusers'.
# There three matrices $q$, $k$, $v$ stand for our one `qkv`, so that an update of one
# of them changes a third of our rows. And two modulations have their halves exchanged:
# there the rows change places.


# %%
def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers of ``model`` by name; of an adapted one the layer alone."""
    inside = tuple(f"{name}." for name, _ in adapted_layers(model))
    found: dict[str, Linear] = {}
    for name, module in model.named_modules():
        layer = module.layer if isinstance(module, AdaptedLinear) else module
        if isinstance(layer, Linear) and not name.startswith(inside):
            found[name] = layer
    return found


def targets(model: nn.Module) -> dict[str, Target]:
    """The linear layers of an MMDiT or a text encoder, under diffusers' names."""
    layers = linear_layers(model)
    sources = {name: Source((name,)) for name in layers}
    if isinstance(model, MMDiT):
        sources = transformer_sources(layers)
    found = {}
    for ours, source in sources.items():
        rows = torch.arange(layers[ours].out_features).chunk(len(source.names))
        if source.how == "swap":
            rows = (torch.cat(rows[0].chunk(2)[::-1]),)
        for name, part in zip(source.names, rows, strict=True):
            found[name] = Target(ours, layers[ours], part)
    return found


def all_targets(model: nn.Module) -> dict[str, Target]:
    """The layers under every name: the official files', whole, and diffusers'."""
    whole = {
        name: Target(name, layer, torch.arange(layer.out_features))
        for name, layer in linear_layers(model).items()
    }
    return whole | targets(model)


# %% tags=["active-ipynb"]
# shown = "joint_blocks.0.x_block.attn.qkv", "final_layer.adaLN_modulation.1"
# for name, target in all_targets(pipe.transformer).items():
#     if target.name in shown:
#         parts = target.rows.tensor_split((target.rows.diff() < 0).nonzero()[:, 0] + 1)
#         rows = ", then ".join(f"{part[0]} to {part[-1]}" for part in parts)
#         print(f"{name}\n    rows {rows} of {target.name}")

# %% [markdown]
# To attach is to look a layer up by any of its names and to put the update beside it.


# %%
def bring(updates: Mapping[str, Update], model: nn.Module) -> None:
    """Move ``updates`` to the device and dtype in which ``model`` computes."""
    first = next(model.parameters())  # a layer's own may be in 8 bits, or away
    for update in updates.values():
        update.to(first)


def attach(updates: Mapping[str, Update], model: nn.Module) -> list[Beside]:
    """Put each of ``updates`` beside the layer that it is named for."""
    found, put = all_targets(model), []
    for name, update in updates.items():
        layer = model.get_submodule(found[name].name)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer)
            model.set_submodule(found[name].name, layer)
        device = next(update.parameters()).device
        put.append(Beside(found[name].rows.to(device), update))
        layer.updates.append(put[-1])
    return put


def detach(updates: Iterable[Update], model: nn.Module) -> None:
    """Take ``updates`` off; a layer without any more stands where it stood before."""
    gone = set(updates)
    for name, layer in adapted_layers(model):
        kept = [beside for beside in layer.updates if beside.update not in gone]
        layer.updates = nn.ModuleList(kept)
        if not kept:
            model.set_submodule(name, layer.layer)


# %% [markdown]
# The trainer of diffusers adapts attention: the projections of both streams. `add_lora`
# puts fresh updates there, and beside Medium's second attention too, which that trainer
# leaves out; the model's own weights stop learning.


# %%
# The projections of attention: those of diffusers' trainer, and Medium's second one.
ATTENTION = (
    "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    names: Sequence[str] = ATTENTION,
) -> dict[str, LowRank]:
    """New updates for all layers whose name ends in one of ``names``, attached.

    The model's own weights stop learning. Raises ValueError for a name that matches no
    layer (but for those of ``ATTENTION``), and for a rank that a layer cannot have.
    """
    check_range("rank", rank, 1)
    layers, ends = targets(model), tuple(f".{name}" for name in names)
    chosen = {n: t for n, t in layers.items() if f".{n}".endswith(ends)}
    own = [name for name in names if name not in ATTENTION]
    missing = [n for n in own if not any(f".{c}".endswith(f".{n}") for c in chosen)]
    if missing or not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        wanted = ", ".join(missing or names)
        raise ValueError(f"no layer is called {wanted}; their names end in {known}")
    if rank > (largest := min(min(t.shape) for t in chosen.values())):
        raise ValueError(f"rank is {rank}; expected at most {largest} in these layers")
    model.requires_grad_(False)
    updates = {
        name: LowRank(t.shape[1], t.shape[0], rank, alpha) for name, t in chosen.items()
    }
    bring(updates, model)
    attach(updates, model)
    return updates


# %% [markdown]
# How many numbers is that? $r\,(\text{in} + \text{out})$ in place of
# $\text{in} \cdot \text{out}$, for each layer:

# %% tags=["active-ipynb"]
# from minidiff.engine.loading import blueprint
#
# for model in ("tiny", "sd3.5-medium", "sd3.5-large"):
#     transformer = blueprint(model)["transformer"]  # shapes alone
#     whole = sum(p.numel() for p in transformer.parameters())
#     chosen = targets(transformer).items()
#     ours = [t.shape for n, t in chosen if n.endswith(tuple(ATTENTION))]
#     few = sum(8 * sum(shape) for shape in ours)
#     print(f"{model}: {few / 1e6:.2f} of {whole / 1e6:,.1f} million numbers at rank 8")

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# ink = add_lora(pipe.transformer, rank=8)
# print("the model draws as before:", torch.equal(draw(tests), base))
# learn(pipe.transformer, lesson(lines), steps=80, rate=1e-2)

# %% [markdown]
# Its rate is larger than that of the full fine-tuning above: a step of $B$ reaches $W$
# only through $A$, whose numbers begin below $1/\sqrt{\text{in}}$.

# %% [markdown]
# ## Keep it
#
# A file holds both matrices of every layer, and $\alpha$. diffusers' style keeps the
# latter in the header, beside the names of the layers.


# %%
def save_lora(updates: Mapping[str, Mapping[str, LowRank]], file: Path | str) -> None:
    """Write updates, by component and layer, as a file that diffusers loads."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, object] = {}
    for part, layers in updates.items():
        ranks = {name: update.down.out_features for name, update in layers.items()}
        alphas = {name: update.alpha for name, update in layers.items()}
        metadata |= notes_of(part, ranks, alphas)
        for name, update in layers.items():
            for key, weight in (("A", update.down.weight), ("B", update.up.weight)):
                tensors[f"{part}.{name}.lora_{key}.weight"] = (
                    weight.detach().contiguous()
                )
    write_tensors(tensors, file, **{METADATA: json.dumps(metadata, sort_keys=True)})


# %% [markdown]
# kohya's keys name the official layers, where q, k and v are one. Their three updates
# become one of three times the rank: $A$ below $A$, each $B$ in its own rows.


# %%
KOHYA = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}
KOHYA |= {"text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}


def save_kohya(
    updates: Mapping[str, Mapping[str, LowRank]],
    models: Mapping[str, nn.Module],
    file: Path | str,
) -> None:
    """Write updates of ``models`` in kohya's keys, which ComfyUI loads too.

    They name the official files' layers: what changes parts of its rows becomes one
    update of the sum of the ranks.
    """
    tensors: dict[str, Tensor] = {}
    for part, layers in updates.items():
        found = all_targets(models[part])
        for ours in dict.fromkeys(found[name].name for name in layers):
            own = [(found[n], u) for n, u in layers.items() if found[n].name == ours]
            key = f"{KOHYA[part]}{ours.replace('.', '_')}"
            state = stacked(own, found[ours].shape[0])
            tensors |= {f"{key}.{end}": tensor for end, tensor in state.items()}
    write_tensors(tensors, file)


@torch.no_grad()
def stacked(own: Sequence[tuple[Target, LowRank]], outputs: int) -> dict[str, Tensor]:
    """Updates of a layer's rows as one: A below A, each B in its own rows."""
    down = torch.cat([update.down.weight for _, update in own])  # → (Σ r, in)
    up, start = down.new_zeros(outputs, len(down)), 0
    scale = own[0][1].scale
    for target, update in own:
        end = start + update.down.out_features
        up[target.rows, start:end] = update.up.weight * (update.scale / scale)
        start = end
    alpha = torch.tensor(scale * len(down))
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}


# %% tags=["active-ipynb"]
# folder = Path(tempfile.mkdtemp())
# save_lora({"transformer": ink}, folder / "ink.safetensors")
# parts = {"transformer": pipe.transformer}
# save_kohya({"transformer": ink}, parts, folder / "kohya.safetensors")
# detach(ink.values(), pipe.transformer)
# size = (folder / "ink.safetensors").stat().st_size
# print("taken off, the model draws as before:", torch.equal(draw(tests), base))
# print(f"the file: {size / 1e6:.1f} MB")

# %% [markdown]
# ## Reading a file
#
# Trainers agree on the formula and on nothing else. One table says whose keys a file
# has (its beginning), another what each tensor is (its end); what matches neither is
# refused by the name of what it is. A layer may be called in either set of names, with
# dots or with underscores, so we look it up under all of them.

# %% tags=["active-ipynb"]
# from minidiff.files.lora_files import STYLES
#
# for prefix, style, part in STYLES:
#     print(f"{prefix + '…':>38}  {style:<19} {part}")

# %% [markdown]
# ### Other ways to be small
#
# Four relatives appear in files. LoHa and LoKr also write the change by few numbers,
# but join *two* products: entry by entry, or by a copy of the second for every entry of
# the first.
#
# $$\text{LoHa: } (B_1 A_1) \odot (B_2 A_2) \qquad
#   \text{LoKr: } C_1 \otimes (B_2 A_2)$$
#
# A product of entries can have rank $r^2$, a Kronecker product the product of both
# ranks. *DoRA* keeps LoRA's product but learns the length $m_i$ of each row apart from
# its direction:
#
# $$w_i' = m_i\, \frac{w_i + \Delta w_i}{\lVert w_i + \Delta w_i \rVert}$$
#
# (some trainers mean columns; the shape of $m$ tells). It depends on $W$, so we compute
# the whole change once, when the file is read. rsLoRA is only another divisor.


# %%
class Joined(Update):
    """Two matrices made one by ``join``, each a product of the matrices in its chain.

    LoHa (Hyeon-Woo et al. 2022) joins by ``torch.mul``, entry by entry; LoKr (Yeh et
    al. 2024) by ``torch.kron``: a copy of the second for every entry of the first.
    """

    def __init__(
        self,
        join: Callable[[Tensor, Tensor], Tensor],
        chains: Sequence[Sequence[Tensor]],
        scale: float,
    ) -> None:
        super().__init__()
        self.join, self.scale = join, scale
        self.chains = nn.ModuleList(nn.ParameterList(chain) for chain in chains)

    def matrix(self) -> Tensor:
        chains = [list(chain.parameters()) for chain in self.chains]
        first, second = (c[0] if len(c) == 1 else c[0] @ c[1] for c in chains)
        return self.join(first, second) * self.scale


# %%
class Whole(Update):
    """A change (out, in) that is held as it is, as large as the layer's weights."""

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(change, requires_grad=False)

    def matrix(self) -> Tensor:
        return self.change


JOINS = {"LoHa": torch.mul, "LoKr": torch.kron}


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA changes of ``weight`` (out, in); Liu et al. 2024, equation 5.

    Each row of weight + change is given its length in ``magnitude``, (out,) or
    (out, 1); with (1, in) each column.
    """
    axis = 0 if magnitude.ndim == 2 and len(magnitude) == 1 else 1
    changed = weight + change
    length = magnitude.view(1, -1) if axis == 0 else magnitude.view(-1, 1)
    return changed * (length / changed.norm(dim=axis, keepdim=True)) - weight


# %% tags=["active-ipynb"]
# thin = [[torch.randn(160, 4), torch.randn(4, 160)] for _ in range(2)]
# small = [[torch.randn(8, 8)], [torch.randn(20, 4), torch.randn(4, 20)]]
# forms = {"LoHa": Joined(torch.mul, thin, 1.0), "LoKr": Joined(torch.kron, small, 1.0)}
# for name, update in (forms | {"LoRA": LowRank(160, 160, 4)}).items():
#     update.up.weight.normal_() if name == "LoRA" else None
#     numbers = sum(p.numel() for p in update.parameters())
#     rank = torch.linalg.matrix_rank(update.matrix()).item()
#     print(f"{name}: {numbers} numbers, a change of rank {rank} of 160")

# %% [markdown]
# Now the reader itself. Every layer and shape is checked before the first is changed:
# half a LoRA on a model would be worse than none.


# %%
def read_lora(
    file: Path | str, models: Mapping[str, nn.Module]
) -> dict[str, dict[str, Update]]:
    """The updates in ``file`` for each model, by layer.

    Raises ValueError for a file that is no LoRA, and naming the first layer that
    ``models`` do not have, or whose shape is another: it belongs to another model.
    """
    names = {part: all_targets(model) for part, model in models.items()}
    joined = {p: {n.replace(".", "_"): n for n in own} for p, own in names.items()}
    chosen: dict[tuple[str, str], tuple[Stored, Target]] = {}
    for one in read_updates(file):
        layer = joined.get(one.part, {}).get(one.layer, one.layer)
        if (target := names.get(one.part, {}).get(layer)) is None:
            raise no_target(one, models.get(one.part))
        check_target(one, target)
        if (one.part, layer) in chosen:
            raise ValueError(f"{file} updates {one.part}.{layer} under two names")
        chosen[one.part, layer] = one, target
    found: dict[str, dict[str, Update]] = {}
    for (part, layer), pair in chosen.items():
        found.setdefault(part, {})[layer] = build(*pair)
    return found


# %%
@torch.no_grad()
def build(one: Stored, target: Target) -> Update:
    """The update that a file holds for ``target``."""
    chains = one.read()
    update: Update
    if one.kind == "LoRA":
        ((up, down),) = chains
        with torch.device("meta"):  # no random numbers are drawn for what is read
            update = LowRank(down.shape[1], up.shape[0], down.shape[0])
        state = {"down.weight": down, "up.weight": up}
        update.load_state_dict(state, assign=True)
        update.scale, update.alpha = one.scale, one.scale * down.shape[0]
    else:
        update = Joined(JOINS[one.kind], chains, one.scale)
    if one.magnitude:
        weight = target.matrix()
        wide = weight.device, torch.promote_types(weight.dtype, torch.float32)
        length = one.file.read(one.magnitude).to(*wide)
        update = Whole(decomposed(weight.to(*wide), update.to(*wide).matrix(), length))
    return update.requires_grad_(False)


# %%
def no_target(one: Stored, model: nn.Module | None) -> ValueError:
    """What to say of an update for a layer that is not linear, or not there."""
    file, keys = one.file.path, f"{one.style} keys"
    if model is None and one.part in ENCODERS:
        found = f"{file} updates {one.part}, a {ENCODERS[one.part]}, which this"
        return ValueError(f"{found} pipeline leaves out; expected one that has it")
    kinds = dict(model.named_modules()) if model else {}
    rename = transformer_sources if isinstance(model, MMDiT) else same_names
    for name, source in rename(kinds).items():
        kinds |= dict.fromkeys(source.names, kinds[name])
    kinds |= {name.replace(".", "_"): module for name, module in kinds.items()}
    if other := kinds.get(one.layer):
        found = f"{file} updates {one.name}, which is a {type(other).__name__}"
        return ValueError(f"{found}; expected linear layers alone")
    what = f"this one has no linear layer {excerpt(one.name)}"
    return ValueError(f"{file} ({keys}) was made for another model: {what}")


def check_target(one: Stored, target: Target) -> None:
    """Raise ValueError unless the update is of the layer's shape."""
    if one.shape != target.shape:
        raise ValueError(
            f"{one.file.path} ({one.style} keys) was made for another model: it "
            f"updates {one.name} of shape {list(one.shape)}; "
            f"expected {list(target.shape)}"
        )
    size = one.file.entries[one.magnitude].shape if one.magnitude else ()
    out, inputs = target.shape
    if size not in ((), (out,), (out, 1), (1, inputs)):
        found = f"{one.file.path}: {one.magnitude} has shape {excerpt(list(size))}"
        raise ValueError(f"{found}; expected [{out}], [{out}, 1] or [1, {inputs}]")


# %% tags=["active-ipynb"]
# pictures = []
# for name in ("ink", "kohya"):
#     found = read_lora(folder / f"{name}.safetensors", parts)["transformer"]
#     attach(found, pipe.transformer)
#     pictures.append(draw(tests))
#     detach(found.values(), pipe.transformer)
#     print(f"{name}: {len(found)} updates")
# print("both files draw the same:", torch.allclose(*pictures, atol=1e-3))


# %% [markdown]
# ## Several at once
#
# Ways beside a layer add up, so a model may wear several LoRAs, each with a weight.
# `pipe.adapters` (`minidiff.engine.adapters`) keeps them by name: it reads the file,
# attaches its updates to the transformer and the text encoders, sets their `weight`,
# and lets every picture note which acted.

# %% tags=["active-ipynb"]
# drawing = pipe.adapters.load(folder / "ink.safetensors")
# columns = {}
# for drawing.weight in (0.0, 0.5, 1.0):
#     columns[f"weight {drawing.weight:g}"] = draw(tests)
# columns["the model's, in lines"] = line_drawing(base)
# table(columns)

# %% [markdown]
# In each row one seed, one prompt, three weights: does the thing that is drawn stay,
# and the manner come? The last column is what the model's own picture gives when
# *drawn* as lines. Here is a number for "the subject stays": how a drawing correlates
# with those lines, and with those of another prompt.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def likeness(a: Tensor, b: Tensor) -> float:
#     """The mean correlation of two batches' pictures, a little blurred."""
#     soft = [F.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1) for x in (a, b)]
#     centred = [x - x.mean(1, keepdim=True) for x in soft]
#     return F.cosine_similarity(*centred).mean().item()
#
# styled, wanted = columns["weight 1"], line_drawing(base)
# print(f"to its own lines, n = {len(tests)}: drawn by the LoRA "
#     f"{likeness(styled, wanted):.2f}, the photograph {likeness(base, wanted):.2f}")
# print(f"to another's lines: {likeness(styled, wanted.roll(1, 0)):.2f}")
# assert likeness(styled, wanted) > likeness(base, wanted)
# assert likeness(styled, wanted) > likeness(styled, wanted.roll(1, 0))

# %% [markdown]
# A second manner: *yellow paper*. Every pixel of the same pictures is multiplied by a
# tint, as if they were printed on it: white turns yellow, and of all blue less than
# half is left. Both are trained by themselves; neither has seen the other.

# %% tags=["active-ipynb"]
# drawing.remove()
# yellow = add_lora(pipe.transformer, rank=8)
# tint = torch.tensor([1.0, 0.85, 0.45]).view(3, 1, 1)
# learn(pipe.transformer, lesson(photos * tint), steps=60, rate=2e-2)
# save_lora({"transformer": yellow}, folder / "paper.safetensors")
# detach(yellow.values(), pipe.transformer)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# drawing = pipe.adapters.load(folder / "ink.safetensors")
# paper = pipe.adapters.load(folder / "paper.safetensors")
# columns = {"neither": base}
# for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
#     drawing.weight, paper.weight = weights
#     columns["ink {:g}, paper {:g}".format(*weights)] = draw(tests)
# print("on the pipeline:", ", ".join(pipe.adapters))
# blue = {name: x[:, 2, [0, -1]].mean().item() for name, x in columns.items()}
# for name, value in (blue | {"the paper": 0.45 * blue["neither"]}).items():
#     print(f"{name:14} blue of the ground {value:.2f}")
# table(columns)

# %% [markdown]
# Look at each row: what took the tint, the thing or the ground, and did the lines stay?
# The numbers say how far the ground is from the paper. Paper alone tints the things and
# leaves the ground nearly white. With the ink beside it the lines stay, and behind
# dress and coat the ground turns yellow. (Every caption says that it is white, and
# sixty steps on twenty pictures may not outweigh that: a manner that contradicts its
# captions is a hard one.) Sums of LoRAs are a habit, not a theorem: the two together
# may do what neither does alone. Two that pull the same layers apart can spoil the
# picture, and smaller weights are the usual remedy.
#
# ## Fusing, and what rounding takes
#
# Ways beside the weights cost time at every step. If the LoRA is to stay, add its
# matrix to the weights once: *fuse* it. The sum is then rounded to the weights' dtype,
# and a change smaller than half a step of that dtype is lost.


# %%
def check_fusable(updates: Mapping[str, Update], model: nn.Module) -> None:
    """Raise ValueError where weights are in 4 or 8 bits or stay in their file."""
    layers = all_targets(model)
    for name in updates:
        if not isinstance(layers[name].layer, nn.Linear):
            raise ValueError(
                f"a LoRA cannot be added to the weights of {name}: they are in 4 or "
                "8 bits or stay in a file; expected an unfused LoRA and no compilation"
            )


@torch.no_grad()
def fuse(updates: Mapping[str, Update], model: nn.Module, weight: float = 1.0) -> None:
    """Add the updates to the weights themselves: no further cost, and no way back.

    Raises ValueError, before any is added, where a layer's weights are in 4 or 8 bits
    or stay in their file.
    """
    check_fusable(updates, model)
    layers = all_targets(model)
    for name, update in updates.items():
        layer, rows = layers[name].layer, layers[name].rows
        assert isinstance(layer, nn.Linear)
        new = layer.weight.clone()  # the weight may be a read-only memory map
        wide = torch.promote_types(new.dtype, torch.float32)
        change = update.to(new.device, wide).matrix() * weight
        new[rows] = (new[rows] + change).to(new)  # summed, then rounded
        layer.weight = nn.Parameter(new, layer.weight.requires_grad)


# %% tags=["active-ipynb"]
# layer = pipe.transformer.joint_blocks[2].x_block.attn.qkv
# beside, lost = layer.updates[0], {}
# weight, delta = layer.layer.weight[beside.rows], beside.update.matrix()
# for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
#     stored = weight.to(dtype).float()
#     kept = (stored + delta).to(dtype).float() - stored
#     lost[str(dtype)[6:]] = ((kept - delta).norm() / delta.norm()).item()
# ordered = [*lost.values()] == sorted(lost.values())
# print("each loses more than the one before:", ordered)
# viz.show_bars(lost, ylabel="error, relative to the change")

# %% [markdown]
# bfloat16 keeps eight bits of a number, these 8-bit floats keep four; the bars say how
# large the rounding is beside the change itself. That is why a LoRA stays *beside*
# weights in 8 bits, in the precision in which the model computes.
#
# Let us fuse both at the weights last set, and compare with the ways beside.

# %% tags=["active-ipynb"]
# for one in (drawing, paper):
#     one.fuse()
# same = torch.allclose(draw(tests), columns["ink 1, paper 1"], atol=0.01)
# print("fused and beside agree:", same)
# pipe = minidiff.load("tiny")  # there is no way back
# pipe.progress = False

# %% [markdown]
# ## Predict, then break it
#
# **One.** The LoRA is trained for weight 1. What will weight −1 draw, and what 3? Write
# it down, then look.

# %% tags=["active-ipynb", "hide-output"]
# drawing, columns = pipe.adapters.load(folder / "ink.safetensors"), {}
# for drawing.weight in (-1.0, 0.0, 1.0, 3.0):
#     columns[f"weight {drawing.weight:g}"] = draw(tests)
# drawing.remove()
# table(columns)

# %% [markdown]
# The weights move along a straight line, and training only ever asked for two points of
# it, 0 and 1. At −1 the model is led *away* from what the drawings have in common: look
# for lines, for what fills them, and for the size of the thing. At 3 the style is
# exaggerated, and the subject pays.
#
# **Two.** $B$ begins at zero. Let $A$ begin at zero as well: will it learn more slowly,
# or how?

# %% tags=["active-ipynb", "hide-output"]
# updates = add_lora(pipe.transformer, rank=8)
# for update in updates.values():
#     update.down.weight.zero_()
# learn(pipe.transformer, lesson(lines), steps=3, rate=1e-2)
# still = all(not p.any() for update in updates.values() for p in update.parameters())
# print("after three steps all of it is still zero:", still)
# detach(updates.values(), pipe.transformer)

# %% [markdown]
# Never: each factor's gradient is multiplied by the other, as the mathematics said. The
# pair sits on a saddle that no gradient leaves.
#
# ## Parity
#
# The reference is diffusers with peft, which reads the file that we wrote. Both compute
# a velocity; the file's effect on it must be far larger than the difference.

# %% tags=["active-ipynb"]
# from diffusers import SD3Transformer2DModel
# from diffusers.loaders import SD3LoraLoaderMixin
# from minidiff.files.weights import TINY
#
# theirs = SD3Transformer2DModel.from_pretrained(TINY / "transformer")
# read = SD3LoraLoaderMixin.lora_state_dict
# how = {"weight_name": "ink.safetensors", "return_lora_metadata": True}
# state, notes = read(str(folder), **how)
# theirs.load_lora_adapter(state, prefix="transformer", metadata=notes)

# %% tags=["active-ipynb"]
# x, sigma = torch.randn(2, 16, 16, 16), torch.tensor([0.8, 0.3])
# text = pipe.encode_prompt(tests[:2])
# bare = pipe.transformer(x, sigma, *text)
# pipe.adapters.load(folder / "ink.safetensors")
# ours, reference = pipe.transformer(x, sigma, *text), theirs(x, *text, 1000 * sigma)[0]
# error, effect = ((v - reference).norm() / reference.norm() for v in (ours, bare))
# assert error < 1e-5 and effect > 100 * error, (error, effect)
# print("relative error below 1e-5, with an effect a hundred times larger")

# %% [markdown]
# The package's tests do this for every style: against peft for plain LoRA, rsLoRA,
# DoRA, LoHa and LoKr; against the formula in float64 for the keys of trainers that are
# no Python package.
#
# ## What production code does differently
#
# - **It trains with more care.** `minidiff train --from … --lora` adds what twenty
#   drawings of our own did not need: the empty prompt now and then (guidance asks it),
#   an average of the weights, pictures that are held out, folders that count more
#   often (each picture in `10_dresses` ten times an epoch), and more.
# - **It adapts more.** kohya's scripts train both CLIPs too (`lora_te1_`, `lora_te2_`):
#   a new word is learned more easily where words are read.
# - **Two mistakes circulate.** SD3.5's levels are logit-normal *and* shifted by 3. A
#   trainer that shifts them for its validation but not for its training, or the other
#   way round, compares two different tasks. And levels drawn uniformly may be weighted
#   by the logit-normal density, or drawn from it and not weighted; a trainer that does
#   both counts the middle twice. Ours draws from it, shifts as the model's own
#   scheduler does when a picture is drawn, and weighs nothing.
# - **It starts elsewhere.** PiSSA starts $A$ and $B$ at the first singular directions
#   of $W$ itself; LoRA+ gives $B$ a larger rate than $A$. They learn faster so.
# - **It keeps many in memory.** Servers batch requests that wear different LoRAs and
#   multiply by each row's own. Ours has one set for all pictures of a call.
#
# ## Exercises
#
# **10.1 Predict.** A layer of SD3.5 Large is 2432 × 2432. From which rank on has a LoRA
# as many numbers as the layer itself?

# %% tags=["active-ipynb", "exercise"]
# def break_even() -> int:
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_10_1() -> None:
#     rank = break_even()
#     assert rank == int(rank) > 0, f"a rank is a whole number from 1, not {rank}"
#     few = sum(p.numel() for p in LowRank(2432, 2432, int(rank)).parameters())
#     assert few == 2432**2, f"rank {rank} has {few:,} numbers, the layer {2432**2:,}"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def break_even() -> int:
#     return 2432 // 2  # r · (2432 + 2432) = 2432²
#
# exercise_10_1()

# %% [markdown]
# **10.2 Code.** Two LoRAs of one layer, with weights, are one LoRA of the sum of their
# ranks. Write it: `down` (r₁ + r₂, in) and `up` (out, r₁ + r₂) whose product is the
# weighted sum. (This is how q, k and v become one update in kohya's keys.)

# %% tags=["active-ipynb", "exercise"]
# def merge(one: LowRank, two: LowRank, w1: float, w2: float) -> tuple[Tensor, Tensor]:
#     """down and up of w1 times ``one`` plus w2 times ``two``."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_10_2() -> None:
#     one, two = LowRank(16, 24, 3, alpha=6), LowRank(16, 24, 2)
#     for update in (one, two):
#         update.up.weight.normal_()
#     down, up = merge(one, two, 0.5, 2.0)
#     assert down.shape == (5, 16) and up.shape == (24, 5), "of rank 3 + 2"
#     wanted = 0.5 * one.matrix() + 2 * two.matrix()
#     assert torch.allclose(up @ down, wanted, atol=1e-5), "mind scale and weight"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def merge(one: LowRank, two: LowRank, w1: float, w2: float) -> tuple[Tensor, Tensor]:
#     pairs = ((one, w1 * one.scale), (two, w2 * two.scale))
#     up = torch.cat([update.up.weight * w for update, w in pairs], 1)
#     return torch.cat([update.down.weight for update, _ in pairs]), up
#
# exercise_10_2()

# %% [markdown]
# **10.3 Code.** Someone has fine-tuned in full and gives you both sets of weights.
# *Extract* a LoRA: the `LowRank` of rank $r$ whose matrix is nearest to the difference.
# (`cut`, above, is most of it.)

# %% tags=["active-ipynb", "exercise"]
# def extract(before: Tensor, after: Tensor, rank: int) -> LowRank:
#     """The update (out, in) of a rank that is nearest to after − before."""
#     raise NotImplementedError

# %% tags=["active-ipynb", "check"]
# @check
# def exercise_10_3() -> None:
#     before, change = torch.randn(24, 16), torch.randn(24, 3) @ torch.randn(3, 16)
#     found = [extract(before, before + change, r).matrix() for r in (2, 3)]
#     error = [(matrix - change).norm() for matrix in found]
#     assert error[1] < 1e-3, "a change of rank 3 should be found exactly"
#     least = torch.linalg.svdvals(change)[2]
#     assert (error[0] - least).abs() < 1e-3, "at rank 2 the third direction is missing"

# %% tags=["active-ipynb", "hide-cell", "solution"]
# def extract(before: Tensor, after: Tensor, rank: int) -> LowRank:
#     update = LowRank(before.shape[1], before.shape[0], rank)
#     up, down = cut(after - before, rank)
#     update.up.weight.copy_(up)
#     update.down.weight.copy_(down)
#     return update
#
# exercise_10_3()

# %% [markdown]
# **10.4 Explore.** Train the lines for 20 steps at rank 1 and at rank 32, both with
# `alpha=8`, so that the scale is $\alpha/r$, and look at both side by side. Does more
# rank give more style?

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# columns = {"the model": base}
# for rank in (1, 32):
#     torch.manual_seed(0)
#     updates = add_lora(pipe.transformer, rank, alpha=8)
#     learn(pipe.transformer, lesson(lines), steps=20, rate=1e-2)
#     drawn = columns[f"rank {rank}"] = draw(tests)
#     detach(updates.values(), pipe.transformer)
#     print(f"rank {rank:2}: {likeness(drawn, wanted):.2f} to its own lines, "
#         f"{likeness(drawn, wanted.roll(1, 0)):.2f} to another's")
# print(f"the photograph: {likeness(base, wanted):.2f}")
# table(columns)
# # Look: after 20 steps the two columns are alike, so one direction has room for what
# # they can move; few directions hold most of the change (the spectrum above). The
# # number tells whose lines these are, and hardly how much of the manner.

# %% [markdown]
# ## Summary
#
# You **saw** that what fine-tuning changes is held by few directions, and **derived** a
# change that has only those. You **attached** it beside the layers, **trained** it on
# twenty pictures and **kept** the model's own weights. You **weighed**, switched, added
# and fused, and saw what rounding takes. You **wrote** and **read** files of two
# styles, and **broke** two LoRAs: one by its weight, one by its start.
#
# From here on "the model" may mean the model and what it wears. Chapter 11 adds another
# kind of guest: a second network that tells the first where to draw.
#
# ## Further reading
#
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685): section 4.1 for the
#   method, section 7 for the rank that suffices.
# - Aghajanyan et al. 2020, [Intrinsic dimensionality](https://arxiv.org/abs/2012.13255):
#   why fine-tuning needs few directions.
# - Kalajdzievski 2023, [rsLoRA](https://arxiv.org/abs/2312.03732): the square root.
# - Liu et al. 2024, [DoRA](https://arxiv.org/abs/2402.09353): lengths apart from
#   directions.
# - Hyeon-Woo et al. 2022, [FedPara](https://arxiv.org/abs/2108.06098), the product of
#   LoHa; Yeh et al. 2024, [LyCORIS](https://arxiv.org/abs/2309.14859), all of them
#   compared on pictures.
# - Meng et al. 2024, [PiSSA](https://arxiv.org/abs/2404.02948), and Hayou et al. 2024,
#   [LoRA+](https://arxiv.org/abs/2402.12354).

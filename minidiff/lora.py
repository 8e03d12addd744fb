"""LoRA: small trained corrections of a model's linear layers, in diffusers' files.

A layer W (out, in) learns W + (α/r)·B·A with A (r, in) and B (out, r); Hu et al. 2021,
section 4.1. A file names the layers as diffusers does, and keeps α, where it is not r,
in its header.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from minidiff.dit import MMDiT
from minidiff.files.disk import excerpt
from minidiff.files.lora_files import FILE, METADATA, Update, read_updates
from minidiff.files.weights import (
    Source,
    same_names,
    transformer_sources,
    write_tensors,
)
from minidiff.interface.checks import check_number, check_range

if TYPE_CHECKING:
    from minidiff.sampling import Pipeline

# What the trainer of diffusers adapts: the projections of both streams' attention.
ATTENTION = (
    "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)


class LowRank(nn.Module):
    """(α/r)·B·A·x: tokens (…, in) → (…, out). B begins at zero, so nothing changes.

    It computes in the dtype of its own weights, which may be another than the model's.
    """

    casts = True

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
        """The update (out, in) itself."""
        return self.up.weight @ self.down.weight * self.scale


@runtime_checkable
class Linear(Protocol):
    """A layer (…, in) → (…, out) that can be adapted, wherever its weights are."""

    in_features: int
    out_features: int


class Beside(nn.Module):
    """An update and the rows of its layer's output to which it is added."""

    rows: Tensor

    def __init__(self, rows: Tensor, update: LowRank) -> None:
        super().__init__()
        self.update = update
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        return out.index_add(-1, self.rows, self.update(x).to(out.dtype))


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
        """(out, in) of what diffusers calls the layer."""
        return len(self.rows), self.layer.in_features


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


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers of ``model`` by name; of an adapted one the layer alone."""
    inside = tuple(f"{name}." for name, _ in adapted_layers(model))
    found: dict[str, Linear] = {}
    for name, module in model.named_modules():
        layer = module.layer if isinstance(module, AdaptedLinear) else module
        if isinstance(layer, Linear) and not name.startswith(inside):
            found[name] = layer
    return found


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """The layers that have updates beside them, with their names."""
    named = model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, AdaptedLinear)]


# Attaching


def bring(updates: Mapping[str, LowRank], model: nn.Module) -> None:
    """Move ``updates`` to the device and dtype in which ``model`` computes."""
    first = next(model.parameters())  # a layer's own may be in 8 bits, or away
    for update in updates.values():
        update.to(first)


def attach(updates: Mapping[str, LowRank], model: nn.Module) -> None:
    """Put each of ``updates`` beside the layer that it is named for."""
    found = targets(model)
    for name, update in updates.items():
        layer = model.get_submodule(found[name].name)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer)
            model.set_submodule(found[name].name, layer)
        rows = found[name].rows.to(update.up.weight.device)
        layer.updates.append(Beside(rows, update))


def detach(updates: Iterable[LowRank], model: nn.Module) -> None:
    """Take ``updates`` off; a layer without any more stands where it stood before."""
    gone = set(updates)
    for name, layer in adapted_layers(model):
        kept = [beside for beside in layer.updates if beside.update not in gone]
        layer.updates = nn.ModuleList(kept)
        if not kept:
            model.set_submodule(name, layer.layer)


@torch.no_grad()
def fuse(updates: Mapping[str, LowRank], model: nn.Module) -> None:
    """Add the updates to the weights themselves: no further cost, and no way back."""
    layers = targets(model)
    for name, update in updates.items():
        layer, rows = layers[name].layer, layers[name].rows
        assert isinstance(layer, nn.Linear)  # ``check_fusable``
        weight = layer.weight.clone()  # the weight may be a read-only memory map
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = update.to(weight.device, wide).matrix()
        weight[rows] = (weight[rows] + change).to(weight)  # summed, then rounded
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)


def check_fusable(updates: Mapping[str, LowRank], model: nn.Module) -> None:
    """Raise ValueError where a layer's weights are in 8 bits or stay in their file."""
    layers = targets(model)
    for name in updates:
        if not isinstance(layers[name].layer, nn.Linear):
            raise ValueError(
                f"a LoRA cannot be added to the weights of {name}: they are in 8 bits "
                "or stay in their file; expected an unfused LoRA and no compilation"
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


# Files


def components(pipe: "Pipeline") -> dict[str, nn.Module]:
    """What a file can adapt, under the names that it uses."""
    names = ("text_encoder", "text_encoder_2")
    encoders = zip(names, pipe.text_encoders, strict=False)
    return {"transformer": pipe.transformer} | {n: e for n, e in encoders if e}


def lora_file(file: Path | str) -> Path:
    """``file``, or the one in that folder."""
    path = Path(file)
    return path / FILE if path.is_dir() else path


def read_lora(
    file: Path | str, models: Mapping[str, nn.Module]
) -> dict[str, dict[str, LowRank]]:
    """The updates in ``file`` for each model, by layer.

    Raises ValueError for a file that is no LoRA, and naming the first layer that
    ``models`` do not have, or whose shape is another: it belongs to another model.
    """
    layers = {part: targets(model) for part, model in models.items()}
    stored = read_updates(file)
    for name, update in stored.items():
        part, _, layer = name.partition(".")
        if (target := layers.get(part, {}).get(layer)) is None:
            raise no_target(file, name, models.get(part))
        check_target(file, name, update, target)
    found: dict[str, dict[str, LowRank]] = {}
    for name, update in stored.items():
        part, _, layer = name.partition(".")
        down, up = update.read()
        with torch.device("meta"):  # no random numbers are drawn for what is read
            one = LowRank(down.shape[1], up.shape[0], down.shape[0], update.alpha)
        one.load_state_dict({"down.weight": down, "up.weight": up}, assign=True)
        found.setdefault(part, {})[layer] = one.requires_grad_(False)
    return found


def no_target(file: Path | str, name: str, model: nn.Module | None) -> ValueError:
    """What to say of an update for a layer that is not linear, or not there."""
    modules = dict(model.named_modules()) if model else {}
    rename = transformer_sources if isinstance(model, MMDiT) else same_names
    kinds = {
        s: modules[n] for n, source in rename(modules).items() for s in source.names
    }
    if other := kinds.get(name.partition(".")[2]):
        found = f"{file} updates {name}, which is a {type(other).__name__}"
        return ValueError(f"{found}; expected linear layers alone")
    what = f"this one has no linear layer {excerpt(name)}"
    return ValueError(f"{file} was made for another model: {what}")


def check_target(file: Path | str, name: str, update: Update, target: Target) -> None:
    """Raise ValueError unless the matrices of ``update`` are of the layer's shape."""
    a, b = update.shapes
    for key, shape in ((update.a, a), (update.b, b)):
        if len(shape) != 2 or 0 in shape:
            found = f"{file}: {key} has shape {excerpt(list(shape))}"
            raise ValueError(f"{found}; expected a matrix that is not empty")
    if a[0] != b[1]:
        found = f"lora_A of rank {a[0]}, lora_B of rank {b[1]}"
        raise ValueError(f"{file}: {name} has {found}; expected one rank")
    if (b[0], a[1]) != target.shape:
        raise ValueError(
            f"{file} was made for another model: it updates {name} of shape "
            f"{[b[0], a[1]]}; expected {list(target.shape)}"
        )


class LoRA:
    """The updates of one file on a pipeline; ``remove`` takes them off again.

    ``attached`` are those beside the layers of each model, none where they are fused.
    """

    def __init__(
        self,
        pipe: "Pipeline",
        attached: list[tuple[dict[str, LowRank], nn.Module]],
        file: Path | str,
        scale: float,
    ) -> None:
        self.pipe: Pipeline | None = pipe
        self.attached, self.file, self.scale = attached, file, scale
        record(pipe, [*pipe.adapters, self])

    def remove(self) -> None:
        """Take the updates off the pipeline; without effect where they are fused."""
        if not (self.pipe and self.attached):
            return
        for updates, model in self.attached:
            detach(updates.values(), model)
        record(self.pipe, [a for a in self.pipe.adapters if a is not self])
        self.attached, self.pipe = [], None  # it keeps no pipeline alive


def record(pipe: "Pipeline", loras: list[LoRA]) -> None:
    """Let pictures say which ``loras`` act on the pipeline that draws them."""
    pipe.adapters = loras
    ours = ("lora", "lora_scale")
    said: dict[str, Any] = {k: v for k, v in pipe.settings.items() if k not in ours}
    if loras:
        said["lora"] = ", ".join(str(one.file) for one in loras)
        scales = [one.scale for one in loras]
        several = ", ".join(map(str, scales))
        said["lora_scale"] = several if len(scales) > 1 else scales[0]
    pipe.settings = said


def load_lora(
    pipe: "Pipeline", file: Path | str, scale: float = 1.0, fused: bool = False
) -> LoRA:
    """Apply a LoRA file, or a folder with one, to a pipeline, times ``scale``.

    ``fused`` adds the updates to the weights: as fast as without, but not removable,
    and only for weights that are held in full. Otherwise they are computed beside the
    layers, which may be stored in 8 bits or streamed, but not compiled.
    """
    check_number("lora_scale", scale)
    path = lora_file(file)
    others = [lora_file(one.file).resolve() for one in pipe.adapters]
    if path.resolve() in others:
        known = f"{file} is on this pipeline already and is added once more"
        warnings.warn(f"{known}; remove() takes a LoRA off", stacklevel=2)
    models = components(pipe)
    found = read_lora(path, models)
    for part, updates in found.items():
        if fused:
            check_fusable(updates, models[part])
        elif any(module._compiled_call_impl for module in models[part].modules()):
            raise ValueError(
                f"the {part} is compiled and would not see {file}; "
                "expected a fused LoRA or no compilation"
            )
    pairs = [(updates, models[part]) for part, updates in found.items()]
    for update in (u for updates, _ in pairs for u in updates.values()):
        update.scale *= scale
    if not fused:
        for pair in pairs:  # all, before the first layer changes: memory may not do
            bring(*pair)
        for pair in pairs:
            attach(*pair)
        return LoRA(pipe, pairs, file, scale)
    try:
        for pair in pairs:
            fuse(*pair)
    except BaseException as error:
        error.add_note(f"some weights may have {file} in them: load the model anew")
        raise
    return LoRA(pipe, [], file, scale)


def save_lora(updates: Mapping[str, Mapping[str, LowRank]], file: Path | str) -> None:
    """Write updates, by component and layer, as a file that diffusers loads."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, object] = {}
    for part, layers in updates.items():
        first = next(iter(layers.values()))
        metadata[f"{part}.r"] = first.down.out_features
        metadata[f"{part}.lora_alpha"] = first.alpha
        metadata[f"{part}.target_modules"] = sorted(layers)
        for name, update in layers.items():
            for key, weight in (("A", update.down.weight), ("B", update.up.weight)):
                tensors[f"{part}.{name}.lora_{key}.weight"] = (
                    weight.detach().contiguous()
                )
    write_tensors(tensors, file, **{METADATA: json.dumps(metadata, sort_keys=True)})

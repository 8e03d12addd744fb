"""A component's weights on disk: their names, read, checked and written.

The models carry the parameter names of the official single files. A folder in the hub's
diffusers layout names the transformer's and the autoencoder's tensors otherwise;
:func:`transformer_sources` and :func:`vae_sources` are the one table between the two,
used for reading and for writing. Text encoders have one set of names in both layouts.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.files.disk import (
    LONGEST_TABLE,
    excerpt,
    file_size,
    read_json,
    replacing,
    write_json,
)
from minidiff.files.layout import (
    MODELS,
    Config,
    component_class,
    config_file,
    hub_config,
    pipeline_index,
    read_config,
    save_scheduler,
)


@dataclass(frozen=True)
class Source:
    """The stored tensors that make one of ours, and how.

    ``how``: "copy"; "stack" (their rows, one below the other); "swap" (the halves of
    the rows change places); "conv" (a matrix that we hold as a 1×1 convolution);
    "identity" (an identity matrix that is not stored).
    """

    names: tuple[str, ...]
    how: str = "copy"


def transformer_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where diffusers' SD3Transformer2DModel keeps each of MMDiT's tensors ``names``.

    diffusers stores the last layer's and the last context block's modulation as
    (scale, shift); the official files, and we, as (shift, scale).
    """
    names = list(names)
    blocks = [int(m[1]) for n in names if (m := re.match(r"joint_blocks\.(\d+)\.", n))]
    last = f"joint_blocks.{max(blocks, default=0)}.context_block.adaLN_modulation"
    return {name: _transformer_source(name, last) for name in names}


def _transformer_source(name: str, last: str) -> Source:
    parts = re.findall(r"^(?:joint_blocks\.(\d+)\.)?(.*?)(\.weight|\.bias)?$", name)
    block, inner, end = parts[0]
    prefix = f"transformer_blocks.{block}." if block else ""
    stored = (BLOCK if block else TRANSFORMER).get(inner, inner).split()
    swap = name.startswith((last, "final_layer.adaLN_modulation"))
    how = "stack" if len(stored) > 1 else "swap" if swap else "copy"
    return Source(tuple(prefix + s + end for s in stored), how)


def controlnet_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where diffusers' SD3ControlNetModel keeps each of a ControlNet's tensors."""
    return {name: _controlnet_source(name, BLOCK) for name in names}


def single_controlnet_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where the official single files of SD3.5 Large's ControlNets keep them.

    They name the blocks' tensors as we do, and time and text as diffusers.
    """
    return {name: _controlnet_source(name, {}) for name in names}


def _controlnet_source(name: str, block: Mapping[str, str]) -> Source:
    inner, _, end = name.rpartition(".")
    if found := re.match(r"(transformer_blocks\.\d+\.)(.*)", inner):
        stored = block.get(f"x_block.{found[2]}", found[2]).split()
        names = tuple(f"{found[1]}{s}.{end}" for s in stored)
        return Source(names, "stack" if len(names) > 1 else "copy")
    return Source((f"{TRANSFORMER.get(inner, inner)}.{end}",))


def vae_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where diffusers' AutoencoderKL keeps each of the VAE's tensors ``names``.

    diffusers counts the decoder's levels from the latents, the official files, and
    we, from the pixels; it holds the attention's 1×1 convolutions as matrices.
    """
    names = list(names)
    levels = [int(m[1]) for n in names if (m := re.match(r"decoder\.up\.(\d+)\.", n))]
    return {name: _vae_source(name, max(levels, default=0)) for name in names}


def _vae_source(name: str, top: int) -> Source:
    stored = re.sub(r"\bup\.(\d+)", lambda m: f"up_blocks.{top - int(m[1])}", name)
    stored = re.sub(r"\bdown\.(\d+)", r"down_blocks.\1", stored)
    stored = re.sub(r"\bblock\.(\d+)", r"resnets.\1", stored)
    for ours, theirs in VAE.items():
        stored = re.sub(rf"\b{re.escape(ours)}\b", theirs, stored)
    conv = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
    return Source((stored,), "conv" if conv else "copy")


def same_names(names: Iterable[str]) -> dict[str, Source]:
    return {name: Source((name,)) for name in names}


TRANSFORMER = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
VAE = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.q": "mid_block.attentions.0.to_q",
    "mid.attn_1.k": "mid_block.attentions.0.to_k",
    "mid.attn_1.v": "mid_block.attentions.0.to_v",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "nin_shortcut": "conv_shortcut",
    "downsample.conv": "downsamplers.0.conv",
    "upsample.conv": "upsamplers.0.conv",
    "norm_out": "conv_norm_out",
}


Rename = Callable[[Iterable[str]], dict[str, Source]]
RENAMES: dict[str, Rename] = {
    "SD3Transformer2DModel": transformer_sources,
    "AutoencoderKL": vae_sources,
    "SD3ControlNetModel": controlnet_sources,
}


PRETRAINED = Path(__file__).parents[1] / "pretrained"
SHIPPED = "tiny", "tiny-turbo"  # the models that are there
CONTROLS = ("tiny-edges",)  # the ControlNets
TINY = PRETRAINED / "tiny"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
LONGEST_HEADER = 10_000_000  # bytes; Large's has 150,000
HASHED = 2**26  # bytes of a file that are hashed in a moment
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Written by some, read by none: a copy of the table, the numbers 0, 1, 2, …, and (where
# it is no parameter) OpenAI's projection of CLIP-L, which SD3 does not have
UNUSED = {
    "encoder.embed_tokens.weight",
    "text_model.embeddings.position_ids",
    "text_projection.weight",
}

Model = TypeVar("Model", bound=nn.Module)


# Files


def shipped(name: Path | str, among: Sequence[str] = SHIPPED) -> Path | None:
    """The folder of what ships with this package by a name that is ``among`` these."""
    return PRETRAINED / str(name) if str(name) in among else None


def weight_files(folder: Path | str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component's folder: one, or the shards of its index.

    With a ``variant`` such as "fp16" those of that name, model.fp16.safetensors, where
    the folder has them. Raises FileNotFoundError where there is none, ValueError where
    there are only pickled files: opening those can run any code in them.
    """
    folder = Path(folder)
    for name in WEIGHTS:
        for ending in (f".{variant}", "") if variant else ("",):
            file = folder / name.replace(".safe", f"{ending}.safe")
            if file.is_file():
                return [file]
            index = folder / f"{name}.index{ending}.json"
            if index.is_file():
                return [folder / shard for shard in _shards(index)]
    raise _no_weights(folder)


def of_variant(name: str, variant: str) -> bool:
    """Whether a file's name says that its weights are of this variant."""
    return bool(re.search(rf"\.{re.escape(variant)}[.-]", Path(name).name))


def check_variant(folder: Path, variant: str | None) -> None:
    """Raise ValueError where no part of a pipeline's folder is of this variant."""
    names = [path.name for path in folder.glob("*/*.safetensors*")]
    if variant and not any(of_variant(name, variant) for name in names):
        found = f"variant is {variant!r}"
        raise ValueError(f"{found}; {folder} has no weights that are called so")


def _no_weights(folder: Path) -> Exception:
    """What to say of a folder without the weights that are read."""
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLED)
    if pickled:
        return _refused(folder / pickled[0])
    others = [path.name for path in folder.glob("*.safetensors")]
    found = f" (found {_some(others)})" if others else ""
    variants = {name.split(".")[1].split("-")[0] for name in others} - {"safetensors"}
    hint = f"; variant={min(variants)!r} reads them" if variants else ""
    known = " or ".join(WEIGHTS)
    return FileNotFoundError(f"no weights in {folder}: expected {known}{found}{hint}")


def _shards(index: Path) -> list[str]:
    """The names of the files over which ``index`` spreads the tensors."""
    files = read_json(index, LONGEST_TABLE).get("weight_map")
    if not files or not isinstance(files, dict):
        raise ValueError(f"{index} names no files; expected them in its weight_map")
    names = sorted(set(map(str, files.values())))
    if outside := [n for n in names if not n or Path(n).name != n]:
        found = excerpt(repr(outside[0]))
        raise ValueError(f"{index} names {found}; expected files beside it")
    return names


def _refused(file: Path) -> ValueError:
    return ValueError(
        f"{file} is a pickled checkpoint, which could run any code when opened; "
        "expected a .safetensors file"
    )


class Entry(NamedTuple):
    """A tensor in a file: its shape, and its dtype as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, opened once and checked to be whole: its memory map."""

    path: Path
    handle: Any
    entries: Mapping[str, Entry]

    @property
    def metadata(self) -> dict[str, str]:
        """What stands beside the tensors."""
        return self.handle.metadata() or {}

    def read(self, name: str) -> Tensor:
        """A tensor, still in the memory map."""
        return self.handle.get_tensor(name)


def open_tensors(file: Path | str) -> TensorFile:
    """What a safetensors file holds, by its header; of the tensors nothing is read.

    Raises FileNotFoundError or ValueError for what is no whole safetensors file.
    """
    file = Path(file)
    if file.suffix in PICKLED:
        raise _refused(file)
    size = file_size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
    if start == b"version ":
        found = f"{file} is Git LFS's pointer to weights that are not here"
        raise ValueError(f"{found}; run git lfs pull in its folder")
    found = f"{file} is not a whole safetensors file ({size} bytes)"
    if not 8 <= size or int.from_bytes(start, "little") > LONGEST_HEADER:
        raise ValueError(found)
    try:
        handle = safe_open(file, "pt")
        parts = {name: handle.get_slice(name) for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(f"{found}: {excerpt(error)}") from None
    entries = {n: Entry((*x.get_shape(),), x.get_dtype()) for n, x in parts.items()}
    return TensorFile(file, handle, entries)


# Reading


Read = Callable[[torch.device | str, torch.dtype | None], Tensor]


@dataclass(frozen=True)
class Prepared(Generic[Model]):
    """A model on the meta device and its files, checked but not yet read.

    Called with a device and a dtype it reads them all.
    """

    model: Model
    sources: Mapping[str, Source]
    found: Mapping[str, TensorFile]

    def tensors(self) -> Iterator[tuple[str, Read]]:
        """Each tensor's name, and what reads it to a device, in a dtype."""

        def stored(name: str) -> Tensor:
            return self.found[name].read(name)

        expected = self.model.state_dict()
        for name, source in self.sources.items():
            yield name, partial(join_stored, stored, source, expected[name].shape)

    def __call__(self, device: torch.device | str, dtype: torch.dtype | None) -> Model:
        state = {name: read(device, dtype) for name, read in self.tensors()}
        self.model.load_state_dict(state, assign=True)
        return self.model.eval()


def short_hash(file: Path) -> str | None:
    """Twelve digits of a file's SHA-256, by which pictures name their weights.

    The hub's cache calls its files by it. Of another file over ``HASHED`` bytes it
    would take seconds, and there is none.
    """
    name = file.resolve().name
    if re.fullmatch("[0-9a-f]{64}", name):
        return name[:12]
    if file.stat().st_size > HASHED:
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def prepare_weights(
    model: Model,
    files: Iterable[Path | TensorFile],
    rename: Rename | None = None,
    prefix: str = "",
) -> Prepared[Model]:
    """Check safetensors files against ``model``, built on the meta device.

    ``rename`` says where the files keep each tensor; of them only those whose names
    begin with ``prefix`` count. ValueError names what is missing, unexpected, in two
    files, or of the wrong shape or kind. When read, each tensor goes from the memory
    map straight to its device and dtype; on a CPU, in the dtype stored, it stays there.
    """
    expected = model.state_dict()
    sources = (rename or same_names)(expected)
    opened = [f if isinstance(f, TensorFile) else open_tensors(f) for f in files]
    found: dict[str, TensorFile] = {}
    for file in opened:
        own = dict.fromkeys((n for n in file.entries if n.startswith(prefix)), file)
        if twice := found.keys() & own.keys():
            both = f"{file.path} and {found[name := min(twice)].path.name}"
            raise ValueError(f"{excerpt(name)} is in {both}; expected it in one file")
        found |= own
    if not found:
        raise ValueError(f"{opened[0].path} holds no tensors; expected {len(sources)}")
    check_stored(sources, found)
    check_shapes(sources, found, expected)
    return Prepared(model, sources, found)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(excerpt, names[:3])) + more


def check_stored(
    sources: Mapping[str, Source], found: Mapping[str, TensorFile]
) -> None:
    """Raise ValueError unless the files hold exactly the tensors that are wanted."""
    wanted = {name for source in sources.values() for name in source.names}
    file, *others = {file.path for file in found.values()}
    place = file.parent if others else file
    if missing := wanted - found.keys():
        raise ValueError(f"{place} lacks {len(missing)} tensors: {_some(missing)}")
    if extra := found.keys() - wanted - UNUSED:
        what = f"{len(extra)} unexpected tensors"
        raise ValueError(f"{place} has {what}: {_some(extra)}")


def check_shapes(
    sources: Mapping[str, Source],
    found: Mapping[str, TensorFile],
    expected: Mapping[str, Tensor],
) -> None:
    """Raise ValueError at the first stored tensor of a shape or kind not its own."""
    for ours, source in sources.items():
        rows, *rest = expected[ours].shape
        parts = max(1, len(source.names))
        shape = (rows // parts, *(rest[:1] if source.how == "conv" else rest))
        for name in source.names:
            stored, what = found[name].entries[name], f"{found[name].path}: {name}"
            if stored.shape != shape:
                found_shape = excerpt(list(stored.shape))
                raise ValueError(
                    f"{what} has shape {found_shape}; expected {list(shape)}"
                )
            if stored.dtype not in FLOATS:
                kind = excerpt(stored.dtype)
                raise ValueError(
                    f"{what} is {kind}; expected one of {', '.join(FLOATS)}"
                )


def join_stored(
    read: Callable[[str], Tensor],
    source: Source,
    shape: tuple[int, ...],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Tensor:
    """One of our tensors, of ``shape``, from the stored tensors of its ``source``."""
    if source.how == "identity":
        return torch.eye(*shape, device=device, dtype=dtype)
    first = read(source.names[0])
    if source.how == "stack":
        whole = torch.empty(shape, device=device, dtype=dtype or first.dtype)
        for part, name in zip(
            whole.chunk(len(source.names)), source.names, strict=True
        ):
            part.copy_(read(name).to(device))  # as stored; cast where it is going
        return whole
    tensor = first.to(device).to(dtype=dtype)
    if source.how == "swap":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.reshape(shape)


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are where ``torch.nn.init`` would fill them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built within has shapes and no weights, and nothing is initialised.

    The meta device's ``normal_`` does nothing, but imports torch's compiler first.
    """
    with torch.device("meta"), _Unfilled():
        yield


def _build(
    model_class: type[Model], config_class: type[Config], folder: Path | str
) -> Model:
    """The model of a component's folder on the meta device, without weights."""
    config = read_config(config_class, folder)
    try:
        with on_meta():
            return model_class(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{config_file(folder)}: {error}") from None


def prepare_component(
    model_class: type[Model],
    config_class: type[Config],
    folder: Path | str,
    variant: str | None = None,
) -> Prepared[Model]:
    """The two halves of :func:`load_component`: check now, read when called."""
    model = _build(model_class, config_class, folder)
    rename = RENAMES.get(component_class(folder))
    return prepare_weights(model, weight_files(folder, variant), rename)


def load_component(
    model_class: type[Model],
    config_class: type[Config],
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """Build ``model_class`` from a component's folder, in eval mode.

    ``folder`` holds config.json and safetensors in the hub's layout. On the meta
    device nothing is read but the configuration.
    """
    if torch.device(device).type == "meta":
        return _build(model_class, config_class, folder).to(dtype).eval()
    return prepare_component(model_class, config_class, folder)(device, dtype)


# Writing


def stored_tensors(
    state: Mapping[str, Tensor], rename: Rename | None = None
) -> dict[str, Tensor]:
    """``state`` under the names and in the form in which the hub's folders keep it."""
    stored: dict[str, Tensor] = {}
    for ours, source in (rename or same_names)(state).items():
        parts = [*state[ours].chunk(len(source.names))]  # (3·D, D) → 3 × (D, D)
        if source.how == "swap":
            parts = [torch.cat(state[ours].chunk(2)[::-1])]
        elif source.how == "conv":
            parts = [state[ours].flatten(1)]  # (C, C, 1, 1) → (C, C)
        stored.update(zip(source.names, parts, strict=True))
    return stored


def save_weights(
    model: nn.Module,
    file: Path | str,
    rename: Rename | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``model``'s tensors to one safetensors file, in ``dtype`` (None: as is).

    ValueError for what is no dtype, and for whole numbers, which would cut the weights
    off.
    """
    if dtype and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        found = f"dtype is {dtype!r}"
        raise ValueError(f"{found}; expected one of floating point: torch.float16, …")
    tensors = {
        name: t.detach().to("cpu", dtype).contiguous()
        for name, t in stored_tensors(model.state_dict(), rename).items()
    }
    write_tensors(tensors, file)


def write_tensors(
    tensors: dict[str, Tensor], file: Path | str, **metadata: str
) -> None:
    """Write one safetensors file; OSError if that fails, and what was there is kept."""
    with replacing(file) as part:
        save_file(tensors, part, {"format": "pt", **metadata})


def save_component(
    model: nn.Module,
    folder: Path | str,
    class_name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``model`` as a component's folder that diffusers or transformers loads.

    ``class_name`` is the hub's: SD3Transformer2DModel, AutoencoderKL,
    CLIPTextModelWithProjection or T5EncoderModel.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rename = RENAMES.get(class_name)
    save_weights(model, folder / WEIGHTS[0 if rename else 1], rename, dtype)
    write_json(folder / "config.json", hub_config(model.config, class_name))


def save_folder(
    folder: Path,
    models: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    scheduler: Any,
    origin: str,
    dtype: torch.dtype | None,
) -> None:
    """Write every part, None where there is none, and the index that names them.

    ``origin`` is the name that the folder remembers. Raises ValueError, before anything
    is written, where a model does not hold all its weights in full.
    """
    models = {name: model for name, model in models.items() if model}
    tokenizers = {name: known for name, known in tokenizers.items() if known}
    for name, model in models.items():
        check_whole(name, model)
    for name, model in models.items():
        save_component(model, folder / name, MODELS[name], dtype)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    save_scheduler(scheduler, folder / "scheduler")
    index = pipeline_index((*models, *tokenizers)) | {"_name_or_path": origin}
    write_json(folder / "model_index.json", index)


def check_whole(name: str, model: nn.Module) -> None:
    """Raise ValueError for weights in few bits, in their file or beside their layer."""
    with on_meta():
        own = type(model)(model.config).state_dict().keys()
    if odd := sorted(own ^ model.state_dict().keys()):
        raise ValueError(
            f"{name}.{odd[0]} is stored in few bits, in its file, or beside its layer; "
            "expected a pipeline loaded without a plan of memory"
        )


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns (its buffers are not among them)."""
    return sum(p.numel() for p in model.parameters())

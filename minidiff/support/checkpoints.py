"""Weights and configurations on disk: the hub's folders, their names, their errors.

The models carry the parameter names of the official single files. A folder in the
hub's diffusers layout names the transformer's and the autoencoder's tensors otherwise;
:func:`transformer_sources` and :func:`vae_sources` are the one table between the two,
used for reading and for writing. Text encoders have one set of names in both layouts.
"""

import json
import operator
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TINY = Path(__file__).parents[1] / "pretrained" / "tiny"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
CONFIGS = ("config.json", "scheduler_config.json")
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
# Written by some, read by none: a copy of the table, the numbers 0, 1, 2, …, and (where
# it is no parameter) OpenAI's projection of CLIP-L, which SD3 does not have
UNUSED = {
    "encoder.embed_tokens.weight",
    "text_model.embeddings.position_ids",
    "text_projection.weight",
}

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


# Configurations


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def read_text(path: Path | str) -> str:
    """A text in UTF-8, with or without a byte order mark; ValueError for another."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None


def config_file(path: Path | str) -> Path:
    """``path`` itself if it is a file, else the configuration file in that folder."""
    path = Path(path)
    if path.suffix == ".json":
        return path
    found = [path / name for name in CONFIGS if (path / name).is_file()]
    return found[0] if found else path / CONFIGS[0]


def read_config(cls: type[Config], path: Path | str) -> Config:
    """Build the dataclass ``cls`` from the hub's JSON file ``path`` (or its folder).

    Keys that are not fields are ignored; a field without default must be there, and
    each value must be of its field's type. Numbers are finite, layers at most 1000.
    """
    path = config_file(path)
    content = read_json(path)
    wanted = [f for f in fields(cls) if f.name in content]
    missing = [
        f.name
        for f in fields(cls)
        if f not in wanted and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    values = {f.name: content[f.name] for f in wanted}
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    for f in wanted:
        if not _fits(value := values[f.name], f.type):
            kind = getattr(f.type, "__name__", f.type)
            raise ValueError(f"{path}: {f.name} is {value!r}; expected {kind}")
        if f.type is int and value < 1 and not f.name.endswith("_id"):
            raise ValueError(f"{path}: {f.name} is {value}; expected at least 1")
        if "layers" in f.name and f.type is int and value > 1000:
            raise ValueError(f"{path}: {f.name} is {value}; expected at most 1000")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a field of type ``kind`` can hold a value from a JSON file."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, int) for v in value)
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


# Names


@dataclass(frozen=True)
class Source:
    """The stored tensors that make one of ours, and how.

    ``how``: "copy"; "stack" (their rows, one below the other); "swap" (the halves of
    the rows change places); "conv" (a matrix that we hold as a 1×1 convolution);
    "identity" (an identity matrix that is not stored).
    """

    names: tuple[str, ...]
    how: str = "copy"


Rename = Callable[[Iterable[str]], dict[str, Source]]

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
    parts = re.fullmatch(r"(?:joint_blocks\.(\d+)\.)?(.*?)(\.weight|\.bias)?", name)
    block, inner, end = parts.groups(default="")
    prefix = f"transformer_blocks.{block}." if block else ""
    stored = (BLOCK if block else TRANSFORMER).get(inner, inner).split()
    swap = name.startswith((last, "final_layer.adaLN_modulation"))
    how = "stack" if len(stored) > 1 else "swap" if swap else "copy"
    return Source(tuple(prefix + s + end for s in stored), how)


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


RENAMES: dict[str, Rename] = {
    "SD3Transformer2DModel": transformer_sources,
    "AutoencoderKL": vae_sources,
}


def _identity(names: Iterable[str]) -> dict[str, Source]:
    return {name: Source((name,)) for name in names}


# Files


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a component's folder: one, or the shards of its index.

    Raises FileNotFoundError where there is none, ValueError where there are only
    pickled files: opening those can run any code that their author put in.
    """
    folder = Path(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in _shards(index)]
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLED)
    if pickled:
        raise _refused(folder / pickled[0])
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" (found {', '.join(others)})" if others else ""
    known = " or ".join(WEIGHTS)
    raise FileNotFoundError(f"no weights in {folder}: expected {known}{found}")


def _shards(index: Path) -> list[str]:
    """The names of the files over which ``index`` spreads the tensors."""
    files = read_json(index).get("weight_map")
    if not files or not isinstance(files, dict):
        raise ValueError(f"{index} names no files; expected them in its weight_map")
    names = sorted(set(map(str, files.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {outside[0]!r}; expected files beside it")
    return names


def _refused(file: Path) -> ValueError:
    return ValueError(
        f"{file} is a pickled checkpoint, which could run any code when opened; "
        "expected a .safetensors file"
    )


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file, which is checked to be whole."""
    file = Path(file)
    if file.suffix in PICKLED:
        raise _refused(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            found = f"{file} is Git LFS's pointer to weights that are not here"
            raise ValueError(f"{found}; run git lfs pull in its folder")
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{file} is not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            whole = operator.index  # TypeError for what is no whole number
            shapes = {n: tuple(map(whole, x["shape"])) for n, x in header.items()}
            ends = [whole(x["data_offsets"][1]) for x in header.values()]
            data = max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file} is not a safetensors file") from None
    if size != 8 + length + data:
        raise ValueError(
            f"{file} is damaged: it has {size} bytes; expected {8 + length + data}"
        )
    return shapes


# Reading


Read = Callable[[torch.device | str, torch.dtype | None], Tensor]
Place = Callable[[str, Read], Tensor | None]


@dataclass(frozen=True)
class Prepared:
    """A model on the meta device and its files, checked but not yet read.

    Called with a device and a dtype it reads them. ``place(name, read)``, if given,
    decides for each tensor itself; where it returns None the tensor stays out.
    """

    model: nn.Module
    sources: Mapping[str, Source]
    found: Mapping[str, tuple[Path, tuple[int, ...]]]

    def __call__(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None,
        place: Place | None = None,
    ) -> nn.Module:
        expected = self.model.state_dict()
        opened = {file: open_tensors(file) for file, _ in self.found.values()}

        def stored(name: str) -> Tensor:
            return opened[self.found[name][0]].get_tensor(name)

        state = {}
        for name, source in self.sources.items():
            read = partial(assemble, stored, source, expected[name].shape)
            tensor = place(name, read) if place else read(device, dtype)
            if tensor is not None:
                state[name] = tensor
        self.model.load_state_dict(state, assign=True, strict=place is None)
        return self.model.eval()


def prepare_weights(
    model: nn.Module,
    files: Iterable[Path],
    rename: Rename | None = None,
    prefix: str = "",
) -> Prepared:
    """Check safetensors files against ``model``, built on the meta device.

    ``rename`` says where the files keep each tensor; of them only those whose names
    begin with ``prefix`` count. ValueError names what is missing, unexpected or of the
    wrong shape. When read, each tensor goes from the memory map straight to its device
    and dtype; on a CPU, in the dtype stored, it stays in the map.
    """
    expected, files = model.state_dict(), list(files)
    sources = (rename or _identity)(expected)
    found = {
        name: (file, shape)
        for file in files
        for name, shape in read_header(file).items()
        if name.startswith(prefix)
    }
    if not found:
        raise ValueError(f"{files[0]} holds no tensors; expected {len(sources)}")
    check_names(sources, found)
    check_shapes(sources, found, expected)
    return Prepared(model, sources, found)


def open_tensors(file: Path | str) -> Any:
    """A safetensors file, open to be read; ValueError for one that is damaged."""
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_names(
    sources: Mapping[str, Source], found: Mapping[str, tuple[Path, tuple[int, ...]]]
) -> None:
    """Raise ValueError unless the files hold exactly the tensors that are wanted."""
    wanted = {name for source in sources.values() for name in source.names}
    file, *others = {file for file, _ in found.values()}
    place = file.parent if others else file
    if missing := wanted - found.keys():
        raise ValueError(f"{place} lacks {len(missing)} tensors: {_some(missing)}")
    if extra := found.keys() - wanted - UNUSED:
        what = f"{len(extra)} unexpected tensors"
        raise ValueError(f"{place} has {what}: {_some(extra)}")


def check_shapes(
    sources: Mapping[str, Source],
    found: Mapping[str, tuple[Path, tuple[int, ...]]],
    expected: Mapping[str, Tensor],
) -> None:
    """Raise ValueError at the first stored tensor that has not the shape it needs."""
    for ours, source in sources.items():
        rows, *rest = expected[ours].shape
        parts = max(1, len(source.names))
        shape = (rows // parts, *(rest[:1] if source.how == "conv" else rest))
        for name in source.names:
            file, stored = found[name]
            if stored != shape:
                raise ValueError(
                    f"{file}: {name} has shape {list(stored)}; expected {list(shape)}"
                )


def assemble(
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


def component_class(folder: Path | str) -> str:
    """The class name that a component's config.json states, as diffusers spells it."""
    content = read_json(config_file(folder))
    listed = content.get("architectures") or [""]
    first = listed[0] if isinstance(listed, list) else listed
    return str(content.get("_class_name") or first)


def _build(
    model_class: type[Model], config_class: type[Config], folder: Path | str
) -> Model:
    """The model of a component's folder on the meta device, without weights."""
    config = read_config(config_class, folder)
    try:
        with torch.device("meta"):
            return model_class(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{config_file(folder)}: {error}") from None


def prepare_component(
    model_class: type[Model], config_class: type[Config], folder: Path | str
) -> Prepared:
    """The two halves of :func:`load_component`: check now, read when called."""
    model = _build(model_class, config_class, folder)
    rename = RENAMES.get(component_class(folder))
    return prepare_weights(model, weight_files(folder), rename)


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
    stored = {}
    for ours, source in (rename or _identity)(state).items():
        parts = state[ours].chunk(len(source.names))  # (3·D, D) → 3 × (D, D)
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
    """Write ``model``'s tensors to one safetensors file, in ``dtype`` (None: as is)."""
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


@contextmanager
def replacing(file: Path | str) -> Iterator[Path]:
    """Another name to write ``file`` under; at the end it takes its place in one step.

    A reader, and a model whose weights are still mapped from the old file, see the old
    bytes or the new, never a part. An error (a full disk, say; on Windows an old file
    that is still mapped) leaves the old: OSError.
    """
    file = Path(file)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {file}: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def hub_config(config: Any, class_name: str) -> dict[str, Any]:
    """The config.json with which diffusers or transformers builds ``class_name``."""
    content = asdict(config)
    if class_name == "SD3Transformer2DModel":
        width = config.num_attention_heads * config.attention_head_dim
        return {"_class_name": class_name, "caption_projection_dim": width, **content}
    if class_name == "AutoencoderKL":
        levels = len(config.block_out_channels)
        return {
            "_class_name": class_name,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            **content,
        }
    if class_name == "T5EncoderModel":
        kind = {"model_type": "t5", "is_encoder_decoder": False, "use_cache": False}
        return {"architectures": [class_name], **kind, **content}
    kind = {"model_type": "clip_text_model", "bos_token_id": 0, "pad_token_id": 1}
    return {"architectures": [class_name], **kind, **content}


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and in UTF-8."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns (its buffers are not among them)."""
    return sum(p.numel() for p in model.parameters())

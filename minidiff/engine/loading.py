"""Pipelines on disk: hub folders and single files, checked before they are read."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files import (
    configurations,
    hub,
    published,
    reading,
    single_file,
    writing,
)
from minidiff.files.weights import (
    TINY,
    Prepared,
    load_component,
    prepare_component,
    save_component,
)
from minidiff.flow_matching import Scheduler
from minidiff.interface import checks
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from minidiff.engine.memory import Plan
    from minidiff.sampling import Pipeline

PARTS = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_3": ("T5EncoderModel", T5Encoder, T5Config),
    "transformer": ("SD3Transformer2DModel", MMDiT, MMDiTConfig),
    "vae": ("AutoencoderKL", VAE, VAEConfig),
}
TOKENIZERS = {
    "tokenizer": ("CLIPTokenizer", CLIPTokenizer),
    "tokenizer_2": ("CLIPTokenizer", CLIPTokenizer),
    "tokenizer_3": ("T5TokenizerFast", T5Tokenizer),
}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# Settings of diffusers' scheduler that no SD3 model uses, and that we do not honour.
DYNAMIC = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


ENCODERS = tuple(PARTS)[:3]


class Opened(NamedTuple):
    """A pipeline's files, checked; of the models nothing has been read yet.

    ``name`` is for people, ``known_as`` for ``recognize``.
    """

    name: str
    known_as: str
    parts: dict[str, Prepared]
    tokenizers: list[CLIPTokenizer | T5Tokenizer | None]
    scheduler: Scheduler


def open_model(
    model: Path | str,
    text_encoders: Path | str | None,
    memory: "str | Plan | None" = None,
    knobs: Mapping[str, Any] | None = None,
    fast: bool = False,
    compile: bool = False,
) -> Opened:
    """Check the settings of memory, then the files of ``model``: one, or a folder.

    With ``fast``, unless blocks are to be compiled, the transformer must be one that
    ``minidiff.engine.fast`` runs.
    """
    from minidiff.engine.memory import requested

    t5 = requested(memory, **(knobs or {})).t5 != "none"
    if Path(model).is_file():
        opened = open_single_file(Path(model), text_encoders, t5)
    elif text_encoders is not None:
        raise ValueError(
            f"text_encoders is {str(text_encoders)!r}, but {model} is no single file "
            "and has its own"
        )
    else:
        opened = open_folder(model, t5)
    models = {name: part.model for name, part in opened.parts.items()}
    encoders = [models.get(name) for name in ENCODERS]
    checks.check_parts(encoders, models["transformer"], models["vae"])
    checks.check_tokenizers(opened.tokenizers, encoders)
    if fast and not compile:
        checks.check_fast(models["transformer"].config)
    return opened


def open_folder(model: Path | str, t5: bool = True) -> Opened:
    """Check a folder in the hub's layout, or a name that stands for one.

    Without ``t5`` its weights need not be there.
    """
    folder = find_model(model, t5)
    index, present = read_index(folder)
    scheduler = read_scheduler(folder / "scheduler")
    parts = {
        name: prepare_component(*classes, folder / name)
        for name, (_, *classes) in PARTS.items()
        if name in present and (t5 or name != "text_encoder_3")
    }
    check_t5(folder, parts, present)
    origin = index.get("_name_or_path")
    name = f"{model} ({origin})" if origin else str(model)
    tokenizers = read_tokenizers(folder, present)
    return Opened(name, with_origin(folder, index), parts, tokenizers, scheduler)


def read_index(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A folder's model_index.json, and the parts and tokenizers that it names.

    Raises FileNotFoundError without one, ValueError for what is no SD3 pipeline.
    """
    index = reading.read_json(folder / "model_index.json")
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        found = index.get("_class_name")
        raise ValueError(f"{folder} is a {found}; expected a StableDiffusion3Pipeline")
    names = (*PARTS, *TOKENIZERS)
    present = [n for n in names if index.get(n) not in (None, [None, None])]
    if missing := [n for n in names if n not in present and not n.endswith("_3")]:
        raise ValueError(f"{folder}/model_index.json names no {', '.join(missing)}")
    return index, present


def open_single_file(
    file: Path, text_encoders: Path | str | None, t5: bool = True
) -> Opened:
    """Check an official single file, and the folder of its encoders and tokenizers.

    The encoders may be single files too, or folders of the hub's layout.
    """
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is a file; expected a folder in the hub's layout, or an official "
            "single file, *.safetensors"
        )
    if text_encoders is None:
        raise ValueError(
            f"{file}: text encoders are not read from it; expected text_encoders="
            "folder, with clip_l.safetensors, clip_g.safetensors, … and the tokenizers"
        )
    folder = Path(text_encoders)
    parts = {
        name: single_file.prepare_part(name, *PARTS[name][1:], file)
        for name in ("transformer", "vae")
    }
    if (folder / ENCODERS[0]).is_dir():
        parts |= {
            name: prepare_component(*PARTS[name][1:], folder / name)
            for name in ENCODERS
            if not name.endswith("_3") or (t5 and (folder / name).is_dir())
        }
    else:
        files = single_file.find_text_encoders(folder, t5)
        parts |= {
            name: single_file.prepare_part(name, *PARTS[name][1:], encoder)
            for name, encoder in files.items()
        }
    present = [n for n in TOKENIZERS if (folder / n).is_dir() or not n.endswith("_3")]
    check_t5(folder, parts, present)
    if t5 and "text_encoder_3" not in parts:
        warnings.warn(f"{folder} holds no T5, so it is left out", stacklevel=4)
    tokenizers = read_tokenizers(folder, present)
    return Opened(file.stem, file.stem, parts, tokenizers, Scheduler(3.0))


def check_t5(folder: Path, parts: Collection[str], tokenizers: Collection[str]) -> None:
    """Raise FileNotFoundError where there are T5's weights and no tokenizer for it."""
    if "text_encoder_3" in parts and "tokenizer_3" not in tokenizers:
        raise FileNotFoundError(
            f"{folder} has T5 and no tokenizer_3; expected both, or t5='none'"
        )


def read_tokenizers(
    folder: Path, present: Sequence[str]
) -> list[CLIPTokenizer | T5Tokenizer | None]:
    """The three tokenizers, None for one that is not ``present``."""
    return [
        cls.from_pretrained(folder / name) if name in present else None
        for name, (_, cls) in TOKENIZERS.items()
    ]


PUBLISHED = published.ON_HUB


def is_published(model: Path | str) -> bool:
    """Whether ``model`` is a published model's name, and no folder of that name."""
    known = published.named(model)
    return known is not None and bool(known.repository) and not Path(model).is_dir()


def blueprint(model: Path | str = "tiny") -> dict[str, nn.Module]:
    """The models of a pipeline on the meta device: shapes, and not one weight.

    The published names need no network; a folder's config.json files are read.
    """
    known = published.named(model)
    if known and is_published(model):
        with torch.device("meta"):
            return {
                name: model_class(getattr(config_class, known.sizes[name])())
                for name, (_, model_class, config_class) in PARTS.items()
            }
    folder = find_model(model, weights=False)
    present = read_index(folder)[1]
    return {
        name: load_component(*classes, folder / name, device="meta")
        for name, (_, *classes) in PARTS.items()
        if name in present
    }


def known_as(model: Path | str) -> str:
    """The path by which ``recognize`` knows a folder, or a name that stands for one.

    Where the folder remembers another name, that is its end. The published names need
    no network.
    """
    if is_published(model):
        return str(model)
    folder = find_model(model, weights=False)
    return with_origin(folder, read_index(folder)[0])


def with_origin(folder: Path, index: Mapping[str, Any]) -> str:
    """A folder's path, and after it the name that its index remembers."""
    origin = index.get("_name_or_path")
    return f"{folder}/{origin}" if origin else str(folder)


def find_model(model: Path | str, t5: bool = True, weights: bool = True) -> Path:
    """The folder that ``model`` names; downloaded if it is on the hub."""
    if str(model) == "tiny":
        return TINY
    if str(model) and Path(model).is_dir():
        return Path(model)
    owner, _, name = str(model).partition("/")
    hub_id = name and "/" not in name and not Path(owner).is_dir()
    if Path(model).suffix == ".safetensors" and not Path(model).exists():
        raise FileNotFoundError(f"{model} is missing")
    if published.named(model) or hub_id:
        return hub.download(str(model), t5, weights=weights)
    known = ", ".join(published.PUBLISHED)
    raise ValueError(f"model is {str(model)!r}; expected {known} or a folder")


def read_scheduler(folder: Path) -> Scheduler:
    """The schedule of a folder; ValueError for settings that would draw otherwise."""
    content = reading.read_json(configurations.config_file(folder))
    if (name := content.get("_class_name", SCHEDULER)) != SCHEDULER:
        found = f"{folder} asks for the scheduler {name}"
        raise ValueError(f"{found}; expected {SCHEDULER} (solvers: sampler=…)")
    if used := [name for name in DYNAMIC if content.get(name)]:
        raise ValueError(f"{folder} asks for {used[0]}, which minidiff does not have")
    scheduler = configurations.read_config(Scheduler, folder)
    if scheduler.shift <= 0 or scheduler.num_train_timesteps < 1:
        raise ValueError(f"{folder}: {scheduler}; expected positive numbers")
    return scheduler


def save_pipeline(pipe: "Pipeline", folder: Path, dtype: torch.dtype | None) -> None:
    """Write every part of ``pipe`` and the index that names them.

    Raises ValueError where a part does not hold all its weights in full.
    """
    models = (*pipe.text_encoders, pipe.transformer, pipe.vae)
    parts = dict(zip(PARTS, models, strict=True))
    for name, part in parts.items():
        check_whole(name, part)
    tokenizers = dict(zip(TOKENIZERS, pipe.tokenizers, strict=True))
    for name, part in parts.items():
        if part:
            save_component(part, folder / name, PARTS[name][0], dtype)
    for name, tokenizer in tokenizers.items():
        if tokenizer:
            tokenizer.save_pretrained(folder / name)
    save_scheduler(pipe.scheduler, folder / "scheduler")
    present = [name for name, part in (parts | tokenizers).items() if part]
    index = pipeline_index(present) | {"_name_or_path": pipe.name}
    writing.write_json(folder / "model_index.json", index)


def check_whole(name: str, model: nn.Module | None) -> None:
    """Raise ValueError for weights in 8 bits, in their file, or beside their layer."""
    from minidiff.engine.memory import StreamedEmbedding, StreamedLinear
    from minidiff.engine.precision import Float8Linear

    away = StreamedLinear, StreamedEmbedding, Float8Linear
    for layer, module in model.named_modules() if model else ():
        if isinstance(module, away):
            raise ValueError(
                f"{name}.{layer} is stored in 8 bits or in its file; expected a "
                "pipeline loaded without a plan of memory"
            )
        if any(
            hook.__module__ == "minidiff.lora"
            for hook in module._forward_hooks.values()
        ):
            raise ValueError(
                f"{name}.{layer} has a LoRA beside it; expected one loaded with "
                "fused=True, or removed"
            )


def pipeline_index(present: Collection[str]) -> dict[str, object]:
    """The hub's model_index.json of a pipeline that has the parts ``present``."""
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, (hub_class, *_) in (PARTS | TOKENIZERS).items():
        library = "diffusers" if name in ("transformer", "vae") else "transformers"
        known = name in present
        index[name] = [library, hub_class] if known else [None, None]
    return index | {"scheduler": ["diffusers", SCHEDULER]}


def save_scheduler(scheduler: Scheduler, folder: Path) -> None:
    """Write the hub's scheduler_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "_class_name": SCHEDULER,
        "shift": scheduler.shift,
        "num_train_timesteps": scheduler.num_train_timesteps,
    }
    writing.write_json(folder / "scheduler_config.json", content)

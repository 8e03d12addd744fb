"""Loading a pipeline: hub folders and single files, checked before they are read."""

import textwrap
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files import configurations, hub, published, reading, single_file
from minidiff.files.layout import ENCODERS, SCHEDULER, read_index
from minidiff.files.weights import (
    TINY,
    Prepared,
    count_parameters,
    load_component,
    on_meta,
    open_tensors,
    prepare_component,
)
from minidiff.files.words import seen
from minidiff.flow_matching import Scheduler
from minidiff.interface import checks
from minidiff.sampling import DEFAULTS, Pipeline, recognize
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from minidiff.engine.memory import Plan

PARTS: dict[str, tuple[type, type]] = {
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_2": (CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_3": (T5Encoder, T5Config),
    "transformer": (MMDiT, MMDiTConfig),
    "vae": (VAE, VAEConfig),
}
TOKENIZERS: dict[str, type[CLIPTokenizer] | type[T5Tokenizer]] = {
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "tokenizer_3": T5Tokenizer,
}
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


def load(
    model: Path | str = "tiny",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    text_encoders: Path | str | None = None,
    memory: "str | Plan | None" = None,
    fast: bool = False,
    compile: bool = False,
    **knobs: Any,
) -> Pipeline:
    """A pipeline, ready to draw.

    ``model``: "tiny", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo", a hub id, a
    folder in the hub's diffusers layout, or an official single file; then
    ``text_encoders`` is the folder with the encoders and the tokenizers. ``device``
    None is the CPU; ``dtype`` None is float32 on a CPU and bfloat16 elsewhere.

    ``memory``: "8GB", "12GB", … picks a plan by which one picture of the model's usual
    size fits, says so, and refuses a call that needs more; ``knobs`` are settings of
    ``minidiff.engine.memory.Plan``. ``fast`` runs ``minidiff.engine.fast`` for the
    blocks, ``compile`` compiles each kind of block.
    Every file is checked before the first weight is read: ValueError and
    FileNotFoundError name what does not fit.
    """
    from minidiff.engine.memory import load_parts

    device, dtype = checks.find_target(device, dtype)
    opened = open_model(model, text_encoders, memory, knobs, fast, compile)
    prepared = opened.parts
    parts, plan, room = load_parts(prepared, device, dtype, memory, compile, **knobs)
    *encoders, transformer, vae = (parts.get(name) for name in PARTS)
    if fast or compile:
        from minidiff.engine.fast import accelerate

        transformer = accelerate(transformer, vae, fast, compile)
    given = opened.scheduler, opened.known_as
    pipe = Pipeline(opened.tokenizers, encoders, transformer, vae, *given)
    pipe.plan, pipe.room = plan, room
    how = {"memory": memory, "fast": fast, "compile": compile, **knobs}
    pipe.settings |= checks.chosen(model=opened.name, **how)
    return pipe


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
        for name, classes in PARTS.items()
        if name in present and (t5 or name != "text_encoder_3")
    }
    check_t5(folder, parts, present)
    origin = index.get("_name_or_path")
    name = f"{model} ({origin})" if origin else str(model)
    tokenizers = read_tokenizers(folder, present)
    return Opened(name, with_origin(folder, index), parts, tokenizers, scheduler)


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
    folder, opened = Path(text_encoders), open_tensors(file)
    parts = {
        name: single_file.prepare_part(name, *PARTS[name], opened)
        for name in ("transformer", "vae")
    }
    if (folder / "text_encoder").is_dir():
        parts |= {
            name: prepare_component(*PARTS[name], folder / name)
            for name in ENCODERS
            if not name.endswith("_3") or (t5 and (folder / name).is_dir())
        }
    else:
        files = single_file.find_text_encoders(folder, t5)
        parts |= {
            name: single_file.prepare_part(name, *PARTS[name], encoder)
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
        for name, cls in TOKENIZERS.items()
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
        with on_meta():
            return {
                name: model_class(getattr(config_class, known.sizes[name])())
                for name, (model_class, config_class) in PARTS.items()
            }
    folder = find_model(model, weights=False)
    present = read_index(folder)[1]
    return {
        name: load_component(*classes, folder / name, device="meta")
        for name, classes in PARTS.items()
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
        found = f"{folder} asks for the scheduler {reading.excerpt(name)}"
        raise ValueError(f"{found}; expected {SCHEDULER} (solvers: sampler=…)")
    if used := [name for name in DYNAMIC if content.get(name)]:
        raise ValueError(f"{folder} asks for {used[0]}, which minidiff does not have")
    scheduler = configurations.read_config(Scheduler, folder)
    if scheduler.shift <= 0 or scheduler.num_train_timesteps < 1:
        raise ValueError(f"{folder}: {scheduler}; expected positive numbers")
    return scheduler


def describe(model: Path | str) -> str:
    """A table of a model's parts, and how it is meant to be drawn from."""
    parts = blueprint(model)
    sizes = {name: count_parameters(part) for name, part in parts.items()}
    rows = [f"{'part':<16}{'parameters':>16}{'MB':>10}"]
    for name, size in (sizes | {"all": sum(sizes.values())}).items():
        rows.append(f"{name:<16}{size:>16,}{2 * size / 1e6:>10,.1f}")
    config = parts["transformer"].config
    side = config.sample_size * parts["vae"].config.factor
    usual = DEFAULTS[recognize(known_as(model), config)]
    rows.append(
        f"{side}×{side} pixels, {usual.num_inference_steps} steps, "
        f"guidance {usual.guidance_scale}"
    )
    if words := sorted(seen(model)):
        rows += textwrap.wrap(f"{len(words)} words: {', '.join(words)}", 79)
    return "\n".join(rows)

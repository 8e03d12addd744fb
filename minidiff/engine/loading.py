"""Loading a pipeline: hub folders and single files, checked before they are read."""

import textwrap
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minidiff.distillation import JumpScheduler
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.engine.adapters import Adapters
from minidiff.engine.memory import (
    GIB,
    NOTHING,
    Call,
    Fit,
    Plan,
    asked_by,
    check_device,
    check_speed,
    choose,
    estimate,
    load_parts,
    requested,
    room_left,
    size_in_words,
    stand_in,
    usual_size,
    working,
)
from minidiff.files import hub, single_file
from minidiff.files.disk import read_json
from minidiff.files.layout import (
    ENCODERS,
    ON_HUB,
    SCHEDULER,
    Published,
    config_file,
    make_config,
    named,
    part_folder,
    read_index,
    recognize,
)
from minidiff.files.tokenizer_files import seen
from minidiff.files.weights import (
    SHIPPED,
    Prepared,
    check_variant,
    count_parameters,
    load_component,
    on_meta,
    open_tensors,
    prepare_component,
    shipped,
    short_hash,
)
from minidiff.flow_matching import Scheduler
from minidiff.interface import checks
from minidiff.interface.request import Request
from minidiff.sampling import OTHERS, Pipeline
from minidiff.text_encoders import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.vae import VAE, VAEConfig

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
    variant: str | None = None,
    revision: str | None = None,
    memory: str | Plan | None = None,
    fast: bool | None = None,
    compile: bool = False,
    **knobs: Any,
) -> Pipeline:
    """A pipeline, ready to draw.

    ``model``: "tiny", "tiny-turbo", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo",
    a hub id, a folder in the hub's diffusers layout (which may share parts with one
    beside it: ``layout.part_folder``), or an official single file; then
    ``text_encoders`` is the folder with the encoders and the tokenizers. ``variant``,
    such as "fp16", chooses weights of that name where a folder has them, ``revision`` a
    commit, tag or branch on the hub. ``device`` None is the CPU; ``dtype`` None is
    float32 on a CPU and bfloat16 elsewhere (in float16 T5, which would overflow,
    computes in bfloat16).

    ``memory``: "8GB", "12GB", … picks a plan by which one picture of the model's usual
    size fits, says so, and refuses a call that needs more; ``knobs`` are settings of
    ``minidiff.engine.memory.Plan``. ``fast`` runs ``minidiff.engine.fast`` for the
    blocks and the decoder; None does so in float32 on a CPU, as far as nothing but the
    order of sums changes. ``compile`` compiles each kind of block.
    Every file is checked before the first weight is read: ValueError and
    FileNotFoundError name what does not fit.
    """
    t5 = requested(memory, **knobs).t5 != "none"
    given = Given(model, text_encoders, variant, revision, t5)
    opened = open_model(given, *checks.find_target(device, dtype))
    fit = opened.fit(memory, **knobs)
    return opened.load(fit, memory, fast, compile, **knobs)


class Given(NamedTuple):
    """Where a pipeline's files are, as ``load`` is told; ``t5``: whether T5 counts."""

    model: Path | str
    text_encoders: Path | str | None = None
    variant: str | None = None
    revision: str | None = None
    t5: bool = True


class Files(NamedTuple):
    """A pipeline's files, checked; of the models nothing has been read yet.

    ``name`` is for people, ``origin`` for ``recognize``. ``here``: the files of
    ``parts`` are, so that these read their weights.
    """

    name: str
    origin: str
    parts: dict[str, Prepared]
    tokenizers: list[CLIPTokenizer | T5Tokenizer | None]
    scheduler: Scheduler
    here: bool = True

    @property
    def models(self) -> dict[str, Any]:
        """The parts on the meta device."""
        return {name: part.model for name, part in self.parts.items()}


@dataclass(frozen=True)
class Opened:
    """A model whose files are open, and where it is to be placed."""

    given: Given
    files: Files
    device: torch.device
    dtype: torch.dtype

    def pipeline(self, models: Mapping[str, Any]) -> Pipeline:
        """The pipeline that ``models`` make."""
        encoders = [models.get(name) for name in ENCODERS]
        transformer, vae = models["transformer"], models["vae"]
        readers, how = (self.files.tokenizers, encoders), self.files.scheduler
        pipe = Pipeline(*readers, transformer, vae, how, self.files.origin)
        pipe.adapters = Adapters(pipe)
        pipe.words = seen(self.given.model)
        return pipe

    def rehearsal(self, plan: Plan | None = None) -> Pipeline:
        """A pipeline without weights: its ``check`` refuses what the real one would.

        Layers whose weights ``plan`` keeps elsewhere are marked.
        """
        models = deepcopy(self.files.models)
        for model in models.values():
            stand_in(model, plan or Plan())
        return self.pipeline(models)

    def fit(
        self,
        memory: str | Plan | None = None,
        requests: Iterable[Request] = (),
        **knobs: Any,
    ) -> Fit:
        """The plan by which the checked ``requests`` fit ``memory`` and the card.

        Without any, one picture of the usual size; with a Plan only the weights. A plan
        that was asked for is printed in one line.
        """
        models, dtype = self.files.models, self.dtype
        calls = [asked_by(request, models, dtype) for request in requests]
        size = NOTHING if isinstance(memory, Plan) else usual_size(models)
        usual = Call(models, size, dtype.itemsize)
        call = max(calls, key=lambda call: working(Plan(), call), default=usual)
        plan = choose(memory, call, **knobs)
        check_device(plan, call, self.device, **knobs)
        if knobs or not (memory is None or isinstance(memory, Plan)):
            need, what = (
                estimate(plan, call) / GIB,
                size_in_words(call.size, models["vae"]),
            )
            print(f"memory plan: {plan}; about {need:.1f} GiB for {what}")
        return Fit(plan, room_left(memory, plan, call, calls and self.device or None))

    def load(
        self,
        fit: Fit,
        memory: str | Plan | None = None,
        fast: bool | None = None,
        compile: bool = False,
        **knobs: Any,
    ) -> Pipeline:
        """The pipeline, its weights read as the plan of ``fit`` says.

        ``memory`` and ``knobs`` are what was asked for, as in ``minidiff.load``.
        """
        if not self.files.here:
            here = open_model(self.given, self.device, self.dtype)
            return here.load(fit, memory, fast, compile, **knobs)
        config, files = self.files.models["transformer"].config, self.files.parts
        check_speed(fit.plan, config, self.device, bool(fast), compile)
        weights = files["transformer"].found.values()
        parts: dict[str, Any] = load_parts(files, fit.plan, self.device, self.dtype)
        if fast is None and (self.device.type, self.dtype) != ("cpu", torch.float32):
            fast = False
        if fast is not False or compile:
            from minidiff.engine.fast import accelerate

            made = accelerate(parts["transformer"], parts["vae"], fast, compile)
            parts["transformer"] = made
        pipe = self.pipeline(parts)
        pipe.plan, pipe.room = fit
        how = {"memory": memory, "fast": fast, "compile": compile, **knobs}
        how["weights"] = short_hash(min(f.path for f in weights))
        pipe.settings |= checks.chosen(model=self.files.name, **how)
        return pipe


def open_model(
    given: Given, device: torch.device, dtype: torch.dtype, weights: bool = True
) -> Opened:
    """Check the files of a model: one, or a folder.

    Without ``weights`` those of a model on the hub need not be here yet: what is wrong
    with a call is told before the download.
    """
    model, encoders = given.model, given.text_encoders
    if given.variant is not None:
        hub.check_word("variant", given.variant)
    if given.revision is not None and (shipped(model) or Path(model).exists()):
        found = f"revision is {given.revision!r}, but {model} is here"
        raise ValueError(f"{found}; expected the name of a model on the hub")
    if Path(model).is_file():
        files = open_single_file(given)
    elif encoders is not None:
        found = f"text_encoders is {str(encoders)!r}, but {model} is no single file"
        raise ValueError(f"{found} and has its own")
    elif weights or shipped(model) or Path(model).exists():
        files = open_folder(given)
    else:
        files = outline(given)
    models = files.models
    readers = [models.get(name) for name in ENCODERS]
    checks.check_parts(readers, models["transformer"], models["vae"])
    checks.check_tokenizers(files.tokenizers, readers)
    return Opened(given, files, device, dtype)


def open_folder(given: Given) -> Files:
    """Check a folder in the hub's layout, or a name that stands for one.

    Where T5 does not count its weights need not be there.
    """
    folder = find_model(given)
    check_variant(folder, given.variant)
    index, present = read_index(folder)
    scheduler = read_scheduler(part_folder(folder, "scheduler"))
    parts: dict[str, Prepared] = {
        name: prepare_component(*classes, part_folder(folder, name), given.variant)
        for name, classes in PARTS.items()
        if name in present and (given.t5 or name != "text_encoder_3")
    }
    check_t5(folder, parts, present)
    name, readers = str(given.model), read_tokenizers(folder, present)
    if origin := index.get("_name_or_path"):
        name = f"{name} ({origin})"
    return Files(name, known_as(given, folder), parts, readers, scheduler)


def outline(given: Given) -> Files:
    """What is known of a model without its weights: shapes, on the meta device.

    The published names need no network; a folder's config.json files are read.
    """
    if known := on_hub(given.model):
        with on_meta():
            models = {
                name: model_class(getattr(config_class, known.sizes[name])())
                for name, (model_class, config_class) in PARTS.items()
            }
        origin = known.name
    else:
        folder = find_model(given, weights=False)
        present, origin = read_index(folder)[1], known_as(given, folder)
        models = {
            name: load_component(*classes, part_folder(folder, name), device="meta")
            for name, classes in PARTS.items()
            if name in present
        }
    counted = {n: m for n, m in models.items() if given.t5 or n != "text_encoder_3"}
    parts = {name: Prepared(model, {}, {}) for name, model in counted.items()}
    return Files(str(given.model), origin, parts, [None] * 3, Scheduler(3.0), False)


def blueprint(
    model: Path | str = "tiny", revision: str | None = None
) -> dict[str, nn.Module]:
    """The models of a pipeline on the meta device: shapes, and not one weight."""
    return outline(Given(model, revision=revision)).models


def open_single_file(given: Given) -> Files:
    """Check an official single file, and the folder of its encoders and tokenizers.

    The encoders may be single files too, or folders of the hub's layout.
    """
    file = Path(given.model)
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is a file; expected a folder in the hub's layout, or an official "
            "single file, *.safetensors"
        )
    if given.text_encoders is None:
        raise ValueError(
            f"{file}: text encoders are not read from it; expected text_encoders="
            "folder, with clip_l.safetensors, clip_g.safetensors, … and the tokenizers"
        )
    folder, opened = Path(given.text_encoders), open_tensors(file)
    parts: dict[str, Prepared] = {
        name: single_file.prepare_part(name, *PARTS[name], opened)
        for name in ("transformer", "vae")
    }
    parts |= open_encoders(folder, given)
    present = [n for n in TOKENIZERS if (folder / n).is_dir() or not n.endswith("_3")]
    check_t5(folder, parts, present)
    if given.t5 and "text_encoder_3" not in parts:
        warnings.warn(f"{folder} holds no T5, so it is left out", stacklevel=5)
    rest = read_tokenizers(folder, present), Scheduler(3.0)
    return Files(file.stem, file.stem, parts, *rest)


def open_encoders(folder: Path, given: Given) -> dict[str, Prepared]:
    """The text encoders in ``folder``: its folders, or single files."""
    if (folder / "text_encoder").is_dir():
        return {
            name: prepare_component(*PARTS[name], folder / name, given.variant)
            for name in ENCODERS
            if not name.endswith("_3") or (given.t5 and (folder / name).is_dir())
        }
    files = single_file.find_text_encoders(folder, given.t5)
    return {
        name: single_file.prepare_part(name, *PARTS[name], encoder)
        for name, encoder in files.items()
    }


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
        cls.from_pretrained(part_folder(folder, name)) if name in present else None
        for name, cls in TOKENIZERS.items()
    ]


def on_hub(model: Path | str) -> Published | None:
    """The published model that ``model`` names, unless it is a folder of that name."""
    known = named(model)
    return known if known and known.repository and not Path(model).is_dir() else None


def known_as(given: Given, folder: Path) -> str:
    """What ``recognize`` is told of a model: its folder and the name it remembers."""
    if known := on_hub(given.model):
        return known.name
    origin = read_index(folder)[0].get("_name_or_path")
    return f"{folder}/{origin}" if origin else str(folder)


def find_model(given: Given, weights: bool = True) -> Path:
    """The folder that a model's name stands for; downloaded if it is on the hub."""
    if folder := find_local(given.model):
        return folder
    at, kind = given.revision, given.variant
    return hub.download_model(
        str(given.model), given.t5, weights=weights, revision=at, variant=kind
    )


def find_local(model: Path | str) -> Path | None:
    """The folder of a model that is no hub's; None for a name on the hub.

    Raises ValueError, or FileNotFoundError for a single file, where it is neither.
    """
    if folder := shipped(model):
        return folder
    if str(model) and Path(model).is_dir():
        return Path(model)
    owner, _, name = str(model).partition("/")
    hub_id = name and "/" not in name and not Path(owner).is_dir()
    if Path(model).suffix == ".safetensors" and not Path(model).exists():
        raise FileNotFoundError(f"{model} is missing")
    if named(model) or hub_id:
        return None
    known = ", ".join((*SHIPPED, *ON_HUB))
    raise ValueError(f"model is {str(model)!r}; expected {known} or a folder")


def read_scheduler(folder: Path) -> Scheduler:
    """The schedule of a folder; ValueError for settings that would draw otherwise."""
    content = read_json(config_file(folder))
    if (name := content.get("_class_name", SCHEDULER)) != SCHEDULER:
        found = f"{folder} asks for the scheduler {name}"
        raise ValueError(f"{found}; expected {SCHEDULER} (solvers: sampler=…)")
    if used := [name for name in DYNAMIC if content.get(name)]:
        raise ValueError(f"{folder} asks for {used[0]}, which minidiff does not have")
    file, jumps = config_file(folder), content.get("_jumps")
    if jumps is None:
        return make_config(Scheduler, content, file)
    return make_config(JumpScheduler, content | {"jumps": jumps}, file)


def usual_of(model: Path | str) -> tuple[int, float]:
    """The steps and the guidance that are usual for a model."""
    files = outline(Given(model))
    known = recognize(files.models["transformer"].config, files.origin) or OTHERS
    usual = known.num_inference_steps, known.guidance_scale
    if on_hub(model):
        return usual
    folder = part_folder(find_model(Given(model), weights=False), "scheduler")
    return (folder.exists() and read_scheduler(folder).usual) or usual


def describe_model(model: Path | str) -> str:
    """A table of a model's parts, and how it is meant to be drawn from."""
    parts: dict[str, Any] = blueprint(model)
    sizes = {name: count_parameters(part) for name, part in parts.items()}
    rows = [f"{'part':<16}{'parameters':>16}{'MB':>10}"]
    for name, size in (sizes | {"all": sum(sizes.values())}).items():
        rows.append(f"{name:<16}{size:>16,}{2 * size / 1e6:>10,.1f}")
    config = parts["transformer"].config
    side = config.sample_size * parts["vae"].config.factor
    steps, scale = usual_of(model)
    rows.append(f"{side}×{side} pixels, {steps} steps, guidance {scale}")
    if words := sorted(seen(model)):
        rows += textwrap.wrap(f"{len(words)} words: {', '.join(words)}", 79)
    return "\n".join(rows)

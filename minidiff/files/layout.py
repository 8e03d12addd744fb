"""The hub's layout of a model: its parts, their configurations, what is published."""

from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_origin

from minidiff.files.disk import excerpt, read_json, write_json

# The hub's class of each part; a pipeline may go without T5 (``_3``)
ENCODERS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}
MODELS = ENCODERS | {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
TOKENIZERS = {
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": "T5TokenizerFast",
}
INDEX = "model_index.json"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def part_folder(folder: Path, name: str) -> Path:
    """Where a pipeline keeps ``name``, one of its parts or files.

    What is not in its folder lies in the one beside it whose name is ``_base`` in its
    index. Raises ValueError for a base that is no such name.
    """
    own = folder / name
    base = None if own.exists() else read_json(folder / INDEX).get("_base")
    if base is None:
        return own
    if not isinstance(base, str) or base != Path(base).name or base in ("", ".."):
        found = f"{folder / INDEX}: _base is {excerpt(repr(base))}"
        raise ValueError(f"{found}; expected the name of a folder beside it")
    return folder.resolve().parent / base / name


def read_index(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A folder's model_index.json, and the parts and tokenizers that it names.

    Raises FileNotFoundError without one, ValueError for what is no SD3 pipeline.
    """
    index = read_json(folder / INDEX)
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        found = excerpt(index.get("_class_name"))
        raise ValueError(f"{folder} is a {found}; expected a StableDiffusion3Pipeline")
    names = (*MODELS, *TOKENIZERS)
    present = [n for n in names if index.get(n) not in (None, [None, None])]
    if missing := [n for n in names if n not in present and not n.endswith("_3")]:
        raise ValueError(f"{folder}/model_index.json names no {', '.join(missing)}")
    return index, present


def pipeline_index(present: Collection[str]) -> dict[str, object]:
    """The hub's model_index.json of a pipeline that has the parts ``present``."""
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, hub_class in (MODELS | TOKENIZERS).items():
        library = "diffusers" if name in ("transformer", "vae") else "transformers"
        known = name in present
        index[name] = [library, hub_class] if known else [None, None]
    return index | {"scheduler": ["diffusers", SCHEDULER]}


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Write the hub's scheduler_config.json; of a distilled model's with ``_jumps``.

    diffusers passes over names that begin so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "_class_name": SCHEDULER,
        "shift": scheduler.shift,
        "num_train_timesteps": scheduler.num_train_timesteps,
    }
    if jumps := getattr(scheduler, "jumps", None):
        content["_jumps"] = jumps
    write_json(folder / "scheduler_config.json", content)


# Configurations

CONFIGS = ("config.json", "scheduler_config.json")
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


class Limits(NamedTuple):
    """What a number of a configuration can be; of a list, each of its entries."""

    low: float
    high: float
    longest: int = 128


# By type, and by name where a type says too little: a model is built from them before
# its weights are seen, so they hold for the largest models with room to spare
LIMITS: dict[Any, Limits] = {
    int: Limits(1, 2**20),
    float: Limits(-3e38, 3e38),
    "num_layers": Limits(1, 128),
    "num_hidden_layers": Limits(1, 128),
    "dual_attention_layers": Limits(0, 127),
    "layers_per_block": Limits(1, 8),
    "block_out_channels": Limits(1, 2**20, 8),
    "blocks": Limits(1, 16, 8),
    "widths": Limits(1, 2**20, 8),
    "eos_token_id": Limits(0, 2**20),
    "shift": Limits(1e-3, 1e3),
    "layer_norm_eps": Limits(0, 1),
    "layer_norm_epsilon": Limits(0, 1),
}


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
    each value must be of its field's type and within ``LIMITS``.
    """
    path = config_file(path)
    return make_config(cls, read_json(path), path)


def make_config(
    cls: type[Config], content: Mapping[str, Any], source: object
) -> Config:
    """Build the dataclass ``cls`` from ``content``; ValueError names its ``source``."""
    wanted = [f for f in fields(cls) if f.name in content]
    missing = [
        f.name
        for f in fields(cls)
        if f not in wanted and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    values = {f.name: content[f.name] for f in wanted}
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    for field in wanted:
        if expected := _unfit(field, values[field.name]):
            found = f"{field.name} is {excerpt(repr(values[field.name]))}"
            raise ValueError(f"{source}: {found}; expected {expected}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def _unfit(field: Field[Any], value: Any) -> str | None:
    """What a value from a JSON file should have been for ``field``; None if it fits."""
    listed = get_origin(field.type) is tuple
    values = value if listed and isinstance(value, tuple) else (value,)
    kind: Any = int if listed else int | float if field.type is float else field.type
    wrong = [v for v in values if not isinstance(v, kind) or isinstance(v, bool)]
    if wrong or isinstance(value, tuple) != listed or (value == () != field.default):
        return getattr(field.type, "__name__", str(field.type))
    usual = LIMITS[float if field.type is float else int]
    low, high, longest = LIMITS.get(field.name, usual)
    if isinstance(value, str | tuple) and len(value) > longest:
        return f"at most {longest} entries"
    numbers = [v for v in values if isinstance(v, int | float)]
    inside = all(low <= number <= high for number in numbers)
    return None if inside else f"{low:g} to {high:g}"


def component_class(folder: Path | str) -> str:
    """The class name that a component's config.json states, as diffusers spells it."""
    content = read_json(config_file(folder))
    listed = content.get("architectures") or [""]
    first = listed[0] if isinstance(listed, list) else listed
    return str(content.get("_class_name") or first)


# Of diffusers' SD3ControlNetModel, where it has SD3.5 Large's layout: blocks of the
# image's stream alone, and the transformer's own patches and positions
IMAGE_ONLY: dict[str, Any] = {
    "joint_attention_dim": None,
    "use_pos_embed": False,
    "pos_embed_type": None,
    "qk_norm": None,
    "extra_conditioning_channels": 0,
    "force_zeros_for_pooled_projection": False,
}


def check_image_only(folder: Path | str) -> dict[str, Any]:
    """A ControlNet's config.json; ValueError unless it is laid out as Large's are."""
    path = config_file(folder)
    content = read_json(path)
    for name, expected in IMAGE_ONLY.items():
        if (found := content.get(name, "not said")) != expected:
            what = f"{path}: {name} is {excerpt(repr(found))}"
            raise ValueError(f"{what}; expected {expected!r}, as in SD3.5 Large's")
    return content


def hub_config(config: Any, class_name: str) -> dict[str, Any]:
    """The config.json with which diffusers or transformers builds ``class_name``."""
    content = asdict(config)
    if class_name == "SD3Transformer2DModel":
        width = config.num_attention_heads * config.attention_head_dim
        return {"_class_name": class_name, "caption_projection_dim": width, **content}
    if class_name == "SD3ControlNetModel":
        table = {"pos_embed_max_size": None, "sample_size": 128}
        return {"_class_name": class_name, **table, **IMAGE_ONLY, **content}
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


@dataclass(frozen=True)
class Published:
    """A model that a name stands for, and what suits it.

    ``sizes``: for each part the class method of its configuration that has its sizes.
    ``repository``, ``revision``: on the hub, at the commit that this package was
    written for; ``single_file``: the official one there. Steps and guidance are those
    of the model's card; a folder's scheduler has the last word on ``shift``.
    """

    name: str
    sizes: Mapping[str, str]
    num_inference_steps: int
    guidance_scale: float
    repository: str = ""
    revision: str = ""
    single_file: str = ""
    shift: float = 3.0

    @property
    def names(self) -> set[str]:
        """What it is called: here, on the hub, in the hub's cache, as a single file."""
        if not self.repository:
            return {self.name}
        cached = f"models--{self.repository.replace('/', '--')}"
        stem = self.single_file.removesuffix(".safetensors")
        return {self.name, self.repository, cached, self.single_file, stem}


SMALL = {
    "text_encoder": "tiny_l",
    "text_encoder_2": "tiny_g",
    "text_encoder_3": "tiny",
    "transformer": "tiny",
    "vae": "tiny",
}
MEDIUM = {
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
    "text_encoder_3": "t5_xxl",
    "transformer": "sd35_medium",
    "vae": "sd35",
}
LARGE = MEDIUM | {"transformer": "sd35_large"}
PUBLISHED = {
    model.name: model
    for model in (
        Published("tiny", SMALL, 28, 2.5),
        Published(
            "sd3.5-medium",
            MEDIUM,
            40,
            4.5,
            "stabilityai/stable-diffusion-3.5-medium",
            "b940f670f0eda2d07fbb75229e779da1ad11eb80",
            "sd3.5_medium.safetensors",
        ),
        Published(
            "sd3.5-large",
            LARGE,
            28,
            3.5,
            "stabilityai/stable-diffusion-3.5-large",
            "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
            "sd3.5_large.safetensors",
        ),
        Published(
            "sd3.5-large-turbo",
            LARGE,
            4,
            1.0,
            "stabilityai/stable-diffusion-3.5-large-turbo",
            "ec07796fc06b096cc56de9762974a28f4c632eda",
            "sd3.5_large_turbo.safetensors",
        ),
    )
}
# SD3.5 Large's ControlNets, as their official files number them
CONTROL_KINDS = ("blur", "canny", "depth")
ON_HUB = {name: model for name, model in PUBLISHED.items() if model.repository}


def named(model: Path | str) -> Published | None:
    """The published model that ``model``, a name or a hub id, stands for."""
    names = {known.repository: known for known in ON_HUB.values()} | PUBLISHED
    return names.get(str(model))


def recognize(config: Any, origin: Path | str = "") -> Published | None:
    """The published model that a transformer of configuration ``config`` is one of.

    Of those that are configured alike, as Large and Large Turbo, ``origin`` decides: a
    name, a hub id or a path that ends in what one is called, or lies in its folder of
    the hub's cache; else it is the first. The size of pictures does not count. A
    configuration of none is the model that its origin names, or None.
    """
    said = called(origin)
    alike = [known for known in PUBLISHED.values() if _is_like(config, known)]
    for known in alike or PUBLISHED.values():
        if said & known.names:
            return known
    return alike[0] if alike else None


def called(origin: Path | str) -> set[str]:
    """What a path calls a model: its last part or two, and its folder on the hub."""
    parts = Path(origin).parts
    cached = {part for part in parts if part.startswith("models--")}
    return {*parts[-1:], "/".join(parts[-2:])} | cached


def published_control(path: Path) -> str | None:
    """What the published ControlNet of this name reads: one of ``CONTROL_KINDS``."""
    for kind in CONTROL_KINDS:
        repository = f"stable-diffusion-3.5-large-controlnet-{kind}"
        names = {repository, f"models--stabilityai--{repository}"}
        if called(path) & (names | {f"sd3.5_large_controlnet_{kind}.safetensors"}):
            return kind
    return None


def _is_like(config: Any, known: Published) -> bool:
    """Whether a transformer of ``config`` has the layers of a published model's."""
    other = getattr(type(config), known.sizes["transformer"])()
    return config == replace(other, sample_size=config.sample_size)

"""A model's settings as the hub keeps them: config.json, read and written."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_origin

from minidiff.files.reading import excerpt, read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIGS = ("config.json", "scheduler_config.json")
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

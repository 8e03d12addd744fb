"""A model's settings as the hub keeps them: config.json, read and written."""

import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin

from minidiff.files.reading import read_json

CONFIGS = ("config.json", "scheduler_config.json")
Config = TypeVar("Config")


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

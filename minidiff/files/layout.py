"""A pipeline's folder in the hub's layout: its parts, their index, the scheduler."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidiff.files import reading, weights, writing

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
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def read_index(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A folder's model_index.json, and the parts and tokenizers that it names.

    Raises FileNotFoundError without one, ValueError for what is no SD3 pipeline.
    """
    index = reading.read_json(folder / "model_index.json")
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        found = reading.excerpt(index.get("_class_name"))
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
    """Write the hub's scheduler_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "_class_name": SCHEDULER,
        "shift": scheduler.shift,
        "num_train_timesteps": scheduler.num_train_timesteps,
    }
    writing.write_json(folder / "scheduler_config.json", content)


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
        weights.save_component(model, folder / name, MODELS[name], dtype)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    save_scheduler(scheduler, folder / "scheduler")
    index = pipeline_index((*models, *tokenizers)) | {"_name_or_path": origin}
    writing.write_json(folder / "model_index.json", index)


def check_whole(name: str, model: nn.Module) -> None:
    """Raise ValueError for weights in 8 bits, in their file, or beside their layer."""
    with weights.on_meta():
        own = type(model)(model.config).state_dict().keys()
    if odd := sorted(own ^ model.state_dict().keys()):
        raise ValueError(
            f"{name}.{odd[0]} is stored in 8 bits, in its file, or beside its layer; "
            "expected a pipeline loaded without a plan of memory"
        )

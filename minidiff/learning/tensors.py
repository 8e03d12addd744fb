"""Tensors in a file with a checksum, and names made of what made them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff.files.reading import file_size, parse_json
from minidiff.files.writing import replacing
from minidiff.interface.terminal import tell
from minidiff.learning import parallel

Tensors = dict[str, Tensor]


def fingerprint(*parts: object) -> str:
    """A short name for what made a file: tensors by their bytes, others by repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            content = part.detach().contiguous().cpu().flatten().view(torch.uint8)
            digest.update(content.numpy().data)
        else:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]


def checksum(tensors: Tensors, metadata: dict[str, object]) -> str:
    """A fingerprint of names, dtypes, shapes and bytes, and of what stands beside."""
    shapes = [(k, x.dtype, tuple(x.shape)) for k, x in sorted(tensors.items())]
    about = sorted(metadata.items()), shapes
    return fingerprint(about, *(tensors[name] for name in sorted(tensors)))


def save_tensors(path: Path, tensors: Tensors, **metadata: object) -> None:
    """``tensors`` as one safetensors file, atomically; ``metadata`` beside them."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    about = metadata | {"checksum": checksum(tensors, metadata)}
    with replacing(path) as part:
        save_file(tensors, part, {"about": json.dumps(about)})


def load_tensors(path: Path) -> tuple[Tensors, dict[str, object]]:
    """The tensors and the metadata that :func:`save_tensors` wrote.

    Raises ValueError for a file that is not whole, or not what was written.
    """
    file_size(path)
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if notes.keys() <= {"step", "score"}:  # from before there were checksums
        about = ", ".join(f'"{key}": {value}' for key, value in notes.items())
        return tensors, parse_json(f"{{{about}}}", f"what {path} says")
    metadata = parse_json(notes.get("about", "{}"), f"what {path} says")
    if metadata.pop("checksum", None) != checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: it has not the checksum of its tensors")
    return tensors, metadata


def cached(
    path: Path | None, make: Callable[[], Tensors], device: str | torch.device
) -> Tensors:
    """What ``make`` returns, on ``device``; kept in the file ``path``, if there is one.

    Of several processes the first writes. A damaged file is made again.
    """
    made = None
    if path and path.exists():
        try:
            made = load_tensors(path)[0]
        except ValueError as error:
            tell(f"{error}; it is made again")
    if made is None:
        made = make()
        if path and parallel.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, made)
    return {name: x.to(device) for name, x in made.items()}

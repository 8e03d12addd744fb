"""LoRA files of diffusers and peft: which layers, which matrices, which α."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minidiff.files.disk import LONGEST_CONFIG, excerpt, parse_json
from minidiff.files.weights import FLOATS, TensorFile, open_tensors

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
PARTS = ("transformer.", "text_encoder.", "text_encoder_2.")
LARGEST = 3e38  # of float32
KEYS = "diffusers' keys (transformer.….lora_A.weight)"


class Update(NamedTuple):
    """A layer's two matrices in a file, A (r, in) and B (out, r), and α (None: r)."""

    file: TensorFile
    a: str
    b: str
    alpha: float | None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        return self.file.entries[self.a].shape, self.file.entries[self.b].shape

    def read(self) -> tuple[Tensor, Tensor]:
        """Copies of A and B: a file may be replaced."""
        return self.file.read(self.a).clone(), self.file.read(self.b).clone()


def read_updates(path: Path | str) -> dict[str, Update]:
    """The updates in a file by component and layer, transformer.transformer_blocks.….

    Raises ValueError for a file that is no LoRA, or is written in another form.
    """
    file = open_tensors(path)
    if not file.entries:
        raise ValueError(f"{path} holds no LoRA: it has no tensors")
    notes = parse_notes(path, file.metadata.get(METADATA, "{}"))
    check_kind(path, [*file.entries, *(k for k, v in notes.items() if v)])
    keys = {n: keys_of(file, n) for n in {k.split(".lora_")[0] for k in file.entries}}
    if more := sorted(file.entries.keys() - {*chain(*keys.values())}):
        raise ValueError(f"{path} has {excerpt(more[0])}; expected {KEYS}")
    patterns = {part: patterns_of(path, notes, part) for part in PARTS}
    return {
        name: Update(file, *keys[name], alpha_of(path, name, notes, patterns))
        for name in sorted(keys)
    }


def parse_notes(path: Path | str, text: str) -> dict[str, Any]:
    """A file's metadata; ValueError where it is no object of JSON."""
    if len(text) > LONGEST_CONFIG:
        found = f"{path}: {METADATA} has {len(text):,} characters"
        raise ValueError(f"{found}; expected at most {LONGEST_CONFIG:,}")
    try:
        return parse_json(text, path)
    except ValueError:
        found = f"{path}: {METADATA} is {excerpt(repr(text[:40]))}"
        raise ValueError(f"{found}; expected a JSON object") from None


def check_kind(path: Path | str, names: Sequence[str]) -> None:
    """Raise ValueError for settings and tensors that another formula is needed for."""
    ends = ("use_dora", "use_rslora", "lora_magnitude_vector", "lora_B.bias")
    if found := [name for name in names if name.endswith(ends)]:
        what = f"{path} has {excerpt(found[0])}"
        raise ValueError(f"{what}; expected plain LoRA: W + (α/r)·B·A")


def keys_of(file: TensorFile, name: str) -> tuple[str, str]:
    """The names of a layer's A and B; ValueError where ``file`` lacks one of floats."""
    if not name.startswith(PARTS):
        raise ValueError(f"{file.path} has {excerpt(name)}; expected {KEYS}")
    a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    if a not in file.entries or b not in file.entries:
        what = f"{file.path}: {excerpt(name)} lacks lora_A or lora_B"
        raise ValueError(f"{what}; expected {KEYS}")
    for key in (a, b):
        if (kind := file.entries[key].dtype) not in FLOATS:
            found = f"{file.path}: {excerpt(key)} is {excerpt(kind)}"
            raise ValueError(f"{found}; expected one of {', '.join(FLOATS)}")
    return a, b


def patterns_of(
    path: Path | str, notes: Mapping[str, Any], part: str
) -> dict[str, tuple[int, Any]]:
    """The part's patterns of α: a layer's name or its end → its place, and α.

    peft reads them as regular expressions. Those of real files are names, whose dots
    may be escaped; anything else is refused, for some take hours or gigabytes.
    """
    patterns = notes.get(f"{part}alpha_pattern") or {}
    if not isinstance(patterns, dict):
        found = f"{path}: {part}alpha_pattern is {excerpt(repr(patterns))}"
        raise ValueError(f"{found}; expected layers and numbers")
    alphas: dict[str, tuple[int, Any]] = {}
    for place, (pattern, alpha) in enumerate(patterns.items()):
        name = pattern.replace("\\.", ".")
        if not re.fullmatch(r"\w[\w.]*", name):
            bad = f"{path}: {part}alpha_pattern has {excerpt(repr(pattern))}"
            raise ValueError(f"{bad}; expected the name of a layer, or its end")
        alphas.setdefault(name, (place, alpha))
    return alphas


def alpha_of(
    path: Path | str,
    name: str,
    notes: Mapping[str, Any],
    patterns: Mapping[str, Mapping[str, tuple[int, Any]]],
) -> float | None:
    """α of a layer: by the first of the patterns that it is or ends in, or its part's.

    Raises ValueError for what is no finite number that float32 holds.
    """
    part, *words = name.split(".")
    known, ends = patterns[f"{part}."], (".".join(words[i:]) for i in range(len(words)))
    found = [known[end] for end in ends if end in known]
    alpha = min(found)[1] if found else notes.get(f"{part}.lora_alpha")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (number and abs(alpha) < LARGEST):
        what = f"{path}: α of {name} is {excerpt(repr(alpha))}"
        raise ValueError(f"{what}; expected a number")
    return alpha

"""LoRA files of every style: whose keys, which layers, by which matrices, how much."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.files.disk import LONGEST_CONFIG, excerpt, parse_json, read_text
from minidiff.files.weights import FLOATS, TensorFile, open_tensors

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
LARGEST = 3e38  # of float32

# How a key begins, whose style that is, and the part of the pipeline that it means
STYLES = (
    ("transformer.", "diffusers", "transformer"),
    ("text_encoder.", "diffusers", "text_encoder"),
    ("text_encoder_2.", "diffusers", "text_encoder_2"),
    ("text_encoder_3.", "diffusers", "text_encoder_3"),
    ("unet.", "diffusers U-Net", "unet"),
    ("lora_unet_", "kohya", "transformer"),
    ("lora_te1_", "kohya or OneTrainer", "text_encoder"),
    ("lora_te2_", "kohya or OneTrainer", "text_encoder_2"),
    ("lora_te3_", "kohya or OneTrainer", "text_encoder_3"),
    ("lora_te_", "kohya SD 1", "text_encoder"),
    ("lora_transformer_", "OneTrainer", "transformer"),
    ("lycoris_", "LyCORIS", "transformer"),
    ("diffusion_model.", "ComfyUI", "transformer"),
    ("model.diffusion_model.", "ComfyUI", "transformer"),
    ("text_encoders.clip_l.transformer.", "ComfyUI", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "ComfyUI", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "ComfyUI", "text_encoder_3"),
    ("clip_l.transformer.", "ComfyUI", "text_encoder"),
    ("clip_g.transformer.", "ComfyUI", "text_encoder_2"),
    ("t5xxl.transformer.", "ComfyUI", "text_encoder_3"),
    ("base_model.model.", "peft", "transformer"),
    ("", "no prefix", "transformer"),
)
# How a key ends, and what the tensor is
ROLES = {
    f"{name}{end}": role
    for role, names in {
        "down": "lora_A lora_down lora.down lora_linear_layer.down",
        "up": "lora_B lora_up lora.up lora_linear_layer.up",
    }.items()
    for name in names.split()
    for end in (".weight", ".default.weight")
}
MAGNITUDES = [
    f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default.weight")
]
ROLES |= dict.fromkeys([*MAGNITUDES, "dora_scale"], "magnitude") | {"alpha": "alpha"}
ROLES |= {f"hada_w{i}_{c}": f"hada_w{i}_{c}" for i in (1, 2) for c in "ab"}
ROLES |= {f"lokr_w{i}{c}": f"lokr_w{i}{c}" for i in (1, 2) for c in ("", "_a", "_b")}
# Chains of matrices to multiply: one makes a LoRA, LoHa and LoKr join two
_LOKR = [[(f"lokr_w{i}",), (f"lokr_w{i}_a", f"lokr_w{i}_b")] for i in (1, 2)]
KINDS: dict[frozenset[str], tuple[str, tuple[tuple[str, ...], ...]]] = {
    frozenset(role for chain in chains for role in chain): (kind, chains)
    for kind, chains in (
        ("LoRA", (("up", "down"),)),
        ("LoHa", (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))),
        *(("LoKr", (left, right)) for left in _LOKR[0] for right in _LOKR[1]),
    )
}
# What is not added to a linear layer's matrix, or needs a formula that is not here
REFUSED = {
    "lora_B.bias": "a LoRA with biases",
    "lora_mid.weight": "a LoCon of convolutions, in Tucker's form",
    "hada_t1": "a LoHa of convolutions, in Tucker's form",
    "lokr_t2": "a LoKr of convolutions, in Tucker's form",
    "diff": "LyCORIS' full difference",
    "diff_b": "LyCORIS' full difference of biases",
    "w_norm": "LyCORIS' trained norms",
    "b_norm": "LyCORIS' trained norms",
    "oft_blocks": "OFT, a rotation",
    "oft_diag": "OFT, a rotation",
    "oft_R.weight": "OFT, a rotation",
    "boft_R": "BOFT, a rotation",
    "on_input": "IA³, a scale of rows",
    "ia3_l": "IA³, a scale of rows",
    "a1.weight": "GLoRA",
}
FORMS = "LoRA, LoHa, LoKr or DoRA"


@dataclass(frozen=True)
class Stored:
    """A layer's update in a file, in one of ``STYLES``: ``layer`` of a ``part``.

    ``kind`` is LoRA, LoHa or LoKr, ``chains`` the keys of the matrices to multiply;
    ``magnitude`` is the key of DoRA's lengths, None without. α is None for the rank.
    """

    file: TensorFile
    style: str
    part: str
    layer: str
    kind: str
    chains: tuple[tuple[str, ...], ...]
    magnitude: str | None = None
    alpha: float | None = None
    root: bool = False

    @property
    def name(self) -> str:
        """What to call it: part and layer."""
        return f"{self.part}.{self.layer}"

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """What each chain makes; ValueError for what is no product of matrices."""
        return [self._shape(chain) for chain in self.chains]

    def _shape(self, chain: tuple[str, ...]) -> tuple[int, int]:
        sizes = [self.file.entries[key].shape for key in chain]
        for key in sorted(chain):
            size = self.file.entries[key].shape
            if len(size) != 2 or 0 in size:
                shape = excerpt(list(size))
                found = f"{self.file.path}: {excerpt(key)} has shape {shape}"
                raise ValueError(f"{found}; expected a matrix that is not empty")
        if len(chain) > 1 and sizes[0][1] != sizes[1][0]:
            found = f"{self.file.path}: {self.name} has matrices"
            found += f" of shapes {list(sizes[0])} and {list(sizes[1])}"
            raise ValueError(f"{found}; expected one rank")
        return sizes[0][0], sizes[-1][1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update, as ``shapes``."""
        (out, inputs), *more = self.shapes
        if self.kind == "LoKr":
            return out * more[0][0], inputs * more[0][1]
        if more and more[0] != (out, inputs):
            both = f"{[out, inputs]} and {list(more[0])}"
            found = f"{self.file.path}: {self.name} has products of shape {both}"
            raise ValueError(f"{found}; expected one shape")
        return out, inputs

    @property
    def rank(self) -> int | None:
        """The last product's inner size; None where every matrix is whole (LoKr)."""
        pairs = [chain for chain in self.chains if len(chain) > 1]
        return self.file.entries[pairs[-1][1]].shape[0] if pairs else None

    @property
    def scale(self) -> float:
        """α/r; α/√r for rsLoRA; 1 without α, and where there is no rank."""
        if self.rank is None:
            return 1.0
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.root else self.rank)

    def read(self) -> list[list[Tensor]]:
        """Copies of the chains' matrices: a file may be replaced."""
        return [[self.file.read(key).clone() for key in c] for c in self.chains]


def lora_file(file: Path | str) -> Path:
    """``file``, or the one in that folder, diffusers' or peft's."""
    path = Path(file)
    if not path.is_dir():
        return path
    peft = path / PEFT_FILE
    return peft if peft.exists() and not (path / FILE).exists() else path / FILE


def read_updates(path: Path | str) -> list[Stored]:
    """The updates in a file, as its keys and its notes say.

    Raises ValueError for a file that is no LoRA, or of a form that is not known here.
    """
    file = open_tensors(path)
    if not file.entries:
        raise ValueError(f"{path} holds no LoRA: it has no tensors")
    notes = read_notes(file)
    layers: dict[str, dict[str, str]] = {}
    for key in sorted(file.entries):
        name, role = split_key(file, key)
        layers.setdefault(name, {})[role] = key
    known = {part: patterns_of(path, notes, part) for _, _, part in STYLES}
    return [stored(file, name, keys, notes, known) for name, keys in layers.items()]


def split_key(file: TensorFile, key: str) -> tuple[str, str]:
    """A layer's name as the file has it, and what the tensor is for it."""
    ends = [key.rsplit(".", n) for n in (4, 3, 2, 1)]  # the longest first
    named = [(name, ".".join(rest)) for name, *rest in ends]
    for name, end in named:
        if role := ROLES.get(end):
            kind = file.entries[key].dtype
            if kind not in FLOATS and role != "alpha":
                found = f"{file.path}: {excerpt(key)} is {excerpt(kind)}"
                raise ValueError(f"{found}; expected one of {', '.join(FLOATS)}")
            return name, role
    forms = [f", {REFUSED[end]}" for _, end in named if end in REFUSED]
    what = f"{file.path} ({style_of(key)[1]} keys) has {excerpt(key)}"
    raise ValueError(f"{what}{forms[0] if forms else ''}; expected {FORMS}")


def style_of(name: str) -> tuple[str, str, str]:
    """The row of ``STYLES`` that a layer's name in a file belongs to."""
    return next(row for row in STYLES if name.startswith(row[0]))


def stored(
    file: TensorFile,
    name: str,
    keys: Mapping[str, str],
    notes: Mapping[str, Any],
    patterns: Mapping[str, Mapping[str, tuple[int, Any]]],
) -> Stored:
    """The update that the ``keys`` of one layer make."""
    prefix, style, part = style_of(name)
    layer = name.removeprefix(prefix)
    roles = keys.keys() - {"alpha", "magnitude"}
    if (found := KINDS.get(frozenset(roles))) is None:
        have = ", ".join(sorted(roles)) or "none"
        what = f"{file.path} ({style} keys): of {excerpt(name)} it has {have}"
        raise ValueError(f"{what}; expected all matrices of a {FORMS}")
    kind, chains = found
    alpha = alpha_of(file, f"{part}.{layer}", keys.get("alpha"), notes, patterns)
    return Stored(
        file,
        style,
        part,
        layer,
        kind,
        tuple(tuple(keys[role] for role in chain) for chain in chains),
        keys.get("magnitude"),
        alpha,
        notes.get(f"{part}.use_rslora") is True,
    )


# The notes of a file, and α


def read_notes(file: TensorFile) -> dict[str, Any]:
    """A file's metadata, as diffusers writes it; of peft's the adapter_config.json."""
    config = file.path.parent / PEFT_CONFIG
    if file.path.name == PEFT_FILE and config.exists():
        found = parse_notes(config, read_text(config))
        alpha = found.get("lora_alpha", found.get("alpha"))
        return {f"transformer.{k}": v for k, v in found.items()} | {
            "transformer.lora_alpha": alpha
        }
    return parse_notes(file.path, file.metadata.get(METADATA, "{}"))


def notes_of(
    part: str, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """A part's metadata: the first layer's rank and α, and patterns for other ones."""
    notes: dict[str, Any] = {f"{part}.target_modules": sorted(ranks)}
    known = ("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)
    for key, pattern, own in known:
        notes[f"{part}.{key}"] = first = next(iter(own.values()))
        if others := {f"^{name}": x for name, x in own.items() if x != first}:
            notes[f"{part}.{pattern}"] = others
    return notes


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


def patterns_of(
    path: Path | str, notes: Mapping[str, Any], part: str
) -> dict[str, tuple[int, Any]]:
    """The part's patterns of α: a layer's name or its end → its place, and α.

    peft reads them as regular expressions. Those of real files are names, whose dots
    may be escaped, and diffusers' begin with a ^: the whole name. Anything else is
    refused, for some take hours or gigabytes.
    """
    patterns = notes.get(f"{part}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        found = f"{path}: {part}.alpha_pattern is {excerpt(repr(patterns))}"
        raise ValueError(f"{found}; expected layers and numbers")
    alphas: dict[str, tuple[int, Any]] = {}
    for place, (pattern, alpha) in enumerate(patterns.items()):
        name = pattern.replace("\\.", ".")
        if not re.fullmatch(r"\^?\w[\w.]*", name):
            bad = f"{path}: {part}.alpha_pattern has {excerpt(repr(pattern))}"
            raise ValueError(f"{bad}; expected the name of a layer, or its end")
        alphas.setdefault(name, (place, alpha))
    return alphas


def alpha_of(
    file: TensorFile,
    name: str,
    key: str | None,
    notes: Mapping[str, Any],
    patterns: Mapping[str, Mapping[str, tuple[int, Any]]],
) -> float | None:
    """α of a layer: its own tensor; or by the first of the patterns that it is or ends
    in; or its part's.

    Raises ValueError for what is no finite number that float32 holds.
    """
    part, *words = name.split(".")
    known = patterns[part]
    ends = (".".join(words[i:]) for i in range(len(words) if known else 0))
    names = itertools.chain([f"^{'.'.join(words)}"], ends)
    found = [known[name] for name in names if name in known]
    alpha = min(found)[1] if found else notes.get(f"{part}.lora_alpha")
    if key:
        tensor = file.read(key)
        alpha = tensor.item() if tensor.numel() == 1 else tensor.tolist()
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (number and abs(alpha) < LARGEST):
        what = f"{file.path}: α of {name} is {excerpt(repr(alpha))}"
        raise ValueError(f"{what}; expected a number")
    return alpha

"""The LoRAs on a pipeline by name: loaded, weighed, switched off, taken out, fused."""

import warnings
import weakref
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from minidiff.files.layout import ENCODERS
from minidiff.files.lora_files import FILE, PEFT_FILE, lora_file
from minidiff.interface.checks import check_number
from minidiff.lora import (
    Beside,
    Update,
    attach,
    bring,
    check_fusable,
    detach,
    fuse,
    read_lora,
)
from minidiff.sampling import Pipeline

Pairs: TypeAlias = list[tuple[dict[str, Update], nn.Module]]
LARGEST = torch.finfo(torch.float16).max  # as a weight it overflows in no layer's dtype


def components(pipe: Pipeline) -> dict[str, nn.Module]:
    """What a file can adapt, under the names that it uses."""
    encoders = zip(ENCODERS, pipe.text_encoders, strict=False)
    return {"transformer": pipe.transformer} | {n: e for n, e in encoders if e}


class LoRA:
    """A file's updates on a pipeline, under a name.

    ``weight`` may be changed and ``enabled`` set to False at any time, until they are
    fused. ``pairs`` are the updates by layer, and their models.
    """

    def __init__(
        self,
        owner: "Adapters",
        name: str,
        file: Path | str,
        pairs: Pairs,
        weight: float,
    ) -> None:
        self.owner, self.name, self.file, self.pairs = owner, name, file, pairs
        self.beside: list[Beside] = []
        self._weight, self._enabled = weight, True

    @property
    def weight(self) -> float:
        """How much of the updates is added; ValueError for what no layer can take."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        check_number("lora_scale", value, LARGEST)
        self._set(value, self._enabled)

    @property
    def enabled(self) -> bool:
        """Whether they act at all."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._set(self._weight, bool(value))

    def _set(self, weight: float, enabled: bool) -> None:
        if not self.pairs:
            found = f"{self.name} is fused or taken out"
            raise ValueError(f"{found}; expected a LoRA beside its layers")
        self._weight, self._enabled = weight, enabled
        for beside in self.beside:
            beside.weight = weight * enabled
        self.owner.record()

    def attach(self) -> None:
        """Put the updates beside their layers."""
        for pair in self.pairs:  # all, before a layer changes: memory may not do
            bring(*pair)
        self.beside = [beside for pair in self.pairs for beside in attach(*pair)]
        self.weight = self.weight

    def fuse(self) -> None:
        """Add what acts to the weights, for good.

        Raises ValueError as ``lora.fuse`` does, before any weight is changed.
        """
        for pair in self.pairs:
            check_fusable(*pair)
        try:
            for updates, model in self.pairs:
                fuse(updates, model, self._weight * self._enabled)
        except BaseException as error:
            note = f"some weights may have {self.file} in them: load the model anew"
            error.add_note(note)
            raise
        self._let_go()

    def remove(self) -> None:
        """Take the updates off the pipeline; without effect where they are fused."""
        if self.beside:
            self._let_go()
            self.owner.forget(self)

    def _let_go(self) -> None:
        for updates, model in self.pairs:
            detach(updates.values(), model)
        self.beside, self.pairs = [], []


class Adapters(Mapping[str, LoRA]):
    """The LoRAs on a pipeline by name, in the order in which they came."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = weakref.ref(pipe)  # which would else be freed late
        self._known: dict[str, LoRA] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapters":
        """Those of the copied pipeline, where that is what is copied."""
        made = memo[id(self)] = Adapters(memo.get(id(self.pipe), self.pipe))
        made._known = deepcopy(self._known, memo)
        return made

    def __getitem__(self, name: str) -> LoRA:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def pipe(self) -> Pipeline:
        """The pipeline; ReferenceError where it is gone."""
        if (pipe := self._pipe()) is None:
            raise ReferenceError("the pipeline of these adapters is gone")
        return pipe

    def load(
        self, file: Path | str, weight: float = 1.0, name: str | None = None
    ) -> LoRA:
        """``load_lora`` on this pipeline."""
        return load_lora(self.pipe, file, weight, name=name)

    def free(self, file: Path) -> str:
        """A name after a file that no other has."""
        named = file.name not in (FILE, PEFT_FILE)
        plain = file.stem if named else file.parent.name
        names = (f"{plain}-{i}" if i else plain for i in count())
        return next(name for name in names if name not in self)

    def keep(self, one: LoRA) -> None:
        """Put a LoRA on the list."""
        self._known[one.name] = one
        self.record()

    def forget(self, one: LoRA) -> None:
        """Strike a LoRA off the list."""
        del self._known[one.name]
        self.record()

    def record(self) -> None:
        """Let pictures say which LoRAs act on the pipeline that draws them."""
        said: dict[str, Any] = dict(self.pipe.settings)
        for key in ("lora", "lora_scale"):
            said.pop(key, None)
        if acting := [one for one in self.values() if one.enabled]:
            scales = [one.weight for one in acting]
            said["lora"] = ", ".join(str(one.file) for one in acting)
            several = ", ".join(map(str, scales))
            said["lora_scale"] = several if len(scales) > 1 else scales[0]
        self.pipe.settings = said


def load_lora(
    pipe: Pipeline,
    file: Path | str,
    scale: float = 1.0,
    fused: bool = False,
    name: str | None = None,
) -> LoRA:
    """Apply a LoRA file, or a folder with one, to a pipeline, times ``scale``.

    Without a ``name`` it has the file's. ``fused`` adds the updates to the weights: as
    fast as without, but not removable, and only for weights that are held in full.
    Otherwise they are computed beside the layers, which may be stored in 8 bits or
    streamed, but not compiled.
    """
    check_number("lora_scale", scale, LARGEST)
    if not isinstance(pipe.adapters, Adapters):
        pipe.adapters = Adapters(pipe)
    adapters, path = pipe.adapters, lora_file(file)
    if name in adapters:
        raise ValueError(f"name is {name!r}, which is on this pipeline already")
    if path.resolve() in [lora_file(one.file).resolve() for one in adapters.values()]:
        known = f"{file} is on this pipeline already and is added once more"
        warnings.warn(f"{known}; remove() takes a LoRA off", stacklevel=2)
    models = components(pipe)
    found = read_lora(path, models)
    for part in () if fused else found:
        if any(module._compiled_call_impl for module in models[part].modules()):
            raise ValueError(
                f"the {part} is compiled and would not see {file}; "
                "expected a fused LoRA or no compilation"
            )
    pairs = [(updates, models[part]) for part, updates in found.items()]
    one = LoRA(adapters, name or adapters.free(path), file, pairs, scale)
    one.fuse() if fused else one.attach()
    adapters.keep(one)
    return one

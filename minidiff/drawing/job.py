"""What one command draws, and the pipeline that fits it: rehearsed, then loaded."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minidiff.drawing.guidance import SkipLayer
from minidiff.drawing.series import Series
from minidiff.engine.loading import Given, open_model
from minidiff.engine.memory import requested
from minidiff.files.weights import read_header
from minidiff.interface.checks import find_target
from minidiff.interface.request import Request
from minidiff.lora import load_lora, lora_file
from minidiff.sampling import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Job:
    """A series, and what is put on a pipeline for it.

    ``lora``, a file or its folder, times ``lora_scale``; ``fused`` into the weights, or
    beside them. ``skip_layers`` are those of Skip Layer Guidance. Raises ValueError or
    OSError for a file that cannot be used.
    """

    series: Series
    lora: Path | None = None
    lora_scale: float = 1.0
    fused: bool = False
    skip_layers: Sequence[int] = ()
    skip_layer_scale: float = 2.8

    def __post_init__(self) -> None:
        if self.lora:
            read_header(lora_file(self.lora))

    def put_on(self, pipe: Pipeline) -> Series:
        """The series for a pipeline, to which the LoRA is applied here."""
        if self.lora:
            load_lora(pipe, self.lora, self.lora_scale, self.fused)
        if not self.skip_layers:
            return self.series
        request = self.series.request or Request("")
        beneath = pipe.guidance(request.guidance_scale)
        guidance = SkipLayer(beneath, self.skip_layers, self.skip_layer_scale)
        request = replace(request, guidance=guidance, guidance_scale=None)
        return replace(self.series, request=request)

    def draw(self, pipe: Pipeline) -> "Iterator[Image]":
        """The pictures, as they come."""
        return self.put_on(pipe).draw(pipe)

    def load(
        self,
        model: str,
        text_encoders: Path | None,
        target: tuple[str, torch.dtype | None],
        plan: dict[str, Any],
        fast: bool,
        compile: bool,
    ) -> Pipeline:
        """A pipeline in which one picture fits: checked first, without any weights.

        ``target``: device and dtype; ``plan``: ``memory`` and settings of a Plan. What
        is printed goes to stderr: stdout is for names.
        """
        wanted = requested(**plan)
        given = Given(model, text_encoders, t5=wanted.t5 != "none")
        with redirect_stdout(sys.stderr):
            opened = open_model(given, *find_target(*target), weights=False)
            pipe = opened.rehearsal(wanted)
            fit = opened.fit(requests=[self.put_on(pipe).check(pipe)], **plan)
            if fit.plan != wanted:  # it may keep weights away that a LoRA is added to
                self.put_on(opened.rehearsal(fit.plan))
            return opened.load(fit, fast=fast, compile=compile, **plan)

"""A drawing's checks without its weights: what is refused is refused at once.

A pipeline checks a call before any work, but reading a large model comes before the
call. A rehearsal makes the same call on the same files with models that have shapes and
no weights, and ends where the work would begin.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from minidiff.extras import loading
from minidiff.extras.memory import Plan, check_device, choose, requested, stand_in
from minidiff.flow_matching import Scheduler
from minidiff.sampling import Pipeline
from minidiff.support.checks import check_target


class Began(Exception):
    """The call passed its checks."""


class Rehearsal(Pipeline):
    """A pipeline on the meta device that ends at its first work."""

    def prepare_latents(self, *args: Any, **options: Any) -> Tensor:
        """The latents, whose shape is kept: memory depends on it."""
        latents = super().prepare_latents(*args, **options)
        self.size = tuple(latents.shape)
        return latents

    def encode_prompt(self, *_: object) -> NoReturn:
        """Prompts are encoded once all checks have passed."""
        raise Began


def rehearse(
    perform: Callable[[Pipeline], None],
    model: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    text_encoders: Path | str | None = None,
    memory: Any = None,
    **knobs: Any,
) -> Plan:
    """Call ``perform`` with a rehearsal of ``model``; its errors are the real call's.

    So is that of a card too small for the call. The arguments are those of
    ``minidiff.load``. Warnings wait for the real call. Returns the plan of memory with
    which the call fits.
    """
    device, dtype = check_target(device, dtype)
    opened = outline(model, text_encoders, memory, knobs)
    models, width = opened.parts, dtype.itemsize
    plan = choose(memory, models, width, **knobs)
    for part in models.values():
        stand_in(part, plan)
    *encoders, transformer, vae = (models.get(name) for name in loading.PARTS)
    parts = transformer, vae, opened.scheduler, opened.name
    pipe = Rehearsal(opened.tokenizers, encoders, *parts)
    pipe.progress = False
    with warnings.catch_warnings(action="ignore"):
        try:
            perform(pipe)
        except Began:
            plan = choose(memory, models, width, pipe.size, **knobs)
            check_device(plan, models, device, width, pipe.size, **knobs)
    return plan


def outline(
    model: Path | str, text_encoders: Path | str | None, memory: Any, knobs: dict
) -> loading.Opened:
    """A pipeline's files, opened, their models on the meta device.

    Of a published model they need not be here yet: what is wrong with a call is told
    before the download.
    """
    if str(model) not in loading.PUBLISHED or text_encoders is not None:
        opened = loading.open_model(model, text_encoders, memory, knobs)
        return opened._replace(parts={n: p.model for n, p in opened.parts.items()})
    models = loading.blueprint(model)
    if requested(memory, **knobs).t5 == "none":
        del models["text_encoder_3"]
    return loading.Opened(str(model), models, [None] * 3, Scheduler(3.0))

"""A drawing's checks without its weights: what is refused is refused at once.

A pipeline checks a call before any work, but reading a large model comes before the
call. A rehearsal makes the same call on the same files with models that have shapes and
no weights, and ends where the work would begin.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from minidiff.engine import loading
from minidiff.engine.memory import (
    Call,
    Plan,
    announce,
    check_device,
    choose,
    requested,
    room_for_more,
    stand_in,
    usual_levels,
    usual_size,
)
from minidiff.flow_matching import Scheduler
from minidiff.interface.checks import check_target
from minidiff.sampling import Pipeline


class Began(Exception):
    """The call passed its checks."""


class Fit(NamedTuple):
    """The plan with which a call fits, and what larger calls may take in bytes."""

    plan: Plan
    room: float


class Rehearsal(Pipeline):
    """A pipeline on the meta device that ends at its first work.

    It keeps what memory depends on: the latents' size, and how many levels have
    modulations.
    """

    size = levels = None

    def prepare_latents(self, *args: Any, levels: int | None = None) -> Tensor:
        """The latents; their shape and the levels are kept."""
        latents = super().prepare_latents(*args, levels=levels)
        self.size, self.levels = tuple(latents.shape), levels
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
) -> Fit:
    """Call ``perform`` with a rehearsal of ``model``; its errors are the real call's.

    So is that of a card too small for the call. The arguments are those of
    ``minidiff.load``. Warnings wait for the real call. Where a plan of memory was asked
    for it is printed in one line.
    """
    device, dtype = check_target(device, dtype)
    opened = outline(model, text_encoders, memory, knobs)
    asked = requested(memory, **knobs)
    pipe = attempt(perform, opened, asked)
    size = pipe.size or usual_size(opened.parts)
    levels = pipe.levels or usual_levels(pipe)
    call = Call(opened.parts, size, dtype.itemsize, levels)
    plan = choose(memory, call, **knobs)
    check_device(plan, call, device, **knobs)
    if plan != asked:  # it may keep weights away that a LoRA would be added to
        attempt(perform, opened, plan)
    if memory is not None or knobs:
        announce(plan, call)
    return Fit(plan, room_for_more(memory, plan, call, device))


def attempt(
    perform: Callable[[Pipeline], None], opened: loading.Opened, plan: Plan
) -> Rehearsal:
    """The pipeline that ``perform`` was called with, its weights where ``plan`` says.

    ``opened`` keeps its models as they are, for these are weighed.
    """
    parts = deepcopy(opened.parts)
    for part in parts.values():
        stand_in(part, plan)
    *encoders, transformer, vae = (parts.get(name) for name in loading.PARTS)
    given = transformer, vae, opened.scheduler, opened.known_as
    pipe = Rehearsal(opened.tokenizers, encoders, *given)
    pipe.progress = False
    with warnings.catch_warnings(action="ignore"), suppress(Began):
        perform(pipe)
    return pipe


def outline(
    model: Path | str, text_encoders: Path | str | None, memory: Any, knobs: dict
) -> loading.Opened:
    """A pipeline's files, opened, their models on the meta device.

    Of a model on the hub its weights need not be here yet: what is wrong with a call is
    told before the download.
    """
    if str(model) == "tiny" or Path(model).exists() or text_encoders is not None:
        with warnings.catch_warnings(action="ignore"):
            opened = loading.open_model(model, text_encoders, memory, knobs)
        return opened._replace(parts={n: p.model for n, p in opened.parts.items()})
    known = loading.is_published(model)
    source = model if known else loading.find_model(model, weights=False)
    models = loading.blueprint(source)
    if requested(memory, **knobs).t5 == "none":
        models.pop("text_encoder_3", None)
    names = str(model), loading.known_as(source)
    return loading.Opened(*names, models, [None] * 3, Scheduler(3.0))

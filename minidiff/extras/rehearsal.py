"""A drawing's checks without its weights: what is refused is refused at once.

A pipeline checks a call before any work, but reading a large model comes before the
call. A rehearsal makes the same call on the same files with models that have shapes and
no weights, and ends where the work would begin.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from minidiff.extras import loading
from minidiff.sampling import Pipeline


class Began(Exception):
    """The call passed its checks."""


class Rehearsal(Pipeline):
    """A pipeline on the meta device that ends at its first work."""

    def encode_prompt(self, *_: object) -> NoReturn:
        """Prompts are encoded once all checks have passed."""
        raise Began


def rehearse(
    perform: Callable[[Pipeline], None],
    model: Path | str,
    text_encoders: Path | str | None = None,
    memory: Any = None,
    **knobs: Any,
) -> None:
    """Call ``perform`` with a rehearsal of ``model``; its errors are the real call's.

    The arguments are those of ``minidiff.load``. Warnings wait for the real call.
    """
    opened = loading.open_model(model, text_encoders, memory, knobs)
    models = {name: part.model for name, part in opened.parts.items()}
    encoders = [models.get(name) for name in loading.ENCODERS]
    parts = models["transformer"], models["vae"], opened.scheduler, opened.name
    pipe = Rehearsal(opened.tokenizers, encoders, *parts)
    pipe.progress = False
    with warnings.catch_warnings(action="ignore"):
        try:
            perform(pipe)
        except Began:
            pass

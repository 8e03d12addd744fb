"""A stage and its lesson: what it needs and makes, what is learned, what is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minidiff.recipes.job import Job
from minidiff.training import Task


@dataclass(frozen=True)
class Lesson:
    """What a stage learns, and what is done with the averaged model at the end."""

    task: Task
    export: Callable[[Any], None]


@dataclass(frozen=True)
class Stage:
    """One step on the way to a model.

    Args:
        name: of its run's folder, and of its settings in a ``Recipe``.
        prepare: makes its lesson; None where all is done, without learning by steps.
        needs, makes: parts of OUTPUT/model.
        goes_on: whether it can begin with another model's weights.
        only: the scenes it can learn from, if not from any.
    """

    name: str
    prepare: Callable[[Job], Lesson | None]
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    goes_on: bool = False
    only: str | None = None

"""A job and its stages: what is read, learned and kept, and from which seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from minidiff.data import rng
from minidiff.data.captioned import Pictures
from minidiff.data.garments import Garments
from minidiff.data.reader import vocabulary
from minidiff.data.scenes import GARMENT_SHARE
from minidiff.data.told import ToldScenes, own_things
from minidiff.engine import loading
from minidiff.files import layout
from minidiff.files.disk import read_json, write_json
from minidiff.files.layout import ENCODERS, TOKENIZERS
from minidiff.files.tokenizer_files import write_words
from minidiff.files.weights import load_component, save_component
from minidiff.flow_matching import Scheduler
from minidiff.interface.terminal import printable
from minidiff.learning import parallel
from minidiff.learning.run import Run
from minidiff.recipes.recipe import GARMENTS, PLAIN, Recipe
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer
from minidiff.training import Task, TrainingConfig

LENGTH = 32  # tokens of a prompt, for each encoder
AnyScenes = ToldScenes | Garments | Pictures


@dataclass(frozen=True)
class Job:
    """Where a stage reads and writes, and on what it runs."""

    output: Path
    recipe: Recipe
    data: str | None = None
    device: str = "cpu"
    cache: Path | None = None
    seed: int = 0
    start: Path | None = None  # a model whose weights are the beginning
    recompute: bool = False  # the transformer's blocks: see ``steps.recompute``
    crop: bool = True  # pictures of a folder: their middle, or all of them squeezed
    run: Run | None = None  # of the stage that learns now

    @property
    def model(self) -> Path:
        """The exported model, in the hub's layout."""
        return self.output / "model"

    @property
    def runs(self) -> Path:
        """The folder of the stages' runs."""
        return self.output / "runs"

    def config(self, stage: str) -> TrainingConfig | None:
        """How a stage learns; None for one that does not learn by steps."""
        return getattr(self.recipe, stage, None)

    def seed_for(self, purpose: str) -> int:
        """A seed for one purpose."""
        return rng.fold_in(self.seed, sum(map(ord, purpose)))

    def scenes(self, split: str = "train") -> AnyScenes:
        """Scenes, or the pictures of a folder, of one split on this job's device."""
        name, r = self.recipe.scenes, self.recipe
        here = self.data, self.device, self.seed
        if name == PLAIN:
            return Garments(split, *here)
        if not r.told:
            return Pictures(split, name, self.device, self.seed, self.crop)
        sizes = max(r.pictures, r.latents, r.captions), r.held
        things = own_things(r.things) if r.things else None
        share = 1.0 if name == GARMENTS else GARMENT_SHARE
        return ToldScenes(split, *here, *sizes, things, share)

    def read_tokenizers(self) -> list[CLIPTokenizer | T5Tokenizer]:
        """The three trained tokenizers."""
        kinds = loading.TOKENIZERS.items()
        return [kind.from_pretrained(self.model / name) for name, kind in kinds]

    def load_part(self, name: str) -> Any:
        """The exported component of that name."""
        kind, config = loading.PARTS[name]
        return load_component(kind, config, self.model / name, self.device)

    def begin_part(self, name: str) -> Any:
        """A part to train: its tiny configuration, or what ``start`` has learned."""
        kind, config = cast(tuple[Any, Any], loading.PARTS[name])
        if self.start is None:
            return kind(config.tiny())
        return load_to_learn(name, self.start)


def load_to_learn(name: str, folder: Path) -> Any:
    """The component of that name in ``folder``, in memory that can be written."""
    model: nn.Module = load_component(*loading.PARTS[name], folder / name)
    for parameter in model.parameters():  # it may be a read-only memory map
        parameter.data = parameter.data.clone()
    return model


def announce(line: str) -> None:
    """Print ``line`` once, however many processes train."""
    if parallel.rank() == 0:
        print(printable(line), flush=True)


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
        after: the stage whose folder in OUTPUT it begins with, if with one.
        goes_on: whether it can begin with another model's weights.
        only: the scenes it can learn from, if not from any.
        named: whether it is run only where it is named, not among all.
    """

    name: str
    prepare: Callable[[Job], Lesson | None]
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    after: str = ""
    goes_on: bool = False
    only: str | None = None
    named: bool = False


def export_part(job: Job, model: nn.Module, name: str) -> None:
    """Write one component of the hub's layout in float16."""
    if parallel.rank():
        return
    save_component(model, job.model / name, layout.MODELS[name], torch.float16)
    if name in ENCODERS:
        state_special_ids(job, name)


def state_special_ids(job: Job, name: str) -> None:
    """Add the special ids that transformers' configurations of encoders state."""
    tokenizer = job.read_tokenizers()[list(ENCODERS).index(name)]
    path = job.model / name / "config.json"
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = tokenizer.pad_token_id
    known = {k: v for k, v in ids.items() if v is not None}
    write_json(path, read_json(path) | known)


def export_index(job: Job) -> None:
    """What makes a folder of components a pipeline: two files, and the words seen."""
    if parallel.rank():
        return
    layout.save_scheduler(Scheduler(shift=1.0), job.model / "scheduler")
    index = layout.pipeline_index((*loading.PARTS, *TOKENIZERS))
    write_json(job.model / "model_index.json", index)
    scenes = job.scenes()
    if isinstance(scenes, ToldScenes):
        write_words(job.model, [*vocabulary(), *scenes.kinds])
    else:
        write_words(job.model, scenes.all_captions())

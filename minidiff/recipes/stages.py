"""The stages that make the tiny model: from scenes to a folder that ``load`` opens.

Each stage learns by its own objective (``minidiff.training``), keeps its checkpoints
under ``OUTPUT/runs/STAGE`` and exports float16 weights in the hub's layout into
``OUTPUT/model``; the next stage reads them from there.
"""

import json
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.data.fashion_mnist import fashion_mnist
from minidiff.data.told import ToldScenes
from minidiff.files.layout import ENCODERS, TOKENIZERS
from minidiff.files.writing import write_text
from minidiff.learning import parallel
from minidiff.learning.run import Run, lasting
from minidiff.learning.steps import check_batch
from minidiff.learning.tensors import fingerprint
from minidiff.recipes.job import Job, announce
from minidiff.recipes.judge_stage import judge_lesson, witness_lesson
from minidiff.recipes.lesson import Stage
from minidiff.recipes.recipe import LEARNED, WORLD, Recipe
from minidiff.recipes.text_stages import clip_lesson, t5_lesson, train_tokenizers
from minidiff.recipes.transformer_stage import transformer_lesson
from minidiff.recipes.vae_stage import vae_lesson
from minidiff.training import fit

CLIP_L, CLIP_G, T5 = ENCODERS
STAGES = (  # in the order in which one needs another
    Stage("tokenizers", train_tokenizers, makes=tuple(TOKENIZERS)),
    Stage("clip", clip_lesson, needs=tuple(TOKENIZERS), makes=(CLIP_L, CLIP_G)),
    Stage("t5", t5_lesson, needs=tuple(TOKENIZERS), makes=(T5,)),
    Stage("vae", vae_lesson, makes=("vae",), goes_on=True),
    Stage("judge", judge_lesson, only="composed"),
    Stage("judge", witness_lesson, only=WORLD),
    Stage(
        "transformer",
        transformer_lesson,
        needs=(*TOKENIZERS, *ENCODERS, "vae"),
        makes=("transformer",),
        goes_on=True,
    ),
)


def run_stages(job: Job, stages: Iterable[Stage]) -> None:
    """Run ``stages`` in order; one that is done already is left alone.

    ValueError for one that was done with other settings.
    """
    for stage in stages:
        done, start = job.runs / f"{stage.name}.done", time.time()
        finished, run = done.exists(), open_run(job, stage.name)
        parallel.wait()  # nobody begins before all have looked
        if finished:
            run.check()
            announce(f"{stage.name}: was done before")
            continue
        torch.manual_seed(job.seed)
        with run:
            learn_stage(replace(job, run=run), stage)
        seconds = time.time() - start
        if parallel.rank() == 0:
            done.parent.mkdir(parents=True, exist_ok=True)
            write_text(done, json.dumps({"seconds": round(seconds, 1)}))
        announce(f"{stage.name}: done in {seconds:.0f} s")
        parallel.wait()


def learn_stage(job: Job, stage: Stage) -> None:
    """Prepare one stage, fit what it learns, and export it."""
    config = job.config(stage.name)
    if config is None and parallel.rank():
        return  # one process does for all what is not learned by steps
    lesson = stage.prepare(job)
    if config is None or lesson is None:
        return
    with attention_to_train(job.device, config.bfloat16):
        model = fit(lesson.task, config, job.run, job.device)
    lesson.export(model)


def attention_to_train(device: str, bfloat16: bool) -> AbstractContextManager:
    """PyTorch's own choice, but plain products for bfloat16 on a CPU.

    The fused form is slow there on the way back.
    """
    slow = device == "cpu" and bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


# A stage's run: what must be equal for it to go on


def open_run(job: Job, stage: str) -> Run:
    """A stage's folder; what differs from a run that was begun there is named."""
    settings = {"stage": stage, "seed": job.seed, **samples(job)}
    config = job.config(stage)
    if config is None:
        kept = ("stage", "seed", "scenes", "data", "captions")
        settings = {name: settings[name] for name in kept}
        return Run(job.runs / stage, settings)
    settings |= lasting(config)
    began = job.begin_part(stage).state_dict().values() if job.start else ()
    settings["began"] = fingerprint(*began) if began else None
    if stage == "transformer":
        settings["encoders"] = encoders_name(job)
    return Run(job.runs / stage, settings)


def encoders_name(job: Job) -> str:
    """A short name for what makes the transformer's latents and contexts."""
    vae, *encoders = (job.load_part(name) for name in ("vae", *ENCODERS))
    parts = (vae.encoder, *encoders)
    weights = [x for part in parts for x in part.state_dict().values()]
    return fingerprint(*weights, vae.config)


def samples(job: Job) -> dict[str, object]:
    """The settings that change what is learned from, the same for all stages."""
    passing = {*LEARNED, "held"}  # validation's scenes are not learned from
    values = {f.name: getattr(job.recipe, f.name) for f in fields(Recipe)}
    values = {k: v for k, v in values.items() if k not in passing}
    if job.composed or job.world:
        scenes = job.scenes()
        things = (scenes.things.layers,) if isinstance(scenes, ToldScenes) else ()
        data = fingerprint(*fashion_mnist("train", job.data), *things)
        kind = WORLD if job.world else job.recipe.scenes  # wherever own things are
        return values | {"scenes": kind, "data": data}
    content = job.scenes().content
    return values | {"scenes": "pictures", "data": fingerprint(*content)}


# Which stages


def choose_stages(name: str, start: Path | None, scenes: str) -> tuple[Stage, ...]:
    """The stages that ``name`` names: one, or "all" that there are."""
    possible = [s for s in STAGES if s.only in (None, scenes)]
    case = " with plain scenes" if scenes == "plain" else " with your pictures"
    case = "" if scenes in ("composed", WORLD) else case
    if start:
        possible, case = [s for s in STAGES if s.goes_on], " with --start"
    chosen = tuple(s for s in possible if name in (s.name, "all"))
    if not chosen:
        known = ", ".join(s.name for s in possible)
        raise ValueError(f"--stage is {name!r}; expected all, {known}{case}")
    return chosen


def check_needs(stages: Iterable[Stage], model: Path) -> None:
    """Raise ValueError where a stage lacks what none of ``stages`` makes before it."""
    made: set[str] = set()
    for stage in stages:
        for name in stage.needs:
            if name not in made and not (model / name).is_dir():
                raise ValueError(
                    f"--stage {stage.name} needs {model / name}, which is not there; "
                    "expected --stage all, or the stages before it first"
                )
        made |= set(stage.makes)


def check_batches(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Raise ValueError where a stage's batch cannot be cut into its parts."""
    for stage in stages:
        if c := getattr(recipe, stage.name, None):
            check_batch(c.steps, c.batch_size, c.accumulation * parallel.size())

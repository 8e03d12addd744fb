"""``minidiff train``: a whole training, checked, and its stages run one by one.

Each stage learns by its own objective (``minidiff.training``), keeps its checkpoints
under ``OUTPUT/runs/STAGE`` and exports float16 weights in the hub's layout into
``OUTPUT/model``; the next stage reads them from there.
"""

import filecmp
import json
import shutil
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.data.captioned import Pictures
from minidiff.data.fashion_mnist import garment_files
from minidiff.data.told import ToldScenes
from minidiff.engine import loading
from minidiff.files.disk import write_text
from minidiff.files.layout import ENCODERS, TOKENIZERS
from minidiff.files.tokenizer_files import WORDS
from minidiff.files.weights import TINY
from minidiff.interface.checks import check_range
from minidiff.judging.metrics import check_side
from minidiff.learning import parallel
from minidiff.learning.run import Run, check_folder, check_other, fingerprint, lasting
from minidiff.learning.steps import check_batch
from minidiff.recipes.control_stage import control_lesson
from minidiff.recipes.job import Job, Stage, announce
from minidiff.recipes.judge_stage import judge_lesson
from minidiff.recipes.matching_stage import begin_student, matching_lesson
from minidiff.recipes.recipe import (
    LEARNED,
    PLAIN,
    SCENES,
    WORLD,
    Recipe,
    changed,
    find_recipe,
)
from minidiff.recipes.text_stages import clip_lesson, t5_lesson, train_tokenizers
from minidiff.recipes.transformer_stage import transformer_lesson
from minidiff.recipes.turbo_stage import turbo_lesson
from minidiff.recipes.vae_stage import vae_lesson
from minidiff.training import fit

CLIP_L, CLIP_G, T5 = ENCODERS
READ = (*TOKENIZERS, *ENCODERS, "vae")  # by the transformer
WHOLE = (*READ, "transformer")
STAGES = (  # in the order in which one needs another
    Stage("tokenizers", train_tokenizers, makes=tuple(TOKENIZERS)),
    Stage("clip", clip_lesson, needs=tuple(TOKENIZERS), makes=(CLIP_L, CLIP_G)),
    Stage("t5", t5_lesson, needs=tuple(TOKENIZERS), makes=(T5,)),
    Stage("vae", vae_lesson, makes=("vae",), goes_on=True),
    Stage("judge", judge_lesson, only=WORLD),
    Stage(
        "transformer",
        transformer_lesson,
        needs=READ,
        makes=("transformer",),
        goes_on=True,
    ),
    Stage("turbo", turbo_lesson, needs=WHOLE, goes_on=True, named=True),
    Stage(
        "matching",
        matching_lesson,
        needs=WHOLE,
        after="turbo",
        goes_on=True,
        named=True,
    ),
    Stage("control", control_lesson, needs=WHOLE, goes_on=True, named=True),
)

PIPELINE = ("model_index.json", WORDS, "scheduler", *TOKENIZERS, *loading.PARTS)
POOLS = ("pictures", "latents", "captions")


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
    settings["began"] = beginning(job, stage)
    if stage in ("transformer", "turbo", "matching", "control"):
        settings["encoders"] = encoders_name(job)
    if stage in ("turbo", "matching"):
        settings["guidance"] = job.recipe.guidance
    return Run(job.runs / stage, settings)


def beginning(job: Job, stage: str) -> str | None:
    """A short name for the weights from which a stage goes on; None for new ones."""
    if stage in ("turbo", "control"):
        return fingerprint(*job.load_part("transformer").state_dict().values())
    if stage == "matching":
        models = job.load_part("transformer"), begin_student(job)
        return fingerprint(*(x for m in models for x in m.state_dict().values()))
    if job.start is None:
        return None
    return fingerprint(*job.begin_part(stage).state_dict().values())


def encoders_name(job: Job) -> str:
    """A short name for what makes the transformer's latents and contexts."""
    vae, *encoders = (job.load_part(name) for name in ("vae", *ENCODERS))
    parts = (vae.encoder, *encoders)
    weights = [x for part in parts for x in part.state_dict().values()]
    return fingerprint(*weights, vae.config)


def samples(job: Job) -> dict[str, object]:
    """The settings that change what is learned from, the same for all stages."""
    passing = {*LEARNED, "held", "guidance"}  # validation's are not learned from
    values = {f.name: getattr(job.recipe, f.name) for f in fields(Recipe)}
    values = {k: v for k, v in values.items() if k not in passing}
    if job.recipe.told or job.recipe.scenes == PLAIN:
        scenes = job.scenes()
        things = (scenes.things.layers,) if isinstance(scenes, ToldScenes) else ()
        files, labels = garment_files("train", job.data)
        data = fingerprint(*files, labels, *things)
        kind = job.recipe.scenes.partition(":")[0]  # wherever own things are
        return values | {"scenes": kind, "data": data}
    content = job.scenes().content
    return values | {"scenes": "pictures", "data": fingerprint(*content)}


# Which stages


def choose_stages(name: str, start: Path | None, scenes: str) -> tuple[Stage, ...]:
    """The stages that ``name`` names: one, or "all" that there are."""
    possible = [s for s in STAGES if s.only in (None, scenes)]
    case = f" with {scenes} scenes" if scenes in SCENES else " with your pictures"
    case = "" if scenes == WORLD else case
    if start:
        possible, case = [s for s in STAGES if s.goes_on], " with --start"
    names = {s: (s.name,) if s.named else (s.name, "all") for s in possible}
    chosen = tuple(s for s in possible if name in names[s])
    if not chosen:
        known = ", ".join(s.name for s in possible)
        raise ValueError(f"--stage is {name!r}; expected all, {known}{case}")
    return chosen


def check_needs(stages: Iterable[Stage], model: Path, output: Path) -> None:
    """Raise ValueError where a stage lacks what none of ``stages`` makes before it."""
    made: set[Path] = set()
    for stage in stages:
        needed = [model / name for name in stage.needs]
        for folder in needed + [output / stage.after] * bool(stage.after):
            if folder not in made and not folder.is_dir():
                raise ValueError(
                    f"--stage {stage.name} needs {folder}, which is not there; "
                    f"expected --stage {stage.after or 'all'}, or the stages before it"
                    " first"
                )
        made |= {model / name for name in stage.makes}


# The model to go on from: opened, checked, and copied to where a job's stands


def open_start(start: Path) -> Path:
    """The folder of the model to go on from; ValueError unless all of it is whole."""
    folder = TINY if str(start) == "tiny" else start
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"--start is {start}; expected tiny, or a model's folder")
    parts = loading.open_folder(loading.Given(folder)).models
    if "text_encoder_3" not in parts:
        raise ValueError(f"--start is {start}, which lacks T5; expected all encoders")
    check_side(parts["transformer"], parts["vae"])
    if shared := [name for name in parts if not (folder / name).is_dir()]:
        found = f"--start is {start}, which shares its {shared[0]} with another"
        raise ValueError(f"{found}; expected a model with parts of its own")
    return folder


def files_of(path: Path) -> list[Path]:
    """The file ``path``, or the files of this folder, none below."""
    return [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]


def copy_start(job: Job, start: Path) -> None:
    """Copy the model to go on from to where this job's stands, whole or not at all.

    The stages that made what is not learned again count as done. Raises ValueError
    where another model stands already.
    """
    job.runs.mkdir(exist_ok=True)  # first: the model is known by it
    if not job.model.exists():
        copy_model(start, job.model)
    check_same(job.model, start)
    for stage in STAGES:
        if stage.makes and not stage.goes_on:
            write_text(job.runs / f"{stage.name}.done", json.dumps(str(start)))


def copy_model(start: Path, model: Path) -> None:
    """Copy a pipeline's files; they appear at once."""
    part = model.with_name(f".{model.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    names = [name for name in PIPELINE if (start / name).exists()]
    for path in [p for name in names for p in files_of(start / name)]:
        copy = part / path.relative_to(start)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)  # without its mode: it may be read-only
    part.replace(model)


def check_same(model: Path, start: Path) -> None:
    """Raise ValueError where tokenizers or encoders are not those of ``start``."""
    for name in (*TOKENIZERS, *ENCODERS):
        here, there = model / name, start / name
        files = [path.name for path in files_of(there)]
        if filecmp.cmpfiles(here, there, files, shallow=False)[0] != files:
            raise ValueError(
                f"{here} is not {start}'s: expected another --output, or the "
                "model that it began with"
            )


@dataclass(frozen=True)
class TrainOptions:
    """One stage, or "all" that are not done yet, into ``output``.

    Args:
        output: the folder of the model and its runs.
        stage: "all", or the name of one.
        data: where Fashion-MNIST is.
        device: "cpu", "cuda", …
        recipe: "gpu" (large batches, for a large GPU), "shipped" (what made the model
            that ships, on two CPU cores), "trial" (a few steps of everything), or a
            JSON file (see ``find_recipe``); by default "gpu" on a GPU, else "shipped".
        steps, batch_size: of the one stage named, for the recipe's.
        compile: for the recipe's.
        start: a model to go on from, "tiny" or its folder: its tokenizers and text
            encoders stay, its autoencoder and transformer learn on.
        scenes: "world", "garments", "plain" or a folder of pictures with captions, for
            the recipe's; ``crop`` takes their middle, or squeezes them.
        recompute: the transformer needs less memory, and more time.
        seed: decides what is drawn by chance: other scenes, another order, other noise.
    """

    output: Path
    stage: str = "all"
    data: Path | None = None
    device: str = "cpu"
    recipe: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    compile: bool | None = None
    start: Path | None = None
    scenes: str | None = None
    recompute: bool = False
    crop: bool = True
    seed: int = 0


def train_stages(options: TrainOptions) -> None:
    """Train as ``options`` say. Raises ValueError for a name or number that cannot be.

    Nothing is written before all is checked.
    """
    o = options
    recipe = chosen_recipe(o)
    check_range("--seed", o.seed, 0, 2**63 - 1)
    stages = choose_stages(o.stage, o.start, recipe.scenes)
    start = o.start and open_start(o.start)
    check_needs(stages, start or o.output / "model", o.output)
    device = parallel.start(o.device)
    for c in filter(None, (getattr(recipe, s.name, None) for s in stages)):
        check_batch(c.steps, c.batch_size, c.accumulation * parallel.size())
    check_folder(o.output)
    check_other(o.output, "runs", "run")
    parallel.wait()
    recipe = limited(recipe, o)
    # A GPU encodes as fast as a disk reads
    cache = None if o.device.startswith("cuda") else o.output / "cache"
    data = str(o.data) if o.data else None
    job = Job(o.output, recipe, data, device, cache, o.seed, start, o.recompute, o.crop)
    if start and parallel.rank() == 0:
        copy_start(job, start)
    parallel.wait()
    run_stages(job, stages)


def chosen_recipe(o: TrainOptions) -> Recipe:
    """The recipe with what the options change in it."""
    cuda = o.device.startswith("cuda")
    recipe = find_recipe(o.recipe or ("gpu" if cuda else "shipped"), cuda)
    scenes = {"scenes": o.scenes or recipe.scenes}
    recipe = changed(recipe, scenes, "the command line")
    folder = recipe.things or recipe.scenes
    if recipe.scenes not in SCENES and not Path(folder).is_dir():
        raise ValueError(
            f"scenes is {recipe.scenes!r}; expected {', '.join(SCENES)}, or a folder "
            "of pictures"
        )
    size = {"steps": o.steps, "batch_size": o.batch_size}
    size = {name: value for name, value in size.items() if value is not None}
    if size and o.stage not in LEARNED:
        raise ValueError("--steps and --batch-size need a --stage that has them")
    compiled = {} if o.compile is None else {"compile": o.compile}
    changes = {name: compiled | (size if name == o.stage else {}) for name in LEARNED}
    return changed(recipe, changes, "the command line")


def limited(recipe: Recipe, o: TrainOptions) -> Recipe:
    """The recipe with no more samples than there are; the data must be there."""
    if recipe.scenes == PLAIN or recipe.told:
        for split in ("test", "train"):  # the small one first
            garment_files(split, o.data)
        return recipe
    seen, held = (
        len(Pictures(split, recipe.scenes, seed=o.seed, crop=o.crop))
        for split in ("train", "test")
    )
    sizes = {name: min(getattr(recipe, name), seen) for name in POOLS}
    return replace(recipe, held=min(recipe.held, held), **sizes)

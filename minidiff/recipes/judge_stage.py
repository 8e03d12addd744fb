"""The stage of the judge: from every pair of colour and class, every layout."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minidiff.data.garments import Scenes
from minidiff.data.language import shown
from minidiff.data.scenes import World
from minidiff.files.pictures import from_bytes, to_bytes
from minidiff.judging.judge import Judge, accuracy, judge_loss, measure, save_judge
from minidiff.judging.witness import (
    Witness,
    find,
    follows,
    witness_loss,
    witness_targets,
)
from minidiff.learning import parallel
from minidiff.recipes.features import collect, place_in_pool
from minidiff.recipes.job import Job, Lesson
from minidiff.training import Batch, Task


def judge_lesson(job: Job) -> Lesson:
    """The judge of ``minidiff evaluate``, under ``OUTPUT/judge``.

    All pairs are among its scenes, and both layouts as often: see its module.
    """
    scenes = Scenes("train", job.data, job.device, job.seed, held_out=None)
    tests = Scenes("test", job.data, job.device, job.seed, 0.0, held_out=None)

    def batch(indices: Tensor) -> Batch:
        scene = scenes.batch(indices)
        images = scene.images.contiguous(memory_format=torch.channels_last)
        return {"images": images} | scene.attributes._asdict()

    def validate(judge: Judge) -> dict[str, float]:
        return {"one garment": accuracy(judge, tests, 4 * job.recipe.held)["all"]}

    model = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Lesson(
        Task(model, judge_loss, batch, validate), lambda judge: export_judge(job, judge)
    )


def export_judge(job: Job, judge: Judge) -> None:
    """Write the judge, and how much of real scenes it reads rightly."""
    if parallel.rank():
        return
    judge = judge.half().float()  # measured as it will be read back
    n = 20 * job.recipe.held
    measured, config = measure(judge, job.data, n), job.recipe.judge
    seen = config.steps * config.batch_size
    folder = job.output / "judge"
    save_judge(judge, folder, accuracy=measured, test_scenes=n, seen=seen)


# The world's judge

ALONE = (1.0, 0.0, 0.0, 0.0, 0.0)  # one item in every scene


def witness_lesson(job: Job) -> Lesson:
    """The world's judge, under ``OUTPUT/judge``: see ``judging.witness``."""
    world = World("train", job.data, job.device, job.seed, held_out=None)
    images, trace, kinds, colors, ground = witness_pool(world, job.recipe.latents)
    seed = job.seed_for("tests")
    tests = {
        name: World("test", job.data, job.device, seed, None, ALONE, share)
        for name, share in (("one garment", 1.0), ("one thing", 0.0))
    }

    def batch(indices: Tensor) -> Batch:
        place = place_in_pool(indices, len(images))
        pictures = from_bytes(images[place])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        known = {"images": pictures, "trace": trace[place].float()}
        whole = {"kinds": kinds, "colors": colors, "ground": ground}
        return known | {name: x[place].long() for name, x in whole.items()}

    def validate(witness: Witness) -> dict[str, float]:
        numbers = torch.arange(4 * job.recipe.held, device=job.device)
        return {k: reads_rightly(witness, w, numbers) for k, w in tests.items()}

    def export(witness: Witness) -> None:
        if parallel.rank() == 0:
            witness = witness.half().float()  # measured as it will be read back
            told = {"scenes": "world", "accuracy": validate(witness)}
            save_judge(witness, job.output / "judge", **told)

    model = Witness().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Lesson(Task(model, witness_loss, batch, validate), export)


@torch.no_grad()
def witness_pool(world: World, n: int) -> tuple[Tensor, ...]:
    """Scenes 0 … n − 1, uint8 (n, 3, 64, 64), and what ``targets`` makes of them."""

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for numbers in torch.arange(n, device=world.device).split(64):
            scenes = world.batch(numbers)
            t = witness_targets(scenes)
            whole = (t[name].short() for name in ("kinds", "colors", "ground"))
            yield to_bytes(scenes.images), t["trace"].half(), *whole

    return collect(n, parts())


@torch.no_grad()
def reads_rightly(witness: Witness, world: World, indices: Tensor) -> float:
    """The share of scenes of which the witness finds all that they show."""
    right = []
    for part in indices.split(128):
        scenes = world.batch(part)
        pairs = zip(find(witness(scenes.images)), shown(scenes.attributes), strict=True)
        right += [follows(found, meaning)["all"] for found, meaning in pairs]
    return sum(right) / len(right)

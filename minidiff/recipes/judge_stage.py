"""The stage of the judge: from every pair of kind and colour, every layout."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minidiff.data.language import shown
from minidiff.data.samples import ONE
from minidiff.data.scenes import World
from minidiff.files.pictures import from_bytes, to_bytes
from minidiff.judging.answers import follows
from minidiff.judging.judge import Judge, find, judge_loss, judge_targets, save_judge
from minidiff.learning import parallel
from minidiff.recipes.features import collect, place_in_pool
from minidiff.recipes.job import Job, Lesson
from minidiff.training import Batch, Task


def judge_lesson(job: Job) -> Lesson:
    """The judge of ``minidiff evaluate``, under ``OUTPUT/judge``: see its module."""
    world = World("train", job.data, job.device, job.seed, held_out=None)
    images, trace, kinds, colors, ground = judge_pool(world, job.recipe.latents)
    seed = job.seed_for("tests")
    tests = {
        name: World("test", job.data, job.device, seed, None, ONE, share)
        for name, share in (("one garment", 1.0), ("one thing", 0.0))
    }

    def batch(indices: Tensor) -> Batch:
        place = place_in_pool(indices, len(images))
        pictures = from_bytes(images[place])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        known = {"images": pictures, "trace": trace[place].float()}
        whole = {"kinds": kinds, "colors": colors, "ground": ground}
        return known | {name: x[place].long() for name, x in whole.items()}

    def validate(judge: Judge) -> dict[str, float]:
        numbers = torch.arange(4 * job.recipe.held, device=job.device)
        return {k: reads_rightly(judge, w, numbers) for k, w in tests.items()}

    def export(judge: Judge) -> None:
        if parallel.rank() == 0:
            judge = judge.half().float()  # measured as it will be read back
            told = {"scenes": "world", "accuracy": validate(judge)}
            save_judge(judge, job.output / "judge", **told)

    model = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Lesson(Task(model, judge_loss, batch, validate), export)


@torch.no_grad()
def judge_pool(world: World, n: int) -> tuple[Tensor, ...]:
    """Scenes 0 … n − 1, uint8 (n, 3, 64, 64), and what ``targets`` makes of them."""

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for numbers in torch.arange(n, device=world.device).split(64):
            scenes = world.batch(numbers)
            t = judge_targets(scenes)
            whole = (t[name].short() for name in ("kinds", "colors", "ground"))
            yield to_bytes(scenes.images), t["trace"].half(), *whole

    return collect(n, parts())


@torch.no_grad()
def reads_rightly(judge: Judge, world: World, indices: Tensor) -> float:
    """The share of scenes of which the judge finds all that they show."""
    right = []
    for part in indices.split(128):
        scenes = world.batch(part)
        pairs = zip(find(judge(scenes.images)), shown(scenes.attributes), strict=True)
        right += [follows(found, meaning)["all"] for found, meaning in pairs]
    return sum(right) / len(right)

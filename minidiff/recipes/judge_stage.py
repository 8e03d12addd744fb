"""The stage of the judge: from every pair of kind and colour, every layout."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data import rng
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

SHARE = 0.5  # of garments among groups: they are harder to tell apart than things


def judge_lesson(job: Job) -> Lesson:
    """The judge of ``minidiff evaluate``, under ``OUTPUT/judge``: see its module."""
    here = job.data, job.device, job.seed
    world = World("train", *here, held_out=None, garments=SHARE)
    images, trace, kinds, colors, ground = judge_pool(world, job.recipe.latents)
    seed, wear = job.seed_for("tests"), job.seed_for("damage")
    tests = {
        name: World("test", job.data, job.device, seed, None, ONE, share)
        for name, share in (("one garment", 1.0), ("one thing", 0.0))
    }

    def batch(indices: Tensor) -> Batch:
        place = place_in_pool(indices, len(images))
        pictures = damaged(from_bytes(images[place]), indices, wear)
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


def damaged(images: Tensor, indices: Tensor, seed: int) -> Tensor:
    """Pictures (B, 3, H, W) spoilt as drawings may be that still show the same.

    Each is bent, blurred and speckled by amounts that belong to its sample's number in
    ``indices`` (B,); each of the three amounts is zero in a fifth of the pictures.
    """
    size = images.shape[2:]
    amounts = (1.25 * rng.uniform(seed, indices, 3) - 0.25).clamp(min=0)
    bend, blur, speckle = amounts[..., None, None, None].unbind(1)

    def waves(purpose: int, channels: int, side: int) -> Tensor:
        rough = rng.normal(rng.fold_in(seed, purpose), indices, (channels, side, side))
        return F.interpolate(rough, size, mode="bilinear")

    straight = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(straight, [*images.shape], align_corners=False)
    grid = grid + 0.05 * bend * waves(1, 2, 8).movedim(1, -1)  # deviation: 1.1 pixels
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, soft, blur)
    return (images + 0.2 * speckle * (waves(2, 3, 16) + waves(3, 3, 32))).clamp(-1, 1)


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

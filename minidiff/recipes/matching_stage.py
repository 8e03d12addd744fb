"""The stage that sharpens OUTPUT/turbo: its drawings are matched to the teacher's."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidiff.data import rng
from minidiff.distillation import distribution_matching_loss, follow
from minidiff.dit import MMDiT
from minidiff.engine.loading import read_scheduler
from minidiff.flow_matching import flow_matching_loss
from minidiff.learning.steps import INDUCTOR, recompute
from minidiff.recipes.features import Features, place_in_pool
from minidiff.recipes.job import Job, Lesson, load_to_learn
from minidiff.recipes.jumps import (
    Teacher,
    asked,
    caption_row,
    comparison,
    drawings,
    export_turbo,
)
from minidiff.recipes.transformer_stage import NAME, SceneEncoder, plain_attention
from minidiff.recipes.turbo_stage import teacher_of
from minidiff.training import Batch, Task, noise_and_levels

JUMPS = (1, 2, 1, 2, 4)  # of a drawing, in the steps that follow one another
ALONE = 1 / 8  # of the steps: in the first ones only the fake velocity learns


class Pair(nn.Module):
    """The student, and the fake velocity: that of what the student draws."""

    def __init__(self, student: MMDiT, fake: MMDiT) -> None:
        super().__init__()
        self.student, self.fake = student, fake


@torch.compiler.disable  # each network is compiled by itself, which is far quicker
def matching_loss(pair: Pair, batch: Batch, teacher: Teacher) -> Tensor:
    """The chapter's loss of the student's drawings, and the fake velocity's of them.

    The latter learns from two noises of each, so that it keeps up with the student.
    """
    text, jumps = (batch["context"], batch["pooled"]), len(batch["jumps"])
    drawn = follow(asked(pair.student, *text), batch["begin"], jumps, teacher.shift)
    fake, place = asked(pair.fake, *text), (batch["noise"], batch["sigma"])
    match = distribution_matching_loss(drawn, teacher.guided(*text), fake, *place)
    known = [
        flow_matching_loss(fake, drawn.detach(), batch[f"noise{i}"], batch[f"sigma{i}"])
        for i in (1, 2)
    ]
    return batch["matches"] * match + sum(known)


def matching_lesson(job: Job) -> Lesson:
    """The student of OUTPUT/turbo, sharpened, under OUTPUT/matching."""
    recipe, encoder = job.recipe, SceneEncoder(job)
    features = encoder.features(job.scenes(), drawings(recipe.turbo), keep=True)
    held = encoder.features(job.scenes(split="test"), recipe.held, keep=False)
    shift = read_scheduler(job.model / "scheduler").shift
    model: MMDiT = job.load_part(NAME).requires_grad_(False)
    teacher = teacher_of(model, job, features, shift, recipe.matching)
    pair = Pair(begin_student(job), copy.deepcopy(model).requires_grad_(True))
    if job.device == "cpu" and recipe.matching.bfloat16:
        plain_attention(pair.student)  # the others have it from the teacher
    if recipe.matching.compile:
        pair.student.compile(options=INDUCTOR)
        pair.fake.compile(options=INDUCTOR)
    if job.recompute:
        recompute([*pair.student.joint_blocks, *pair.fake.joint_blocks])
    seed = job.seed_for("validation")
    compared = comparison(teacher, held, encoder.vae, seed, job.device)

    def validate(pair: Pair) -> dict:
        step = job.run.step if job.run else 0
        file = job.output / "grids" / f"matching-{step:06}.png"
        return compared.look(pair.student, file)

    def export(pair: Pair) -> None:
        export_turbo(pair.student, job.output / "matching", shift, job.model.name)

    loss = functools.partial(matching_loss, teacher=teacher)
    return Lesson(Task(pair, loss, batches(job, features), validate), export)


def begin_student(job: Job) -> MMDiT:
    """The transformer of OUTPUT/turbo, to learn on."""
    student: MMDiT = load_to_learn(NAME, job.output / "turbo")
    return student


def batches(job: Job, features: Features) -> Callable[[Tensor], Batch]:
    """Captions, noise to draw from, and three noises and levels for each drawing.

    "jumps" is as long as they are many; "matches" is 0 while the student stands still.
    """
    config, shape = job.recipe.matching, tuple(features.latents.shape[1:])
    alone = int(ALONE * config.steps)
    seeds = {name: job.seed_for(f"matching{name}") for name in ("", "1", "2")}

    def batch(indices: Tensor) -> Batch:
        row = caption_row(features, place_in_pool(indices, len(features)))
        made = {"context": features.context[row], "pooled": features.pooled[row]}
        made = {name: x.to(indices.device).float() for name, x in made.items()}
        for name, seed in seeds.items():
            noise, sigma = noise_and_levels(indices, shape, seed)
            made |= {f"noise{name}": noise, f"sigma{name}": sigma}
        step = int(indices[0]) // config.batch_size
        made["begin"] = rng.normal(job.seed_for("begin"), indices, shape)
        made["jumps"] = torch.ones(JUMPS[step % len(JUMPS)])
        made["matches"] = torch.tensor(float(step >= alone), device=indices.device)
        return made

    return batch

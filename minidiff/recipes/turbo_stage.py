"""The stage of the few-step model: the transformer of OUTPUT/model, distilled."""

import copy
import functools

from minidiff.dit import MMDiT
from minidiff.engine.loading import read_scheduler
from minidiff.learning.steps import recompute
from minidiff.recipes.features import Features, place_in_pool
from minidiff.recipes.job import Job, Lesson
from minidiff.recipes.jumps import (
    Comparison,
    Distillation,
    JumpBatches,
    check_rows,
    export_turbo,
)
from minidiff.recipes.transformer_stage import NAME, SceneEncoder, plain_attention
from minidiff.training import Task


def turbo_lesson(job: Job) -> Lesson:
    """A flow map of the guided transformer, under OUTPUT/turbo.

    It shares all but the transformer with OUTPUT/model.
    """
    recipe, encoder = job.recipe, SceneEncoder(job)
    check_rows(recipe.turbo)
    features = encoder.features(job.scenes(recipe.two_garments), recipe.latents, True)
    held = encoder.features(job.scenes(split="test"), recipe.held, keep=False)
    shift = read_scheduler(job.model / "scheduler").shift
    taught = distillation(job, features, shift)
    seed = job.seed_for("validation")
    compared = Comparison(taught, held, encoder.vae, seed, job.device)
    grids = job.output / "grids"

    def validate(student: MMDiT) -> dict:
        step = job.run.step if job.run else 0
        return compared.look(student, grids / f"turbo-{step:06}.png")

    def export(student: MMDiT) -> None:
        export_turbo(student, job.output / "turbo", shift, job.model.name)

    student = copy.deepcopy(taught.teacher).requires_grad_(True)
    if job.recompute:
        recompute(student.joint_blocks)
    order = functools.partial(place_in_pool, n=len(features))
    seeds = job.seed_for("noise"), job.seed_for("dropout")
    batch = JumpBatches(features, order, *seeds, drop=0.0)
    return Lesson(Task(student, taught.loss, batch, validate), export)


def distillation(job: Job, features: Features, shift: float) -> Distillation:
    """The transformer of OUTPUT/model as a teacher, in its fastest form here."""
    teacher: MMDiT = job.load_part(NAME).requires_grad_(False)
    if job.device == "cpu" and job.recipe.turbo.bfloat16:
        plain_attention(teacher)
    empty = features.context[0].float(), features.pooled[0].float()
    return Distillation(teacher, empty, job.recipe.guidance, shift)

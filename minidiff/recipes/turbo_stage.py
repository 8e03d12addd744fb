"""The stage of the few-step model: the transformer of OUTPUT/model, distilled."""

import copy
import functools

from minidiff.dit import MMDiT
from minidiff.engine.loading import read_scheduler
from minidiff.learning.run import fingerprint
from minidiff.learning.steps import compiled, recompute
from minidiff.recipes.features import Features, place_in_pool
from minidiff.recipes.job import Job, Lesson
from minidiff.recipes.jumps import (
    JumpBatches,
    Teacher,
    check_rows,
    comparison,
    draw_paths,
    drawings,
    export_turbo,
    jump_loss,
)
from minidiff.recipes.transformer_stage import NAME, SceneEncoder, plain_attention
from minidiff.training import Task, TrainingConfig


def turbo_lesson(job: Job) -> Lesson:
    """A flow map of the guided transformer, under OUTPUT/turbo.

    It shares all but the transformer with OUTPUT/model.
    """
    recipe, encoder = job.recipe, SceneEncoder(job)
    config = recipe.turbo
    check_rows(config)
    scenes, n = job.scenes(), drawings(config)
    features = encoder.features(scenes, n, keep=True)  # their captions are told
    held = encoder.features(job.scenes(split="test"), recipe.held, keep=False)
    shift = read_scheduler(job.model / "scheduler").shift
    model: MMDiT = job.load_part(NAME).requires_grad_(False)
    teacher = teacher_of(model, job, features, shift, config)
    seed = job.seed_for("noise")
    drawn = draw_paths(teacher, features, config, seed, job.device, job.cache)
    order = functools.partial(place_in_pool, n=len(drawn))
    batch = JumpBatches(drawn, features, order, job.seed_for("jumps"))
    seed = job.seed_for("validation")
    compared = comparison(teacher, held, encoder.vae, seed, job.device)
    grids = job.output / "grids"

    def validate(student: MMDiT) -> dict:
        step = job.run.step if job.run else 0
        return compared.look(student, grids / f"turbo-{step:06}.png")

    def export(student: MMDiT) -> None:
        export_turbo(student, job.output / "turbo", shift, job.model.name)

    student = copy.deepcopy(model).requires_grad_(True)
    if job.recompute:
        recompute(student.joint_blocks)
    loss = functools.partial(jump_loss, shift=shift)
    return Lesson(Task(student, loss, batch, validate), export)


def teacher_of(
    model: MMDiT, job: Job, features: Features, shift: float, config: TrainingConfig
) -> Teacher:
    """The transformer of OUTPUT/model as a teacher, in its fastest form here."""
    if job.device == "cpu" and config.bfloat16:
        plain_attention(model)
    empty = features.context[0].float(), features.pooled[0].float()
    ask = compiled(model) if config.compile else model
    weights = fingerprint(*model.state_dict().values())
    return Teacher(ask, empty, job.recipe.guidance, shift, weights)

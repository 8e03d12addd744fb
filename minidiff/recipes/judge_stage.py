"""The stage of the judge: from every pair of colour and class, both layouts."""

import torch
from torch import Tensor

from minidiff.data.garments import Scenes
from minidiff.judging.judge import Judge, accuracy, judge_loss, measure, save_judge
from minidiff.learning import parallel
from minidiff.recipes.job import Job
from minidiff.recipes.lesson import Lesson
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

    model = Judge().to(memory_format=torch.channels_last)
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

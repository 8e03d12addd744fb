"""The model to go on from: opened, checked, and copied to where a job's stands."""

import filecmp
import json
import shutil
from pathlib import Path

from minidiff.engine import loading
from minidiff.files import words
from minidiff.files.layout import ENCODERS, TOKENIZERS
from minidiff.files.weights import TINY
from minidiff.files.writing import write_text
from minidiff.judging.metrics import check_side
from minidiff.recipes.job import Job
from minidiff.recipes.stages import STAGES

PIPELINE = ("model_index.json", words.FILE, "scheduler", *TOKENIZERS, *loading.PARTS)


def open_start(start: Path) -> Path:
    """The folder of the model to go on from; ValueError unless all of it is whole."""
    folder = TINY if str(start) == "tiny" else start
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"--start is {start}; expected tiny, or a model's folder")
    parts = loading.open_folder(loading.Given(folder)).models
    if "text_encoder_3" not in parts:
        raise ValueError(f"--start is {start}, which lacks T5; expected all encoders")
    check_side(parts["transformer"], parts["vae"])
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

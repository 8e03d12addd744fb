"""What tests of the stages share: quick jobs, each stage of them by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minidiff.learning.run import read_log
from minidiff.recipes import train as stages
from minidiff.recipes.job import Job
from minidiff.recipes.train import TrainOptions, train_stages

TABLES: dict[Path, list] = {}


def run_stages(job: Job, *names: str) -> None:
    """Run the stages of these names."""
    stages.run_stages(job, [s for s in stages.STAGES if s.name in names])


def only_prepares(name: str, prepare: Callable, monkeypatch) -> None:
    """Let a stage of this name prepare ``prepare`` and learn nothing."""
    changed = [
        replace(s, prepare=prepare) if s.name == name else s for s in stages.STAGES
    ]
    monkeypatch.setattr(stages, "STAGES", changed)
    monkeypatch.setattr(stages, "fit", lambda *_: None)


def train(stage: str, output: Path, data: Path | None = None, **how) -> None:
    """``minidiff train --stage``."""
    train_stages(TrainOptions(output, stage, data, **how))


def losses(job: Job, stage: str) -> list[float]:
    """The logged losses of a stage."""
    records = read_log(job.output / "runs" / stage / "log.jsonl")
    return [r["loss"] for r in records if "loss" in r]


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files under ``folder``."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file()
    }

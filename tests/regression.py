"""A small training for tests of a run: y = x², and a child that may be killed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm import tqdm

from minidiff.data import rng
from minidiff.learning import run
from minidiff.learning.run import Run
from minidiff.training import Task, TrainingConfig, fit


def killed_after_step(step: int, action: Callable[[], object]) -> None:
    """Run ``action`` in a child that dies when it has saved this step."""

    def fatal() -> None:
        save = run.save_tensors

        def die(path: Path, *arguments, **facts) -> None:
            save(path, *arguments, **facts)
            if path.name == f"step-{step}.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)

        run.save_tensors = die
        action()

    assert in_child(fatal) == signal.SIGKILL


class Regression(nn.Module):
    """A small network with enough weights that saving them takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 256), nn.SiLU(), nn.Linear(256, 8))


def regression(**changes) -> tuple[Task, TrainingConfig]:
    """Learn y = x², with samples that are functions of their numbers."""

    def batch(indices: torch.Tensor) -> dict:
        x = rng.normal(5, indices, (8,))
        return {"x": x, "y": x**2}

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return (model.layers(batch["x"]) - batch["y"]).square().mean()

    torch.manual_seed(0)
    config = TrainingConfig(40, 16, warmup_steps=4, log_every=5, save_every=2)
    return Task(Regression(), loss, batch), replace(config, **changes)


def trained(folder: Path | None = None, **changes) -> dict[str, torch.Tensor]:
    """The averaged weights after a run in ``folder``."""
    task, config = regression(**changes)
    if folder is None:
        return fit(task, config).state_dict()
    with Run(folder, {"steps": config.steps}) as begun:
        return fit(task, config, begun).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def in_child(action, kill_after: float | None = None) -> int:
    """Run ``action`` in a forked process, kill it if asked; its exit status.

    It gets a lock of its own for its bars: tqdm's is shared with forked processes, and
    one that is killed while it holds it would leave all others waiting for ever.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and kill of POSIX")
    child = os.fork()
    if child == 0:
        try:
            tqdm.set_lock(threading.RLock())
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

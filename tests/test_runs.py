"""A run survives what befalls it: kills, damage, full disks, another run."""

import errno
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from regression import assert_same, in_child, killed_after_step, regression, trained
from torch import nn

from minidiff.data import rng
from minidiff.learning import parallel, steps
from minidiff.learning import run as runs
from minidiff.learning.run import Run, TrainingError, lasting, load_tensors, read_log
from minidiff.training import Task, TrainingConfig, fit


def test_the_best_validation_is_kept(tmp_path: Path) -> None:
    task, config = regression(validate_every=10)
    scores = iter([3.0, 1.0, 2.0, 4.0])
    seen = []

    def validate(model: nn.Module) -> dict:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"validation": next(scores)}

    with Run(tmp_path, {}) as run:
        fit(replace(task, validate=validate), config, run)
    best, facts = load_tensors(tmp_path / "best.safetensors")
    assert facts["score"] == 1.0
    assert_same(best, seen[1])


def test_a_validation_is_logged_at_its_step(tmp_path: Path) -> None:
    task, config = regression(log_every=25, save_every=40, validate_every=15)
    with Run(tmp_path, {}) as run:
        looked = replace(task, validate=lambda _: {"validation": math.nan})
        fit(looked, config, run)
    log = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in log if "validation" in r] == [15, 30, 40]
    assert [r["step"] for r in log if "loss" in r] == [15, 25, 30, 40]
    assert not (tmp_path / "best.safetensors").exists()  # not a number is no score


def test_processes_begin_at_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path)
    monkeypatch.setattr(parallel, "average", lambda x: x / 2)
    with pytest.raises(TrainingError, match="not every process sees step 40"):
        trained(tmp_path)


def test_a_deadline_is_one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert steps.is_late(0.0, cpu) and not steps.is_late(math.inf, cpu)
    monkeypatch.setattr(parallel, "active", lambda: True)
    monkeypatch.setattr(parallel, "average", lambda x: (x + 1) / 2)
    assert steps.is_late(math.inf, cpu)  # another process is late
    assert not steps.is_late(None, cpu)


@pytest.mark.slow
def test_a_run_killed_at_any_time_ends_with_the_same_weights(tmp_path: Path) -> None:
    """20 times while it runs; one that ends before its time is followed by another."""
    whole = trained(tmp_path / "whole")
    start = time.time()
    assert in_child(lambda: trained(tmp_path / "timed")) == 0
    duration = time.time() - start
    draw = torch.Generator().manual_seed(1)
    killed, ended, folder = 0, 0, tmp_path / "run 0"
    while killed < 20:
        moment = torch.rand((), generator=draw).item() * duration / 2
        status = in_child(partial(trained, folder), moment)
        assert status in (0, signal.SIGKILL)
        killed += status == signal.SIGKILL
        if status == 0:  # too late: the machine had been slower when it was timed
            assert_same(trained(folder), whole)
            ended, duration = ended + 1, 0.8 * duration
            folder = tmp_path / f"run {ended}"
    assert_same(trained(folder), whole)
    logs = [read_log(path / "log.jsonl") for path in (tmp_path / "whole", folder)]
    a, b = ([(r["step"], r["loss"]) for r in log] for log in logs)
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["fsync", "replace", "unlink"])
def test_a_run_killed_while_it_saves(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = trained(), iter(range(1000))

    def die(*arguments, **named) -> None:
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    owner = Path if moment == "unlink" else os
    original = getattr(owner, moment)

    def action() -> None:
        setattr(owner, moment, die)
        trained(tmp_path)

    assert in_child(action) == signal.SIGKILL
    assert list(tmp_path.glob("step-*.safetensors"))
    assert_same(trained(tmp_path), whole)
    assert not list(tmp_path.glob(".minidiff-*"))


def test_a_run_killed_while_it_validates_does_so_again(tmp_path: Path) -> None:
    """Else neither the log nor the best weights would ever know of that step."""

    def learn(folder: Path, dies: bool) -> None:
        def validate(model: nn.Module) -> dict[str, float]:
            if dies and run.step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"validation": (model.layers[0].weight ** 2).mean().item()}

        task, config = regression(validate_every=10, save_every=10)
        with Run(folder, {}) as run:
            fit(replace(task, validate=validate), config, run)

    learn(tmp_path / "whole", False)
    assert in_child(lambda: learn(tmp_path / "killed", True)) == signal.SIGKILL
    learn(tmp_path / "killed", False)
    kept, folders = ("step", "loss", "validation"), ("whole", "killed")
    logs = (read_log(tmp_path / name / "log.jsonl") for name in folders)
    whole, again = ([[r.get(key) for key in kept] for r in log] for log in logs)
    assert whole == again and sum(record[2] is not None for record in whole) == 4
    whole, again = (tmp_path / name / "best.safetensors" for name in folders)
    assert whole.read_bytes() == again.read_bytes()


def test_moments_come_back_in_the_memory_order_of_the_weights(tmp_path: Path) -> None:
    def action(deadline: float | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)

        def loss(model: nn.Module, batch: dict) -> torch.Tensor:
            return model(batch["x"]).square().mean()

        def batch(indices: torch.Tensor) -> dict:
            return {"x": rng.normal(3, indices, (4, 6, 6))}

        config = TrainingConfig(3, 4, warmup_steps=1)
        task = Task(model, loss, batch)
        with Run(tmp_path / str(deadline is None), {}) as run:
            return fit(task, config, run, deadline=deadline).state_dict()

    whole = action()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            action(deadline=1.0)
    assert_same(action(deadline=1.0), whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    newest, before = Run(tmp_path, {}).checkpoints()
    assert (newest.stem, before.stem) == ("step-40", "step-38")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_same(trained(tmp_path), whole)


def test_a_copy_of_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    newest = Run(tmp_path, {}).checkpoints()[0]
    copy = Path(shutil.copy(newest, tmp_path / "step-40 (copy).safetensors"))
    assert Run(tmp_path, {}).checkpoints()[0] == newest
    assert_same(trained(tmp_path), whole)
    assert copy.exists()


def test_a_file_system_without_locks_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    assert_same(trained(tmp_path), trained())
    assert "is not locked: " in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_checkpoints_alone_begin_the_run_anew(tmp_path: Path) -> None:
    whole = trained(tmp_path)
    for path in Run(tmp_path, {}).checkpoints():
        path.write_bytes(b"damaged")
    killed_after_step(6, lambda: trained(tmp_path))
    kept = [path.stem for path in Run(tmp_path, {}).checkpoints()]
    assert kept[:2] == ["step-6", "step-4"]
    assert_same(trained(tmp_path), whole)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    trained(tmp_path)
    task, config = regression()
    task.model.layers[0] = nn.Linear(8, 99)
    with Run(tmp_path, {}) as run, pytest.raises(ValueError) as error:
        fit(task, config, run)
    message = str(error.value)
    assert "step-40.safetensors is of another model" in message
    assert "model/layers.0.bias is (256,), expected (99,)" in message


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    whole = trained()

    def action() -> None:
        import resource

        good = "cannot write .*; the last good checkpoint is .*step-"
        with pytest.raises(OSError, match=good):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            save = runs.save_tensors
            count = iter(range(1000))

            def limited(path: Path, tensors: dict, **facts) -> None:
                if next(count) == 6:
                    limit = sum(x.nbytes for x in tensors.values()) // 2
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                save(path, tensors, **facts)

            runs.save_tensors = limited
            trained(tmp_path)

    assert in_child(action) == 0
    kept = Run(tmp_path, {}).checkpoints()
    assert kept and not list(tmp_path.glob(".minidiff-*"))
    assert_same(trained(tmp_path), whole)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    task, config = regression(log_every=1)
    batch = task.batch

    def broken(indices: torch.Tensor) -> dict:
        made = batch(indices)
        bad = torch.where(indices == 7 * 16, torch.nan, 0.0)
        return {"x": made["x"], "y": made["y"] + bad[:, None]}

    with Run(tmp_path, {}) as run, pytest.raises(TrainingError) as error:
        fit(replace(task, batch=broken), config, run)
    message = str(error.value)
    assert "step 8 (samples 112 to 127)" in message and "step-6" in message
    assert (tmp_path / "step-6.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """A finite loss may have a gradient that is not: √x at 0."""
    task, config = regression(save_every=1)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        weight = model.layers[0].weight
        steep = (0 * weight).square().sum().sqrt()
        return task.loss(model, batch) + (steep if batch["last"] else 0)

    def batch(indices: torch.Tensor) -> dict:
        return task.batch(indices) | {"last": indices[0] == 7 * 16}

    broken = replace(task, loss=loss, batch=batch)
    settings = lasting(config)
    with Run(tmp_path, settings) as run, pytest.raises(TrainingError) as error:
        fit(broken, config, run)
    message = str(error.value)
    assert "not finite after step 8 (samples 112 to 127)" in message
    assert "step-7.safetensors" in message
    assert not (tmp_path / "step-8.safetensors").exists()


def test_the_bar_tells_loss_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(steps.sys.stderr, "isatty", lambda: True, raising=False)
    trained(tmp_path, steps=10)
    shown = capsys.readouterr().err.split("\r")[-1]
    assert shown.endswith("\n")
    assert re.search(r"10/10 \[\d\d:\d\d<\d\d:\d\d.*loss=\d\.\d+", shown), shown
    assert re.search(r"samples_per_s=\d+", shown)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    trained(steps=10)
    assert not capsys.readouterr().err  # the first of several processes shows it


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path, {}), pytest.raises(ValueError, match="another process trains"):
        Run(tmp_path, {}).__enter__()


def test_a_batch_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    task, config = regression()

    def greedy(indices: torch.Tensor) -> dict:
        if indices[0] >= 7 * 16:
            torch.empty(2**60)
        return task.batch(indices)

    settings = lasting(config)
    with pytest.raises(TrainingError) as error, Run(tmp_path, settings) as run:
        fit(replace(task, batch=greedy), config, run)
    message = str(error.value)
    assert "does not hold a batch of 16" in message and "step-6" in message
    early = pytest.raises(TrainingError, match="model, or fewer pictures or lat")
    with early, Run(tmp_path, settings):
        raise torch.OutOfMemoryError
    with pytest.raises(ZeroDivisionError), Run(tmp_path, settings):
        raise ZeroDivisionError


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match="steps = 40, not 41"):
        trained(tmp_path, steps=41)
    other = r"another optimiser .exp_avg_sq/layers.0.weight is .256, 8., expected none"
    with pytest.raises(ValueError, match=other):
        trained(tmp_path, muon=True)


def test_tensorboard_gets_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Board:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

    monkeypatch.setattr(runs, "tensorboard", lambda folder: Board())
    with Run(tmp_path, {}) as run:
        run.log({"step": 3, "loss": 0.5, "by_level": [1.0]})
    assert seen == [("loss", 0.5, 3)]


def test_only_the_last_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    with Run(tmp_path, {}, keep=3) as run:
        for step, score in enumerate([3.0, 1.0, 2.0, 4.0]):
            weights = {"w": torch.tensor([score])}
            run.save(step, weights)
            run.save_best(score, weights)
    assert [p.stem for p in run.checkpoints()] == ["step-3", "step-2", "step-1"]
    best = load_tensors(tmp_path / "best.safetensors")
    assert best[0]["w"].item() == best[1]["score"] == 1.0
    (tmp_path / "best.safetensors").write_bytes(b"damaged")
    run.save_best(5.0, {"w": torch.tensor([5.0])})
    assert load_tensors(tmp_path / "best.safetensors")[1]["score"] == 5.0

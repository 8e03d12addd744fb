"""Two processes learn what one learns."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import parallel_worker
import pyarrow.parquet as parquet
import pytest
import torch
from helpers import plain_pictures
from safetensors.torch import load_file
from torch import Tensor

from minidiff.files.lora_files import FILE
from minidiff.files.weights import TINY
from minidiff.learning.run import read_log

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
LAUNCH += ["--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
QUICK = {"steps": 2, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-3}
QUICK |= {"save_every": 2, "validate_every": 2, "bfloat16": False, "sharded": True}
# After so few small steps of Muon's, weights that are 1 % of the way apart in float32
# are 5 % apart in the float16 that is exported; in float64 Muon is compared too
RECIPE = {"vae": QUICK, "transformer": QUICK | {"muon": False}}
RECIPE |= {"pictures": 16, "latents": 16, "held": 2}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What one process learns."""
    torch.set_default_dtype(torch.float64)
    weights = parallel_worker.train(sharded=False)
    torch.set_default_dtype(torch.float32)
    return weights


@pytest.fixture(scope="module")
def stages(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that trains stages, on few garments, but for its output."""
    folder = tmp_path_factory.mktemp("recipe")
    file = folder / "recipe.json"
    file.write_text(json.dumps(RECIPE))
    for path in fashion.rglob("*.parquet"):
        table = parquet.read_table(path)
        labels = table.column("label").to_numpy()
        rows = [(labels == n).nonzero()[0][:20] for n in range(10)]
        parquet.write_table(table.take(np.concatenate(rows)), folder / path.name)
    train = ["train", "--data", str(folder), "--recipe", str(file)]
    return [*train, "--start", "tiny", "--scenes", "plain", "--device", "cpu"]


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that fine-tunes, but for its output."""
    folder = plain_pictures(tmp_path_factory.mktemp("own") / "pictures")
    train = ["train", "--from", "tiny", "--lora", "--data", str(folder)]
    train += ["--steps", "3", "--batch-size", "2", "--learning-rate", "1e-2"]
    return [*train, "--device", "cpu"]


@pytest.fixture(scope="module")
def two(
    stages: list[str], tuning: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of what two processes learn, started once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    commands = {
        name: [*words, "--output", str(folder / name)]
        for name, words in (("stages", stages), ("tuning", tuning))
    }
    (folder / "commands.json").write_text(json.dumps(commands))
    launch = [*LAUNCH, parallel_worker.__file__, folder]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("weights", ["whole", "sharded"])
def test_two_processes_give_the_weights_of_one(
    alone: dict[str, Tensor], two: Path, weights: str
) -> None:
    together = load_file(two / weights)
    stages = {name.split("/")[0] for name in together} - {"moved"}
    assert len(stages) == (4 if weights == "sharded" else 6)
    for name in together:
        assert (alone[name] - together[name]).abs().max() <= 1e-9, name


@pytest.mark.parametrize("stage", ["clip", "t5", "vae", "judge", "transformer", "muon"])
def test_the_stage_learned(alone: dict[str, Tensor], stage: str) -> None:
    moved = [v.abs().max() for k, v in alone.items() if k.startswith(f"moved/{stage}")]
    assert max(moved) > 1e-3


def test_sharded_stages_export_the_model_of_one(
    stages: list[str], two: Path, tmp_path: Path, run: Callable[..., tuple]
) -> None:
    """And draw grids, and keep the best: all that needs the whole of each weight."""
    assert run(*stages, "--output", tmp_path)[0] == 0
    for stage in ("vae", "transformer"):
        models = TINY, tmp_path / "model", two / "stages" / "model"
        old, alone, together = (weights(model / stage) for model in models)
        # Adam's first steps enlarge what differs by rounding, where gradients are small
        assert (together - alone).norm() < 0.1 * (alone - old).norm()
    for name in ("grids/000002.png", "runs/transformer/best.safetensors"):
        assert (two / "stages" / name).exists()
    log = read_log(two / "stages" / "runs" / "transformer" / "log.jsonl")
    assert min(found["conditioning"] for found in log if "validation" in found) > 1e-3


def test_fine_tuning_in_two_processes(
    tuning: list[str], two: Path, tmp_path: Path, run: Callable[..., tuple]
) -> None:
    made = [tmp_path / FILE, two / "tuning" / FILE]
    assert run(*tuning, "--output", tmp_path)[1] == f"{made[0]}\n"
    printed = [(two / f"tuning-{rank}.txt").read_text() for rank in range(2)]
    assert printed == [f"{made[1]}\n", ""]
    alone, together = map(load_file, made)
    learned = [name for name in alone if "lora_B" in name]
    old, new = (torch.cat([x[n].flatten() for n in learned]) for x in (alone, together))
    assert old.norm() > 0 and (new - old).norm() < 0.05 * old.norm()


def weights(folder: Path) -> Tensor:
    """All weights of a component, in one row."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])

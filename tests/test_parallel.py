"""Two processes learn what one learns."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process learns."""
    return learned(tmp_path_factory.mktemp("alone") / "weights", [sys.executable])


def learned(file: Path, command: list[str], *options: str) -> dict[str, Tensor]:
    """The weights that the worker learns when ``command`` runs it."""
    done = subprocess.run(
        [*command, WORKER, file, *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(file)


@pytest.mark.parametrize("options", [(), ("sharded",)])
def test_two_processes_give_the_weights_of_one(
    tmp_path: Path, alone: dict[str, Tensor], options: tuple[str, ...]
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    together = learned(tmp_path / "w", [*launch, "--nproc-per-node", "2"], *options)
    assert alone.keys() == together.keys()
    for name in alone:
        assert (alone[name] - together[name]).abs().max() <= 1e-9, name


@pytest.mark.parametrize("stage", ["clip", "t5", "vae", "transformer"])
def test_the_stage_learned(alone: dict[str, Tensor], stage: str) -> None:
    moved = [v.abs().max() for k, v in alone.items() if k.startswith(f"moved/{stage}")]
    assert max(moved) > 1e-3

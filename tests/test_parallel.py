"""Two processes learn what one learns."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

WORKER = Path(__file__).with_name("parallel_worker.py")


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2"]
    for command, file in (([sys.executable], one), (launch, two)):
        done = subprocess.run(
            [*command, WORKER, file], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-9, name
    for stage in ("clip", "t5", "vae", "transformer"):
        moved = [v.abs().max() for k, v in a.items() if k.startswith(f"moved/{stage}")]
        assert max(moved) > 1e-3, stage

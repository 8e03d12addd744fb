"""How much memory of its own a process takes to read weights, at its peak."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.files.weights import save_component

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="RssAnon is Linux's"
)
WORKER = """
import json, re, sys, threading, time
from pathlib import Path
import torch
from minidiff.dit import MMDiT, MMDiTConfig
from minidiff.engine.memory import Plan, place_part
from minidiff.files.weights import prepare_component

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

torch.set_num_threads(1)
torch.ones(8) @ torch.ones(8, 8)
peak, done = 0, False
prepared = prepare_component(MMDiT, MMDiTConfig, sys.argv[1])
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = place_part(prepared, Plan(**json.loads(sys.argv[2])), "cpu", torch.bfloat16)
done = True
thread.join()
print(json.dumps([max(peak, anonymous()) - before, model.training]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four fifths of a gigabyte: Medium's transformer with two of its blocks."""
    config = MMDiTConfig.sd35_medium()
    config = replace(config, num_layers=2, dual_attention_layers=(0,))
    with torch.device("meta"):
        model = MMDiT(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.state_dict().values():
        parameter.zero_()
    folder = tmp_path_factory.mktemp("transformer")
    save_component(model, folder, "SD3Transformer2DModel")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "share"),
    [({}, 0.13), ({"modulation": "streamed"}, 0.13), ({"fp8": True}, 0.3)],
    ids=str,
)
def test_weights_stay_in_the_file(folder, plan, share):
    """Read in their own dtype they are its map, but for what is put together anew.

    That is the queries, keys and values, one matrix here; blocks in 8 bits are half.
    """
    command = [sys.executable, "-c", WORKER, str(folder), json.dumps(plan)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, training = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 700e6 and not training
    assert grown < share * size, f"{grown / 1e6:.0f} MB of {size / 1e6:.0f} MB"

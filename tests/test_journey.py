import json

import pytest
import torch

import minidiff
from benchmarks import record_journey
from minidiff.classroom import journey


@pytest.fixture
def record(tmp_path, monkeypatch):
    x = torch.randn(1, 16, 16, 16)
    path = tmp_path / "journey.json"
    path.write_text(json.dumps({"tensors": {"latents": journey.describe_tensor(x)}}))
    monkeypatch.setattr(journey, "RECORD", path)
    journey._record.cache_clear()
    yield x
    journey._record.cache_clear()


def test_the_same_tensor_agrees_up_to_rounding(record):
    expected = "latents: (1, 16, 16, 16), the same in every chapter"
    assert journey.meets("latents", record) == expected
    assert journey.meets("latents", record * (1 + 1e-5)) == expected
    with pytest.raises(KeyError, match="noise"):
        journey.meets("noise", record)


@pytest.mark.parametrize("change", ["scale", "flip", "roll", "shape"])
def test_another_tensor_does_not(record, change):
    changed = {
        "scale": record * 1.01,
        "flip": record.flip(-1),
        "roll": record.roll(1, 1),
        "shape": record[:, :8],
    }
    with pytest.raises(AssertionError, match="journey"):
        journey.meets("latents", changed[change])


@pytest.mark.slow
def test_the_shipped_model_makes_the_journey_on_record():
    """All of it, so that the chapters' own checks can only fail by their own fault."""
    found = record_journey.journey(minidiff.load("tiny"))
    known = json.loads(journey.RECORD.read_text())["tensors"]
    assert found.keys() == known.keys()
    for name, x in found.items():
        assert journey.meets(name, x).endswith("the same in every chapter")

"""One prompt's journey: the tensors that the chapters hand to one another.

Every chapter can compute its own piece of the journey alone. What it receives and what
it hands on is compared with the values on record, so that all chapters speak of the
same tensors. ``benchmarks/record_journey.py`` writes the record from the shipped model.
"""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from minidiff.data.rng import normal

PROMPT = "a red dress on a blue background"
SEED = 0
RECORD = Path(__file__).parent.parent / "pretrained" / "journey.json"


def tensor_fingerprint(x: Tensor) -> list[float]:
    """Four numbers that tell tensors apart: projections on fixed random directions.

    Each is the product with a standard normal vector, divided by √n: of the size of the
    elements of ``x``, and sensitive to their order.
    """
    flat = x.detach().cpu().double().flatten()
    directions = normal(0, torch.arange(4), (len(flat),)).double()
    return (directions @ flat / len(flat) ** 0.5).tolist()


@functools.cache
def _record() -> dict[str, dict]:
    return json.loads(RECORD.read_text())["tensors"]


def meets(name: str, x: Tensor, tolerance: float = 1e-3) -> str:
    """Compare ``x`` with the tensor ``name`` of the journey; a line that says so.

    Processors round differently: ``tolerance`` is relative to the root mean square.

    Raises:
        AssertionError: the record has other values or another shape under this name.
        KeyError: it has no such name.
    """
    shape, line = list(x.shape), f"{name}: {tuple(x.shape)}"
    known = _record()[name]
    assert shape == known["shape"], f"{line}, the journey has {known['shape']}"
    pairs = zip(tensor_fingerprint(x), known["fingerprint"], strict=True)
    error = max(abs(a - b) for a, b in pairs) / max(known["rms"], 1e-12)
    assert error < tolerance, f"{line} differs from the journey's by {error:.1e}"
    return f"{line}, the same in every chapter"


def describe_tensor(x: Tensor) -> dict:
    """The entry of one tensor in the record."""
    rms = x.detach().cpu().double().square().mean().sqrt().item()
    return {"shape": list(x.shape), "rms": rms, "fingerprint": tensor_fingerprint(x)}

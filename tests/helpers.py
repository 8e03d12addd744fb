"""What several tests need."""

import json
import re
import urllib.request
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, in float64; infinite where a value is not finite."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)}, {tuple(b.shape)}"
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    error = (a - b).norm() / b.norm()
    return error.item() if error.isfinite() else float("inf")


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random, non-zero values: norm weights around 1.

    Matrices and kernels get a standard deviation of 1/√fan-in, so that signals keep
    their size; vectors (biases, gates) 0.1. Returns the module, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        is_norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(recurse=False):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values = values / parameter[0].numel() ** 0.5
            elif is_norm and name == "weight":
                values = 1 + 0.1 * values
            else:
                values = 0.1 * values
            parameter.copy_(values)
    return module.eval()


def patch_functions(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, **replacements: object
) -> None:
    """Let ``module`` alone see other functions in place of those of ``F``."""
    monkeypatch.setattr(module, "F", SimpleNamespace(**vars(F) | replacements))


def plain_pictures(folder: Path) -> Path:
    """A new folder of four plain pictures, 20 × 14 pixels, with their captions."""
    folder.mkdir()
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (20, 14), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} background\n")
    return folder


def request(url: str, model: dict | None = None) -> dict:
    """The JSON answer of a JupyterLab server; PUTs ``model`` if there is one."""
    data = None if model is None else json.dumps(model).encode()
    headers = {"Authorization": "token t", "Content-Type": "application/json"}
    method = "PUT" if model else "GET"
    asked = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)


def short(value: object) -> str:
    """A case's name, the same in every process."""
    value = sorted(value) if isinstance(value, set) else value
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))[:40]

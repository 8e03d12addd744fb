"""Each part in ONNX, run by onnxruntime, against the part itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from pipelines import halved

from minidiff.live import onnx

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@torch.no_grad()
def test_each_part_computes_what_pytorch_does(small: Path, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import onnxruntime

    pipe = halved(small)
    files = onnx.export_onnx(pipe, tmp_path / "parts")
    assert {file.stem for file in files} == set(onnx.NAMES)
    parts = onnx.parts_with_inputs(pipe)
    ids = pipe.tokenizers[0](["a dress"], pipe.tokenizers[0].model_max_length)
    parts["text_encoder"] = (pipe.text_encoders[0], (ids,))  # not the traced text
    for file in files:
        module, given = parts[file.stem]
        other = [x + torch.rand_like(x) if x.is_floating_point() else x for x in given]
        session = onnxruntime.InferenceSession(file)
        names = [part.name for part in session.get_inputs()]
        values = {name: x.numpy() for name, x in zip(names, other, strict=True)}
        found, expected = session.run(None, values), module(*other)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(torch.from_numpy(ours), theirs) < 1e-5, file.stem


def test_a_missing_package_is_named(
    run: Any, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    code, _, err = run("export", "--model", small, "--format", "onnx", "--output", "x")
    assert code == 2 and "expected pip install onnx onnxscript" in err

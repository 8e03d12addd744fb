"""The doctor finds what computes wrongly, and says what fits and what is here."""

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import patch_functions
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from minidiff.engine import doctor, fast
from minidiff.engine.doctor import Found, examine
from minidiff.engine.loading import blueprint
from minidiff.files import hub

CPU = torch.device("cpu")


def findings(model: Path | str, dtype: torch.dtype = torch.float32) -> list[Found]:
    return list(examine(model, CPU, dtype))


def wrong(found: list[Found]) -> set[str]:
    """The labels, and the first words, of what is wrong."""
    assert all(("wrong" in f.text or "damaged" in f.text) == f.wrong for f in found)
    return {f"{f.label} {f.text.split(':')[0]}" for f in found if f.wrong}


@pytest.mark.parametrize("dtype", doctor.LIMITS)
def test_a_sound_machine(small: Path, dtype: torch.dtype) -> None:
    found = findings(small, dtype)
    labels = list(dict.fromkeys(f.label for f in found))
    first = ["versions", "device", "dtypes", "hub", "weights", "attention"]
    assert labels == [*first, "block", "decoder", "memory", "files"]
    assert not wrong(found), [f for f in found if f.wrong]
    texts = {f.label: f.text for f in found}
    assert texts["weights"] == f"read from {small}" and texts["hub"] == "not asked"
    assert "fits: t5 streamed" in texts["memory"]
    weights = small / "vae/diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    size = f"{weights.stat().st_size:,} bytes"
    line = f"vae/{weights.name}: {size}, SHA-256 {digest}"
    assert Found("files", line) in found


def in_bfloat16(call: Callable, *given: Any, **named: Any) -> Tensor:
    """A device that computes wrongly where it is asked in 16 bits."""
    found = call(*given, **named)
    return found if found.dtype != torch.bfloat16 else found.roll(1, -1)


MUTANTS = {
    "linear": {"block plain", "block fused"},  # of the chapters, and of read_out
    "conv2d": {"decoder plain", "decoder fused"},
    "scaled_dot_product_attention": {"attention flash", "attention math"},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_function_that_is_wrong_on_the_device(
    small: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(F, name, partial(in_bfloat16, getattr(F, name)))
    found = wrong(findings(small, torch.bfloat16))
    assert found >= MUTANTS[name]


def test_a_product_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "matmul", partial(in_bfloat16, torch.matmul))
    assert wrong(list(doctor.try_dtypes(CPU))) == {"dtypes bfloat16"}


def test_a_fused_pass_that_is_wrong(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normed = fast.norm_heads
    monkeypatch.setattr(fast, "norm_heads", lambda x, w, *at: normed(x, w.flip(0), *at))
    assert wrong(findings(small)) == {"block fused"}


def test_what_is_not_finite_is_wrong_and_what_is_refused_is_not_here() -> None:
    given, where = (torch.ones(2, 2),), (CPU, torch.float32)
    found = doctor.compared("a", "b", lambda x: x / 0, given, *given, *where)
    assert found.wrong and found.text.startswith("b: error inf, wrong, expected at")
    refuses = partial(torch.add, other=torch.ones(3))
    found = doctor.compared("a", "b", refuses, given, *given, *where)
    assert found.text.startswith("b: not here (The size") and not found.wrong


def cut(file: Path) -> None:
    """Leave the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FAULTS = {
    "text_encoder_3/model.safetensors": [Path.unlink, cut],
    "transformer/diffusion_pytorch_model.safetensors": [Path.unlink, cut],
    "vae/diffusion_pytorch_model.safetensors": [cut],
    "tokenizer/vocab.json": [Path.unlink, cut],
    "scheduler/scheduler_config.json": [Path.unlink, cut],
}


@pytest.mark.parametrize(
    ("file", "harm"), [(f, harm) for f, harms in FAULTS.items() for harm in harms]
)
def test_a_part_that_cannot_be_loaded(
    small: Path, tmp_path: Path, file: str, harm: Callable
) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    harm(model / file)
    part = file.split("/")[0]
    (found,) = doctor.faults(model, whole=True)
    assert found.wrong and found.text.startswith(f"{part}: wrong, ")
    (found,) = doctor.faults(model, whole=False)  # of a download that is not at its end
    assert found.wrong == (harm is cut) != found.text.startswith(f"{part}: not here")


def test_weights_that_cannot_be_loaded_fail_the_examination(
    small: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(small, tmp_path / "model")
    (model / "text_encoder_3/model.safetensors").unlink()
    cut(model / "vae/diffusion_pytorch_model.safetensors")
    found = findings(model)
    assert wrong(found) == {"files text_encoder_3", "files vae"}
    (weights,) = (f.text for f in found if f.label == "weights")
    assert weights.startswith("random: ") and "not a whole safetensors" in weights


def test_one_block_alone_is_read(small: Path) -> None:
    part = doctor.open_parts(small, small)[1]["transformer"]
    assert not wrong(list(doctor.try_block(part, CPU, torch.float32)))
    assert len(part.model.joint_blocks) == 1
    stored = load_file(small / "transformer/diffusion_pytorch_model.safetensors")
    weight = part.model.joint_blocks[0].x_block.mlp.fc1.weight
    assert torch.equal(weight, stored["transformer_blocks.0.ff.net.0.proj.weight"])


def test_a_model_that_is_not_here(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes are known, so that random weights serve; nobody waits for a hub."""
    monkeypatch.setattr(doctor, "blueprint", lambda _: blueprint(small))
    monkeypatch.setattr(hub, "find_cached", lambda _: None)
    monkeypatch.setattr(hub, "access", lambda _: "no answer")
    found = findings("sd3.5-medium")
    texts = {f.label: f.text for f in found}
    assert not wrong(found) and "files" not in texts and texts["hub"] == "no answer"
    assert texts["weights"] == "random: its files are not here"


def test_a_single_file(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    state = {}
    for name, part in doctor.open_parts(small, small)[1].items():
        prefix = doctor.single_file.PARTS[name][0]
        own = part("cpu", None).state_dict()
        state |= {prefix + n: x.contiguous().clone() for n, x in own.items()}
    save_file(state, file)
    found = findings(file)
    texts = {f.label: f.text for f in found}
    assert not wrong(found) and texts["weights"] == f"read from {file}"
    assert texts["memory"].endswith("GB free")  # its encoders are not known


def test_a_damaged_file_of_the_hubs_cache(tmp_path: Path) -> None:
    content = b"as published"
    name = hashlib.sha256(content).hexdigest()
    (tmp_path / name).write_bytes(content)
    (tmp_path / "vae.safetensors").symlink_to(tmp_path / name)
    (found,) = doctor.files(tmp_path / "vae.safetensors")
    assert found.text.endswith(f"SHA-256 {name[:16]}, as published")
    (tmp_path / name).write_bytes(b"damaged")
    (found,) = doctor.files(tmp_path / "vae.safetensors")
    assert found.wrong and found.text.endswith(", damaged")


@pytest.mark.slow
def test_the_command(run: Callable, small: Path, monkeypatch: Any) -> None:
    code, out, err = run("doctor", "--model", small, "--device", "cpu")
    assert (code, err) == (0, "") and "wrong" not in out
    assert out.count("\n") == len(findings(small))
    refuses = lambda *_, **__: torch.ones(2).view(3)  # noqa: E731
    patch_functions(monkeypatch, doctor, scaled_dot_product_attention=refuses)
    assert run("doctor", "--model", small)[0] == 0  # refused: not here
    found = [Found("block", "plain: error 1.0e+00, wrong", True), Found("a", "b")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(found))
    code, out, err = run("doctor")
    assert (code, err) == (1, "") and out.splitlines()[1] == "a          b"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "sd4"], "model is 'sd4'; expected tiny"),
        (["--model", "gone.safetensors"], "gone.safetensors is missing"),
        (["--device", "tpu"], "device is 'tpu'; expected cpu"),
        (["--dtype", "int8"], "'int8' is not one of 'float32'"),
    ],
)
def test_bad_input(run: Callable, words: list[str], told: str) -> None:
    code, out, err = run("doctor", *words)
    assert (code, out) == (2, "") and told in err and err.count("\n") == 1

"""Damaged, hostile or careless input of a training, a line a case.

A recipe, an option, a checkpoint, a run's files, a folder of pictures, a judge: each is
refused in one short line, or left out with one, and the right weights come out.
"""

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import short
from PIL import Image
from regression import assert_same, trained
from safetensors.torch import load_file, save_file

from minidiff.data.captioned import Pictures, read_folder
from minidiff.judging.evaluation import Evaluation
from minidiff.judging.judge import JUDGE, load_judge
from minidiff.learning.run import Run, cached, load_tensors, read_log, save_tensors
from minidiff.recipes.finetune import FinetuneOptions, finetune_pictures, lora_config
from minidiff.recipes.recipe import find_recipe
from minidiff.recipes.train import TrainOptions, train_stages
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer

HUGE = 10**30


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """A case that waits, for a pipe say, fails after a minute."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def refused(message: str, call: Callable[[], Any]) -> None:
    """``call`` raises one short line that ``message`` is found in."""
    with pytest.raises((ValueError, OSError), match=message) as failed:
        call()
    told = str(failed.value)
    assert "\n" not in told and len(told) < 900, told[:1000]


# Recipes

RECIPES = [
    ("[]", "recipe.json holds a list; expected an object"),
    ("null", "recipe.json holds a NoneType"),
    ("7", "recipe.json holds a int"),
    ("{", "recipe.json is not valid JSON"),
    ("", "recipe.json is not valid JSON"),
    ("[" * 200_000, "nested too deeply"),
    ('{"held": 0}', "held is 0; expected above 0"),
    ('{"held": -1}', "held is -1; expected above 0"),
    ('{"held": 1e3}', "held is a float, expected int"),
    (f'{{"held": {HUGE}}}', "held is 10+; expected above 0, at most 1000000000"),
    (f'{{"pictures": {HUGE}}}', "pictures is 10+; expected above 0, at most"),
    (f'{{"latents": {HUGE}}}', "latents is 10+; expected above 0, at most"),
    (f'{{"captions": {HUGE}}}', "captions is 10+; expected above 0, at most"),
    (f'{{"captions": {10**400}}}', "captions is 10+; expected above 0, at most"),
    ('{"held": null}', "held is a NoneType, expected int"),
    ('{"held": []}', "held is a list, expected int"),
    ('{"held": "many"}', "held is a str, expected int"),
    ('{"held": {"a": 1}}', "held is a dict, expected int"),
    ('{"vae": null}', "vae is a NoneType, expected an object of settings"),
    ('{"vae": 5}', "vae is a int, expected an object of settings"),
    ('{"vae": []}', "vae is a list, expected an object of settings"),
    ('{"vae": {"batch_size": 0}}', "batch_size is 0; expected 1 to 1048576"),
    ('{"vae": {"batch_size": -3}}', "batch_size is -3; expected 1 to 1048576"),
    (
        f'{{"vae": {{"batch_size": {HUGE}}}}}',
        "batch_size is 10+; expected 1 to 1048576",
    ),
    ('{"vae": {"batch_size": 7.5}}', "batch_size is a float, expected int"),
    ('{"vae": {"batch_size": true}}', "batch_size is a bool, expected int"),
    ('{"vae": {"batch_size": "12"}}', "batch_size is a str, expected int"),
    (f'{{"vae": {{"steps": {HUGE}}}}}', "steps is 10+; expected above 0, at most"),
    ('{"vae": {"accumulation": 0}}', "accumulation is 0; expected above 0"),
    ('{"vae": {"learning_rate": 1e400}}', "learning_rate is inf; expected above 0"),
    ('{"vae": {"learning_rate": Infinity}}', "learning_rate is inf; expected above 0"),
    ('{"vae": {"weight_decay": -1e-9}}', "weight_decay is -1e-09; expected 0 to"),
    ('{"vae": {"beta2": NaN}}', "beta2 is nan; expected 0 to 0.999999"),
    ('{"vae": {"muon": 1}}', "muon is a int, expected bool"),
    ('{"t5": {"muon": true}}', "t5: muon is for vae, transformer, turbo"),
    ('{"guidance": 0.5}', "guidance is 0.5; expected 1 to 100"),
    ('{"shift": 0}', "shift is 0; expected above 0"),
    ('{"scenes": 5}', "scenes is a int, expected str"),
    (f'{{"scenes": "{"x" * 5000}"}}', "scenes has 5,000 characters; expected at most"),
    ('{"colours": 5}', "sets 'colours'; expected clip"),
    (f'{{"{"x" * 90_000}": 5}}', "sets 'xxxxx"),
    ('{"vae": {"vae": {}}}', "recipe.json, vae sets 'vae'; expected steps"),
]


@pytest.mark.parametrize(("content", "message"), RECIPES, ids=short)
def test_a_recipe_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(content)
    refused(message, lambda: find_recipe(str(file)))


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"stage": "paint"}, "--stage is 'paint'; expected all, tokenizers"),
    ({"stage": ""}, "--stage is ''; expected all"),
    ({"recipe": "none.json"}, "none.json is missing"),
    ({"recipe": "fast"}, "--recipe is 'fast'; expected shipped, gpu"),
    ({"steps": 5}, "need a --stage that has them"),
    ({"stage": "vae", "steps": HUGE}, "steps is 10+; expected above 0, at most"),
    ({"stage": "vae", "steps": 0}, "steps is 0; expected above 0"),
    ({"stage": "vae", "batch_size": HUGE}, "batch_size is 10+; expected 1 to 1048576"),
    ({"stage": "vae", "batch_size": -1}, "batch_size is -1; expected 1 to 1048576"),
    ({"seed": -1}, "--seed is -1; expected a whole number, 0 to"),
    ({"seed": 2**63}, "--seed is 9223372036854775808; expected a whole number"),
    ({"scenes": "striped"}, "scenes is 'striped'; expected world"),
    ({"scenes": "x" * 100_000}, "scenes has 100,000 characters; expected at most"),
    ({"scenes": "a\0b"}, "expected world"),
    ({"scenes": "/dev/null"}, "scenes is '/dev/null'; expected world"),
    ({"start": Path("/dev/null")}, "--start is /dev/null; expected tiny"),
    ({"start": Path("nowhere")}, "--start is nowhere; expected tiny"),
    ({"output": Path("/dev/null")}, "/dev/null is a file; expected a folder"),
    ({"output": Path("/dev/null/below")}, "/dev/null/below cannot be written into"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=short)
def test_options_that_cannot_be(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    asked = TrainOptions(**{"output": tmp_path / "out", "recipe": "trial"} | options)
    refused(message, lambda: train_stages(asked))
    assert not (tmp_path / "out").exists()


TUNING: list[tuple[dict[str, Any], str]] = [
    ({"steps": HUGE}, "steps is 10+; expected a whole number, 1 to 1000000000"),
    ({"batch_size": HUGE}, "batch_size is 10+; expected a whole number, 1 to 1048576"),
    ({"steps": -1}, "steps is -1; expected a whole number, 1 to"),
    ({"learning_rate": -1.0}, "--learning-rate is -1.0; expected a finite number"),
    ({"learning_rate": float("inf")}, "--learning-rate is inf; expected a finite"),
    ({"pictures": Path("nowhere")}, "nowhere is not a folder"),
    ({"pictures": Path("/dev/null")}, "/dev/null is not a folder"),
    ({"model": "nothing"}, "model is 'nothing'"),
]


@pytest.mark.parametrize(("options", "message"), TUNING, ids=short)
def test_fine_tuning_that_cannot_be(
    pictures: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    usual = {"model": "tiny", "pictures": pictures, "output": tmp_path / "out"}
    asked = FinetuneOptions(**usual | {"steps": 1} | options)
    refused(message, lambda: finetune_pictures(asked))
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, None, None), "--rank is 0; expected a whole number, at least 1"),
        ((8, 0.0, None), "--alpha is 0.0; expected a finite number above 0"),
        ((8, float("nan"), None), "--alpha is nan; expected a finite number above 0"),
    ],
    ids=short,
)
def test_a_lora_that_cannot_be(given: tuple, message: str) -> None:
    refused(message, lambda: lora_config(*given))


# Checkpoints: the one before is taken


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """What the run learns."""
    torch.set_num_threads(1)
    return trained(steps=8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints after steps 6 and 8."""
    torch.set_num_threads(1)
    trained(folder := tmp_path_factory.mktemp("finished"), steps=8)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(share: float) -> Callable[[Path], None]:
    """Change one bit, at this share of a file."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return change


def cut(share: float) -> Callable[[Path], None]:
    """Leave this share of a file."""
    return lambda p: p.write_bytes(p.read_bytes()[: int(share * p.stat().st_size)])


def saved(**notes: str) -> Callable[[Path], None]:
    """The same tensors, written without a checksum, with other notes."""

    def change(path: Path) -> None:
        tensors = {k: x.clone() for k, x in load_file(path).items()}
        save_file(tensors, path, notes)

    return change


def header(path: Path) -> None:
    """Say that the header is longer than the file."""
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def pipe(path: Path) -> None:
    """A pipe in the place of a file."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path: Path) -> None:
    """A link to a device without an end in the place of a file."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def another_step(path: Path) -> None:
    """The checkpoint before, under the name of this."""
    shutil.copy(path.with_name("step-6.safetensors"), path)


WHOLE = "is not a whole safetensors file"
LEFT_OUT = [
    *((flip(share), "damaged|whole") for share in (0.3, 0.5, 0.7, 0.9, 1.0)),
    *((flip(share), "damaged|whole") for share in (0.0, 0.001, 0.005, 0.01)),
    *((cut(share), WHOLE) for share in (0, 0.01, 0.5, 0.99)),
    (header, WHOLE),
    (lambda p: p.write_bytes(b"\xff" * 5000), WHOLE),
    (
        lambda p: p.write_bytes(p.read_bytes() + b"\0"),
        "is not a whole safetensors file",
    ),
    (another_step, "is of another step: {'step': 6}"),
    (saved(), "is damaged"),
    (saved(step="8"), "is damaged"),
    (saved(about="{"), "is not valid JSON"),
    (saved(about='{"step": 8}'), "is damaged"),
    (saved(about='{"step": 8, "checksum": null}'), "is damaged"),
    (saved(about="[]"), "holds a list; expected an object"),
    (saved(about="[" * 9999), "nested too deeply"),
    (saved(abouu='{"step": 8}'), "is damaged"),
    (pipe, None),
    (link, None),
    (Path.unlink, None),
]


@pytest.mark.parametrize(("damage", "told"), LEFT_OUT)
def test_a_damaged_checkpoint_is_left_out(
    folder: Path,
    whole: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture,
    damage: Callable[[Path], Any],
    told: str | None,
) -> None:
    newest = folder / "step-8.safetensors"
    damage(newest)
    with Run(folder, {}) as run:
        tensors, step = run.restore()
    assert step == 6 and f"ema/{next(iter(whole))}" in tensors
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (told is not None)
    for line in lines:
        assert any(part in line for part in told.split("|")) and len(line) < 500
        assert line.endswith("; it is left out") and str(newest) in line


@pytest.mark.parametrize("damage", [flip(0.5), saved(step="7.5")])
def test_a_run_goes_on_from_the_one_before(
    folder: Path, whole: dict[str, torch.Tensor], damage: Callable[[Path], Any]
) -> None:
    damage(folder / "step-8.safetensors")
    assert_same(trained(folder, steps=8), whole)


def test_a_checkpoint_from_before_there_were_checksums(
    folder: Path, whole: dict[str, torch.Tensor]
) -> None:
    saved(step="8")(folder / "step-8.safetensors")
    assert_same(trained(folder, steps=8), whole)


def without(start: str) -> Callable[[dict], dict]:
    """A state that lacks the tensors whose names begin so."""
    return lambda tensors: {k: x for k, x in tensors.items() if not k.startswith(start)}


def shaped(start: str) -> Callable[[dict], dict]:
    """A state whose tensors of these names have another shape."""
    return lambda tensors: {
        k: torch.zeros(3) if k.startswith(start) else x for k, x in tensors.items()
    }


OTHERS = [
    (without("ema/"), "another model: ema/layers.0.bias is missing, expected .256,"),
    (without("model/"), "another model: model/layers.0.bias is missing, expected"),
    (without("exp_avg/"), "another optimiser .exp_avg/layers.0.bias is missing, exp"),
    (without("exp_avg_sq/"), "another optimiser .exp_avg_sq/layers.0.bias is missing"),
    (without("step/"), "another optimiser .step/layers.0.bias is missing"),
    (without(""), "another model: model/layers.0.bias is missing, expected .256,"),
    (shaped("model/"), "another model: model/layers.0.bias is .3,., expected .256,"),
    (shaped("ema/"), "another model: ema/layers.0.bias is .3,., expected .256,"),
    (shaped("exp_avg/"), "another optimiser .exp_avg/layers.0.bias is .3,., expected"),
    (shaped("exp_avg_sq/"), "another optimiser .exp_avg_sq/layers.0.bias is .3,"),
    (shaped("step/"), "another optimiser .step/layers.0.bias is .3,., expected .."),
    (lambda t: t | {"model/x": torch.zeros(1)}, "model/x is .1,., expected none"),
    (lambda t: t | {"other": torch.zeros(1)}, "other is .1,., expected none"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_a_whole_checkpoint_of_something_else(
    folder: Path, change: Callable[[dict], dict], message: str
) -> None:
    file = folder / "step-8.safetensors"
    tensors = {k: x.clone() for k, x in load_tensors(file)[0].items()}
    save_tensors(file, change(tensors), step=8)
    refused(message, lambda: trained(folder, steps=8))


# The other files of a run

RUN = [
    ("run.json", "null", "run.json holds a NoneType; expected an object"),
    ("run.json", "[]", "run.json holds a list; expected an object"),
    ("run.json", "7", "run.json holds a int; expected an object"),
    ("run.json", '"text"', "run.json holds a str; expected an object"),
    ("run.json", "", "run.json is not valid JSON"),
    ("run.json", '{"steps": ', "run.json is not valid JSON"),
    ("run.json", "[" * 100_000, "nested too deeply"),
    ("run.json", b"\xff\xfe", "run.json is not a text in UTF-8"),
    ("run.json", " " * 2_000_000, "run.json has 2,000,000 bytes; expected at most"),
    ("run.json", '{"steps": null}', "holds a run with steps = None, not 8"),
    ("run.json", json.dumps({"steps": "x" * 9999}), "holds a run with steps = xxx"),
    ("run.json", pipe, "run.json is a pipe; expected a file"),
    ("run.json", link, "run.json is a device; expected a file"),
    ("run.json", Path.mkdir, "run.json is a folder; expected a file"),
    ("log.jsonl", pipe, "log.jsonl is a pipe; expected a file"),
    ("log.jsonl", link, "log.jsonl is a device; expected a file"),
    ("log.jsonl", Path.mkdir, "log.jsonl is a folder; expected a file"),
    ("lock", pipe, "lock is a pipe; expected a file"),
    ("lock", link, "lock is a device; expected a file"),
    ("lock", Path.mkdir, "lock is a folder; expected a file"),
]


def put(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Put ``content`` in the place of a file."""
    if callable(content):
        path.unlink(missing_ok=True)
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(("name", "content", "message"), RUN, ids=short)
def test_a_run_that_cannot_go_on(
    folder: Path, name: str, content: Any, message: str
) -> None:
    put(folder / name, content)
    refused(message, lambda: trained(folder, steps=8))


LOGS = [
    ("5\n7\n", []),
    ("[]\nnull\n", []),
    ('"step"\n', []),
    ('{"step": "five"}\n{"step": 6}\n', [6]),
    ('{"step": null}\n{"step": 6}\n', [6]),
    ('{"step": 6}\n{"step": 8, "lo', [6]),
    ("[" * 99_999 + '\n{"step": 6}\n', [6]),
    (b'\xff\xfe\n{"step": 6}\n', [6]),
    (b"\0" * 5000 + b'\n{"step": 6}\n', [6]),
    ("", []),
]


@pytest.mark.parametrize(("content", "steps"), LOGS, ids=short)
def test_a_damaged_log_keeps_its_records(
    folder: Path, content: str | bytes, steps: list[int]
) -> None:
    put(file := folder / "log.jsonl", content)
    assert [record["step"] for record in read_log(file)] == steps
    trained(folder, steps=8)
    assert [record["step"] for record in read_log(file)] == steps


@pytest.mark.parametrize(
    "damage", [flip(0.5), flip(0.9), cut(0.5), saved(), saved(score='"low"')]
)
def test_a_damaged_best_gives_way(folder: Path, damage: Callable[[Path], Any]) -> None:
    with Run(folder, {}) as run:
        run.save_best(1.0, {"w": torch.zeros(100)})
        damage(folder / "best.safetensors")
        run.save_best(5.0, {"w": torch.ones(100)})
    assert load_tensors(folder / "best.safetensors")[1]["score"] == 5.0


@pytest.mark.parametrize("damage", [flip(0.5), flip(1.0), cut(0.7), cut(0)])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], Any]
) -> None:
    file = tmp_path / "cache.safetensors"
    cached(file, lambda: {"x": torch.ones(9)}, "cpu")
    damage(file)
    found = cached(file, lambda: {"x": torch.full((9,), 2.0)}, "cpu")["x"]
    assert (found == 2).all() and "it is made again" in capsys.readouterr().err
    assert (cached(file, dict, "cpu")["x"] == 2).all()


# Own pictures


def listed(**entry: object) -> Callable[[Path], object]:
    """A metadata.jsonl of one line."""
    return lambda folder: (folder / "metadata.jsonl").write_text(json.dumps(entry))


def lines(text: str | bytes) -> Callable[[Path], object]:
    """A metadata.jsonl of this text."""
    return lambda folder: put(folder / "metadata.jsonl", text)


def at(name: str, content: Any) -> Callable[[Path], object]:
    """``content`` in the place of a file of the folder."""
    return lambda folder: put(folder / name, content)


RED = '{"file_name": "red.png", "text": "red"}'
PICTURES = [
    (at("red.txt", pipe), "red.txt is a pipe; expected a file"),
    (at("red.txt", link), "red.txt is a device; expected a file"),
    (at("red.txt", Path.mkdir), "red.txt is a folder; expected a file"),
    (at("red.txt", "x" * 1_000_000), "red.txt has 1,000,000 bytes; expected at most"),
    (at("red.txt", b"\xff"), "red.txt is not a text in UTF-8"),
    (at("red.txt", lambda p: p.symlink_to("none")), "red.txt is a link to a file that"),
    (at("red.txt", lambda p: p.symlink_to(p)), "symbolic links"),
    (at("red.png", pipe), "red.png is no file; expected a picture"),
    (at("red.png", link), "red.png is no file; expected a picture"),
    (at("red.png", Path.mkdir), "red.png is no file; expected a picture"),
    (at("red.png", lambda p: None), "the caption of red.png has no picture"),
    (at("ghost.txt", "boo"), "the caption of ghost.png has no picture"),
    (at("metadata.jsonl", pipe), "metadata.jsonl is a pipe; expected a file"),
    (at("metadata.jsonl", link), "metadata.jsonl is a device; expected a file"),
    (at("metadata.jsonl", Path.mkdir), "metadata.jsonl is a folder; expected a file"),
    (lines("[]"), "line 1: expected an object with file_name and text"),
    (lines("5"), "line 1: expected an object with file_name and text"),
    (lines("null"), "line 1: expected an object with file_name and text"),
    (lines('\n\n{"file_name"'), "line 3: expected an object with file_name and text"),
    (lines("[" * 100_000), "line 1: expected an object with file_name and text"),
    (lines(b"\xff\xfe"), "metadata.jsonl is not a text in UTF-8"),
    (
        lines(f"{RED}\n{RED.replace('red.png', './red.png')}"),
        "line 2: red.png has a caption already; expected one of each picture",
    ),
    (listed(file_name="red.png"), "line 1: expected an object"),
    (listed(text="red"), "line 1: expected an object"),
    (listed(file_name=5, text="red"), "line 1: expected an object"),
    (listed(file_name="red.png", text=5), "line 1: expected an object"),
    (listed(file_name="red.png", text=["red"]), "line 1: expected an object"),
    (listed(file_name="red.png", text="\ud800"), "line 1: expected an object"),
    (listed(file_name="../red.png", text="a"), "expected a file in this folder"),
    (listed(file_name="/etc/passwd", text="a"), "expected a file in this folder"),
    (listed(file_name="a\0b.png", text="a"), "expected a file in this folder"),
    (listed(file_name="", text="a"), "is no file; expected a picture"),
    (listed(file_name="x" * 9999, text="a"), "the caption of x+… has no picture"),
    (
        listed(file_name="red.png", text="x" * 1_000_000),
        "text has 1,000,000 characters",
    ),
]


@pytest.mark.parametrize(("change", "message"), PICTURES)
def test_a_folder_that_cannot_be_read(
    pictures: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(pictures)
    refused(message, lambda: read_folder(pictures, 8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"GIF89a" + b"\xff" * 4,
        b"<svg/>",
        b"\0" * 5000,
    ],
    ids=short,
)
def test_a_damaged_picture_is_left_out(
    pictures: Path, capsys: pytest.CaptureFixture, content: bytes
) -> None:
    (pictures / "red.png").write_bytes(content)
    assert len(read_folder(pictures, 8)[1]) == 3
    assert "red.png is not a picture that can be read" in capsys.readouterr().err


def test_no_picture_that_can_be_read(pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        path.write_bytes(b"no picture")
    refused("none of its pictures can be read", lambda: read_folder(pictures, 8))


def test_a_list_of_names_without_text_is_no_caption(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    refused("no captions in", lambda: read_folder(tmp_path, 8))
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    refused("no captions in", lambda: read_folder(tmp_path, 8))


def test_too_few_pictures_to_learn_from(pictures: Path) -> None:
    refused(
        "4 pictures with captions, too few", lambda: Pictures("test", str(pictures))
    )


def test_the_longest_caption_is_read_in_time(pictures: Path, small: Path) -> None:
    """One word, which tokenizers take longest for: ``patience``."""
    (pictures / "red.txt").write_text("x" * 10_000)
    caption = max(read_folder(pictures, 8)[1], key=len)
    for name, kind in (("tokenizer", CLIPTokenizer), ("tokenizer_3", T5Tokenizer)):
        assert kind.from_pretrained(small / name)([caption]).shape[0] == 1


# Judges and evaluations

JUDGES = [
    ({"widths": []}, "widths"),
    ({"widths": [24]}, "widths are .24,., blocks .1, 2, 2.; expected 3 each"),
    ({"widths": [24, 48, 97]}, "expected 3 each, widths in steps of 8"),
    ({"widths": [0, 48, 96]}, "widths is .0, 48, 96.; expected 1 to"),
    ({"widths": [24, 48, HUGE]}, "widths is .24, 48, 10+.*; expected 1 to"),
    ({"widths": "wide"}, "widths is 'wide'; expected"),
    ({"widths": None}, "widths is None; expected"),
    ({"widths": [24.5, 48, 96]}, "widths is .24.5, 48, 96.; expected"),
    ({"blocks": []}, "blocks"),
    ({"blocks": [1, 2]}, "widths are .24, 48, 96., blocks .1, 2.; expected 3 each"),
    ({"blocks": [1, 2, 10**9]}, "blocks is .1, 2, 1000000000.; expected 1 to 16"),
    ({"features": 0}, "features is 0; expected 1 to"),
    ({"features": HUGE}, "features is 10+; expected 1 to"),
    ({"features": True}, "features is True; expected int"),
    ({"features": 97}, "has shape .*; expected"),
]


@pytest.mark.parametrize(("change", "message"), JUDGES, ids=short)
def test_a_judge_that_cannot_be(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(JUDGE, tmp_path / "judge"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(message, lambda: load_judge(folder))


EVALUATIONS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "-n is 0; expected a whole number, 2 to 100000"),
    ({"n": 1}, "-n is 1; expected a whole number, 2 to 100000"),
    ({"n": 10**9}, "-n is 1000000000; expected a whole number, 2 to 100000"),
    ({"n": HUGE}, "-n is 10+; expected a whole number, 2 to 100000"),
    ({"seed": -1}, "--seed is -1; expected a whole number, 0 to"),
    ({"seed": 2**63}, "--seed is 9223372036854775808; expected a whole number"),
    ({"seed": 2**64}, "--seed is 18446744073709551616; expected a whole number"),
    ({"steps": 0}, "--steps is 0; expected a whole number, 1 to 1000"),
    ({"steps": HUGE}, "--steps is 10+; expected a whole number, 1 to 1000"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf; expected a finite"),
    ({"rows": "five"}, "rows is 'five'; expected all, or a word of"),
]


@pytest.mark.parametrize(("asked", "message"), EVALUATIONS, ids=short)
def test_an_evaluation_that_cannot_be(asked: dict[str, Any], message: str) -> None:
    refused(message, lambda: Evaluation("tiny", **asked))

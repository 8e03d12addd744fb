"""Careless and hostile use of the command line: what is right, or one clear line."""

import functools
import json
import os
import re
import signal
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from children import STDERR, die_at_fsync, in_children, interrupt_after
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minidiff.drawing import series
from minidiff.drawing.series import Series
from minidiff.engine.memory import NoRoom
from minidiff.files import disk
from minidiff.files.pictures import (
    LONGEST,
    in_gray,
    in_rgb,
    open_picture,
    read_settings,
    save_picture,
)
from minidiff.files.weights import Prepared
from minidiff.interface.request import Request
from minidiff.judging import evaluation

LONG = "x" * 5000
HUGE = 10**30
DIGITS = "9" * 5000


@pytest.fixture
def refused(run: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run what must be refused before a weight is read: its line, status 2."""
    monkeypatch.setattr(Prepared, "__call__", lambda *_: 1 / 0)

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1, (code, out, err)
        assert err.startswith("minidiff: ") and len(err) < 1100
        return err

    return call


def make(name: str) -> None:
    """Something under a name that tells what it is."""
    kind = name.split(".")[0].split("-")[0]
    if kind == "folder":
        os.mkdir(name)
    elif kind == "pipe":
        os.mkfifo(name)
    elif kind == "dangling":
        os.symlink("nowhere", name)
    elif kind == "link":
        Path("old").write_text("kept")
        os.symlink("old", name)
    else:
        Path(name).write_text("kept")


# What stands in the folder, options of sample, the line
OUTPUTS = [
    (["old.png"], ["--output", "old.png"], "old.png exists; expected a free name"),
    (["link.png"], ["--output", "link.png"], "link.png exists; expected a free name"),
    (["folder.png"], ["--output", "folder.png"], "folder.png is a folder; expected a"),
    (["pipe.png"], ["--output", "pipe.png"], "pipe.png is a pipe; expected a file"),
    (["dangling.png"], ["--output", "dangling.png"], "is a link to what is not there"),
    (["old-1.png"], ["--output", "old.png", "--num-images", 3], "old-1.png exists"),
    (["old"], ["--output", "old/a.png"], "old/a.png cannot be written: old is not a"),
    ([], ["--output", "no/a.png"], "no/a.png cannot be written: no is not a folder"),
    ([], ["--output", "a.jpg"], "--output is a.jpg; expected a name that ends in .png"),
    ([], ["--output", ""], "--output is .; expected a name that ends in .png"),
    ([], ["--output", "a"], "--output is a; expected a name that ends in .png"),
    ([], ["--output", f"{LONG}.png"], "File name too long"),
    ([], ["--output", f"{'x' * 248}.png", "--num-images", 2], "File name too long"),
    ([], ["--output", "a.png", "--preview", "a.png"], "which a picture will be called"),
    ([], ["--preview", "picture.png"], "which a picture will be called"),
    (["old.png"], ["--preview", "old.png"], "old.png exists; expected a free name"),
    (["folder.png"], ["--preview", "folder.png"], "folder.png is a folder; expected"),
    (["pipe.png"], ["--preview", "pipe.png"], "pipe.png is a pipe; expected a file"),
    (["dangling.png"], ["--preview", "dangling.png"], "a link to what is not there"),
    ([], ["--preview", "a.gif"], "--preview is a.gif; expected a name that ends in"),
    ([], ["--preview", "no/a.png"], "no/a.png cannot be written: no is not a folder"),
]


@pytest.mark.parametrize(("there", "options", "line"), OUTPUTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_outputs(refused: Callable, there: list, options: list, line: str, overwrite):
    """Refused before the drawing, and what stands there stays as it is."""
    for name in there:
        make(name)
    before = sorted(os.listdir())
    if overwrite and "exists" in line:
        return
    more = ["--overwrite"] if overwrite else []
    assert line in refused("sample", "a bag", *options, *more)
    assert sorted(os.listdir()) == before
    assert all(Path(n).read_text() == "kept" for n in before if n.startswith("old"))


EVALUATIONS = [
    (["old.json"], ["--output", "old.json"], "old.json exists; expected a free name"),
    (["folder"], ["--output", "folder", "--overwrite"], "folder is a folder; expected"),
    (
        [],
        ["--output", "/dev/null", "--overwrite"],
        "/dev/null is a device; expected",
    ),
    (["dangling"], ["--output", "dangling", "--overwrite"], "a link to what is not"),
    ([], ["--output", "no/a.json"], "no/a.json cannot be written: no is not a folder"),
    ([], ["-n", 1], "-n is 1; expected a whole number, 2 to 100000"),
    ([], ["-n", HUGE], f"-n is {HUGE}; expected a whole number, 2 to 100000"),
    ([], ["-n", DIGITS], "-n"),
    ([], ["--seed", -1], "--seed is -1; expected a whole number, 0 to"),
    ([], ["--seed", 2**64], f"--seed is {2**64}; expected a whole number, 0 to"),
    ([], ["--steps", 0], "--steps is 0; expected a whole number, 1 to 1000"),
    ([], ["--steps", HUGE], f"--steps is {HUGE}; expected a whole number, 1 to 1000"),
    ([], ["--guidance-scale", "nan"], "--guidance-scale is nan; expected a finite"),
    ([], ["--rows", "five"], "rows is 'five'; expected all, or a word of"),
    ([], ["--judge", "nowhere"], "no judge in nowhere"),
    ([], ["--beside", ""], "model is ''; expected tiny"),
    ([], ["--device", "meta"], "device is 'meta'; expected one of cpu, cuda, mps"),
]


@pytest.mark.parametrize(("there", "options", "line"), EVALUATIONS)
def test_evaluations(refused: Callable, there: list, options: list, line: str) -> None:
    for name in there:
        make(name)
    assert line in refused("evaluate", *options)
    assert sorted(os.listdir()) == sorted(there)


TUNE = ["--from", "tiny", "--data", "pictures"]
TRAININGS = [
    (["--stage", "none"], "--stage is 'none'; expected all, tokenizers, clip, t5"),
    (["--recipe", "none"], "--recipe is 'none'; expected shipped, gpu"),
    (["--start", "nowhere"], "--start is nowhere; expected tiny, or a model's folder"),
    (["--scenes", "nowhere"], "scenes is 'nowhere'; expected world, garments"),
    (["--steps", 5], "--steps and --batch-size need a --stage that has them"),
    (["--stage", "vae", "--steps", 0], "steps is 0; expected above 0"),
    (["--stage", "vae", "--steps", HUGE], f"steps is {HUGE}; expected above 0"),
    (["--stage", "vae", "--batch-size", HUGE], f"batch_size is {HUGE}; expected"),
    (["--seed", -1], "--seed is -1; expected a whole number, 0 to"),
    (["--seed", HUGE], f"--seed is {HUGE}; expected a whole number, 0 to"),
    (["--seed", DIGITS], "Invalid value for '--seed'"),
    (["--device", "meta"], "device is 'meta'; expected one of cpu, cuda, mps"),
    (["--rank", 4], "--rank is 4, which needs --lora"),
    (["--alpha", 1], "--alpha is 1.0, which needs --lora"),
    (["--targets", "x"], "--targets is x, which needs --lora"),
    (["--lora"], "--lora is True, which needs --from"),
    (["--learning-rate", 1], "--learning-rate is 1.0, which needs --from"),
    (["--from", "tiny"], "--from is tiny, which needs --data, a folder of pictures"),
    (["--from", "tiny", "--data", "nowhere"], "nowhere is not a folder"),
    ([*TUNE, "--rank", 4], "--rank is 4, which needs --lora"),
    ([*TUNE, "--prior-pictures", 4], "--prior-pictures is 4, which needs --prior"),
    ([*TUNE, "--lora", "--rank", 0], "--rank is 0; expected a whole number"),
    ([*TUNE, "--lora", "--alpha", "nan"], "--alpha is nan; expected a finite number"),
    ([*TUNE, "--trigger", "\udc80"], "--trigger is not a text in UTF-8"),
    ([*TUNE, "--prior", "\udc80"], "--prior is not a text in UTF-8"),
    ([*TUNE, "--prompt", "a", "--prompt", "\udc80"], "--prompt is not a text in UTF-8"),
    ([*TUNE, "--prior", "a", "--prior-pictures", 0], "--prior-pictures is 0; expected"),
    (
        [*TUNE, "--prior", "a", "--prior-pictures", 10**12],
        "--prior-pictures is 1000000000000; expected a whole number, 1 to 100000",
    ),
    ([*TUNE, "--steps", 0], "--steps is 0; expected a whole number, 1 to"),
    ([*TUNE, "--stage", "vae"], "--from has no stages, recipe, start, scenes or seed"),
    ([*TUNE, "--seed", 1], "--from has no stages, recipe, start, scenes or seed"),
]


@pytest.mark.parametrize(("options", "line"), TRAININGS)
def test_trainings(refused: Callable, pictures: Path, options: list, line: str) -> None:
    assert line in refused("train", "--output", "out", "--device", "cpu", *options)
    assert os.listdir() == ["pictures"]


# Options of sample with a prompt, the line
NUMBERS = [
    (["--num-images", 0], "--num-images is 0; expected a whole number, 1 to 100000"),
    (["--num-images", -1], "--num-images is -1; expected a whole number, 1 to 100000"),
    (["--num-images", 100_001], "--num-images is 100001; expected a whole number"),
    (["--num-images", 10**9], "--num-images is 1000000000; expected a whole number"),
    (["--num-images", HUGE], f"--num-images is {HUGE}; expected a whole number"),
    (["--num-images", "x"], "Invalid value for '--num-images'"),
    (["--num-images", "1e3"], "Invalid value for '--num-images'"),
    (["--num-images", DIGITS], "--num-images"),
    (["--batch-size", 2], "--batch-size is 2, which needs --prompts"),
    (["--seed", -1], "--seed is -1; expected a whole number, 0 to"),
    (["--seed", 2**64], f"seed is {2**64}; expected a whole number, 0 to"),
    (["--seed", HUGE], f"seed is {HUGE}; expected a whole number, 0 to"),
    (["--seed", DIGITS], "--seed"),
    (["--steps", 0], "--steps is 0; expected a whole number, 1 to 1000"),
    (["--steps", 1001], "--steps is 1001; expected a whole number, 1 to"),
    (["--steps", HUGE], f"--steps is {HUGE}; expected a whole number"),
    (["--height", 0], "--height is 0; expected a multiple of"),
    (["--height", -8], "--height is -8; expected a multiple of"),
    (["--height", HUGE], f"height is {HUGE}; expected a multiple of"),
    (["--width", 33], "--width is 33; expected a multiple of"),
    (["--width", "9" * 400], "--width is 99"),
    (["--width", 10**9], "width is 1000000000; expected a multiple of"),
    (["--guidance-scale", "nan"], "--guidance-scale is nan; expected a finite"),
    (["--guidance-scale", "inf"], "--guidance-scale is inf; expected a finite"),
    (["--guidance-scale", "1e400"], "--guidance-scale is inf; expected a finite"),
    (["--skip-layers", ","], "--skip-layers is ','; expected whole numbers: 7,8,9"),
    (["--skip-layers", ""], "--skip-layers is ''; expected whole numbers: 7,8,9"),
    (["--skip-layers", "1,,2"], "--skip-layers is '1,,2'; expected whole numbers"),
    (["--skip-layers", HUGE], f"skip layers are [{HUGE}]; expected some of 0 to"),
    (["--skip-layers", -1], "skip layers are [-1]; expected some of 0 to"),
    (["--skip-layer-scale", 2], "--skip-layer-scale is 2.0, which needs --skip-layers"),
    (["--skip-layers", 1, "--skip-layer-scale", "nan"], "--skip-layer-scale is nan"),
    (["--lora-scale", 1], "--lora-scale is 1.0, which needs --lora"),
    (["--lora", "nowhere"], "nowhere is missing"),
    (["--vae-tile", 0], "--vae-tile is 0; expected a whole number, at least 8"),
    (["--vae-tile", -1], "--vae-tile is -1; expected a whole number, at least 8"),
    (["--memory", ""], "--memory is ''; expected 8GB, 12GB, 16GB, 24GB or None"),
    (["--memory", "GB"], "memory is 'GB'; expected 8GB, 12GB, 16GB, 24GB or None"),
    (["--memory", "-1GB"], "memory is "),
    (["--memory", "0"], "memory is "),
    (["--t5", ""], "t5 is ''; expected one of resident, streamed, none"),
    (["--sampler", ""], "--sampler is ''; expected one of euler, heun, dpmpp_2m"),
    (["--dtype", "float8"], "'float8' is not one of 'float32', 'bfloat16'"),
    (["--device", ""], "device is ''; expected cpu, cuda"),
    (["--device", "meta"], "device is 'meta'; expected one of cpu, cuda, mps"),
    (["--device", "vulkan"], "device is 'vulkan'; expected one of cpu, cuda, mps"),
    (["--device", "cpu:-1"], "device is 'cpu:-1'; expected cpu, cuda"),
    (["--model", ""], "model is ''; expected tiny, tiny-turbo, sd3.5-medium"),
    (["--negative-prompt", "\udcff"], "--negative-prompt is not a text in UTF-8"),
    (["--prompt-2", "\udcff"], "--prompt-2 is not a text in UTF-8"),
    (["--strength", 0.5], "--strength is 0.5, which needs --image"),
    (["--mask", "m.png"], "--mask is m.png, which needs --image"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "line"), NUMBERS)
def test_numbers(refused: Callable, options: list, line: str) -> None:
    assert line in refused("sample", "a bag", *options)
    assert os.listdir() == []


@pytest.mark.parametrize("size", [60_000, 100_000, 10**6, HUGE])
def test_so_many_pictures_are_refused_before_they_have_names(
    refused: Callable, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(series, "numbered", None)
    Path("p.txt").write_text("a bag\na coat\n")
    line = refused("sample", "--prompts", "p.txt", "--num-images", size)
    assert "expected at most 100,000" in line or "1 to 100000" in line


@pytest.mark.parametrize("size", [0, -1, 10**12, HUGE])
def test_batches(refused: Callable, size: int) -> None:
    Path("p.txt").write_text("a bag\na coat\n")
    line = refused("sample", "--prompts", "p.txt", "--batch-size", size)
    assert f"--batch-size is {size}; expected a whole number, 1 to 100000" in line


# The arguments, each with something long: its line stays short
ECHOES = [
    ["sample", "a", "--model", LONG],
    ["sample", "a", "--model", f"{LONG}/{LONG}"],
    ["sample", "a", "--model", "two words " * 500],
    ["sample", "a", "--device", LONG],
    ["sample", "a", "--dtype", LONG],
    ["sample", "a", "--sampler", LONG],
    ["sample", "a", "--output", LONG],
    ["sample", "a", "--preview", LONG],
    ["sample", "a", "--memory", LONG],
    ["sample", "a", "--t5", LONG],
    ["sample", "a", "--skip-layers", LONG],
    ["sample", "a", "--lora", LONG],
    ["sample", "a", "--image", LONG],
    ["sample", "a", "--prompts", LONG],
    ["sample", "--prompts", LONG],
    ["sample", "a", "--steps", LONG],
    ["sample", "a", f"--{LONG}"],
    ["sample", "a", "b " * 3000],
    [LONG],
    ["info", LONG],
    ["info", f"{LONG}.png"],
    ["download", LONG],
    ["evaluate", "--rows", LONG],
    ["evaluate", "--model", LONG],
    ["train", "--output", "o", "--stage", LONG],
    ["train", "--output", "o", "--recipe", LONG],
]


@pytest.mark.parametrize("arguments", ECHOES, ids=range(len(ECHOES)))
def test_what_is_long_is_not_echoed(refused: Callable, arguments: list) -> None:
    line = refused(*arguments)
    assert "x" * 100 not in line and "two words " * 10 not in line
    assert len(line) < 700 and os.listdir() == []


# Pictures and masks


def png(width: int, height: int) -> bytes:
    """A PNG file's beginning: its pixels would take more memory than it has."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + crc + b"\0\0\0\x40IDAT" + b"\0" * 64


def truncated() -> bytes:
    Image.new("RGB", (64, 64), "red").save("whole.png")
    return Path("whole.png").read_bytes()[:-40]


UNREADABLE = {
    "missing.png": (None, "missing.png is missing"),
    "folder.png": ("folder", "folder.png is a folder; expected a file"),
    "pipe.png": ("pipe", "pipe.png is a pipe; expected a file"),
    "/dev/zero": (None, "/dev/zero is a device; expected a file"),
    "empty.png": (b"", "empty.png is not a picture that can be read: cannot identify"),
    "text.png": (b"hello", "text.png is not a picture that can be read: cannot"),
    "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a.eps is not a picture that can be"),
    "a.svg": (b"<svg></svg>", "a.svg is not a picture that can be read: cannot"),
    "cut.png": (truncated, "cut.png is not a picture that can be read"),
    "large.png": (png(13300, 13300), "large.png has 13300×13300 pixels; expected at"),
    "wide.png": (png(2**26 + 1, 1), f"wide.png has {2**26 + 1}×1 pixels; expected"),
    "bomb.png": (png(10**6, 10**6), "bomb.png is not a picture that can be read"),
    "zero.png": (png(0, 0), "zero.png is not a picture that can be read"),
}


@pytest.mark.parametrize("option", ["--image", "--mask", "info"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_are_no_pictures(refused: Callable, option: str, name: str) -> None:
    content, line = UNREADABLE[name]
    if isinstance(content, str):
        make(name)
    elif content is not None:
        Path(name).write_bytes(content() if callable(content) else content)
    Image.new("RGB", (64, 64)).save("good.png")
    given = ["--image", "good.png"] if option == "--mask" else []
    if option == "info" and not name.endswith(".png"):
        return
    call = ("info", name) if option == "info" else ("sample", "a", *given, option, name)
    assert line in refused(*call)


RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
TRUE = "right"
CONVERT = {"L": in_gray, "RGB": in_rgb}
# A mask's values and mode, and what is right: a ramp from black to white, or the line
MASKS = {
    "fractions": (RAMP, TRUE),
    "fractions that are black": (RAMP * 0, "black"),
    "fractions that are white": (RAMP * 0 + 1, "white"),
    "fractions to 255": (RAMP * 255, "holds values of 32 bits from 0 to 255"),
    "negative fractions": (RAMP - 1, "holds values of 32 bits from -1 to 0"),
    "no numbers": (RAMP * np.nan, "holds values of 32 bits from nan to nan"),
    "infinite": (RAMP + np.inf, "holds values of 32 bits from inf to inf"),
    "8 bits": ((RAMP * 255).round().astype("uint8"), TRUE),
    "16 bits": ((RAMP * 65535).astype("uint16"), TRUE),
    "32 bits": ((RAMP * 65535).astype("int32"), TRUE),
    "32 bits that are black": ((RAMP * 0).astype("int32"), "black"),
    "32 bits of one": ((RAMP > 0.5).astype("int32"), "holds values of 32 bits from 0"),
    "32 bits of 255": ((RAMP * 255).astype("int32"), "holds values of 32 bits from 0"),
    "32 bits of more": ((RAMP * 1e9).astype("int32"), "holds values of 32 bits from 0"),
    "32 bits below": ((RAMP * -9).astype("int32"), "holds values of 32 bits from -9"),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_greys_of_every_depth(tmp_path: Path, name: str, mode: str) -> None:
    values, right = MASKS[name]
    Image.fromarray(values).save(tmp_path / "mask.tif")
    picture = open_picture(tmp_path / "mask.tif")
    if right not in (TRUE, "black", "white"):
        with pytest.raises(ValueError, match=f"mask.tif {re.escape(right)}"):
            CONVERT[mode](picture)
        return
    found = np.asarray(CONVERT[mode](picture).convert("L")) / 255
    wanted = {TRUE: RAMP, "black": 0.0, "white": 1.0}[right]
    assert np.abs(found - wanted).max() <= 1.01 / 255


MODES = ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "LA", "RGBA", "PA"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_pictures_and_masks(tmp_path: Path, mode: str) -> None:
    """White is white in every mode that a file can have."""
    white = Image.new("RGB", (64, 64), "white")
    if mode == "LAB":
        picture = Image.new("LAB", (64, 64), (255, 128, 128))
    else:
        picture = white.convert("P" if mode == "PA" else mode)
        picture = picture.convert(mode)
    suffix = "png" if mode in ("P", "LA", "RGBA", "PA", "1") else "tif"
    picture.convert("RGBA" if mode == "PA" else mode).save(tmp_path / f"a.{suffix}")
    for wanted, convert in CONVERT.items():
        found = convert(open_picture(tmp_path / f"a.{suffix}"))
        assert found.mode == wanted and np.asarray(found).min() >= 250


@pytest.mark.slow
def test_transparency_is_told_once(run: Callable) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save("a.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save("b.png")
    call = ("sample", "a bag", "--steps", 4, "--num-images", 2, "--no-sheet")
    code, _, err = run(*call, "--image", "a.png")
    assert code == 0 and err.count("\n") == 1
    assert "a.png is transparent in parts; they lie on white" in err
    assert run(*call, "--image", "b.png")[::2] == (0, "")


# Prompts

PROMPTS = [
    (b"", "holds no prompt; expected one on each line"),
    (b"\n \n\t\n", "holds no prompt; expected one on each line"),
    (b"\xff\xfe", "is not a text in UTF-8"),
    (b"a\n" * 100_001, "p.txt holds over 100,000 prompts; expected at most 100,000"),
    ("folder", "folder is a folder; expected a file"),
    ("pipe", "pipe is a pipe; expected a file"),
    (None, "p.txt is missing"),
]


@pytest.mark.parametrize(("content", "line"), PROMPTS, ids=[m for _, m in PROMPTS])
def test_files_of_prompts(refused: Callable, content: object, line: str) -> None:
    name = "p.txt"
    if isinstance(content, str):
        make(name := content)
    elif isinstance(content, bytes):
        Path(name).write_bytes(content)
    assert line in refused("sample", "--prompts", name)


# What a picture's file keeps

TEXTS = {
    "empty": "",
    "lines": "a\nb\r\nc",
    "zero": "a\0b",
    "controls": "".join(map(chr, range(1, 32))),
    "many scripts": "ein rotes Kleid, 東京 🙂 \u202eabc\u202c é",
    "marks": "<script>'\"&;`$(x)",
    "two megabytes": "ab" * 2**20,
    "as long as is kept": "x" * LONGEST,
    "longer": "x" * (LONGEST + 9),
    "longer, cut within a letter": "é" * LONGEST,
}


@pytest.mark.parametrize("name", TEXTS)
def test_settings_come_back(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.info |= {"prompt": TEXTS[name], "seed": 3, "guidance_scale": 2.5}
    save_picture(picture, tmp_path / "a.png")
    found = read_settings(tmp_path / "a.png")
    kept = TEXTS[name].encode()[:LONGEST].decode(errors="ignore")
    assert (found["prompt"], found["seed"], found["guidance_scale"]) == (
        kept,
        "3",
        "2.5",
    )


@pytest.mark.slow
def test_settings_that_are_too_long_to_be_read(refused: Callable) -> None:
    info = PngInfo()
    info.add_itxt("prompt", "x" * 70_000_000)
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    assert "a.png is not a picture that can be read" in refused("info", "a.png")


# Several runs at a time


def drawing(small: Path, *options: object) -> list[str]:
    """A command that draws with the small model, in one step."""
    words = ["sample", "a bag", "--model", small, "--steps", 1, *options]
    return [str(word) for word in words]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.slow
def test_no_picture_of_twelve_runs_is_lost(small: Path, folder: Path) -> None:
    more = [[], ["--overwrite"]] * 6
    runs = [drawing(small, "--seed", i, *more[i]) for i in range(12)]
    assert in_children(*runs) == [0] * 12
    seeds = {read_settings(file)["seed"] for file in folder.iterdir()}
    assert seeds == set(map(str, range(12))) and len(list(folder.iterdir())) == 12


@pytest.mark.slow
def test_one_of_several_runs_holds_a_name(small: Path, folder: Path) -> None:
    """The others are refused before they draw, with or without its picture."""
    runs = [drawing(small, "--output", "a.png") for _ in range(4)]
    assert sorted(in_children(*runs)) == [0, 2, 2, 2]
    assert [p.name for p in folder.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_what_a_kill_left_goes_with_the_next_picture(small: Path, folder: Path) -> None:
    draw = drawing(small, "--output", "a.png")
    assert in_children(draw, before=die_at_fsync) == [-signal.SIGKILL]
    assert len(list(folder.glob(".minidiff-*"))) == 2  # the name's, and the file's
    assert in_children(draw) == [0]
    assert [p.name for p in folder.iterdir()] == ["a.png"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
def test_an_interruption_at_any_time(small: Path, folder: Path, moment: float) -> None:
    """Status 130, one line, nothing left."""
    draw = drawing(small, "--output", "a.png", "--steps", 900)
    interrupt = functools.partial(interrupt_after, moment)
    assert in_children(draw, before=interrupt) == [130]
    assert (folder.parent / STDERR).read_text() == "minidiff: interrupted\n"
    assert list(folder.iterdir()) == []


# Writing


@pytest.mark.parametrize("write", [disk.write_text, disk.write_json])
def test_a_full_disk_keeps_the_old(tmp_path: Path, write: Callable) -> None:
    resource = pytest.importorskip("resource", reason="needs limits of POSIX")
    file, long = tmp_path / "old.json", "x" * 10_000
    file.write_text("kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {file}: File too large"):
            write(file, long if write is disk.write_text else {"a": long})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "kept" and list(tmp_path.iterdir()) == [file]


def test_half_of_a_pair_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a.html has half of a pair at 1; expected"):
        disk.write_text(tmp_path / "a.html", "a\ud800")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_usual_modes(tmp_path: Path, mask: int) -> None:
    from safetensors.torch import save_file

    before = os.umask(mask)
    try:
        with disk.replacing(tmp_path / "a") as part:
            save_file({"a": torch.zeros(1)}, part)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
        for mode in (0o640, 0o400):
            (tmp_path / "a").chmod(mode)
            disk.write_text(tmp_path / "a", "anew")
            assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_where_there_are_no_links_names_are_exclusive_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", none)
    with disk.creating(tmp_path / "a") as part:
        part.write_text("first")
    with pytest.raises(FileExistsError, match="b exists; expected a free name"):
        with disk.creating(tmp_path / "b") as part:
            part.write_text("second")
            (tmp_path / "b").write_text("of another")
    assert (tmp_path / "a").read_text() == "first"
    assert (tmp_path / "b").read_text() == "of another"


# As memory holds


class Pipe:
    """In place of a pipeline: there is room for a few pictures at once."""

    progress = False

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, list[int]()

    def check(self, request: Request) -> Request:
        if request.count > self.most:
            raise NoRoom("so many take more")
        return request

    def draw(self, request: Request) -> list[tuple[str, int]]:
        self.sizes.append(request.count)
        texts = [first for first, *_ in request.prompts]
        return list(zip(texts, request.seeds, strict=True))


@pytest.mark.parametrize(
    ("texts", "n", "batch", "most", "sizes"),
    [
        (1, 10, None, 99, [10]),
        (1, 10, None, 4, [3, 3, 3, 1]),
        (3, 2, None, 99, [2, 2, 2]),
        (3, 2, 2, 99, [4, 2]),
        (3, 2, 3, 1, [1] * 6),
        (1, 150, None, 999, [64, 64, 22]),
        (2, 100, 2, 999, [200]),
    ],
)
def test_batches_are_halved_until_they_fit(
    texts: int, n: int, batch: int | None, most: int, sizes: list[int]
) -> None:
    """And each picture has its prompt and its seed, however they are cut."""
    names, pipe = [f"prompt {i}" for i in range(texts)], Pipe(most)
    found = list(Series(names, n, batch, 7).draw(pipe))
    assert found == [(names[i // n], 7 + i) for i in range(texts * n)]
    assert pipe.sizes == sizes


def test_one_that_does_not_fit_is_refused() -> None:
    with pytest.raises(NoRoom):
        list(Series(["a"]).draw(Pipe(0)))


@pytest.mark.slow
def test_a_contact_sheet(run: Callable, small: Path) -> None:
    call = ("sample", "a bag", "--model", small, "--steps", 1, "--num-images", 5)
    code, out, err = run(*call, "--output", "a.png")
    assert (code, out.split()) == (0, [f"a-{i}.png" for i in range(5)])
    assert err == "contact sheet: a-sheet.png\n"
    sheet = Image.open("a-sheet.png")
    assert sheet.size == (3 * 264 + 8, 2 * 264 + 8)
    large = Image.open("a-3.png").resize((256, 256), resample=0)
    assert sheet.crop((8, 272, 264, 528)).tobytes() == large.tobytes()
    assert run(*call, "--no-sheet")[2] == ""
    assert len(list(Path().glob("*sheet*"))) == 1


@pytest.mark.slow
def test_results_stay_when_they_cannot_be_replaced(
    run: Callable, fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("old.json").write_text(json.dumps({"kept": 1}))
    monkeypatch.setattr(os, "replace", lambda *_: os.open("no/where", os.O_RDONLY))
    how = ("-n", 2, "--steps", 1, "--rows", "one garment", "--data", fashion)
    monkeypatch.setattr(evaluation, "attention_correlation", lambda *_, **__: {})
    code, _, err = run("evaluate", *how, "--output", "old.json", "--overwrite")
    assert code == 2 and "cannot write old.json" in err
    assert json.loads(Path("old.json").read_text()) == {"kept": 1}
    assert os.listdir() == ["old.json"]

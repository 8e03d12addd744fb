"""Two pictures side by side: what differs, and which difference explains it."""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minidiff
from minidiff.cli.compare import CAUSES, QUIRKS, compare, first_difference
from minidiff.control import encode_weighted
from minidiff.drawing.guidance import SkipLayer
from minidiff.drawing.image_to_image import Start
from minidiff.efficiency import FirstBlockCache
from minidiff.engine.memory import Plan
from minidiff.files.pictures import save_picture
from minidiff.flow_matching import ClassifierFree, Scheduler
from minidiff.interface.request import UNTOLD, Request
from minidiff.lora import LowRank, save_lora
from minidiff.sampling import Pipeline

SETTINGS = {"model": "tiny", "prompt": "a red dress", "seed": 3, "sampler": "euler"}


def picture(file: Path, value: int = 0, size: int = 8, **settings: object) -> Path:
    made = Image.new("RGB", (size, size), (value, 0, 0))
    made.info = settings
    save_picture(made, file)
    return file


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ({"seed": 4}, "seed: other noise to begin from"),
        ({"sampler": "heun", "seed": 4}, "seed: other noise"),
        ({"dtype": "bfloat16", "max_sequence_length": 77}, "max_sequence_length: T5"),
        ({"model": "sd3.5-large", "prompt": "a bag"}, "model: other weights"),
        ({"colour": "blue"}, "colour: not known here"),
        ({"strength": 0.5, "control": "edges a.png"}, "control: another sketch"),
        ({"seed": 4, "t5": "streamed"}, "seed: other noise"),
        ({"seed": 4, "t5": "none"}, "t5 none: without T5"),
        ({"seed": 4, "image": "a.png"}, "image: another picture"),
        ({"max_sequence_length": 9}, "max_sequence_length: T5 reads more or fewer"),
        ({}, "nothing noted; a callback"),
    ],
)
def test_the_most_telling_difference_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, changed: dict, first: str
) -> None:
    files = [picture(tmp_path / "a.png", **SETTINGS)]
    files.append(picture(tmp_path / "b.png", 9, **SETTINGS | changed))
    compare(*files)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"first: {first}")
    assert lines[-2] == "pixels: apart by 3.0 of 255 on average, 9 at most"
    marked = {line.split()[0] for line in lines if line.endswith("  <")}
    assert marked == changed.keys()


def test_the_same_pictures_differ_in_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [picture(tmp_path / f"{i}.png", **SETTINGS) for i in range(2)]
    compare(*files)
    out = capsys.readouterr().out
    assert "pixels: the same" in out and "first" not in out and " <" not in out


def test_of_equal_pixels_no_cause_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [picture(tmp_path / "a.png", **SETTINGS)]
    files.append(picture(tmp_path / "b.png", **SETTINGS, t5="streamed"))
    compare(*files)
    out = capsys.readouterr().out
    assert "streamed  <" in out and out.endswith("pixels: the same\n")


def test_settings_of_other_programs_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs, texts = tmp_path / "theirs.png", PngInfo()
    texts.add_text("parameters", "a red dress\nSteps: 20, Seed: 3")
    Image.new("RGB", (8, 8), "white").save(theirs, pnginfo=texts)
    compare(picture(tmp_path / "ours.png", **SETTINGS), theirs)
    out = capsys.readouterr().out
    assert "theirs.png carries no settings" in out and "parameters" not in out
    assert out.splitlines()[-1].startswith("pixels: apart by")


def test_pictures_of_other_programs_are_compared_by_their_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ours, theirs = picture(tmp_path / "a.png", **SETTINGS), tmp_path / "b.jpg"
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(theirs)
    compare(ours, theirs)
    out = capsys.readouterr().out
    assert "b.jpg carries no settings" in out and "first" not in out
    assert "pixels: 8 × 8 and 9 × 8, not compared" in out


def test_nothing_differs_in_nothing() -> None:
    assert first_difference({}, {}) is None


def load(folder: Path, **how: object) -> Pipeline:
    pipe = minidiff.load(folder, **how)
    pipe.progress = False
    return pipe


@pytest.mark.slow
def test_every_setting_that_can_be_written_has_its_cause(
    small: Path, tmp_path: Path
) -> None:
    names = {field.name for field in fields(Request)} - {*UNTOLD, "guidance"}
    names |= {field.name for field in fields(Plan)}
    names |= SkipLayer(ClassifierFree(2.0)).settings.keys()
    names |= Start(torch.ones(3, 8, 8), 0.5, torch.ones(8, 8)).settings.keys()
    names |= load(small, memory="8GB", compile=True).settings.keys()
    pipe = load(small, fast=True)
    width = pipe.transformer.config.width
    update = randomize(LowRank(width, width, 2))
    layers = {"transformer": {"transformer_blocks.0.attn.to_q": update}}
    save_lora(layers, tmp_path / "lora.safetensors")
    pipe.adapters.load(tmp_path / "lora.safetensors")
    pipe.scheduler = Scheduler(9.0)
    pipe.transformer = FirstBlockCache.of(pipe.transformer, 0.1)
    names |= pipe.about.keys()
    file = picture(tmp_path / "a.png", **dict.fromkeys(names, 1))
    with Image.open(file) as written:
        assert written.text.keys() <= CAUSES.keys()
    assert {key.split()[0] for key in CAUSES} == written.text.keys()


def test_causes_point_to_entries_of_the_page_of_quirks() -> None:
    page = Path(__file__).parents[1] / "book" / "quirks.ipynb"
    titles = re.findall(r'"#+ (.*?)\\n"', page.read_text("utf-8"))
    assert QUIRKS.keys() <= CAUSES.keys() and {*QUIRKS.values()} <= {*titles}


def drawn_twice(small: Path, what: str) -> list[dict]:
    """What two pictures note that differ in ``what`` alone."""
    pipe = load(small, fast=False)
    calls: list[dict] = [{}, {}]
    if what == "latents":
        calls = [{what: pipe.prepare_latents(1, seed=i)} for i in range(2)]
    if what == "prompt_embeds":
        prompts = "a (red:1.5) dress", "a (red:0.5) dress"
        ends = what, f"pooled_{what}"
        calls = [
            dict(zip(ends, encode_weighted(pipe, p), strict=True)) for p in prompts
        ]
    notes = []
    for i, call in enumerate(calls):
        if what == "shift" and i:
            pipe.scheduler = Scheduler(pipe.scheduler.shift + 1)
        if what == "cache_threshold" and i:
            pipe.transformer = FirstBlockCache.of(pipe.transformer, 0.1)
        prompt = None if "prompt_embeds" in call else "a red dress"
        notes.append(pipe(prompt, num_inference_steps=1, **call)[0].info)
    return notes


@pytest.mark.parametrize(
    "what", ["shift", "cache_threshold", "prompt_embeds", "latents"]
)
def test_what_changes_a_picture_is_noted(small: Path, what: str) -> None:
    one, other = drawn_twice(small, what)
    assert {n for n in {**one, **other} if one.get(n) != other.get(n)} == {what}
    again = drawn_twice(small, what)
    assert again == [one, other]


def test_each_picture_notes_its_own_embeddings(small: Path) -> None:
    pipe = load(small)
    read = pipe.encode_prompt(["a red dress", "a bag"])
    names = "prompt_embeds", "pooled_prompt_embeds"
    how = {"num_images_per_prompt": 2, "num_inference_steps": 1}
    drawn = pipe(**dict(zip(names, read, strict=True)), **how)
    alone = pipe(**dict(zip(names, (x[1:] for x in read), strict=True)), **how)
    for name in names:
        a, b, c, d, e, f = (picture.info[name] for picture in (*drawn, *alone))
        assert a == b != c == d == e == f

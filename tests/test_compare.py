"""Two pictures side by side: what differs, and which difference explains it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiff.cli.compare import compare, first_difference
from minidiff.files.pictures import save_picture

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

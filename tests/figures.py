"""Moves the book's interactive figures in a browser and compares what is displayed."""

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image


def data_of(figure: Any) -> dict[str, Any]:
    script = figure.locator("script[type='application/json']")
    return json.loads(script.text_content())


def sprite(url: str) -> np.ndarray:
    png = base64.b64decode(url.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)


def displayed(canvas: Any, height: int, width: int) -> np.ndarray:
    """What the screen shows at the middle of each pixel of a canvas (height, width).

    A canvas may begin between two of the page's pixels; the screenshot does not.
    """
    shot = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"))
    box, density = canvas.bounding_box(), canvas.evaluate("() => devicePixelRatio")
    y = (box["y"] % 1 + (np.arange(height) + 0.5) * box["height"] / height) * density
    x = (box["x"] % 1 + (np.arange(width) + 0.5) * box["width"] / width) * density
    return shot[y.astype(int)][:, x.astype(int)].astype(float)


def same(shown: np.ndarray, expected: np.ndarray) -> bool:
    """Equal up to the rounded corners and a grey level or two."""
    rim = max(1, len(shown) // 16)
    inside = np.abs(shown - expected)[rim:-rim, rim:-rim]
    return shown.std() > 0 and inside.max() <= 3


def check_scrubber(figure: Any) -> None:
    """The slider, by keyboard: every panel shows the pixels of its step."""
    data = data_of(figure)
    slider, last = figure.get_by_label("denoising step"), len(data["sigmas"]) - 1
    assert not figure.locator(".minidiff-strip").is_visible()
    for key, count, step in (("Home", 1, 0), ("ArrowRight", 2, 2), ("End", 1, last)):
        for _ in range(count):
            slider.press(key)
        assert slider.get_attribute("aria-valuetext").startswith(f"{step} of {last}")
        for i, row in enumerate(data["rows"]):
            height, width = row["size"]
            frame = sprite(row["sprite"])[:, step * width : (step + 1) * width]
            shown = displayed(figure.locator("canvas").nth(i), height, width)
            assert same(shown, frame), f"{row['name']} at step {step}"


def heat_map(data: dict[str, Any], block: int, step: int, word: int) -> np.ndarray:
    """The picture that the explorer must show for a word."""
    shape = (len(data["blocks"]), len(data["steps"]), len(data["words"]), *data["grid"])
    maps = np.frombuffer(base64.b64decode(data["maps"]), np.uint8).reshape(shape)
    colors = np.frombuffer(base64.b64decode(data["palette"]), np.uint8).reshape(-1, 3)
    height, width = data["size"]
    frame = step if data["pictures"] > 1 else 0
    picture = sprite(data["sprite"])[:, frame * width : (frame + 1) * width]
    y = np.arange(height) * shape[3] // height
    x = np.arange(width) * shape[4] // width
    heat = colors[maps[block, step, word]][y][:, x].astype(float)
    return 0.3 * picture.mean(-1, keepdims=True) + 0.7 * heat


def check_explorer(figure: Any) -> None:
    """Words, blocks and steps show their map; a patch shows what it reads."""
    data = data_of(figure)
    canvas, words = figure.locator("canvas"), figure.locator(".minidiff-words button")
    assert words.all_text_contents() == data["words"]
    height, width = data["size"]
    last = (len(data["blocks"]) - 1, len(data["steps"]) - 1)
    for block, step, word in (
        (*last, 1),
        (0, last[1], 1),
        (0, 0, len(data["words"]) - 1),
    ):
        figure.get_by_label("block", exact=True).press("End" if block else "Home")
        figure.get_by_label("step", exact=True).press("End" if step else "Home")
        words.nth(word).hover()
        assert words.nth(word).get_attribute("aria-pressed") == "true"
        shown = displayed(canvas, height, width)
        expected = heat_map(data, block, step, word)
        assert same(shown, expected), f"block {block}, step {step}, word {word}"
    words.nth(0).focus()
    assert words.nth(0).get_attribute("aria-pressed") == "true"
    assert same(displayed(canvas, height, width), heat_map(data, 0, 0, 0))
    check_patch(figure, canvas, words, data)


def check_patch(figure: Any, canvas: Any, words: Any, data: dict[str, Any]) -> None:
    rows, columns = data["grid"]
    box = canvas.bounding_box()
    place = {"x": box["width"] * 2.5 / columns, "y": box["height"] * 1.5 / rows}
    canvas.click(position=place)
    reads = np.frombuffer(base64.b64decode(data["reads"]), np.uint8)
    reads = reads.reshape(len(data["blocks"]), len(data["steps"]), rows, columns, -1)
    for key, (row, column) in ((None, (1, 2)), ("ArrowDown", (2, 2))):
        if key:
            canvas.press(key)
        assert f"row {row}, column {column}" in canvas.get_attribute("aria-label")
        share = reads[0, 0, row, column] / max(reads[0, 0, row, column].max(), 1)
        found = [float(w.get_attribute("data-share")) for w in words.all()]
        assert np.allclose(found, share, atol=1e-3)
    words.nth(0).focus()  # the patch stays chosen, for the sliders behind the words
    assert words.nth(0).get_attribute("aria-pressed") == "false"
    words.nth(0).press("Enter")
    assert words.nth(0).get_attribute("aria-pressed") == "true"
    canvas.click(position=place)
    canvas.press("Escape")
    assert words.nth(0).get_attribute("aria-pressed") == "true"

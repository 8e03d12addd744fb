"""The figures: drawn without pyplot, and the frames of those that come alive."""

import base64
import html
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import viz
from minidiff.classroom.colors import GROUNDS, colors_of

ROOT, LIMIT = Path(__file__).parents[1], 200_000  # bytes of a figure

STEPS, WORDS = 6, ["a", "red", "dress", "</s>"]


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]


FIGURES: dict[str, Callable[[], Any]] = {
    "images": lambda: viz.show_images(pictures(3), ["one", "two", "three"], columns=2),
    "pil": lambda: viz.show_images([Image.new("RGB", (8, 8)), Image.new("L", (8, 8))]),
    "grey": lambda: viz.show_images(torch.zeros(9, 28, 28, dtype=torch.uint8)),
    "latents": lambda: viz.show_latents(torch.randn(16, 8, 8)),
    "attention": lambda: viz.show_attention(torch.rand(4, 4, 4), WORDS, pictures(1)[0]),
    "rows": lambda: viz.show_attention(torch.rand(2, 4, 4, 4), WORDS, rows=["0", "1"]),
    "trajectory": lambda: viz.show_trajectory(
        {"x": torch.randn(9, 16, 4, 4), "picture": pictures(9)}, torch.linspace(1, 0, 9)
    ),
    "tokens": lambda: viz.show_tokens(Tokenizer(), ["a $b$ 😀 日本 \n", "c"]),
    "pieces": lambda: viz.show_pieces([["p", "u"], ["pu"]], labels=["0", "1"]),
    "lattice": lambda: viz.show_lattice(
        "red", [(0, 1, -2.0), (1, 3, -3.0), (0, 3, -4.0)], [(0, 3)]
    ),
    "curves": lambda: viz.show_curves(
        {"y": [3, 2, 1], "xy": ([0, 2], [1, 2])}, "x", "y"
    ),
    "heatmap": lambda: viz.show_heatmap(torch.randn(2, 3), signed=True, digits=1),
    "bars": lambda: viz.show_bars({"a": 1, "b": 2}, "bytes"),
    "stacked": lambda: viz.show_bars(
        {"a": {"x": 1, "y": 2}, "b": {"x": 3}}, stacked=True
    ),
    "histogram": lambda: viz.show_histogram({"n": torch.randn(100)}),
    "points": lambda: viz.show_points({"n": torch.randn(9, 2)}, torch.randn(4, 3, 2)),
    "panels": lambda: viz.show_points({"σ = 1": {"n": torch.randn(9, 2)}, "σ = 0": {}}),
    "fields": lambda: viz.show_fields(
        {"σ": (*torch.randn(2, 9, 2), torch.randn(9, 2))}
    ),
    "vectors": lambda: viz.show_vectors(torch.zeros(2), {"v": torch.ones(2)}),
    "quadrants": lambda: viz.show_quadrants({"even": (4, 4), "thin": (1, 40)}),
    "factors": lambda: viz.show_factors({"tall": (60, 20), "wide": (20, 60)}, rank=3),
    "block": lambda: viz.show_joint_block(),
    "positions": lambda: viz.show_positions(
        torch.randn(1, 64, 32), {"whole": (8, 8), "part": (4, 6)}, (3, 4)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("error")
def test_figure_is_drawn_on_a_transparent_ground(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    figure = FIGURES[name]()
    picture = np.asarray(Image.open(io.BytesIO(figure.drawn("png"))))
    assert picture.shape[2] == 4 and picture[0, 0, 3] == 0
    assert 0 < (picture[..., 3] > 0).mean() < 1
    assert "matplotlib.pyplot" not in sys.modules
    text = figure._repr_html_()
    assert len(text) < LIMIT and f'alt="{html.escape(repr(figure))}"' in text


# Colours: whatever is written can be read on both grounds, and in tinted boxes


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    """Of two colours, as WCAG 2 defines it."""
    linear = [
        np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (a, b)
    ]
    low, high = sorted(float(c @ (0.2126, 0.7152, 0.0722)) for c in linear)
    return (high + 0.05) / (low + 0.05)


def values(svg: str, theme: str) -> dict[str, str]:
    """The variables' colours in a theme, from the figure's own style."""
    light, dark = svg.split("prefers-color-scheme: dark", 1)
    style = {"light": light, "dark": dark.split("</style>")[0]}[theme]
    return dict(re.findall(r"--(\w+):(#\w{6});", style))


@pytest.mark.slow
@pytest.mark.parametrize("theme", GROUNDS)
@pytest.mark.parametrize("name", FIGURES)
def test_what_is_written_can_be_read(name: str, theme: str) -> None:
    svg = FIGURES[name]().svg()
    known, ground = values(svg, theme), rgb(GROUNDS[theme])
    boxes = re.findall(
        r'<path[^>]*style="fill: var\(--(\w+)\); fill-opacity: ([.\d]+)', svg
    )
    behind = [ground] + [
        float(a) * rgb(known[k]) + (1 - float(a)) * ground
        for k, a in boxes
        if float(a) < 0.5  # in a bar nothing is written
    ]
    texts = set(re.findall(r"<text[^>]*fill: var\(--(\w+)\)", svg))
    assert texts or name in ("pil", "grey")
    for text in texts:
        assert min(contrast(rgb(known[text]), b) for b in behind) >= 4.5
    if name != "heatmap":  # its cells choose black or white
        assert not re.findall(r"<text[^>]*fill: (?!var)[^;\"]+", svg)


def test_a_thing_has_one_colour() -> None:
    first = colors_of(["anything", "noise", "data"])
    assert colors_of(["data", "noise"]) == first[:0:-1]
    assert first[0] not in first[1:]


@pytest.mark.slow
def test_a_figure_says_what_is_written_in_it() -> None:
    figure = viz.show_curves({"fast": [2, 1], "slow": [2, 2]}, "step", "loss")
    assert repr(figure) == "Figure (curves): loss, step, fast, slow"
    figure = viz.show_images(torch.zeros(2, 3, 4, 4), ["a red dress", "a bag"])
    assert repr(figure) == "Figure (images): a red dress, a bag"
    assert repr(figure.captioned("Two.")) == "Figure (images): Two. a red dress, a bag"
    assert "<figcaption>Two.</figcaption>" in figure._repr_html_()
    figure = viz.show_pieces([["dre", "s", "s"]], ["word"], [["1", "2", "2"]])
    assert repr(figure) == "Figure (pieces): word, dre, s, s"
    figure = viz.show_heatmap(torch.eye(2), ["0 a dress", "1 a bag"], digits=1)
    assert repr(figure) == "Figure (heatmap): 0 a dress, 1 a bag"
    assert len(repr(viz.show_images(torch.zeros(40, 3, 4, 4), ["word"] * 20))) < 401


def test_labels_keep_their_digits() -> None:
    figure = viz.show_curves({"e": ([1, 2], [0.004, 0.04])}, "0.12345", logy=True)
    svg = figure.svg()
    assert re.findall(r">(0\.00\d|0\.1\d+)<", svg) == ["0.12345", "0.005"]
    assert not re.search(r'd="[^"]*\.\d{3}', svg)


def test_dashes_tell_what_colours_do_not_and_ticks_stand_apart() -> None:
    curves = {f"{s}, {k}": ([8, 16], [2, 1]) for k in "ab" for s in ("euler", "heun")}
    curves["heun, b"] = ([15, 31], [2, 1])
    figure = viz.show_curves(curves, logx=True, markers=True)
    (ax,) = figure.axes
    assert [line.get_linestyle() for line in ax.lines] == ["-", "-", "--", "--"]
    assert [line.get_marker() for line in ax.lines] == ["o", "s", "o", "s"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "16", "31"]


def test_settings_of_matplotlib_are_left_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    viz.show_bars({"a": 1})
    assert dict(matplotlib.rcParams) == before


def test_the_map_leads_to_every_chapter_and_marks_one() -> None:
    text = viz.show_pipeline("vae")._repr_html_()
    links = re.findall(r'href="(\w+)\.ipynb"', text)
    assert sorted(links) == sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
    assert re.findall(r'<a href="(\w+)[^>]*aria-current', text) == ["03_vae"]


def test_unknown_chapter_of_the_map() -> None:
    with pytest.raises(ValueError, match="unknown chapter 'unet'"):
        viz.show_pipeline("unet")


# The figures that come alive on the book's pages


def test_frames_show_what_they_are_given() -> None:
    latents, shown = torch.randn(2, STEPS, 16, 8, 8), pictures(STEPS, 64)
    sigmas = torch.linspace(1, 0, STEPS)
    figure = viz.live_denoising(*latents, shown, sigmas, "a <b> & “c”")
    frames = np.asarray(Image.open(io.BytesIO(figure.frames)))
    assert frames.shape == (3 * 64, STEPS * 64, 3)
    assert (frames[128:, 64:128] == viz.to_pictures(shown)[1]).all()
    assert (frames[:64, -64::8][::8] == viz.latent_pictures(latents[0])[-1]).all()
    assert "σ = 1.00, 0.80" in repr(figure)


def test_frames_of_attention_are_bright_where_a_word_is_read() -> None:
    maps = torch.zeros(len(WORDS), 4, 4)
    maps[2, 1, 3] = 0.2
    figure = viz.live_attention(maps, WORDS, torch.zeros(3, 32, 32), "a red dress")
    frames = np.asarray(Image.open(io.BytesIO(figure.frames))).astype(int)
    bright = frames.sum(-1) > 450
    assert frames.shape == (32, len(WORDS) * 32, 3)
    assert bright[8:16, 2 * 32 + 24 : 2 * 32 + 32].all() and bright.sum() == 64


def test_a_figure_tells_the_page_what_to_open() -> None:
    figure = viz.live_attention(torch.rand(4, 4, 4), WORDS, pictures(1)[0], 'a "b" <c>')
    text = figure._repr_html_()
    assert 'data-open="attention"' in text
    assert 'data-prompt="a &quot;b&quot; &lt;c&gt;"' in text
    assert "<script" not in text and "http" not in text


def test_a_sketch_lies_on_the_pad() -> None:
    sketch = torch.zeros(1, 8, 8)
    sketch[0, 0, 1] = sketch[0, 7, 7] = 1
    text = viz.live_sketch(sketch, pictures(1, 8)[0], "a cat")._repr_html_()
    lines = base64.b64encode(bytes([64, 0, 0, 0, 0, 0, 0, 1])).decode()
    assert f'data-model="tiny-turbo-edges" data-sketch="{lines}"' in text
    assert text.count("<img") == 1 and "minidiff-inside" not in text
    with pytest.raises(ValueError, match="expected one size"):
        viz.live_sketch(sketch, pictures(1, 16)[0], "a cat")


def test_frames_must_agree() -> None:
    latents = torch.randn(4, 16, 8, 8)
    with pytest.raises(ValueError, match=r"\[4, 4, 5, 4\] frames"):
        viz.live_denoising(latents, latents, pictures(5), torch.zeros(4), "")
    with pytest.raises(ValueError, match="expected .4 words, h, w"):
        viz.live_attention(torch.rand(3, 4, 4), WORDS, pictures(1)[0], "")

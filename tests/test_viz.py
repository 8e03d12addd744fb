"""The figures: drawn without pyplot, and the interactive ones moved in a browser."""

import html
import io
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from figures import check_explorer, check_scrubber, displayed
from PIL import Image

from minidiff import viz
from minidiff.classroom.colors import GROUNDS, colors_of

ROOT, LIMIT = Path(__file__).parents[1], 200_000  # bytes of a figure

STEPS, WORDS = 6, ["a", "red", "dress", "</s>"]


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


def scrubber() -> viz.Interactive:
    latents = torch.randn(2, STEPS, 16, 8, 8)
    sigmas = torch.linspace(1, 0, STEPS)
    return viz.denoising_scrubber(*latents, pictures(STEPS), sigmas, "a <b> & “c”")


def explorer(images: int = STEPS) -> viz.Interactive:
    maps = torch.rand(3, STEPS, len(WORDS), 4, 4)
    return viz.attention_explorer(maps, WORDS, pictures(images))


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


# The interactive figures


@pytest.mark.parametrize("make", [scrubber, explorer])
def test_interactive_is_self_contained(make: Callable[[], viz.Interactive]) -> None:
    text = make()._repr_html_()
    assert len(text) < 1_000_000
    assert "http" not in text and "@import" not in text


def test_interactive_is_deterministic() -> None:
    pages = []
    for _ in range(2):
        torch.manual_seed(1)
        pages.append(scrubber()._repr_html_() + explorer()._repr_html_())
    assert pages[0] == pages[1]


def test_frames_must_agree() -> None:
    latents = torch.randn(4, 16, 8, 8)
    with pytest.raises(ValueError, match=r"\[4, 4, 5, 4\] frames"):
        viz.denoising_scrubber(latents, latents, pictures(5), torch.zeros(4))
    with pytest.raises(ValueError, match="expected .B, S, 4 words, h, w"):
        viz.attention_explorer(torch.rand(1, 1, 3, 4, 4), WORDS, pictures(1))
    with pytest.raises(ValueError, match="2 images: expected 1 or 6"):
        explorer(images=2)


def test_too_large_is_refused() -> None:
    latents = torch.randn(28, 16, 8, 8)
    sigmas = torch.linspace(1, 0, 28)
    figure = viz.denoising_scrubber(latents, latents, pictures(28, 256), sigmas)
    with pytest.raises(ValueError, match="expected at most 1000000"):
        figure._repr_html_()


@pytest.mark.parametrize("width", [1000, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_work_in_a_browser(
    chromium: Any, tmp_path: Path, width: int, theme: str
) -> None:
    """Two of each on one page: they move, and do not disturb one another."""
    body = "".join(make()._repr_html_() for make in (scrubber, explorer) * 2)
    head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme"'
    head += f' content="{theme}"><meta name="viewport" content="width=device-width">'
    (tmp_path / "page.html").write_text(head + body, encoding="utf-8")
    page = chromium.new_page(viewport={"width": width, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    kinds = {"scrubber": check_scrubber, "explorer": check_explorer}
    for kind, check in kinds.items():
        figures = page.locator(f"[data-kind={kind}]").all()
        assert len(figures) == 2
        for figure in figures:
            check(figure)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0 and not errors
    page.close()


WATCH = """() => {
  const figure = document.querySelector("[data-kind=scrubber]");
  window.seen = [];
  const look = () => {
    const { step } = figure.dataset;
    if (seen.at(-1) !== step) seen.push(step);
  };
  const chosen = { attributes: true, attributeFilter: ["data-step"] };
  new MutationObserver(look).observe(figure, chosen);
}"""


def test_play_runs_to_the_end(chromium: Any, tmp_path: Path) -> None:
    scrubber().save(tmp_path / "page.html")
    page = chromium.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate(WATCH)  # what is asked after the click may come late
    page.get_by_role("button", name="play").click()
    page.wait_for_function(f"seen.at(-1) === '{STEPS - 1}'")
    assert page.evaluate("seen") == [str(step) for step in range(STEPS)]
    page.close()


@pytest.mark.parametrize("make", [scrubber, explorer])
def test_without_scripts_there_is_a_strip_of_frames(
    chromium: Any, tmp_path: Path, make: Callable[[], viz.Interactive]
) -> None:
    make().save(tmp_path / "page.html")
    page = chromium.new_page(java_script_enabled=False)
    page.goto((tmp_path / "page.html").as_uri())
    strip = page.locator(".minidiff-strip")
    assert strip.is_visible() and page.locator("canvas").count() == 0
    assert displayed(strip, 8, 8).std() > 0
    page.close()


def test_figures_work_in_jupyterlab(
    chromium: Any,
    tmp_path: Path,
    jupyterlab: Callable[[Path], AbstractContextManager[str]],
) -> None:
    """As saved outputs of a trusted notebook, without a kernel's help."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    for figure in (scrubber(), explorer()):
        data = {"text/html": figure._repr_html_(), "text/plain": repr(figure)}
        output = nbformat.v4.new_output("display_data", data)
        notebook.cells.append(nbformat.v4.new_code_cell("figure", outputs=[output]))
    nbformat.write(notebook, tmp_path / "figures.ipynb")
    command = [sys.executable, "-m", "jupyter", "trust", "figures.ipynb"]
    with jupyterlab(tmp_path) as url:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        page = chromium.new_page(viewport={"width": 1200, "height": 1400})
        page.goto(f"{url}/lab/tree/figures.ipynb?token=t")
        page.wait_for_selector("[data-kind=scrubber] canvas")
        page.wait_for_selector("[data-kind=explorer] canvas")
        check_scrubber(page.locator("[data-kind=scrubber]"))
        check_explorer(page.locator("[data-kind=explorer]"))
        page.close()

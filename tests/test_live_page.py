"""The page that draws: from the disk and from a server, by keyboard, told in words."""

import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from helpers import randomize, relative_error
from PIL import Image
from pipelines import halved
from torch import Tensor

from minidiff import viz
from minidiff.control import Control, begin_control
from minidiff.files.pictures import read_settings, save_picture
from minidiff.flow_matching import euler, exact_velocity, sigma_schedule
from minidiff.live.exporting import export_pipeline
from minidiff.live.field import PROMPTS, load_field, two_moons
from minidiff.sampling import Pipeline

PROMPT = "a red dress"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>live</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="live/live.css">
<figure class="minidiff-live minidiff-inside" data-examples='["a blue bag", "a hat"]'>
<img src="first.png" alt="a red dress" data-prompt="a red dress">
<figcaption>Type.</figcaption></figure>
<script defer src="live/page.js"></script><script defer src="live/models.js"></script>
</html>"""
pytestmark = pytest.mark.filterwarnings("ignore:CLIP-L and CLIP-G read")


@pytest.fixture(scope="module")
def pipe(small: Path) -> Pipeline:
    """Its weights are what half precision holds."""
    return halved(small)


@pytest.fixture(scope="module")
def site(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page, and a model that knows four words."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "model").mkdir()
    (folder / "model" / "words.txt").write_text("a\nred\ndress\nblue\n")
    export_pipeline(pipe, folder / "live", folder / "model")
    (folder / "page.html").write_text(PAGE)
    Image.new("RGB", (32, 32)).save(folder / "first.png")
    return folder


@pytest.fixture(scope="module", params=["file", "http"])
def address(request: pytest.FixtureRequest, site: Path) -> Iterator[str]:
    """The page's address: on the disk, and from a server."""
    if request.param == "file":
        yield (site / "page.html").as_uri()
        return
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/page.html"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *message: Any) -> None:
        """Says nothing."""


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(address)
    page.wait_for_selector("[data-ready]")
    yield page
    assert page.problems == []
    page.context.close()


DRAW = """
async (request) => {
  const { pixels, side, latents, ids, maps } = await minidiff.draw(request);
  const { weights, heads, length } = await maps(0, 1);
  return { pixels: [...pixels], side, latents: [...latents], ids, heads, length,
    row: [...weights.subarray(0, length)] };
}
"""


def test_the_console_draws_what_python_draws(page: Any, pipe: Pipeline) -> None:
    found = page.evaluate(DRAW, {"prompt": PROMPT, "seed": 4, "steps": 3})
    options = {"seed": 4, "num_inference_steps": 3}
    expected = pipe(PROMPT, output_type="latent", **options)
    latents = torch.tensor(found["latents"])
    assert relative_error(latents, expected.flatten()) < 1e-3
    picture = torch.tensor(found["pixels"]).reshape(found["side"], found["side"], 4)
    drawn = (pipe.decode(expected)[0].permute(1, 2, 0) * 255).round()
    assert (picture[..., :3] - drawn).abs().max() <= 1
    assert (picture[..., 3] == 255).all()
    assert sum(found["row"]) == pytest.approx(1, abs=1e-5)
    assert found["heads"] == pipe.transformer.config.num_attention_heads
    assert found["ids"][0] == pipe.tokenizers[0]([PROMPT])[0].tolist()


def test_a_later_drawing_ends_the_one_before(page: Any) -> None:
    first, last, alone = page.evaluate("""
      async () => {
        const slow = { prompt: "a bag", seed: 1, steps: 40 };
        const wanted = { ...slow, steps: 4 };
        const both = await Promise.all([minidiff.draw(slow), minidiff.draw(wanted)]);
        return [...both, await minidiff.draw(wanted)].map((d) => d && [...d.latents]);
      }
    """)
    assert first is None
    assert last == alone


def test_what_cannot_be_drawn_is_told(page: Any) -> None:
    tell = "(request) => minidiff.draw(request).catch((error) => error.message)"
    refused = {
        "steps is 0; expected a whole number, 1 to 1000": {"steps": 0},
        "seed is 1.5; expected a whole number": {"seed": 1.5},
        "model is big; expected one of model": {"model": "big"},
        "prompt is 3; expected a text": {"prompt": 3},
        "sampler is ddim; expected one of euler, heun": {"sampler": "ddim"},
    }
    for message, request in refused.items():
        assert message in page.evaluate(tell, request)


def test_a_browser_without_simd_is_told(page: Any) -> None:
    page.evaluate("WebAssembly.validate = () => false")
    page.get_by_label("Say what the picture shows").press_sequentially("s")
    told = "Nothing drawn: this browser lacks WebAssembly SIMD"
    page.get_by_text(told).wait_for()


def test_nothing_is_loaded_before_a_word_is_typed(page: Any, address: str) -> None:
    loaded = "performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert not [name for name in page.evaluate(loaded) if "transformer" in name]
    assert page.evaluate("Object.keys(minidiff.models)") == []


def test_typing_draws_and_marks_what_was_never_seen(page: Any) -> None:
    line = page.get_by_label("Say what the picture shows")
    line.press("End")
    line.press_sequentially(" zebra")  # each letter draws
    page.wait_for_selector("[data-drawn=whole] canvas[aria-label$='zebra”']")
    assert page.locator("mark").all_inner_texts() == ["zebra"]
    assert page.get_by_text("never seen in training: zebra").is_visible()
    assert "prompt=a+red+dress+zebra&seed=0" in page.url
    assert "drawn in" in page.locator(".live-status").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tokens = page.get_by_role("group", name="tokens of CLIP-L").locator("span")
    assert tokens.first.inner_text() == "<|startoftext|>"


def test_a_link_repeats_the_picture(page: Any, address: str) -> None:
    page.goto(f"{address}?prompt=a+blue+bag&seed=3&steps=2&guidance=1.5")
    page.wait_for_selector("[data-drawn=whole]")
    assert page.get_by_label("Say what the picture shows").input_value() == "a blue bag"
    assert page.get_by_label("seed").input_value() == "3"
    assert page.get_by_role("slider", name="guidance").input_value() == "1.5"


@pytest.mark.parametrize("model", ["constructor", "__proto__", "toString"])
def test_a_link_that_says_nothing_usable_draws_the_usual(
    page: Any, address: str, model: str
) -> None:
    begun = [slider.input_value() for slider in page.get_by_role("slider").all()]
    asked = f"prompt=a+bag&model={model}&open={model}&seed=&steps=&guidance=+&strength="
    page.goto(f"{address}?{asked}")
    page.wait_for_selector("[data-drawn=whole]")
    sliders = page.locator(".live-controls").get_by_role("slider")
    assert [slider.input_value() for slider in sliders.all()] == begun


def test_a_long_word_never_seen_keeps_to_the_page(page: Any, address: str) -> None:
    page.goto(f"{address}?prompt={'x' * 300}&steps=1")
    page.wait_for_selector("[data-drawn=whole]")
    assert page.locator(".live-unseen").inner_text().endswith("xxx")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_saved_picture_is_that_of_sample(
    page: Any, address: str, pipe: Pipeline, tmp_path: Path
) -> None:
    page.goto(f"{address}?prompt=a+r%C3%A9d+dress&seed=3&steps=2&guidance=1.5")
    page.wait_for_selector("[data-drawn=whole]")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as PNG").click()
    saved.value.save_as(tmp_path / "ours.png")
    drawn = pipe("a réd dress", seed=3, num_inference_steps=2, guidance_scale=1.5)[0]
    save_picture(drawn, tmp_path / "theirs.png")
    settings = read_settings(tmp_path / "ours.png")
    assert settings == read_settings(tmp_path / "theirs.png") | {"model": "model"}
    with Image.open(tmp_path / "ours.png") as ours:
        assert ours.convert("RGB").size == drawn.size


@pytest.fixture
def sketching(chromium: Any, pipe: Pipeline, tmp_path: Path) -> Iterator[Any]:
    """A page of two models, one of which reads sketches, and the net that does."""
    net = randomize(begin_control(pipe.transformer), 3).half().float()
    export_pipeline(pipe, tmp_path / "live", "model")
    export_pipeline(pipe, tmp_path / "live", "model", net)
    (tmp_path / "page.html").write_text(PAGE)
    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    page = chromium.new_page(viewport={"width": 390, "height": 1200})
    page.goto(f"{(tmp_path / 'page.html').as_uri()}?steps=2&guidance=1")
    page.wait_for_selector("[data-ready]")
    yield page, net
    page.context.close()


def saved_sketch(page: Any, folder: Path) -> Tensor:
    """What the pad saves as sketch.png, (32, 32) of 0 and 1."""
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save sketch").click()
    saved.value.save_as(folder / "sketch.png")
    pixels = viz.to_pictures([Image.open(folder / "sketch.png")])[0, ..., 0]
    return torch.from_numpy(pixels) / 255


def test_what_is_sketched_is_drawn(
    sketching: tuple, pipe: Pipeline, tmp_path: Path
) -> None:
    """A line on the pad steers, stays in the address, and is saved for Python."""
    page, net = sketching
    pad = page.get_by_role("img", name="the sketch")
    assert not pad.is_visible()
    page.get_by_label("model").select_option("model-edges")
    page.wait_for_selector("[data-drawn=whole]")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    cell = box["width"] / 32
    page.mouse.move(box["x"] + 8.5 * cell, box["y"] + 8.5 * cell)
    page.mouse.down()
    page.mouse.move(box["x"] + 8.5 * cell, box["y"] + 24.5 * cell, steps=4)
    page.mouse.up()
    page.wait_for_url("**&sketch=*")
    line = torch.zeros(32, 32)
    line[8:25, 8] = 1
    assert torch.equal(saved_sketch(page, tmp_path), line)
    drawn = "async (request) => [...(await minidiff.draw(request)).latents]"
    asked = {"prompt": PROMPT, "model": "model-edges", "seed": 0}
    how = {"steps": 2, "guidance": 1, "sketch": line.flatten().tolist()}
    found = torch.tensor(page.evaluate(drawn, asked | how))
    control = Control(tmp_path / "sketch.png", net)
    steps = {"num_inference_steps": 2, "guidance_scale": 1.0, "control": control}
    expected = pipe(PROMPT, seed=0, output_type="latent", **steps)
    assert relative_error(found, expected.flatten()) < 1e-3
    page.reload()
    page.wait_for_selector("[data-drawn=whole]")
    assert "&sketch=" in page.url
    assert torch.equal(saved_sketch(page, tmp_path), line)
    page.get_by_role("button", name="Clear").click()
    page.wait_for_url(lambda url: "&sketch=" not in url)
    page.get_by_role("button", name="The picture's edges").click()
    page.wait_for_url("**&sketch=*")
    edges = saved_sketch(page, tmp_path)
    assert 0 < edges.mean() < 0.5
    page.get_by_role("button", name="Rubber").click()
    row, column = edges.nonzero()[0].tolist()
    pad.click(position={"x": (column + 0.5) * cell, "y": (row + 0.5) * cell})
    left = saved_sketch(page, tmp_path)
    assert left[row, column] == 0 and (left <= edges).all()
    tell = "(request) => minidiff.draw(request).catch((error) => error.message)"
    told = page.evaluate(tell, asked | how | {"model": "model"})
    assert told == "sketch has 1024 numbers; this model reads 0"


def test_an_open_picture(page: Any, address: str) -> None:
    page.goto(
        f"{address}?prompt=a+red+dress&seed=3&steps=3&guidance=1.5&open=attention"
    )
    page.wait_for_selector("[data-drawn=whole]")
    page.get_by_text("black is 0").wait_for()
    picture = page.locator(".inside-panel canvas")
    picture.focus()
    picture.press("ArrowRight")
    page.get_by_text("the patch in row 1, column 2").wait_for()
    page.get_by_role("tab", name="Attention").press("ArrowRight")
    page.get_by_role("img", name="gate of attention, by block").wait_for()
    for name in ("Context", "Steps", "The bench"):
        page.get_by_role("tab", name=name).click()
        assert page.locator(".inside-panel canvas").first.is_visible()
    page.get_by_label("Skip a block", exact=True).check()
    page.wait_for_selector("[data-bench=skip]")
    assert (
        "differs by 0.0 %"
        not in page.locator(".inside-panel [role=status]").inner_text()
    )


def test_an_address_opens_a_state_and_keeps_it(page: Any, address: str) -> None:
    state = "open=attention&step=1&block=1&head=0&word=2"
    page.goto(f"{address}?prompt=a+red+dress&steps=3&guidance=1&{state}")
    page.get_by_text("(CLIP): black is 0").wait_for()
    words = page.locator(".inside-words button")
    assert words.nth(2).get_attribute("aria-pressed") == "true"
    sliders = {"step": "1", "block": "1"}
    for name, value in sliders.items():
        slider = page.locator(".inside-panel").get_by_label(name, exact=True)
        assert slider.input_value() == value
    assert page.get_by_label("head").input_value() == "0"
    slider.fill("0")
    page.locator(".inside-panel canvas").press("ArrowRight")
    for kept in ("block=0", "head=0", "patch=1", "word=2", "open=attention"):
        assert f"&{kept}" in page.url
    page.goto(f"{address}?steps=2&guidance=1&open=bench&switch=skip&block=1")
    page.wait_for_selector("[data-bench=skip]")
    assert page.get_by_label("Skip a block: block").input_value() == "1"
    assert page.get_by_role("slider", name="steps").input_value() == "2"


def test_a_page_for_ones_own_pipeline(
    chromium: Any, pipe: Pipeline, tmp_path: Path
) -> None:
    shown = viz.live(pipe, "a <b> dress", tmp_path / "own")
    assert 'data-prompt="a &lt;b&gt; dress"' in shown._repr_html_()
    page = chromium.new_page()
    page.goto((tmp_path / "own" / "index.html").as_uri())
    line = page.get_by_label("Say what the picture shows")
    assert line.input_value() == "a <b> dress"
    page.get_by_role("slider", name="steps").fill("2")
    page.wait_for_selector("[data-drawn=whole]")
    page.context.close()


@pytest.mark.slow
def test_a_notebook_shows_the_page(
    chromium: Any,
    pipe: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jupyterlab: Callable[[Path], AbstractContextManager[str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"text/html": viz.live(pipe, "a dress")._repr_html_()}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    output = nbformat.v4.new_output("display_data", data)
    notebook.cells.append(nbformat.v4.new_code_cell("viz.live", outputs=[output]))
    nbformat.write(notebook, "page.ipynb")
    command = [sys.executable, "-m", "jupyter", "trust", "page.ipynb"]
    with jupyterlab(tmp_path) as url:
        subprocess.run(command, check=True, capture_output=True)
        page = chromium.new_page(viewport={"width": 1200, "height": 1400})
        page.goto(f"{url}/lab/tree/page.ipynb?token=t")
        page.wait_for_selector("figure[data-ready]")
        page.get_by_role("slider", name="steps").first.fill("2")
        page.wait_for_selector("[data-drawn=whole]")
        assert "prompt=" not in page.url
        page.context.close()


@torch.no_grad()
def test_the_network_of_the_plane_draws_points_of_its_own() -> None:
    """Near the moon it was asked for; nearly none on a point of the data."""
    field, moon = load_field(), two_moons(60)[1]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return field(x, sigma.expand(len(x)), PROMPTS[1].expand(len(x), 2))

    drawn = euler(velocity, torch.randn(500, 2), sigma_schedule(32, shift=1.0))
    miss = torch.cdist(drawn, moon).amin(1)
    assert (miss < 0.1).float().mean() > 0.9 and (miss < 0.005).float().mean() < 0.1


# How far down the prompt's points lie at the sides of the moon, and in its middle
ORANGE = """() => {
  const canvas = document.querySelector("canvas"), found = [];
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  for (let i = 0; i < data.length; i += 4)
    if (data[i] > 200 && data[i + 1] < 150 && data[i + 2] < 90)
      found.push([i / 4 % width, Math.floor(i / 4 / width)]);
  const xs = found.map(([x]) => x), low = Math.min(...xs), wide = Math.max(...xs) - low;
  const mean = (list) => list.reduce((sum, [, y]) => sum + y, 0) / list.length;
  const [sides, middle] = [[0, 0.1], [0.4, 0.6]].map(([from, to]) => mean(found.filter(
    ([x]) => x >= low + from * wide && x <= low + to * wide)));
  return [sides, middle];
}"""
# Where each slider and its number stand
ROWS = """() => [...document.querySelectorAll("label:has(input[type=range])")].map(
  (label) => ["input", "output"].map((part) => {
    const box = label.querySelector(part).getBoundingClientRect();
    return box.y + box.height / 2;
  }))"""


@torch.no_grad()
def test_the_plane_is_chapter_six(chromium: Any, site: Path) -> None:
    page = chromium.new_page()
    text = PAGE.replace("minidiff-inside", "minidiff-plane").replace("<img", "<input")
    (site / "plane.html").write_text(text)
    page.goto((site / "plane.html").as_uri())
    page.wait_for_selector("[data-ready]")
    points = torch.tensor(page.evaluate("twoMoons(60)"))
    x = torch.tensor([[0.8, 1.2], [-1.0, 0.3]])
    given = {"points": points[:60].tolist(), "x": x.flatten().tolist()}
    v = page.evaluate("({ points, x }) => [...exactVelocity(points)(x, 0.7)]", given)
    expected = exact_velocity(points[:60])(x, torch.tensor(0.7))
    assert relative_error(torch.tensor(v), expected.flatten()) < 1e-5
    assert relative_error(points, two_moons(60).flatten(0, 1)) < 1e-5
    ends, middle = page.evaluate(ORANGE)
    assert middle < ends - 100  # the upper moon is an arch
    rows = page.evaluate(ROWS)
    assert len(rows) == 4 and max(abs(a - b) for a, b in rows) < 8, rows
    told = page.locator(".live-status")
    assert "After 8 calls" in told.inner_text()
    page.get_by_label("solver").select_option("heun")
    assert "After 15 calls" in told.inner_text()
    page.get_by_label("field").select_option("learned")
    page.get_by_text("calls of the learned velocity").wait_for()
    given = {"prompt": PROMPTS[1].tolist(), "x": x.flatten().tolist()}
    v = page.evaluate(
        "({ prompt, x }) => [...learnedVelocity(minidiff.field, prompt)(x, 0.7)]", given
    )
    expected = load_field()(x, torch.full((2,), 0.7), PROMPTS[1].expand(2, 2))
    assert relative_error(torch.tensor(v), expected.flatten()) < 1e-5
    slider = page.get_by_role("slider", name="at")
    before = page.locator("canvas").screenshot()
    slider.fill("2")
    assert page.locator("canvas").screenshot() != before
    page.context.close()


@pytest.mark.slow
def test_the_command_exports(run: Any, small: Path, tmp_path: Path) -> None:
    code, out, _ = run("export", "--model", small, "--output", "live")
    assert (code, out.strip()) == (0, "live")
    files = {path.name for path in (tmp_path / "live").iterdir()}
    assert {"page.js", "models.js", "live.css", "runtime.js", "saved.js"} <= files
    (tmp_path / "taken").touch()
    code, _, err = run("export", "--model", small, "--output", "taken")
    assert code == 2 and "taken" in err and len(err.splitlines()) == 1

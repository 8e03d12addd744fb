"""Draw the pictures of README and the book's first page, in book/_static.

    python benchmarks/draw_pictures.py

Run it when the shipped weights change, after the chapters were executed: a chapter's
picture is one of its own figures. Needs playwright with a Chromium.
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageOps
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from record_page import find_chromium, record  # noqa: E402

import minidiff  # noqa: E402
from minidiff import viz  # noqa: E402

STATIC = ROOT / "book" / "_static"
PROMPTS = (
    "a cat",
    "two red dresses",
    "a guitar on pink",
    "a yellow bag and a blue shoe",
    "a penguin on a cyan background",
    "three stars on black",
    "a pizza above a green car",
    "an orange coat",
)
CHOSEN = (  # a chapter's figure: its kind, and which of these, counted from 0
    "lattice 0,heatmap 0,images 1,attention 0,joint block 0,points 1,images 1,images 1,"
    "images 0,images 2,images 1,histogram 0"
).split(",")
SIZE = (300, 160)  # pixels; shown at half of it


def first_page() -> str:
    """The grid of the first page, an SVG with the theme's ink."""
    pictures = minidiff.load("tiny")(list(PROMPTS), seed=0)
    return viz.show_images(pictures, list(PROMPTS), columns=4).svg()


def figures(notebook: Path) -> list[tuple[str, str]]:
    """The kind of each of a notebook's figures, and the figure as HTML."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = (out.get("data", {}) for cell in cells for out in cell.get("outputs", []))
    found = []
    for data in shown:
        text = "".join(data.get("text/plain", ""))
        if text.startswith("Figure ("):
            png = "".join(data.get("image/png", "")).strip()
            plain = f'<figure><img src="data:image/png;base64,{png}"></figure>'
            kind = text.partition("(")[2].partition(")")[0]
            found.append((kind, "".join(data.get("text/html", plain))))
    return found


def thumbnail(page: Page, notebook: Path, chosen: str) -> Image.Image:
    """The chosen figure of a chapter, on white and of one size."""
    kind, _, number = chosen.rpartition(" ")
    same = [figure for name, figure in figures(notebook) if name == kind]
    page.set_content(same[int(number)])
    drawn = io.BytesIO(page.locator("img").first.screenshot())
    return ImageOps.pad(Image.open(drawn).convert("RGB"), SIZE, color="white")


def main() -> None:
    """Write them all."""
    (STATIC / "drawn.svg").write_text(first_page(), encoding="utf-8")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=find_chromium(play), args=["--no-sandbox"]
        )
        page = browser.new_page(device_scale_factor=2, color_scheme="light")
        for number, (notebook, chosen) in enumerate(
            zip(notebooks, CHOSEN, strict=True), 1
        ):
            file = STATIC / "chapters" / f"{number:02}.webp"
            thumbnail(page, notebook, chosen).save(file, quality=85)
        browser.close()
    record(STATIC / "typing.webp")


if __name__ == "__main__":
    main()

"""Draw the pictures of the book's first page: book/_static/drawn.png.

    python benchmarks/draw_first_page.py

Run it when the shipped weights change. The last two pairs of colour and garment were
never trained.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import minidiff  # noqa: E402
from minidiff import viz  # noqa: E402

SCENES = (
    "red dress on a blue",
    "yellow bag on a black",
    "white coat on a green",
    "purple ankle boot on a white",
    "pink shirt on a gray",
    "green pullover on a red",
    "blue t-shirt on a yellow",
    "orange bag on a purple",
)

if __name__ == "__main__":
    prompts = [f"a {scene} background".replace("a o", "an o") for scene in SCENES]
    pictures = minidiff.load("tiny")(prompts, seed=0)
    titles = [scene.replace(" on a ", " on ") for scene in SCENES]
    figure = viz.show_images(pictures, titles, columns=4)
    picture = figure.drawn("png")
    (ROOT / "book" / "_static" / "drawn.png").write_bytes(picture)

"""Record the page that draws while one types, as an animated picture.

    python benchmarks/record_page.py book/_static/typing.webp

Needs playwright with a Chromium. A frame is taken after each word.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, Playwright, sync_playwright

import minidiff
from minidiff.live.page import live

PROMPTS = ("a cat on a blue background", "three yellow stars on black")
SIZE = {"width": 760, "height": 560}  # pixels of the page


def frames(page: Page) -> list[Image.Image]:
    """The page after each word of the prompts, and for a while at a prompt's end."""
    found = []
    line = page.get_by_label("Say what the picture shows")
    for prompt in PROMPTS:
        words = prompt.split()
        for count in range(1, len(words) + 1):
            page.evaluate("delete document.querySelector('figure').dataset.drawn")
            line.fill(" ".join(words[:count]))
            page.wait_for_selector("[data-drawn=whole]", timeout=0)
            found.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        found += found[-1:] * 3
    return found


def find_chromium(play: Playwright) -> str:
    """The system's Chromium, or Playwright's own."""
    return shutil.which("chromium") or play.chromium.executable_path


def record(file: Path | str) -> None:
    """Write the animated picture."""
    pipe = minidiff.load("tiny-turbo")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        shown = live(pipe, PROMPTS[0], folder)
        text = shown.file.read_text().replace(" minidiff-inside", "")
        shown.file.write_text(text)
        browser = play.chromium.launch(
            executable_path=find_chromium(play), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(f"{shown.file.as_uri()}?prompt=a")
        page.add_style_tag(content=".live-status { visibility: hidden; }")
        page.wait_for_selector("[data-drawn=whole]", timeout=0)
        first, *others = frames(page)
        browser.close()
    first.save(file, save_all=True, append_images=others, duration=450, loop=0)


if __name__ == "__main__":
    record(sys.argv[1])

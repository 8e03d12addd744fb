"""A page that draws with the reader's own pipeline, for a notebook or by itself."""

import html
from pathlib import Path

import torch

from minidiff.files.disk import write_text
from minidiff.files.pictures import save_sheet
from minidiff.live.exporting import export_pipeline
from minidiff.sampling import Pipeline

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{prompt}</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="live.css">
<style>body {{ font-family: system-ui, sans-serif; color-scheme: light dark; }}</style>
<figure class="minidiff-live minidiff-inside">
<img src="first.png" alt="{prompt}" data-prompt="{prompt}">
</figure>
<script defer src="page.js"></script><script defer src="models.js"></script></html>
"""


class Page:
    """A page in a folder; a notebook beside the folder shows it."""

    def __init__(self, file: Path, height: int) -> None:
        self.file, self.height = file, height

    def __repr__(self) -> str:
        return f"the page {self.file}"

    def _repr_html_(self) -> str:
        source = html.escape(self.file.as_posix(), quote=True)
        style = f"width: 100%; height: {self.height}px; border: 0"
        return f'<iframe src="{source}" title="the model" style="{style}"></iframe>'


def live(
    pipe: Pipeline, prompt: str, folder: Path | str = "live", height: int = 1100
) -> Page:
    """Export ``pipe`` and write a page that draws with it, opened at ``prompt``.

    ``folder`` lies beside the notebook, ``height`` is in pixels. Raises ValueError for
    a pipeline that the runtime cannot run.
    """
    folder = Path(folder)
    export_pipeline(pipe, folder, pipe.settings["model"])
    picture = torch.as_tensor(pipe(prompt, output_type="pt"))  # (1, 3, H, W)
    save_sheet(picture, 1, folder / "first.png")
    text = PAGE.format(prompt=html.escape(prompt, quote=True))
    write_text(folder / "index.html", text)
    return Page(folder / "index.html", height)

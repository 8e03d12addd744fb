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


# JupyterLab tells a picture where the notebook's folder is: what else is there follows
NOTEBOOK = """<figure class="minidiff-live minidiff-inside" data-notebook>
<img src="{folder}/first.png" alt="{prompt}" data-prompt="{prompt}">
</figure>
<script>
document.querySelectorAll("[data-notebook]:not([data-asked]) img").forEach((image) => {{
  image.closest("figure").dataset.asked = "1";
  const load = (tag, properties) => new Promise((done) => {{
    const part = Object.assign(document.createElement(tag), properties);
    part.onload = done;
    document.head.append(part);
  }});
  const place = (file) => new URL(file, image.src).href;
  const begin = async () => {{
    if (!image.naturalWidth || image.dataset.begun) return;
    image.dataset.begun = "1";
    await load("link", {{ rel: "stylesheet", href: place("live.css") }});
    await load("script", {{ src: place("page.js") }});
    await load("script", {{ src: place("models.js") }});
    minidiff.start();
  }};
  image.addEventListener("load", begin);
  if (image.complete) begin();
}});
</script>"""


class Page:
    """A page in a folder; a notebook beside the folder shows it too."""

    def __init__(self, file: Path, prompt: str) -> None:
        self.file, self.prompt = file, prompt

    def __repr__(self) -> str:
        return f"the page {self.file}"

    def _repr_html_(self) -> str:
        words = html.escape(self.prompt, quote=True)
        folder = html.escape(self.file.parent.as_posix(), quote=True)
        return NOTEBOOK.format(folder=folder, prompt=words)


def live(pipe: Pipeline, prompt: str, folder: Path | str = "live") -> Page:
    """Export ``pipe`` and write a page that draws with it, opened at ``prompt``.

    ``folder`` lies beside the notebook. Raises ValueError for a pipeline that the
    runtime cannot run.
    """
    folder = Path(folder)
    export_pipeline(pipe, folder, pipe.settings["model"])
    picture = torch.as_tensor(pipe(prompt, output_type="pt"))  # (1, 3, H, W)
    save_sheet(picture, 1, folder / "first.png")
    text = PAGE.format(prompt=html.escape(prompt, quote=True))
    write_text(folder / "index.html", text)
    return Page(folder / "index.html", prompt)

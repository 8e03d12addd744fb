"""The models of the book's pages: exported to the static files when it is built.

Beside them lie their pictures of the journey's prompt, for browsers without scripts.
Pages that have a place to draw load the scripts.
"""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import minidiff
from minidiff.classroom.journey import PROMPT
from minidiff.control import load_control
from minidiff.files.pictures import save_picture
from minidiff.live.exporting import export_pipeline

# The first draws unless another is asked for; a net's name is of what reads sketches
MODELS = ("tiny-turbo", None), ("tiny", None), ("tiny-turbo", "tiny-edges")


def add(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_static" / "live"
    pipes = {name: minidiff.load(name) for name, _ in MODELS}
    for name, net in MODELS:
        export_pipeline(pipes[name], folder, name, net and load_control(net))
    for name, pipe in pipes.items():
        pipe.progress = False
        save_picture(pipe(PROMPT)[0], folder / f"{name}.png", replace=True)


def load(app: Sphinx, page: str, template: str, context: dict[str, Any], tree) -> None:
    if "minidiff-live" in context.get("body", ""):
        app.add_css_file("live/live.css")
        for name in ("page", "models"):
            app.add_js_file(f"live/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", load)
    app.connect("build-finished", add)
    return {"parallel_read_safe": True}

"""Keeps the chapters' prose out of the API reference.

A chapter's module has the chapter's first page as its docstring, in Markdown. The API
page lists the names of each module and links to the chapter instead.
"""

from typing import Any

from sphinx.application import Sphinx

CHAPTERS = {
    "minidiff.tokenizer",
    "minidiff.text_encoders",
    "minidiff.vae",
    "minidiff.attention",
    "minidiff.dit",
    "minidiff.flow_matching",
    "minidiff.training",
    "minidiff.sampling",
}


def drop_prose(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "module" and name in CHAPTERS:
        lines.clear()


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", drop_prose)
    return {"parallel_read_safe": True}

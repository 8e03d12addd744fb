"""The API reference: a room's modules, and chapters without their prose.

``.. room:: files`` stands for the names of every module in `minidiff/files/`. A
chapter's module has the chapter's first page as its docstring, in Markdown: the API
page lists its names and links to the chapter instead, and its source is the code alone.
"""

import functools
import re
import sys
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jupytext
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

PACKAGE = Path(__file__).parents[2] / "minidiff"
PAIRS = (PACKAGE.parent / "jupytext.toml").read_text(encoding="utf-8")
CHAPTERS = {f"minidiff.{name}" for name in re.findall(r"minidiff//(\w+)/py", PAIRS)}
API = "book/api"
# What minidiff.viz lists under its own name, and what matplotlib adds to its figures
LEFT_OUT = (
    "Interactive, latent_pictures, live_attention, live_denoising, live_sketch, "
    "to_frames, to_pictures, set"
)


class Room(SphinxDirective):
    """The names of every module of a room."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        room = self.arguments[0]
        options = f"   :members:\n   :exclude-members: {LEFT_OUT}\n"
        text = "".join(
            f".. automodule:: minidiff.{room}.{path.stem}\n{options}\n"
            for path in sorted((PACKAGE / room).glob("[a-z]*.py"))
        )
        return self.parse_text_to_nodes(text)


def drop_prose(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "module" and name in CHAPTERS:
        lines.clear()


def code_alone(app: Sphinx, module: str) -> tuple[str, dict] | None:
    """What ``analyzed`` gives of a chapter; None for another module."""
    return analyzed(module) if module in CHAPTERS else None


@functools.cache  # asked for every name on a page
def analyzed(module: str) -> tuple[str, dict]:
    """A chapter's code without prose and demonstrations, and where its names stand."""
    cells = jupytext.read(PACKAGE / f"{module.partition('.')[2]}.py").cells
    kept = [
        cell.source
        for cell in cells
        if cell.cell_type == "code"
        and "active-ipynb" not in cell.metadata.get("tags", [])
    ]
    found = ModuleAnalyzer.for_string("\n\n\n".join(kept), module)
    return found.code, found.find_tags()


def leave_variables(
    app: Sphinx, env: Any, node: nodes.Element, content: nodes.Node
) -> nodes.Node | None:
    """A variable of types, in an annotation, is no link and no error."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return content if isinstance(found, TypeVar | ParamSpec) else None


def keep_to_itself(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Thousands of names are copied for the API's own sidebar, not for every page's."""
    app.env.metadata[API]["tocdepth"] = 0 if page == API else 1


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("room", Room)
    app.connect("autodoc-process-docstring", drop_prose)
    app.connect("viewcode-find-source", code_alone)
    app.connect("missing-reference", leave_variables)
    app.connect("doctree-resolved", keep_to_itself)
    return {"parallel_read_safe": True}

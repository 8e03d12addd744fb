"""What screen readers find: alternative texts of figures, names of folded cells.

And the map of the pipeline: ``.. map::`` draws it, and its links lead to pages.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from minidiff.classroom.map import Map

MAP = r'<nav class="minidiff-map".*?</nav>'
FOLDED = {"all": "the answer", "output": "what comes out", "input": "the code"}


class PipelineMap(SphinxDirective):
    """The map of the pipeline, on a page of the folder ``book``."""

    def run(self) -> list[nodes.Node]:
        text = Map(folder="../notebooks/")._repr_html_()
        return [nodes.raw("", text, format="html")]


def describe(app: Sphinx, tree: nodes.document) -> None:
    """Give each output's picture the words of its plain text, each fold its name."""
    for bundle in tree.findall(nodes.container):
        if bundle.get("nb_element") == "mime_bundle":
            forms = {child.get("mime_type"): child for child in bundle.children}
            if "text/plain" in forms and "image/png" in forms:
                for image in forms["image/png"].findall(nodes.image):
                    image["alt"] = forms["text/plain"].astext()
        if what := FOLDED.get(bundle.get("hide_mode", "")):
            bundle["prompt_show"], bundle["prompt_hide"] = (
                f"Show {what}",
                f"Hide {what}",
            )


def name(app: Sphinx, page: str, template: str, context: dict[str, Any], tree) -> None:
    """Let the text of a folded cell's summary be its name."""
    if "body" in context:
        label = ' aria-label="Toggle hidden content"'
        body = context["body"].replace(f"<summary{label}>", "<summary>")
        context["body"] = re.sub(MAP, to_pages, body, flags=re.S)


def to_pages(found: re.Match[str]) -> str:
    """A map whose links lead to pages, not to notebooks."""
    return found[0].replace(".ipynb", ".html")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("map", PipelineMap)
    app.connect("doctree-read", describe)
    app.connect("html-page-context", name)
    return {"parallel_read_safe": True}

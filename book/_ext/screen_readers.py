"""What screen readers find: alternative texts of figures, names of folded cells.

A folded cell is an answer, unless its code alone is folded: imports and bookkeeping.
"""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

CODE = "Show the code", "Hide the code"


def describe(app: Sphinx, tree: nodes.document) -> None:
    """Give each output's picture the words of its plain text (``BookFigure``)."""
    for bundle in tree.findall(nodes.container):
        if bundle.get("hide_mode") == "input":
            bundle["prompt_show"], bundle["prompt_hide"] = CODE
        if bundle.get("nb_element") == "mime_bundle":
            forms = {child.get("mime_type"): child for child in bundle.children}
            if "text/plain" in forms and "image/png" in forms:
                for image in forms["image/png"].findall(nodes.image):
                    image["alt"] = forms["text/plain"].astext()


def name(app: Sphinx, page: str, template: str, context: dict[str, Any], tree) -> None:
    """Let the text of a folded cell's summary be its name."""
    if "body" in context:
        label = ' aria-label="Toggle hidden content"'
        context["body"] = context["body"].replace(f"<summary{label}>", "<summary>")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", describe)
    app.connect("html-page-context", name)
    return {"parallel_read_safe": True}

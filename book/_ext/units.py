"""Numbers stay on one line with their units and partners: 90 %, 64 × 64, 93 / 78."""

import re

from docutils import nodes
from sphinx.application import Sphinx

APART = re.compile(
    r"(?<=\d) (?=(?:%|m?s|[kMGT]i?B|dB|TFLOPS?)(?!\w)|[×/] ?\d)|(?<=\d [×/]) (?=\d)"
)
VERBATIM = nodes.literal, nodes.literal_block, nodes.raw, nodes.math, nodes.math_block


def join(app: Sphinx, tree: nodes.document, page: str) -> None:
    for text in list(tree.findall(nodes.Text)):
        if APART.search(text) and not isinstance(text.parent, VERBATIM):
            text.parent.replace(text, nodes.Text(APART.sub("\N{NO-BREAK SPACE}", text)))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", join)
    return {"parallel_read_safe": True}

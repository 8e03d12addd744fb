"""All exercises on one page: ``.. exercises::`` lists them, each with a link to itself.

They are found where they stand, in the chapters' notebooks: **4.2 Code.** begins one.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
KINDS = "Predict|Code|Explore"
BEGINS = re.compile(
    rf"^\*\*(\d+\.\d+) ({KINDS})[.,]\*\*\s*(.*?)(?=\n\n|\Z)", re.M | re.S
)


def found(path: Path) -> list[tuple[str, str, str]]:
    """Number, kind and question of a notebook's exercises."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    begun = [exercise for text in texts for exercise in BEGINS.findall(text)]
    return [(number, kind, question(text)) for number, kind, text in begun]


def question(text: str) -> str:
    """The first sentence of a paragraph, and those up to its first question, if any."""
    sentences = re.split(r"(?<=[.?])\s+", text)
    asked = [i for i, sentence in enumerate(sentences) if sentence.endswith("?")]
    return " ".join(sentences[: asked[0] + 1 if asked else 1])


def anchor(number: str) -> str:
    return f"exercise-{number.replace('.', '-')}"


class Exercises(SphinxDirective):
    """A list of every chapter's exercises."""

    def run(self) -> list[nodes.Node]:
        parts: list[nodes.Node] = []
        for path in sorted(NOTEBOOKS.glob("*.ipynb")):
            page = f"../notebooks/{path.stem}.html"
            parts.append(nodes.rubric("", f"Chapter {int(path.stem[:2])}"))
            items = [self.item(page, *each) for each in found(path)]
            parts.append(nodes.bullet_list("", *items))
        return parts

    def item(self, page: str, number: str, kind: str, text: str) -> nodes.list_item:
        """One exercise: its number leads to it."""
        label = f"{number} {kind}"
        link = nodes.reference("", label, refuri=f"{page}#{anchor(number)}")
        paragraph, *_ = self.parse_text_to_nodes(" ".join(text.split()))
        paragraph[:0] = [link, nodes.Text(": ")]
        return nodes.list_item("", paragraph)


def name(app: Sphinx, tree: nodes.document) -> None:
    """Give the paragraph with which an exercise begins an anchor."""
    for strong in tree.findall(nodes.strong):
        begins = re.match(rf"(\d+\.\d+) (?:{KINDS})[.,]$", strong.astext())
        if begins and isinstance(strong.parent, nodes.paragraph):
            strong.parent["ids"].append(anchor(begins[1]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("exercises", Exercises)
    app.connect("doctree-read", name)
    return {"parallel_read_safe": True}

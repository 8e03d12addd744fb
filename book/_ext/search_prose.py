"""What a search shows: the prose around the words found, offline too.

Sphinx fetches each page found, which a browser refuses for files, and shows whatever
text stands there: code, tables of contents, raw formulas. Here the paragraphs of all
pages lie beside the index, for `book/_static/search.js` to choose from.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def prose(tree: nodes.document) -> list[list[str]]:
    """A page's paragraphs, each after the anchor of its section."""
    return [[anchor(each), words(each)] for each in tree.findall(nodes.paragraph)]


def anchor(node: nodes.Node) -> str:
    """Of the section that ``node`` stands in; none for the page's own."""
    while node.parent and not isinstance(node, nodes.section):
        node = node.parent
    inner = isinstance(node.parent, nodes.section)
    return f"#{node['ids'][0]}" if inner else ""


def words(paragraph: nodes.paragraph) -> str:
    """The text of a paragraph, its formulas without TeX's marks."""
    copy = paragraph.deepcopy()
    for math in list(copy.findall(nodes.math)):
        plain = math.astext()
        math.replace_self(nodes.Text("…" if "\\" in plain else plain))
    return " ".join(copy.astext().split())


def write(app: Sphinx, error: Exception | None) -> None:
    """Every page's prose, as a script: a page that is a file may load no other."""
    if error or app.builder.format != "html":
        return
    found = {name: prose(app.env.get_doctree(name)) for name in app.env.found_docs}
    text = json.dumps(found, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    file = Path(app.outdir) / "_static" / "prose.js"
    file.write_text(f"const PROSE = {text};\n", encoding="utf-8")


def load(app: Sphinx, page: str, template: str, context: dict, tree: None) -> None:
    if page == "search":
        for name in ("prose", "search"):
            app.add_js_file(f"{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", load)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True}

"""The built book: no warning (the fixture), and every link and figure resolves."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOCAL = ("", "file")
FETCHED = ("stylesheet", "preload", "modulepreload", "icon")


class Page(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = {"", "top"}
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.update(filter(None, (values.get("id"), values.get("name"))))
        if tag in ("a", "link") and values.get("href"):
            self.links.append(values["href"])
        if tag in ("img", "script", "source", "iframe") and values.get("src"):
            self.sources.append(values["src"])
        if tag == "link" and values.get("rel") in FETCHED and values.get("href"):
            self.sources.append(values["href"])


def html(book: Path) -> list[Path]:
    return [path for path in book.rglob("*.html") if "_static" not in path.parts]


def test_every_link_and_figure_resolves(book: Path) -> None:
    pages = {path.resolve(): Page(path) for path in html(book)}
    broken = []
    for path, page in pages.items():
        for link in page.links + page.sources:
            parts = urlsplit(link)
            if parts.scheme not in LOCAL or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            target = path if not parts.path else target
            anchor = unquote(parts.fragment)
            found = target.exists() and not target.is_dir()
            if not found or target in pages and anchor not in pages[target].ids:
                broken.append(f"{path.relative_to(book.resolve())}: {link}")
    assert not broken, "\n".join(broken)


def test_nothing_is_fetched_from_elsewhere(book: Path) -> None:
    for path in html(book):
        for source in Page(path).sources:
            parts = urlsplit(source)
            near = not parts.netloc and parts.scheme in ("", "data")
            assert near, f"{path.name}: {source}"


def test_figures_and_folds_have_names(book: Path) -> None:
    figures = []
    for path in sorted((book / "notebooks").glob("*.html")):
        text = path.read_text(encoding="utf-8")
        assert "<summary>" in text and "Toggle hidden content" not in text, path.name
        figures += re.findall(r'<img[^>]*alt="([^"]*)"[^>]*_images', text)
        figures += re.findall(r'<img[^>]*_images[^>]*alt="([^"]*)"', text)
    assert len(figures) > 60
    assert [alt for alt in figures if not alt.startswith("Figure (")] == []


def test_classes_link_to_their_source(book: Path) -> None:
    api = Page(book / "book" / "api.html")
    for name in ("vae.html#VAE", "dit.html#MMDiT", "attention.html#JointAttention"):
        assert f"../_modules/minidiff/{name}" in api.links


def test_pages_have_search_copy_buttons_and_neighbours(book: Path) -> None:
    text = (book / "book" / "setup.html").read_text(encoding="utf-8")
    for wanted in ("search-button", "copybutton.js", "theme-switch", "prev-next"):
        assert wanted in text, f"no {wanted} in the page"

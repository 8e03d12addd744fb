"""The built book: every link and figure resolves; each page in a real browser.

Without a warning it is built by the fixture, once: both kinds of tests stand in one
file so that one process has it.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

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
        for tag in re.findall(r"<img[^>]*(?:_images|data:image/svg)[^>]*>", text):
            figures += re.findall(r'alt="([^"]*)"', tag) or [""]
    assert len(figures) > 60
    assert [alt for alt in figures if not alt.startswith("Figure (")] == []


def test_classes_link_to_their_source(book: Path) -> None:
    api = Page(book / "book" / "api.html")
    for name in ("vae.html#VAE", "dit.html#MMDiT", "attention.html#JointAttention"):
        assert f"../_modules/minidiff/{name}" in api.links


def test_a_chapters_source_is_its_code_alone(book: Path) -> None:
    text = (book / "_modules" / "minidiff" / "attention.html").read_text("utf-8")
    assert 'id="JointAttention"' in text and "%%" not in text and "viz" not in text


def test_pages_have_search_copy_buttons_and_neighbours(book: Path) -> None:
    text = (book / "book" / "setup.html").read_text(encoding="utf-8")
    for wanted in ("search-button", "copybutton.js", "theme-switch", "prev-next"):
        assert wanted in text, f"no {wanted} in the page"


def test_exercises_are_listed_with_what_they_ask(book: Path) -> None:
    text = (book / "book" / "solutions.html").read_text(encoding="utf-8")
    items = re.findall(r"<li>\s*<p>(.*?)</p>", text, re.S)
    plain = [" ".join(re.sub("<[^>]+>", "", item).split()) for item in items]
    listed = [item for item in plain if re.match(r"\d+\.\d+ (Predict|Code|Ex)", item)]
    assert len(listed) >= 48  # four of each chapter
    assert not [item for item in listed if item.endswith(":")]
    assert sum(item.endswith("?") for item in listed) > 25


def test_numbers_stay_with_their_units(book: Path) -> None:
    text = (book / "book" / "training_log.html").read_text(encoding="utf-8")
    prose = re.sub(r"<pre>.*?</pre>|<code.*?</code>", "", text, flags=re.S)
    assert not re.search(r"\d (%|MB|[×/] \d)", prose)
    assert len(re.findall("\\d\N{NO-BREAK SPACE}%", prose)) > 5


# In a browser: wide and light, on a phone and dark

MODES = {"light": (1280, "light"), "dark": (390, "dark")}

PROBE = """
async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await new Promise(seen => requestAnimationFrame(() => requestAnimationFrame(seen)));
  const root = document.documentElement;
  const images = [...document.images].filter(i => !(i.complete && i.naturalWidth > 0));
  const maths = [...document.querySelectorAll(".math")]
    .filter(m => !m.querySelector("mjx-container"));
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const raw = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.data, parent = walker.currentNode.parentElement;
    if (/\\$\\$|\\$\\\\[a-z]|\\\\\\(|\\\\\\[|\\{cite\\}|:::|-\\|-/.test(text)
        && !parent.closest("pre, code, script, style, textarea")) raw.push(text);
  }
  const wide = () => [...document.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > root.clientWidth + 1;
  });
  return {
    theme: root.dataset.theme,
    images: images.map(i => i.src.slice(0, 200)),
    maths: maths.map(m => m.textContent),
    errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")]
      .map(m => m.textContent),
    raw,
    overflow: root.scrollWidth > root.clientWidth
      ? wide().slice(0, 5).map(e => e.tagName + "." + e.className) : [],
  };
}
"""


def pages(book: Path) -> list[Path]:
    """All that is written, and of the sources' pages the longest."""
    found = [
        path for name in ("book", "notebooks") for path in (book / name).rglob("*.html")
    ]
    sources = (book / "_modules").rglob("*.html")
    ends = [book / "genindex.html", book / "search.html"]
    return sorted(found) + [max(sources, key=lambda p: p.stat().st_size)] + ends


def test_every_page(chromium: Any, book: Path) -> None:
    context = chromium.new_context()
    problems = [
        f"{path.relative_to(book)}: {line}"
        for path in pages(book)
        for line in visit(context, path)
    ]
    context.close()
    assert not problems, "\n".join(problems)


def visit(context: Any, path: Path) -> list[str]:
    """What is wrong with a page, in each of the modes."""
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.on("console", lambda m: m.type == "error" and problems.append(m.text))
    page.on("requestfailed", lambda r: problems.append(f"request failed: {r.url}"))
    page.on("request", lambda r: problems.append(foreign(r.url)))
    for number, (mode, (width, theme)) in enumerate(MODES.items()):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=theme)
        if number == 0:
            page.goto(path.as_uri(), wait_until="load")
        state = page.evaluate(PROBE)
        if state.pop("theme") != theme:
            problems.append(f"{mode}: theme is not {theme}")
        problems += [
            f"{mode}, {kind}: {found}" for kind, found in state.items() if found
        ]
    page.close()
    return [problem for problem in problems if problem]


def foreign(url: str) -> str:
    kept = url.startswith(("file:", "data:", "blob:", "about:"))
    return "" if kept else f"request off the machine: {url}"


def test_a_search_shows_prose(chromium: Any, book: Path) -> None:
    page = chromium.new_page()
    page.goto(f"{(book / 'search.html').as_uri()}?q=attention+padding")
    page.wait_for_selector("text=Search finished")
    results = page.locator("ul.search li")
    assert results.count() == page.locator("p.context").count() > 5
    found = page.locator("p.context").all_inner_texts()
    words = [text for text in found if "attention" in text or "pad" in text]
    assert len(words) > 0.8 * len(found) and not any("\\" in text for text in found)
    assert all(20 < len(text) < 300 for text in found)
    page.context.close()


def test_the_sidebar_opens_at_the_readers_place(chromium: Any, book: Path) -> None:
    page = chromium.new_page(viewport={"width": 1280, "height": 500})
    for name in ("01_tokenizer", "12_efficiency", "01_tokenizer"):
        page.goto((book / "notebooks" / f"{name}.html").as_uri())
        box = page.locator(".bd-sidebar-primary .current.active > a").bounding_box()
        assert 0 <= box["y"] and box["y"] + box["height"] <= 500
    page.context.close()


def test_print_has_the_numbered_title_and_whole_boxes(
    chromium: Any, book: Path
) -> None:
    page = chromium.new_page()
    page.goto((book / "notebooks" / "04_attention.html").as_uri())
    page.emulate_media(media="print")
    titles = page.locator("h1:visible").all_inner_texts()
    assert len(titles) == 1 and titles[0].startswith("4. Attention")
    breaks = "cells => cells.map(cell => getComputedStyle(cell).breakInside)"
    kinds = page.locator("div.cell_input").evaluate_all(breaks)
    assert set(kinds) == {"avoid"}
    page.context.close()


STATIONS = {"04_attention": "Attention", "08_sampling": "Steps"}


@pytest.mark.parametrize("chapter", STATIONS)
def test_frames_of_a_chapter_come_alive(
    chromium: Any, book: Path, chapter: str
) -> None:
    page = chromium.new_page(viewport={"width": 390, "height": 900})
    page.goto((book / "notebooks" / f"{chapter}.html").as_uri())
    figure = page.locator("figure.minidiff-inside")
    frames = figure.locator(".inside-frames img")
    assert frames.is_visible() and not figure.locator("canvas").first.is_visible()
    figure.get_by_role("slider", name="steps").fill("2")
    page.wait_for_selector("[data-drawn=whole]")
    assert figure.locator(".inside-panel canvas").first.is_visible()
    chosen = figure.get_by_role("tab", selected=True).inner_text()
    assert chosen == STATIONS[chapter] and frames.count() == 0
    page.context.close()


def test_frames_stay_without_scripts(chromium: Any, book: Path) -> None:
    page = chromium.new_page(java_script_enabled=False)
    for chapter in STATIONS:
        page.goto((book / "notebooks" / f"{chapter}.html").as_uri())
        frames = page.locator("figure.minidiff-inside img")
        assert [image.is_visible() for image in frames.all()] == [True, True]
    page.context.close()


LARGEST = 45e6  # bytes that the first page may load from the disk


def test_the_first_page_draws_from_the_disk(chromium: Any, book: Path) -> None:
    page = chromium.new_page()
    page.goto((book / "book" / "index.html").as_uri())
    line = page.get_by_label("Say what the picture shows")
    line.fill("a green bag on a white background")
    page.wait_for_selector("[data-drawn]")
    assert page.get_by_role("img", name="the picture drawn for").is_visible()
    page.get_by_role("link", name="Look inside").click()
    page.wait_for_selector("[data-drawn]")
    kept = page.get_by_label("Say what the picture shows").input_value()
    assert kept == "a green bag on a white background"
    page.context.close()
    loaded = (book / "_static" / "live").glob("*.js")
    assert sum(file.stat().st_size for file in loaded) < LARGEST

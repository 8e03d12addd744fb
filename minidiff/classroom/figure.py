"""A matplotlib figure that draws itself in a notebook as SVG, without pyplot's state.

A colour of ours has two values: the one that matplotlib is given, for light grounds,
and one for dark grounds. The SVG holds both, and the page's theme chooses.
"""

import base64
import html
import io
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from minidiff.classroom.colors import COLORS, GREY, INK

NOT_DRAWN = r"<!--.*?-->|<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>\s*"
DPI = 192  # of what is no vector: two pixels for one of the page's


STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 10.5,  # points: the page's small print
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "image.interpolation": "none",  # a picture's own pixels, enlarged by the reader
    "svg.fonttype": "none",
    "svg.hashsalt": "minidiff",
}


class BookFigure(Figure):
    """A figure on a transparent ground, shown by a notebook as an SVG picture."""

    kind, caption = "figure", ""

    def captioned(self, caption: str) -> "BookFigure":
        """The figure with a sentence beneath it; screen readers begin with it."""
        self.caption = caption
        return self

    def __repr__(self) -> str:
        """What is written in it: the book gives it to those who cannot see it."""
        texts = [t for legend in self.legends for t in legend.get_texts()]
        texts += [t for ax in self.axes for t in _names(ax)]
        names = dict.fromkeys(t.get_text() for t in texts if t.get_text())
        inside = [t.get_text() for ax in self.axes for t in ax.texts]
        words = ", ".join([*names, *filter(_is_word, inside)])
        words = " ".join(filter(None, (self.caption, words)))
        return textwrap.shorten(f"Figure ({self.kind}): {words}", 400)

    def drawn(self, form: str) -> bytes:
        """The picture as a file of ``form``, "svg" or "png"."""
        import matplotlib

        nothing = {"Date": None, "Creator": None} if form == "svg" else {}
        options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05}
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            options["metadata"] = nothing or {"Software": None}
            self.savefig(buffer, format=form, dpi=DPI, **options)
        return buffer.getvalue()

    def svg(self) -> str:
        """The picture as SVG, with both values of each colour."""
        text = self.drawn("svg").decode()
        text = re.sub(NOT_DRAWN, "", text, flags=re.S)
        text = re.sub("<[^>]*>", lambda tag: _hundredths(tag[0]), text)  # no labels
        for name, color in COLORS.items():
            text = text.replace(color.light, f"var(--{name})")
        head, body = text.split(">", 1)  # <svg …>
        return re.sub(r"\n\s*", "\n", f"{head}><style>{_themes()}</style>{body}")

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg().encode()).decode()
        label = html.escape(repr(self), quote=True)
        picture = f'<img src="data:image/svg+xml;base64,{data}" alt="{label}">'
        below = f"<figcaption>{html.escape(self.caption)}</figcaption>"
        inner = picture + (below if self.caption else "")
        return f'<figure class="minidiff-plot {self.kind}">{inner}</figure>'


def _hundredths(tag: str) -> str:
    """An SVG tag whose places end at hundredths of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", tag)


def _themes() -> str:
    """The colours as CSS variables, for light and for dark."""
    light, dark = (
        "svg{" + "".join(f"--{k}:{c[i]};" for k, c in COLORS.items()) + "}"
        for i in range(2)
    )
    return f"{light}@media (prefers-color-scheme: dark){{{dark}}}"


def _names(ax: Axes) -> Iterator[Text]:
    """The title, the labels, the words at the axes and in the legend."""
    yield from (ax.title, ax.yaxis.label, ax.xaxis.label)
    for label in (*ax.get_yticklabels(), *ax.get_xticklabels()):
        if _is_word(label.get_text()):
            yield label
    if legend := ax.get_legend():
        yield from legend.get_texts()


def _is_word(text: str) -> bool:
    """Whether a text has letters, and is no formatted power of ten."""
    return any(map(str.isalpha, text)) and "mathdefault" not in text

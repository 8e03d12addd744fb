"""A matplotlib figure that draws itself in a notebook, without pyplot's state."""

import io
import textwrap
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

DPI = 120
INK = "#777b83"  # contrast above 4 on white and on the dark ground: no grey has 4.5
PALETTE = ["#3f88c5", "#e0762b", "#2f9e6e", "#d6495f", "#9267d0", "#b08a1e", "#1d98a7"]

STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
}


class BookFigure(Figure):
    """A figure on a transparent ground, shown by a notebook as a PNG picture."""

    kind = "figure"

    def __repr__(self) -> str:
        """What is written in it: the book gives it to those who cannot see it."""
        texts = [t for legend in self.legends for t in legend.get_texts()]
        texts += [t for ax in self.axes for t in _names(ax)]
        names = dict.fromkeys(t.get_text() for t in texts if t.get_text())
        inside = [t.get_text() for ax in self.axes for t in ax.texts]
        words = ", ".join([*names, *filter(_is_word, inside)])
        return textwrap.shorten(f"Figure ({self.kind}): {words}", 400)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.05}
        self.savefig(buffer, dpi=DPI, metadata={"Software": None}, **options)
        return buffer.getvalue()


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

"""A matplotlib figure that draws itself in a notebook, without pyplot's state."""

import io

from matplotlib.figure import Figure

DPI = 120
INK = "#777b83"  # contrast above 4 on white and on the dark theme's ground alike
PALETTE = ["#3f88c5", "#e0762b", "#2f9e6e", "#d6495f", "#9267d0", "#b08a1e", "#1d98a7"]

STYLE = {
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

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        options = {"bbox_inches": "tight", "pad_inches": 0.05}
        self.savefig(buffer, dpi=DPI, metadata={"Software": None}, **options)
        return buffer.getvalue()

"""Every figure of the book, importable by anyone.

The functions take tensors and return matplotlib figures that a notebook shows as SVG.
Their ground is transparent and their ink the theme's, so that they can be read in
light and in dark; a thing has one colour throughout (:mod:`minidiff.classroom.colors`).
matplotlib is imported when the first figure is drawn, and its global state is left
alone. The figures that come alive on the book's pages, :func:`live_denoising`,
:func:`live_attention` and :func:`live_sketch`, are in
:mod:`minidiff.classroom.interactive`, the map of the pipeline in
:mod:`minidiff.classroom.map`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minidiff.classroom.colors import GREY, PALETTE, colors_of
from minidiff.classroom.interactive import (  # noqa: F401
    latent_pictures,
    live_attention,
    live_denoising,
    live_sketch,
    to_frames,
    to_pictures,
)
from minidiff.classroom.map import show_pipeline  # noqa: F401
from minidiff.live.page import live  # noqa: F401

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

    from minidiff.classroom.figure import BookFigure

WIDTH = 7.2  # inches: the text column of the book
DASHES, HATCHES = ("-", "--", "-.", ":"), ("", "///", "\\\\\\", "xxx")  # beside colours
MARKERS = "osD^"
MONOSPACE = "DejaVu Sans Mono"
Points = Mapping[str, Tensor]
Style = dict[str, Any]  # of matplotlib


def _drawn(draw: Callable[..., "BookFigure"]) -> Callable[..., "BookFigure"]:
    """Give ``draw`` the book's style, and leave matplotlib's own settings alone."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> "BookFigure":
        import matplotlib

        from minidiff.classroom.figure import STYLE

        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        figure.kind = draw.__name__.removeprefix("show_").replace("_", " ")
        return figure

    return drawn


def _axes(
    rows: int, columns: int, size: tuple[float, float], grid: bool = False
) -> tuple["BookFigure", "np.ndarray[Any, Any]"]:
    """A figure of ``size`` inches and its (rows, columns) array of axes."""
    from minidiff.classroom.figure import BookFigure

    figure = BookFigure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(grid)
        ax.set_axisbelow(True)
    return figure, axes


def _blank(ax: "Axes") -> None:
    """No ticks and no frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _edge(ax: "Axes") -> None:
    """A thin edge around a picture, which may be as dark or light as the page."""
    ax.spines[:].set(visible=True, linewidth=0.5, color=GREY)


def _panels(
    rows: int, columns: int, aspect: float = 1.0, title: float = 0.2
) -> tuple["BookFigure", Any]:
    """Blank axes for pictures of that height over width, ``title`` inches above."""
    side = min(1.5, WIDTH / columns)
    size = side * columns, (side * aspect + title) * rows
    figure, axes = _axes(rows, columns, size)
    for ax in axes.flat:
        _blank(ax)
    return figure, axes


def _numpy(x: Any) -> np.ndarray:
    return torch.as_tensor(x).detach().float().cpu().numpy()


# Pictures


@_drawn
def show_images(
    images: Any,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    low: float = -1.0,
) -> "BookFigure":
    """Pictures in a table, at most ``columns`` (by default 8) in a row.

    ``images``: (B, 3, H, W) or (3, H, W) with values in [``low``, 1], uint8 of these
    shapes or (B, H, W), or a list of PIL pictures of one size.
    """
    pictures = to_pictures(images, low)
    columns = columns or min(8, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    aspect = pictures.shape[1] / pictures.shape[2]
    room = int(min(108, 72 * WIDTH / columns) / 6.6)  # letters above a picture
    above = [_wrapped(title, room) for title in titles or []]
    lines = [1 + max(t.count("\n") for t in row) for row in _in_rows(above, columns)]
    figure, axes = _panels(rows, columns, aspect, 0.04 + 0.16 * sum(lines) / rows)
    for ax, picture in zip(axes.flat, pictures, strict=False):
        ax.imshow(picture)
        _edge(ax)
    for ax, title in zip(axes.flat, above, strict=False):
        ax.set_title(title, fontsize=9.5 if columns > 4 else None)
    return figure


def _in_rows(titles: Sequence[str], columns: int) -> list[Sequence[str]]:
    return [titles[i : i + columns] for i in range(0, len(titles), columns)]


@_drawn
def show_latents(latents: Tensor) -> "BookFigure":
    """Every channel of latents (C, h, w) as a map of signed values.

    All maps share one scale, symmetric about zero: blue is below it and red above.
    """
    values = _numpy(latents)
    columns = min(8, len(values))
    figure, axes = _panels(math.ceil(len(values) / columns), columns)
    limit = np.abs(values).max()
    for c, (ax, channel) in enumerate(zip(axes.flat, values, strict=False)):
        shown = ax.imshow(channel, "RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(str(c), pad=2)
    figure.colorbar(shown, ax=axes.ravel().tolist(), shrink=0.8, aspect=30)
    return figure


@_drawn
def show_attention(
    maps: Tensor,
    words: Sequence[str],
    image: Any = None,
    rows: Sequence[str] | None = None,
    low: float = -1.0,
    common: bool = False,
) -> "BookFigure":
    """Where each word is found: heat maps (words, h, w) or (rows, words, h, w).

    With ``image``, a picture (3, H, W) in [``low``, 1], the maps lie over it and the
    picture stands first. Each map is scaled from zero to its own maximum, which is
    written beneath; with ``common`` all are to one, with a colour bar.
    """
    values = _numpy(maps)
    values = values[None] if values.ndim == 3 else values
    picture = None if image is None else to_pictures(image, low)[0]
    first = 0 if picture is None else 1
    figure, axes = _panels(len(values), len(words) + first)
    for row, w in np.ndindex(values.shape[:2]):
        ax, most = axes[row, first + w], values[row, w].max()
        ax.imshow(_heat(values[row, w], picture, values.max() if common else most))
        if not common:
            ax.set_xlabel(f"max {most:.3f}", fontsize=9)
        if row == 0:
            ax.set_title(words[w])
    for row in range(len(values) * first):
        axes[row, 0].imshow(picture)
        _edge(axes[row, 0])
    for ax, label in zip(axes[:, 0], rows or [], strict=False):
        ax.set_ylabel(label)
    if common:
        _bar(figure, axes, "inferno", values.max())
    return figure


def _bar(figure: "BookFigure", axes: Any, cmap: str, most: float) -> None:
    """A colour bar from 0 to ``most`` beside all ``axes``."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shown = ScalarMappable(Normalize(0, most), cmap)
    figure.colorbar(shown, ax=axes.ravel().tolist(), shrink=0.8, aspect=30)


def _heat(values: np.ndarray, picture: np.ndarray | None, most: float) -> np.ndarray:
    """A heat map (h, w) as colours, over a darkened picture if there is one."""
    from matplotlib import colormaps

    scaled = values / max(most, 1e-12)
    colors = colormaps["inferno"](scaled)[..., :3]
    if picture is None:
        return colors
    scale = [p // v for p, v in zip(picture.shape, values.shape, strict=False)]
    colors = np.kron(colors, np.ones((*scale, 1)))
    grey = picture.mean(-1, keepdims=True) / 255
    return 0.3 * grey + 0.7 * colors


@_drawn
def show_trajectory(rows: Mapping[str, Tensor], sigmas: Tensor) -> "BookFigure":
    """One row a quantity, one column a step: from noise on the left to a picture.

    ``rows`` maps a label to pictures (S, 3, H, W) in [−1, 1] or to latents
    (S, C, h, w), which are shown by :func:`latent_pictures`; at most eight of the S
    steps are drawn, evenly spaced. ``sigmas`` (S,) names them.
    """
    steps = len(next(iter(rows.values())))
    chosen = np.linspace(0, steps - 1, min(8, steps)).round().astype(int)
    figure, axes = _panels(len(rows), len(chosen))
    for band, (label, values) in zip(axes, rows.items(), strict=True):
        pictures = to_frames(values)
        band[0].set_ylabel(label)
        for ax, step in zip(band, chosen, strict=True):
            ax.imshow(pictures[step])
            _edge(ax)
    for ax, step in zip(axes[0], chosen, strict=True):
        ax.set_title(f"σ = {float(sigmas[step]):.2f}")
    return figure


# Text


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    path = font_manager.findfont(MONOSPACE)
    return frozenset(font_manager.get_font(path).get_charmap())


def _visible(piece: str) -> str:
    """The piece with what the font cannot draw written as ``U+1F600``."""
    return "".join(
        c if ord(c) in _glyphs() and c.isprintable() else f"U+{ord(c):04X}"
        for c in piece
    )


@_drawn
def show_pieces(
    rows: Sequence[Sequence[str]],
    labels: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
) -> "BookFigure":
    """Rows of text pieces as coloured chips; equal pieces have equal colours.

    ``labels`` name the rows; ``notes`` (one a piece) are written below the chips. Long
    rows go on in a line below.
    """
    width = 78  # characters
    labels = labels or [""] * len(rows)
    notes = notes or [[""] * len(row) for row in rows]
    margin = max(len(label) for label in labels) + 2 if any(labels) else 0
    chips, line = [], 0
    for row, note in zip(rows, notes, strict=True):
        placed, line = _place(row, note, line, width - margin)
        chips.append(placed)
    step = 0.58 if any(n for note in notes for n in note) else 0.36
    figure, axes = _axes(1, 1, (WIDTH, step * line + 0.1))
    axes[0, 0].set(xlim=(0, width), ylim=(line - 0.4, -0.6))
    _blank(axes[0, 0])
    for label, placed in zip(labels, chips, strict=True):
        _draw_chips(axes[0, 0], label, margin, placed)
    return figure


def _place(
    row: Sequence[str], notes: Sequence[str], line: int, width: int
) -> tuple[list[tuple[float, int, str, str]], int]:
    """Column and line of every piece of a row, and the line after it."""
    placed, x = [], 0.0
    for piece, note in zip(row, notes, strict=True):
        piece = _visible(piece)
        size = max(len(piece), len(note)) + 1.4
        if x and x + size > width:
            x, line = 0.0, line + 1
        placed.append((x + size / 2, line, piece, note))
        x += size
    return placed, line + 1


def _draw_chips(ax: "Axes", label: str, margin: int, placed: list[Any]) -> None:
    from zlib import crc32

    font: Style = {"va": "center", "parse_math": False, "family": MONOSPACE}
    font["fontsize"] = 9.5
    if placed:
        ax.text(0, placed[0][1], label, **font)
    for x, y, piece, note in placed:
        color = PALETTE[crc32(piece.encode()) % 7]
        box = {"boxstyle": "round,pad=0.25", "fc": color + "20", "ec": color, "lw": 0.8}
        place = font | {"ha": "center"}
        ax.text(margin + x, y, piece, bbox=box, **place)
        ax.text(margin + x, y + 0.45, note, **place)


def show_tokens(tokenizer: Any, text: str | Sequence[str]) -> "BookFigure":
    """The tokens of a text, or of several, as chips with their ids beneath.

    ``tokenizer`` has ``encode(text) → ids`` and ``tokens(ids) → pieces``.
    """
    texts = [text] if isinstance(text, str) else text
    ids = [tokenizer.encode(text) for text in texts]
    notes = [[str(i) for i in row] for row in ids]
    return show_pieces([tokenizer.tokens(row) for row in ids], notes=notes)


def show_rows(tokenizers: Mapping[str, Any], text: str, count: int) -> "BookFigure":
    """The first ``count`` ids of a text's padded row, by each named tokenizer."""
    rows = {name: t([text])[0, :count].tolist() for name, t in tokenizers.items()}
    pieces = [t.tokens(rows[name]) for name, t in tokenizers.items()]
    notes = [[str(i) for i in row] for row in rows.values()]
    return show_pieces(pieces, list(rows), notes)


@_drawn
def show_lattice(
    text: str,
    pieces: Sequence[tuple[int, int, float]],
    best: Sequence[tuple[int, int]] = (),
) -> "BookFigure":
    """The lattice of a Unigram tokenizer: an arc for each piece that fits the text.

    ``pieces``: (start, end, log-probability), in characters of ``text``; ``best``: the
    (start, end) arcs of the winning path, drawn in colour.
    """
    longest = max(end - start for start, end, _ in pieces)
    figure, axes = _axes(1, 1, (WIDTH, 1.2 + 0.42 * longest))
    ax = axes[0, 0]
    _blank(ax)
    ax.set(xlim=(-0.3, len(text) + 0.3), ylim=(-0.9, longest + 0.6))
    for i, letter in enumerate(text):
        ax.text(i + 0.5, -0.55, _visible(letter), ha="center", parse_math=False)
    ax.plot(range(len(text) + 1), [0] * (len(text) + 1), "o", color=GREY, ms=4)
    for start, end, score in pieces:
        _arc(ax, start, end, f"{score:.1f}", (start, end) in set(best))
    return figure


def _arc(ax: "Axes", start: int, end: int, label: str, chosen: bool) -> None:
    x = np.linspace(0, np.pi, 30)
    width = end - start
    color = PALETTE[1] if chosen else GREY
    path = start + width * (1 - np.cos(x)) / 2, (width - 0.35) * np.sin(x)
    ax.plot(*path, color=color, lw=2.4 if chosen else 1, zorder=3 if chosen else 2)
    weight = "bold" if chosen else None
    middle = start + width / 2, width - 0.25
    ax.text(*middle, label, ha="center", weight=weight, fontsize=9.5)


# Numbers


def _line_styles(
    names: Sequence[str], colors: Sequence[str], markers: bool
) -> Iterator[dict[str, Any]]:
    """How each line of :func:`show_curves` is drawn."""
    shades, kinds = dict.fromkeys(colors), [n.partition(",")[2] for n in names]
    shared = markers and len(shades) < len(names)
    for i, (color, kind) in enumerate(zip(colors, kinds, strict=True)):
        dash = [*dict.fromkeys(kinds)].index(kind) if shared else i
        shape = MARKERS[[*shades].index(color) % 4 if shared else 0]
        marker = shape if markers else None
        yield {"c": color, "ls": DASHES[dash % 4], "marker": marker, "ms": 4}


@_drawn
def show_curves(
    curves: Mapping[str, Any],
    xlabel: str = "",
    ylabel: str = "",
    logx: bool = False,
    logy: bool = False,
    markers: bool = False,
) -> "BookFigure":
    """Lines by name: each a sequence of y, or a pair (x, y).

    Where one colour has several lines with markers, as "euler, even" and "euler, odd",
    the dashes tell what follows the comma, and the marker's shape the colour.
    """
    figure, axes = _axes(1, 1, (5.4, 3.0), grid=True)
    ax = axes[0, 0]
    styles = _line_styles([*curves], colors_of(curves), markers)
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        x, y = curve if isinstance(curve, tuple) else (range(len(curve)), curve)
        ax.plot(_numpy(x), _numpy(y), label=name, **style)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set(xscale="log" if logx else "linear", yscale="log" if logy else "linear")
    for axis, log in ((ax.xaxis, logx), (ax.yaxis, logy)):
        low, high = sorted(axis.get_view_interval())
        if log and high < 100 * low:  # plain numbers: 0.5, not 5 × 10⁻¹
            axis.set_major_formatter(lambda v, _: f"{v:g}")
            few = lambda v, _: f"{v:g}" if f"{v:e}"[0] in "235" else ""  # noqa: E731
            axis.set_minor_formatter(few)
    if any(curves):  # many names stand beside the axes, where they hide no curve
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        ax.legend(**beside if len(curves) > 4 else {})
    if logx and markers:  # counts, each with its own tick; of near ones the larger
        places = sorted({x for line in ax.lines for x in line.get_xdata()})
        above = [*places[1:], math.inf]
        places = [x for x, y in zip(places, above, strict=True) if y > 1.2 * x]
        ax.set_xticks(places, [f"{x:g}" for x in places])
        ax.set_xticks([], minor=True)
    return figure


@_drawn
def show_heatmap(
    matrix: Tensor,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    signed: bool = False,
    digits: int | None = None,
) -> "BookFigure":
    """A matrix (R, C) as colours; ``digits`` writes its values into the cells.

    ``rows`` and ``columns`` name all of them; "" leaves one without name and tick.
    """
    values = _numpy(matrix)
    high, wide = values.shape
    height = min(7.0, max(1.6, 5.0 * high / wide))
    if high > wide:  # rows as high as their labels need
        height = min(height, 0.38 * high + 0.6)
    figure, axes = _axes(1, 1, (5.8, height + 0.6))
    ax, limit = axes[0, 0], np.abs(values).max()
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {}
    shown = ax.imshow(values, aspect="auto" if high > wide else "equal", **scale)
    figure.colorbar(shown, cax=ax.inset_axes([1.03, 0, 0.03, 1]))
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if rows is not None:
        ax.set_yticks(*_named(rows))
    if columns is not None:
        short = max(map(len, map(str, columns))) < 5
        turned: Style = {} if short else {"rotation": 45, "ha": "right"}
        ax.set_xticks(*_named(columns), **turned)
    if digits is not None:
        _write(ax, values, shown, digits)
    return figure


def _named(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Places and names of those that have one."""
    return [i for i, name in enumerate(names) if name], [*filter(None, names)]


def _write(ax: "Axes", values: np.ndarray, shown: Any, digits: int) -> None:
    longest = max(len(f"{value:.{digits}f}") for value in values.flat)
    size = min(9.5, 340 / (values.shape[1] * longest))  # points
    for (row, column), value in np.ndenumerate(values):
        color = np.array(shown.cmap(shown.norm(value))[:3])
        light = color**2.2 @ (0.2126, 0.7152, 0.0722) > 0.18  # relative luminance
        style: Style = {"ha": "center", "va": "center", "color": "k" if light else "w"}
        ax.text(column, row, f"{value:.{digits}f}", fontsize=size, **style)


@_drawn
def show_bars(
    values: Mapping[str, Any], ylabel: str = "", stacked: bool = False
) -> "BookFigure":
    """Bars by name. A mapping of mappings, name → part → value, gives each name one
    bar a part, side by side or ``stacked``."""
    nested = {k: v if isinstance(v, Mapping) else {"": v} for k, v in values.items()}
    parts = list(dict.fromkeys(part for row in nested.values() for part in row))
    figure, axes = _axes(1, 1, (5.8, 3.0))
    ax, base = axes[0, 0], np.zeros(len(nested))
    width = 0.7 if stacked else 0.8 / len(parts)
    for i, (part, color) in enumerate(zip(parts, colors_of(parts), strict=True)):
        heights = np.array([float(row.get(part, 0)) for row in nested.values()])
        x = np.arange(len(nested)) + (
            0 if stacked else (i - (len(parts) - 1) / 2) * width
        )
        style = {"fc": color + "c0", "label": part, "hatch": HATCHES[i % 4], "ec": "w"}
        ax.bar(x, heights, width * 0.95, base if stacked else 0, lw=0, **style)
        base += heights
    room = max(6, 72 // len(nested))  # letters below a bar
    ax.set_xticks(range(len(nested)), [_wrapped(name, room) for name in nested])
    ax.set(ylabel=ylabel)
    if stacked:
        figure.legend(loc="outside upper center", ncols=len(parts))
    elif len(parts) > 1:
        ax.legend()
    return figure


@_drawn
def show_histogram(values: Mapping[str, Tensor], xlabel: str = "") -> "BookFigure":
    """The densities of one or several sets of numbers, on 60 common bins."""
    flat = {name: _numpy(x).ravel() for name, x in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(flat.values())), 60)
    figure, axes = _axes(1, 1, (5.4, 2.8), grid=True)
    for color, (name, x) in zip(colors_of(flat), flat.items(), strict=True):
        style = {"histtype": "stepfilled", "fc": color + "30", "ec": color, "lw": 1.4}
        axes[0, 0].hist(x, edges, density=True, label=name, **style)
    axes[0, 0].set(xlabel=xlabel, ylabel="density")
    if len(flat) > 1:
        axes[0, 0].legend()
    return figure


@_drawn
def show_points(
    panels: Points | Mapping[str, Points],
    paths: Tensor | None = None,
    limits: tuple[float, float] | None = None,
) -> "BookFigure":
    """Sets of points (N, 2) in the plane, by name; or several such panels by title.

    In the first panel, ``paths`` (S, N, 2) are drawn as N lines of S points.
    """
    nested = isinstance(next(iter(panels.values()), None), Mapping)
    table: Any = panels if nested else {"": panels}
    side = min(3.6, WIDTH / len(table))
    figure, axes = _axes(1, len(table), (side * len(table), side + 0.3), grid=True)
    for ax, (title, sets) in zip(axes.flat, table.items(), strict=True):
        for color, (name, xy) in zip(colors_of(sets), sets.items(), strict=True):
            ax.scatter(*_numpy(xy).T, s=7, c=color, label=name, lw=0, zorder=3)
        ax.set(title=title, aspect="equal", xlim=limits, ylim=limits)
        if len(table) == 1 and any(sets):
            ax.legend(loc="upper left", markerscale=2)
    if len(table) > 1:  # once for all, beneath
        shown = [ax.get_legend_handles_labels() for ax in axes.flat]
        names = {n: h for found in shown for h, n in zip(*found, strict=True)}
        place: Style = {"loc": "outside lower center", "ncols": len(names)}
        figure.legend(names.values(), names.keys(), markerscale=2, **place)
    if paths is not None:
        axes[0, 0].plot(*_numpy(paths).transpose(2, 0, 1), c=GREY, lw=0.5)
    return figure


# Chapters 4 and 5: attention and the transformer


@_drawn
def show_quadrants(sizes: Mapping[str, tuple[int, int]]) -> "BookFigure":
    """Tables of joint attention, to scale: title → (text tokens, patches)."""
    figure, axes = _axes(1, len(sizes), (WIDTH, 3.6))
    for ax, (title, (text, patches)) in zip(axes.flat, sizes.items(), strict=True):
        total = text + patches
        _fields(ax, text / total)
        ax.set(title=title, xlabel=f"token read: {total}", ylabel=f"reader: {total}")
    return figure


def _fields(ax: "Axes", text: float) -> None:
    """Four coloured fields of the unit square, cut at ``text`` from its upper left."""
    ends = ((0, text, "words"), (text, 1 - text, "patches"))
    for row, (y, height, reader) in enumerate(ends):
        for column, (x, width, read) in enumerate(ends):
            color = PALETTE[2 * row + column]
            style = {"fc": color + "1c", "ec": color, "lw": 1}
            ax.add_patch(_rectangle((x, y), width, height, style))
            middle = x + width / 2, y + height / 2
            place: Style = {"ha": "center", "va": "center"}
            if min(width, height) > 0.3:
                ax.text(*middle, f"{reader}\nread\n{read}", **place)
            elif max(width, height) > 0.3:
                place |= {"fontsize": 9, "rotation": 90 * (height > width)}
                ax.text(*middle, f"{reader} read {read}", **place)
    ax.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])


def _rectangle(
    corner: tuple[float, float], width: float, height: float, style: Any
) -> "Patch":
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **style)


@_drawn
def show_joint_block() -> "BookFigure":
    """One block of MMDiT: two streams, one attention, modulation from the side."""
    figure, axes = _axes(1, 1, (WIDTH, 4.4))
    ax = axes[0, 0]
    _blank(ax)
    ax.set(xlim=(-2.8, 4.8), ylim=(-7.5, 0.7))
    rows = ["LayerNorm, modulate", "qkv, norm of q, k", "", "proj", "gate, add"]
    rows += ["LayerNorm, modulate", "MLP", "gate, add"]
    for x, name in ((0.0, "text tokens"), (2.0, "patches")):
        ax.text(x, 0.45, name, ha="center", weight="bold")
        for y, row in enumerate(rows):
            _step(ax, x, -y, row, blue="gate" in row or "modulate" in row)
    _step(ax, 1, -2, "joint attention", width=3.6, orange=True)
    for x, side in ((-2.2, -1), (4.2, 1)):
        ax.text(
            x, -2.5, "time and\npooled text\n\n6·D numbers", ha="center", va="center"
        )
        for y in (0, -4, -5, -7):
            end = (1 + side * 1.92, y)
            style = {"arrowstyle": "->", "ec": PALETTE[0], "lw": 0.8}
            ax.annotate("", end, (x - side * 0.62, -2.5), arrowprops=style)
    return figure


def _step(
    ax: "Axes",
    x: float,
    y: float,
    text: str,
    width: float = 1.7,
    blue: bool = False,
    orange: bool = False,
) -> None:
    """A flat box of :func:`show_joint_block`, with an arrow to the row below."""
    if not text:
        return
    color = PALETTE[0] if blue else PALETTE[1] if orange else GREY
    style = {"fc": color + "30", "ec": color, "lw": 1}
    ax.add_patch(_rectangle((x - width / 2, y - 0.28), width, 0.56, style))
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5)
    for place in (x - 1, x + 1) if orange else (x,):
        style = {"arrowstyle": "->", "ec": GREY, "lw": 0.8}
        ax.annotate("", (place, y - 0.72), (place, y - 0.28), arrowprops=style)


@_drawn
def show_positions(
    table: Tensor, crops: Mapping[str, tuple[int, int]], point: tuple[int, int]
) -> "BookFigure":
    """A position table (1, M·M, D): some channels, and how alike all places are.

    The last panel is the cosine between the place ``point`` (row, column) and every
    other; ``crops``, name → (height, width), are outlined in its middle.
    """
    values = _numpy(table)[0]
    size, width = round(len(values) ** 0.5), values.shape[1]
    grid = values.reshape(size, size, width)
    unit = grid / np.linalg.norm(grid, axis=-1, keepdims=True)
    halves = (0, width // 16, width // 2, width // 2 + width // 16)
    panels = {f"channel {c}": grid[..., c] for c in halves}
    panels[f"cosine with {point}"] = unit @ unit[point]
    figure, axes = _axes(1, len(panels), (WIDTH, WIDTH / len(panels) + 0.5))
    for ax, (title, panel) in zip(axes.flat, panels.items(), strict=True):
        limits = (-1, 1) if "channel" in title else (panel.min(), 1)
        cmap = "RdBu_r" if "channel" in title else "viridis"
        shown = ax.imshow(panel, cmap, vmin=limits[0], vmax=limits[1])
        ax.set(title=title.replace(" with", "\nwith"), xticks=[], yticks=[])
        if ax in (axes[0, -2], axes[0, -1]):
            figure.colorbar(shown, ax=ax, shrink=0.6, location="bottom", ticks=limits)
    for color, (name, crop) in zip(PALETTE, crops.items(), strict=False):
        top, left = ((size - side) // 2 - 0.5 for side in crop)
        style = {"fill": False, "ec": color, "lw": 1.6, "label": name}
        for ax in axes.flat:
            ax.add_patch(_rectangle((left, top), crop[1], crop[0], style))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center")
    return figure


# Chapters 6 and 8: the flow


@_drawn
def show_fields(fields: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> "BookFigure":
    """Vector fields side by side: title → (points (N, 2), places (M, 2), arrows).

    Arrows show the direction; how long a vector is, its colour, on one scale for all.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, Normalize

    side = WIDTH / len(fields)
    middle = ListedColormap(colormaps["plasma"](np.linspace(0.3, 0.85, 256)))
    figure, axes = _axes(1, len(fields), (WIDTH, side + 0.7))
    lengths = [arrows.norm(dim=1) for _, _, arrows in fields.values()]
    scale = Normalize(0, float(torch.cat(lengths).quantile(0.95)))
    for ax, (title, (points, places, arrows)), length in zip(
        axes.flat, fields.items(), lengths, strict=True
    ):
        ax.scatter(*_numpy(points).T, s=5, c=GREY, lw=0)
        unit = _numpy(arrows / length[:, None])
        style = {"width": 0.009, "angles": "xy", "norm": scale, "cmap": middle}
        shown = ax.quiver(*_numpy(places).T, *unit.T, _numpy(length), scale=20, **style)
        ax.set(title=title, aspect="equal")
    bar: Style = {"location": "bottom", "shrink": 0.5, "aspect": 40, "extend": "max"}
    figure.colorbar(shown, ax=axes.ravel().tolist(), label="length", **bar)
    return figure


@_drawn
def show_vectors(
    origin: Tensor, vectors: Mapping[str, Tensor], points: Points | None = None
) -> "BookFigure":
    """Named arrows (2,) from one place (2,), among sets of ``points`` (N, 2)."""
    figure, axes = _axes(1, 1, (5.0, 3.8), grid=True)
    ax, points = axes[0, 0], points or {}
    colors = colors_of([*points, *vectors])
    for color, (name, xy) in zip(colors, points.items(), strict=False):
        ax.scatter(*_numpy(xy).T, s=7, c=color, lw=0, label=name)
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.007}
    for color, (name, v) in zip(colors[len(points) :], vectors.items(), strict=True):
        ax.quiver(*_numpy(origin), *_numpy(v), color=color, **style)
        up = 1 if v[1] > 0 else -1  # beyond the tip, where no arrow goes
        place = {"xytext": (0, 9 * up), "textcoords": "offset points"}
        ax.annotate(name, _numpy(origin + v), ha="center", va="center", **place)
    ends = np.stack([_numpy(origin)] + [_numpy(origin + v) for v in vectors.values()])
    ends = np.concatenate([ends, *(_numpy(xy) for xy in points.values())])
    low, high = ends.min(0) - 0.6, ends.max(0) + 0.4
    ax.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    if points:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# Chapter 10: LoRA


@_drawn
def show_factors(sizes: Mapping[str, tuple[int, int]], rank: int) -> "BookFigure":
    """Matrices and two factors of them, to scale: title → (out, in)."""
    figure, axes = _axes(1, len(sizes), (WIDTH, 3.6))
    for ax, (title, (outputs, inputs)) in zip(axes.flat, sizes.items(), strict=True):
        gap = 0.12 * inputs
        parts = {"W": (0.0, outputs, inputs), "B": (inputs + gap, outputs, rank)}
        parts["A"] = (inputs + 2 * gap + rank, rank, inputs)
        for (name, (x, height, width)), color in zip(
            parts.items(), PALETTE[:3], strict=True
        ):
            style = {"fc": color + "30", "ec": color, "lw": 1}
            ax.add_patch(_rectangle((x, 0), width, height, style))
            ax.text(x + width / 2, height + gap / 2, f"${name}$", ha="center", va="top")
        _blank(ax)
        ax.set(title=title, xlim=(-gap, 2 * inputs + 3 * gap + rank))
        ax.set(ylim=(outputs + 4 * gap, -gap), aspect="equal")
    return figure

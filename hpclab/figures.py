"""What all figures share: colours that everybody tells apart, where the rows come from, and a caption that says it.

Colours are Okabe and Ito's; every series has a marker and a line style, or a hatch, as well.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import offset_copy

from hpclab.language import cjk_font, language
from hpclab.language import translate_drawn as _
from hpclab.pages import html
from hpclab.rows import source

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx")
TITLE_POINTS = 14
"""Height of the title, which says where the data are from."""

DARK = (
    '<style>[data-jp-theme-light="false"] .hpclab-figure img'
    " { filter: invert(1) hue-rotate(180deg); mix-blend-mode: lighten; }</style>"
)
"""In JupyterLab's dark theme, turns light and dark about, and leaves the hues."""
FIGURE = DARK + (
    '<figure class="hpclab-figure" style="margin: 0">'
    '<img style="max-width: 100%" alt="{{ alt }}" src="data:image/png;base64,{{ image }}">'
    '<figcaption style="font-size: smaller"><details><summary>{{ title }}</summary>{{ lines | join("<br>" | safe) }}'
    "</details></figcaption></figure>"
)

Values = Sequence[float] | np.ndarray


class Figure(matplotlib.figure.Figure):
    """A figure that says in words what its axes show: folded away below it, in a notebook or a page."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.series: dict[Axes, tuple[str, ...]] = {}
        """For each axes that `finish` has done: what is drawn against what, then a line a series."""

    def words(self) -> str:
        """All that it says, a line for each of its axes; of pictures that `finish` hasn't done, their titles."""
        return "\n".join(f"{title}. {'; '.join(lines)}" for title, *lines in self.series.values()) or self._titles()

    def _titles(self) -> str:
        return "; ".join(filter(None, (ax.get_title() for ax in self.axes)))

    def picture(self) -> str:
        """The figure as HTML that needs no other file; what it says is folded away below it."""
        return self._around(png(self))

    def _around(self, image: bytes) -> str:
        alt = "; ".join(title for title, *_lines in self.series.values()) or self._titles()
        encoded, lines = base64.b64encode(image).decode(), self.words().split("\n")
        return html(FIGURE, alt=alt, image=encoded, title=_("This figure in words"), lines=lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        image = png(self)
        encoded = base64.b64encode(image).decode()
        return {"text/plain": self.words(), "text/html": self._around(image), "image/png": encoded}


def subplots(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Any]:
    """A `Figure` of so many inches that a notebook shows at the end of its cell, and its axes.

    As ``matplotlib.pyplot.subplots``, whose figures have no caption.
    """
    shown = plt.figure(FigureClass=Figure, figsize=size, layout="constrained")
    return shown, shown.subplots(rows, columns)  # type: ignore[return-value]


def axes(ax: Axes | None) -> Axes:
    """Where to draw: the given axes, or those of a new figure."""
    return subplots()[1] if ax is None else ax


def finish(ax: Axes, rows: list[dict], xlabel: str, ylabel: str, series: Sequence[str] = ()) -> Axes:
    """Name what was drawn, and say where its rows come from.

    Parameters
    ----------
    series : sequence of str
        What it shows, in words; see `curve` and `cloud`.
    """
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(color="0.6", alpha=0.4)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(provenance(rows), fontsize="x-small", color="0.35", loc="right")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(edgecolor="0.85")  # framed: its own marks are no measurements
    if isinstance(ax.figure, Figure):
        title = _("{y} against {x}", y=ylabel, x=xlabel) if ylabel else xlabel
        ax.figure.series[ax] = (f"{title} ({provenance(rows)})", *series)
    return set_font(ax)


def curve(name: str, x: Values, y: Values) -> str:
    """A line in words: where it begins and ends, and its highest point if that lies between.

    Examples
    --------
    >>> curve("2 ranks", [1, 2, 3], [5, 4, 2.5])
    '2 ranks: 5 at 1, 2.5 at 3'
    """
    places = sorted({0, max(range(len(y)), key=lambda place: y[place]), len(y) - 1}) if len(y) else []
    points = [_("{y} at {x}", y=number(y[place]), x=number(x[place])) for place in places]
    return _named(name, ", ".join(points))


def cloud(name: str, x: Values, y: Values) -> str:
    """Points in words: the range at each x.

    Examples
    --------
    >>> cloud("measured", [1, 1, 2], [10, 12, 19])
    'measured: 10-12 at 1, 19 at 2'
    """
    ranges = []
    for at in sorted(set(x)):
        values = [value for place, value in zip(x, y, strict=True) if place == at]
        ends = dict.fromkeys(number(value) for value in (min(values), max(values)))
        ranges.append(_("{y} at {x}", y="-".join(ends), x=number(at)))
    return _named(name, ", ".join(ranges))


def number(value: float) -> str:
    """A number to read: three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def provenance(rows: list[dict]) -> str:
    """One line that says where rows come from: their source, the machines, the versions, the day."""
    starts = sorted((row for row in rows if "cpu" in row), key=lambda row: row.get("started", "later"))
    in_part = {row["source"] for row in rows if "source" in row} == {"measured", "emulated"}
    word = _("in part emulated") if in_part else _sources(rows)
    if not starts:
        return word
    machines = dict.fromkeys(map(_machine, starts))
    return f"{word}: {' | '.join(machines)}, {starts[0]['started'][:10]}"


def _sources(rows: list[dict]) -> str:
    """The word for the source of rows, or for each of several."""
    kinds = dict.fromkeys(row["source"] for row in rows if "source" in row)
    return ", ".join(map(source_word, kinds)) if len(kinds) > 1 else source_word(source(rows))


def _machine(row: dict) -> str:
    """What a row says of the machines that it was measured on."""
    cpus = f"{row['cpus']} CPU"
    if row.get("hosts", 1) > 1:
        cpus = _("{cpus} CPU on {hosts} hosts", cpus=row["cpus"], hosts=row["hosts"])
    return f"{row['cpu']}, {cpus}, torch {row['torch']}"


def source_word(kind: str) -> str:
    """A row's ``source``, worded for the reader."""
    words = {
        "measured": _("measured"),
        "emulated": _("emulated"),
        "recorded": _("recorded"),
        "forecast": _("forecast"),
        "formula": _("by formula"),
        "simulated": _("simulated"),
        "mixed": _("of mixed origin"),
        "unknown": _("of unknown origin"),
    }
    return words.get(kind, kind)


def series_name(label: str, rows: list[dict]) -> str:
    """The name of a series, which says so where it wasn't simply measured."""
    kind = source(rows)
    return label if kind == "measured" else f"{label}\n({source_word(kind)})"


def look(place: int) -> dict:
    """Colour, marker and style of a line, by its place among the lines."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": STYLES[place % len(STYLES)],
    }


def points(place: int) -> dict:
    """The same, without a line."""
    return look(place) | {"linestyle": "none"}


def legend_above(ax: Axes, columns: int, of: Iterable[Axes] | None = None) -> Axes:
    """Put the legend, if anything has a label, where it hides nothing; that of these axes, by default its own."""
    named: dict[str, Any] = {}
    for one in (ax,) if of is None else of:
        handles, labels = one.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if named:
        figure: Any = ax.figure
        above = offset_copy(ax.transAxes, figure, y=TITLE_POINTS, units="points")  # of where the data are from
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "bbox_transform": above}
        ax.legend(named.values(), named.keys(), frameon=False, ncols=columns, fontsize="small", **place)
    return set_font(ax)


def set_font(ax: Axes) -> Axes:
    """Give Chinese text a font that has its characters."""
    if language() == "zh" and (font := cjk_font()):
        for text in ax.findobj(Text):
            text.set_fontfamily([plt.rcParams["font.sans-serif"][0], font])
    return ax


def png(shown: matplotlib.figure.Figure) -> bytes:
    """A figure as the bytes of a PNG image."""
    buffer = io.BytesIO()
    shown.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _named(name: str, words: str) -> str:
    return f"{name}: {words}".removeprefix(": ").replace("\n", " ")

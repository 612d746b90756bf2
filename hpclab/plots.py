"""Figures of rows: each takes rows and gives a matplotlib Axes, and says on it where its rows come from.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every series has a marker and a line style as well.
"""

import io
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from hpclab.language import cjk_font, language, translate
from hpclab.rows import source, span

if TYPE_CHECKING:
    from hpclab.laws import Fit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx")


def loss(runs: dict[str, list[dict]], ax: Axes | None = None) -> Axes:
    """Draw the training loss against the seconds of training, a line a run.

    Parameters
    ----------
    runs : dict of str to list of dict
        Rows of `train` by the name to show, such as ``{"2 ranks": run.rows}``.
    ax : matplotlib.axes.Axes, optional
        Where to draw. Default: a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        The loss is the mean over the ranks and over about a fortieth of the steps; zero seconds is the first step's
        start.
    """
    ax = _axes(ax)
    for number, (name, rows) in enumerate(runs.items()):
        seconds, losses = loss_curve(rows)
        ax.plot(seconds, losses, label=_name(name, rows) or None, markevery=max(1, len(losses) // 8), **_look(number))
    return _finish(ax, [row for rows in runs.values() for row in rows], _("seconds of training"), _("training loss"))


def throughput(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw the samples a second of each case: the median, and bars from the smallest to the largest.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.summary`.
    """
    return _bars(rows, "samples_per_s", _("samples a second"), ax)


def speedup(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw the speed-up of each case over the first, beside the ideal: as many times as fast as it uses CPUs.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.summary`.
    """
    ax = _bars(rows, "speedup", _("speed-up over the first"), ax)
    ideal = [row["speedup"] / row["efficiency"] for row in rows]
    return _ideal(ax, ideal)


def efficiency(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw the efficiency of each case, its speed-up divided by the CPUs that it uses; the ideal is 1.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.summary`.
    """
    return _ideal(_bars(rows, "efficiency", _("efficiency"), ax), [1.0] * len(rows))


def law(rows: list[dict], fit: "Fit", forecast: list[dict] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the throughput of a sweep over ranks, and a law with its band.

    The law ends where the measurements end: beyond, it says nothing unless its cause is known. With a forecast, which
    knows one, both go on, and it is seen where they part.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.sweep`: each trial is a point.
    fit : laws.Fit
        As from `scaling.fit`.
    forecast : list of dict, optional
        As from `forecast.Forecast.rows`.
    """
    ax = _axes(ax)
    counts = [row["ranks"] for row in rows]
    most = max([*counts, *(row["ranks"] for row in forecast or ())])
    ax.plot(counts, [row["samples_per_s"] for row in rows], label=source_word(source(rows)), **_points(0))
    n = np.geomspace(min(counts), most, 100)
    low, high = fit.band(n)
    ax.fill_between(n, low, high, color=COLOURS[1], alpha=0.15, linewidth=0)
    ax.plot(n, fit(n), color=COLOURS[1], linestyle="--", label=_("{law} with its band", law=fit.law))
    if forecast:
        at = [row["ranks"] for row in forecast]
        samples = [row["samples_per_s"] * row["step_s"] for row in forecast]
        ends = [[row[name] for row in forecast] for name in ("step_high_s", "step_low_s")]
        low, high = (np.array(samples) / np.array(seconds) for seconds in ends)
        ax.fill_between(at, low, high, color=COLOURS[2], alpha=0.15, linewidth=0)
        ax.plot(at, [row["samples_per_s"] for row in forecast], label=_("forecast"), **_look(2))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    return _finish(ax, rows + (forecast or []), _("ranks"), _("samples a second"))


def forecasts(curves: dict[str, tuple], measured: list[dict] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the efficiency that is forecast for many ranks, a line a case, and the points that were measured.

    Parameters
    ----------
    curves : dict of str to (array, array)
        Ranks and efficiency (throughput of a rank over that of one alone), by the name to show.
    measured : list of dict, optional
        Rows with ``ranks`` and ``efficiency``.
    """
    ax = _axes(ax)
    for number, (name, (ranks, efficiency)) in enumerate(curves.items()):
        ax.plot(ranks, efficiency, label=name, markevery=max(1, len(ranks) // 8), **_look(number))
    if measured:
        points = [[row[name] for row in measured] for name in ("ranks", "efficiency")]
        look: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 11, "linestyle": "none"}
        ax.plot(*points, label=source_word(source(measured)), zorder=5, **look)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, 1.1)
    return _finish(ax, [{"source": "forecast"}, *(measured or [])], _("ranks"), _("efficiency"))


def split(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw where the time of a step goes, a bar a rank.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.split`.
    """
    ax = _axes(ax)
    names = [str(row["rank"]) for row in rows]
    titles = {
        "compute_s": _("computing"),
        "comm_s": _("communication"),
        "straggle_s": _("waiting for others"),
        "data_s": _("data"),
    }
    left = np.zeros(len(rows))
    for number, (measure, title) in enumerate(titles.items()):
        width = np.array([1e3 * row[measure] for row in rows])
        look: dict[str, Any] = {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white"}
        ax.barh(names, width, left=left, label=title, **look)
        for bar, value in enumerate(width):
            if value > 0.05 * max(1e3 * row["step_s"] for row in rows):
                ax.annotate(f"{value:.3g}", (left[bar] + value / 2, bar), ha="center", va="center", color="white")
        left += width
    ax.invert_yaxis()
    _finish(ax, rows, _("milliseconds of a step"), _("rank"))
    return _legend_above(ax, columns=4)


def timeline(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw what every rank does when: a row a rank, and below it its all-reduces.

    Parameters
    ----------
    rows : list of dict
        As from `timeline.spans`.
    """
    ax = _axes(ax)
    titles = {
        "data": _("data"),
        "forward": _("forward"),
        "backward": _("backward"),
        "waiting": _("waiting for others and the network"),
        "optimizer": _("optimiser"),
        "all-reduce": _("all-reduce of a bucket"),
    }
    ranks = sorted({row["rank"] for row in rows})
    for number, (name, title) in enumerate(titles.items()):
        hatch = HATCHES[number % len(HATCHES)]
        look: dict[str, Any] = {"facecolor": COLOURS[number], "hatch": hatch, "edgecolor": "white"}
        for place, rank in enumerate(ranks):
            bars = [
                (1e3 * row["start_s"], 1e3 * row["duration_s"])
                for row in rows
                if row["rank"] == rank and row["name"] == name
            ]
            height = (place + 0.25, 0.2) if name == "all-reduce" else (place - 0.4, 0.6)
            ax.broken_barh(bars, height, label=title if place == 0 else None, linewidth=0.3, **look)
    ax.set_yticks(range(len(ranks)), [_("rank {rank}", rank=rank) for rank in ranks])
    ax.invert_yaxis()
    _finish(ax, rows, _("milliseconds"), "")
    return _legend_above(ax, columns=3)


def allreduce(rows: list[dict], fit: "Fit | None" = None, ax: Axes | None = None) -> Axes:
    """Draw the seconds of all-reduces against their bytes, and the alpha-beta line.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.allreduce`.
    fit : laws.Fit, optional
        As from `laws.fit_alpha_beta`.
    """
    ax = _axes(ax)
    size = np.array([row["nbytes"] for row in rows], dtype=float)
    ax.plot(size, [row["duration_s"] for row in rows], alpha=0.5, label=source_word(source(rows)), **_points(0))
    if fit is not None:
        at = np.geomspace(size.min(), size.max(), 100)
        ax.plot(at, fit(at), color=COLOURS[1], linestyle="--", label=_("alpha + beta x bytes"))
    ax.set_xscale("log")
    ax.set_yscale("log")
    return _finish(ax, rows, _("bytes"), _("seconds of an all-reduce"))


def loss_curve(rows: list[dict], points: int = 40) -> tuple[list[float], list[float]]:
    """Seconds of training and mean loss of a run's rows, in about so many points."""
    steps: dict[int, list[dict]] = {}
    for row in rows:
        if row["kind"] == "step" and row.get("loss") is not None:
            steps.setdefault(row["step"], []).append(row)
    if not steps:
        return [], []
    start, _end = span(rows)
    means = [
        (max(row["time_s"] for row in at) - start, sum(row["loss"] for row in at) / len(at)) for at in steps.values()
    ]
    size = max(1, len(means) // points)
    parts = [means[first : first + size] for first in range(0, len(means), size)]
    return [part[-1][0] for part in parts], [sum(value for _seconds, value in part) / len(part) for part in parts]


def rate(rows: list[dict], ax: Axes, points: int = 40) -> tuple[list[float], list[float]]:
    """Draw what all ranks do a second: samples, or steps where the rows tell none; return seconds and rates."""
    steps = sorted((row for row in rows if row["kind"] == "step"), key=lambda row: row["time_s"])
    counted = "samples" if steps and "samples" in steps[0] else None
    if not steps or steps[-1]["time_s"] <= (first := span(steps)[0]):
        return [], []
    width = (steps[-1]["time_s"] - first) / max(1, min(points, len(steps) // 16))
    sums: dict[int, float] = {}
    for row in steps:
        place = int((row["time_s"] - first - 1e-9) / width)
        sums[place] = sums.get(place, 0.0) + (row[counted] if counted else 1)
    seconds, rates = [(place + 1) * width for place in sums], [total / width for total in sums.values()]
    ax.plot(seconds, rates, **_look(0))
    ax.set_ylim(0)
    _finish(ax, rows, _("seconds of training"), _("samples a second") if counted else _("steps a second, of all ranks"))
    return seconds, rates


def png(shown: Figure) -> bytes:
    """A figure as the bytes of a PNG image."""
    buffer = io.BytesIO()
    shown.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def provenance(rows: list[dict]) -> str:
    """One line that says where rows come from: their source, the machine, the versions, the day."""
    about = next((row for row in rows if "cpu" in row), None)
    if about is None:
        return source_word(source(rows))
    machine = f"{about['cpu']}, {about['cpus']} CPU, torch {about['torch']}, {about['started'][:10]}"
    return f"{source_word(source(rows))}: {machine}"


def source_word(kind: str) -> str:
    """A row's ``source``, worded for the reader."""
    words = {
        "measured": _("measured"),
        "emulated": _("emulated"),
        "recorded": _("recorded"),
        "forecast": _("forecast"),
        "mixed": _("of mixed origin"),
        "unknown": _("of unknown origin"),
    }
    return words.get(kind, kind)


def _bars(rows: list[dict], measure: str, title: str, ax: Axes | None) -> Axes:
    ax = _axes(ax)
    for number, row in enumerate(rows):
        value = row[measure]
        spread = [[value - row[f"{measure}_low"]], [row[f"{measure}_high"] - value]]
        ax.errorbar(number, value, yerr=spread, capsize=6, markersize=8, **_points(number))
        ax.annotate(f"{value:,.4g}", (number, value), xytext=(10, 0), textcoords="offset points", va="center")
    ax.set_xticks(range(len(rows)), [_name(row["label"], [row]) for row in rows])
    ax.set_xlim(-0.5, len(rows) - 0.3)
    ax.set_ylim(0, max(row[f"{measure}_high"] for row in rows) * 1.2)
    repeats = min(row["repeats"] for row in rows)
    return _finish(ax, rows, _("median and range of {repeats} repeats", repeats=repeats), title)


def _ideal(ax: Axes, values: list[float]) -> Axes:
    ax.plot(range(len(values)), values, color="0.5", linestyle=":", marker="_", markersize=18, label=_("ideal"))
    ax.set_ylim(0, max(ax.get_ylim()[1], max(values) * 1.1))
    ax.legend(frameon=False, loc="upper left")
    return _set_font(ax)


def _name(name: str, rows: list[dict]) -> str:
    """The name of a series, which says so where it wasn't simply measured."""
    kind = source(rows)
    return name if kind == "measured" else f"{name}\n({source_word(kind)})"


def _look(number: int) -> dict:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STYLES[number % len(STYLES)],
    }


def _points(number: int) -> dict:
    return _look(number) | {"linestyle": "none"}


def _legend_above(ax: Axes, columns: int) -> Axes:
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns, fontsize="small")
    return _set_font(ax)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    return plt.subplots(figsize=(6.4, 4.0), layout="constrained")[1]


def _finish(ax: Axes, rows: list[dict], xlabel: str, ylabel: str) -> Axes:
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(provenance(rows), fontsize="x-small", color="0.35", loc="right")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False)
    return _set_font(ax)


def _set_font(ax: Axes) -> Axes:
    if language() == "zh" and (font := cjk_font()):
        for text in ax.findobj(Text):
            text.set_fontfamily([plt.rcParams["font.sans-serif"][0], font])
    return ax


def _(message: str, **values: object) -> str:
    """Translate, if this machine has a font for it: figures take English rather than empty boxes."""
    return translate(message, **values) if cjk_font() else message.format(**values)

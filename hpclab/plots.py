"""Figures of rows: each takes rows and gives a matplotlib Axes, and says on it where its rows come from.

Colours are Okabe and Ito's, which colour-blind readers tell apart; every series has a marker and a line style as well.
"""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text

from hpclab.language import cjk_font, language, translate
from hpclab.rows import source, span

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")


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
        look = {name: kind for name, kind in _look(number).items() if name != "linestyle"}
        ax.errorbar(number, value, yerr=spread, capsize=6, linestyle="none", markersize=8, **look)
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

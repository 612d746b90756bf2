"""Figures of rows: each takes rows and gives a matplotlib Axes, and says on it where its rows come from.

Without an `ax` they draw in a `figures.Figure`, which also says what it shows in words.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from hpclab import figures
from hpclab.figures import COLOURS, HATCHES, cloud, curve, finish, look
from hpclab.language import translate_drawn as _
from hpclab.rows import attempts, kept, some, source, span

if TYPE_CHECKING:
    from hpclab.laws import Fit


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
    ax = figures.axes(ax)
    told = []
    for place, (name, rows) in enumerate(runs.items()):
        seconds, losses = loss_curve(rows)
        shown = figures.series_name(name, rows)
        ax.plot(seconds, losses, label=shown or None, markevery=max(1, len(losses) // 8), **look(place))
        told.append(curve(shown, seconds, losses))
    every = [row for rows in runs.values() for row in rows]
    return finish(ax, every, _("seconds of training"), _("training loss"), told)


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
    ax = figures.axes(ax)
    counts = [row["ranks"] for row in some(rows, "trial")]
    most = max([*counts, *(row["ranks"] for row in forecast or ())])
    ax.plot(
        counts, [row["samples_per_s"] for row in rows], label=figures.source_word(source(rows)), **figures.points(0)
    )
    n = np.geomspace(min(counts), most, 100)
    low, high = fit.band(n)
    told = [cloud(figures.source_word(source(rows)), counts, [row["samples_per_s"] for row in rows])]
    told.append(curve(fit.law, n, fit(n)) + _(", its band from {low} to {high}", **_ends(low, high)))
    ax.fill_between(n, low, high, color=COLOURS[1], alpha=0.15, linewidth=0)
    ax.plot(n, fit(n), color=COLOURS[1], linestyle="--", label=_("{law} with its band", law=fit.law))
    if forecast:
        names = ("ranks", "samples_per_s", "samples_per_s_low", "samples_per_s_high")
        at, rates, low, high = (np.array([row[name] for row in forecast]) for name in names)
        ax.fill_between(at, low, high, color=COLOURS[2], alpha=0.15, linewidth=0)
        ax.plot(at, rates, label=_("forecast"), **look(2))
        told.append(curve(_("forecast"), at, rates) + _(", its band from {low} to {high}", **_ends(low, high)))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    return finish(ax, rows + (forecast or []), _("ranks"), _("samples a second"), told)


def forecasts(curves: dict[str, dict], measured: list[dict] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the efficiency that is forecast for many ranks, a line a case, and the points that were measured.

    A line by itself has its band; of several, which would hide each other, the band at the end of each is drawn.

    Parameters
    ----------
    curves : dict of str to dict
        As from `forecast.Forecast.columns`, by the name to show.
    measured : list of dict, optional
        Rows with ``ranks`` and ``efficiency``.
    """
    ax = figures.axes(ax)
    told = []
    for place, (name, found) in enumerate(curves.items()):
        ranks, low, high = (found[column] for column in ("ranks", "efficiency_low", "efficiency_high"))
        style = look(place)
        if len(curves) == 1:
            ax.fill_between(ranks, low, high, color=style["color"], alpha=0.15, linewidth=0)
        else:
            ax.plot([ranks[-1] * 1.08 ** (place + 1)] * 2, [low[-1], high[-1]], color=style["color"], marker="_")
        ax.plot(ranks, found["efficiency"], label=name, markevery=0.12, **style)
        band = _(", its band from {low} to {high}", **_ends(low, high))
        told.append(curve(name, ranks, found["efficiency"]) + band)
    if measured:
        points = [[row[name] for row in measured] for name in ("ranks", "efficiency")]
        star: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 11, "linestyle": "none"}
        word = figures.source_word(source(measured))
        ax.plot(*points, label=word, zorder=5, **star)
        told.append(cloud(word, *points))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, 1.1)
    return finish(ax, [{"source": "forecast"}, *(measured or [])], _("ranks"), _("efficiency"), told)


def split(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw where the time of a step goes, a bar a rank.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.split`.
    """
    ax = figures.axes(ax)
    names = [str(row["rank"]) for row in some(rows, "split")]
    titles = {
        "compute_s": _("computing"),
        "comm_s": _("communication"),
        "straggle_s": _("waiting for others"),
        "data_s": _("data"),
    }
    left = np.zeros(len(rows))
    for place, (measure, title) in enumerate(titles.items()):
        width = np.array([1e3 * (row[measure] or 0.0) for row in rows])
        ax.barh(names, width, left=left, label=title, **_bar(place))
        for bar, value in enumerate(width):
            if value > 0.05 * max(1e3 * row["step_s"] for row in rows):
                ax.annotate(f"{value:.3g}", (left[bar] + value / 2, bar), ha="center", va="center", color="white")
        left += width
    ax.invert_yaxis()
    told = [_shares(row["rank"], {title: row[measure] for measure, title in titles.items()}) for row in rows]
    finish(ax, rows, _("milliseconds of a step"), _("rank"), told)
    return figures.legend_above(ax, columns=4)


def timeline(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw what every rank does when: a row a rank, and below it its all-reduces.

    Parameters
    ----------
    rows : list of dict
        As from `timeline.spans`.
    """
    ax = figures.axes(ax)
    titles = {
        "data": _("data"),
        "forward": _("forward"),
        "backward": _("backward"),
        "waiting": _("waiting for others and the network"),
        "optimizer": _("optimiser"),
        "all-reduce": _("all-reduce of a bucket"),
    }
    ranks = sorted({row["rank"] for row in some(rows, "span")})
    spent: dict[int, dict[str, float]] = {rank: {} for rank in ranks}
    for number, (name, title) in enumerate(titles.items()):
        for place, rank in enumerate(ranks):
            bars = [
                (1e3 * row["start_s"], 1e3 * row["duration_s"])
                for row in rows
                if row["rank"] == rank and row["name"] == name
            ]
            spent[rank][title] = sum(duration for _start, duration in bars) / 1e3
            height = (place + 0.25, 0.2) if name == "all-reduce" else (place - 0.4, 0.6)
            ax.broken_barh(bars, height, label=title if place == 0 else None, linewidth=0.3, **_bar(number))
    ax.set_yticks(range(len(ranks)), [_("rank {rank}", rank=rank) for rank in ranks])
    ax.invert_yaxis()
    finish(ax, rows, _("milliseconds"), "", [_shares(rank, found) for rank, found in spent.items()])
    return figures.legend_above(ax, columns=3)


def recovery(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw how far a run has come, second by second: an attempt a line, and what was lost with each.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.
    """
    ax = figures.axes(ax)
    told = []
    titles = {
        "kept": _("steps that count"),
        "lost": _("steps that were lost"),
        "failure": _("failure"),
        "restart": _("until the next attempt's first step"),
    }  # each is named once
    looks: dict[str, dict[str, Any]] = {
        "kept": look(0) | {"marker": ""},
        "lost": look(1) | {"marker": "", "linewidth": 2.5},
    }
    for row in attempts(rows):
        steps = [(step["time_s"], step["step"] + 1) for step in rows if _is_of_rank_0(step, row["attempt"])]
        done = row["first"] + row["kept"]
        parts = {
            "kept": [point for point in steps if point[1] <= done],
            "lost": [point for point in steps if point[1] >= done] if row["first"] + len(steps) > done else [],
        }
        for name, points in parts.items():
            if len(points) > 1:
                ax.plot(*zip(*points, strict=True), label=titles.pop(name, None), **looks[name])
        lost = row["last"] - row["first"] + 1 - row["kept"]
        about = {"number": row["attempt"] + 1, "first": row["first"], "last": row["last"], "lost": lost}
        words = _("attempt {number}: steps {first} to {last}, {lost} of them lost", **about)
        if row["cause"] is not None:
            ends = row["end_s"], row["end_s"] + row["restart_s"]
            ax.axvspan(*ends, color="0.85", linewidth=0, label=titles.pop("restart", None))
            end: dict[str, Any] = {
                "color": "black",
                "marker": "X",
                "linestyle": "none",
                "label": titles.pop("failure", None),
            }
            ax.plot(row["end_s"], row["last"] + 1, **end)
            words += f" ({row['cause']})"
        told.append(words)
    return finish(ax, rows, _("seconds since the launch"), _("steps done"), told)


def allreduce(rows: list[dict], fit: "Fit | None" = None, ax: Axes | None = None) -> Axes:
    """Draw the seconds of all-reduces against their bytes, and the alpha-beta line.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.allreduce`.
    fit : laws.Fit, optional
        As from `laws.fit_alpha_beta`.
    """
    ax = figures.axes(ax)
    size = np.array([row["nbytes"] for row in some(rows, "allreduce")], dtype=float)
    seconds = [row["duration_s"] for row in rows]
    word = figures.source_word(source(rows))
    ax.plot(size, seconds, alpha=0.5, label=word, **figures.points(0))
    told = [cloud(word, size, seconds)]
    if fit is not None:
        at = np.geomspace(max(1.0, size.min()), max(1.0, size.max()), 100)
        ax.plot(at, fit(at), color=COLOURS[1], linestyle="--", label=_("alpha + beta x bytes"))
        told.append(curve(_("alpha + beta x bytes"), at, fit(at)))
    ax.set_xscale("log" if size.min() > 0 else "symlog")
    ax.set_yscale("log")
    return finish(ax, rows, _("bytes"), _("seconds of an all-reduce"), told)


def loss_curve(rows: list[dict], points: int = 40) -> tuple[list[float], list[float]]:
    """Seconds of training and mean loss of a run's rows, in about so many points."""
    steps: dict[int, list[dict]] = {}
    for row in kept(rows):
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


def rate(rows: list[dict], ax: Axes | None = None, points: int = 40) -> Axes:
    """Draw what all ranks do a second: samples, or steps where the rows tell none; nothing while there is but one."""
    ax = figures.axes(ax)
    steps = sorted((row for row in rows if row["kind"] == "step"), key=lambda row: row["time_s"])
    counted = "samples" if steps and "samples" in steps[0] else None
    if not steps or steps[-1]["time_s"] <= (first := span(steps)[0]):
        return ax
    width = (steps[-1]["time_s"] - first) / max(1, min(points, len(steps) // 16))
    sums: dict[int, float] = {}
    for row in steps:
        place = int((row["time_s"] - first - 1e-9) / width)
        sums[place] = sums.get(place, 0.0) + (row[counted] if counted else 1)
    seconds, rates = [(place + 1) * width for place in sums], [total / width for total in sums.values()]
    ax.plot(seconds, rates, **look(0))
    ax.set_ylim(0)
    title = _("samples a second") if counted else _("steps a second, of all ranks")
    return finish(ax, rows, _("seconds of training"), title, [curve("", seconds, rates)])


def _bars(rows: list[dict], measure: str, title: str, ax: Axes | None) -> Axes:
    ax = figures.axes(ax)
    names = [figures.series_name(row["label"], [row]) for row in some(rows, "summary")]
    told = []
    for place, row in enumerate(rows):
        value, low, high = (row[f"{measure}{end}"] for end in ("", "_low", "_high"))
        ax.errorbar(place, value, yerr=[[value - low], [high - value]], capsize=6, **figures.points(place))
        ax.annotate(figures.number(value), (place, value), xytext=(10, 0), textcoords="offset points", va="center")
        ends = _ends([low], [high])
        told.append(f"{' '.join(names[place].split())}: {figures.number(value)} ({ends['low']}-{ends['high']})")
    ax.set_xticks(range(len(rows)), names)
    ax.set_xlim(-0.5, len(rows) - 0.3)
    ax.set_ylim(0, max(row[f"{measure}_high"] for row in rows) * 1.2)
    repeats = min(row["repeats"] for row in rows)
    return finish(ax, rows, _("median and range of {repeats} repeats", repeats=repeats), title, told)


def _ideal(ax: Axes, values: list[float]) -> Axes:
    ax.plot(range(len(values)), values, color="0.5", linestyle=":", marker="_", markersize=18, label=_("ideal"))
    ax.set_ylim(0, max(ax.get_ylim()[1], max(values) * 1.1))
    ax.legend(frameon=False, loc="upper left")
    return figures.set_font(ax)


def _is_of_rank_0(row: dict, attempt: int) -> bool:
    """Whether a row is a step of an attempt's rank 0."""
    return row["kind"] == "step" and (row["attempt"], row["rank"]) == (attempt, 0)


def _bar(place: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[place], "hatch": HATCHES[place % len(HATCHES)], "edgecolor": "white"}


def _ends(low: Any, high: Any) -> dict[str, str]:
    """Where a band ends, for a caption."""
    return {"low": figures.number(low[-1]), "high": figures.number(high[-1])}


def _shares(rank: int, spent: dict[str, float]) -> str:
    """What a rank's seconds went into, for a caption."""
    told = ", ".join(f"{title} {figures.number(1e3 * seconds)} ms" for title, seconds in spent.items() if seconds)
    return f"{_('rank {rank}', rank=rank)}: {told}"

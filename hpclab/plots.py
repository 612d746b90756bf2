"""Figures of rows: each takes rows and gives a matplotlib Axes, and says on it where its rows come from.

Without an `ax` they draw in a `figures.Figure`, which also says what it shows in words. Those that
one notebook draws are in `course.plots`, and can be had here, too.
"""

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter

from hpclab import MOVED_NAMES, figures, later
from hpclab.figures import COLOURS, HATCHES, Values, cloud, curve, finish, look
from hpclab.language import translate_drawn as _
from hpclab.rows import attempts, grouped, kept, some, source, span

if TYPE_CHECKING:
    from hpclab.laws import LawFit

JOBS = 40
"""Jobs that a Gantt chart has room for."""
MEASURES = ("step", "time_s", "step_s", "data_s", "compute_s", "wait_s", "cpu_s", "samples", "loss")
"""What figures and tables of steps compute with."""
LARGEST = 1e300
"""Beyond, matplotlib's own arithmetic overflows."""

__getattr__ = later(__name__, MOVED_NAMES[__name__])


def loss(runs: dict[str, list[dict]], ax: Axes | None = None, *, ghosts: dict[str, list[dict]] | None = None) -> Axes:
    """Draw the training loss against the seconds of training, a line a run.

    Parameters
    ----------
    runs : dict of str to list of dict
        Rows of `train` by the name to show, such as ``{"2 ranks": run.rows}``.
    ax : matplotlib.axes.Axes, optional
        Where to draw. Default: a new figure.
    ghosts : dict of str to list of dict, optional
        Runs to draw in grey, behind the others.

    Returns
    -------
    matplotlib.axes.Axes
        The loss is the mean over the ranks and over about a fortieth of the steps; zero seconds is the first step's
        start. Where a run failed and went on, its line has a gap, and its failures and checkpoints are marked.
    """
    ax = figures.axes(ax)
    looks = [(name, rows, look(place)) for place, (name, rows) in enumerate(runs.items())]
    looks += [(name, rows, {"color": "0.7", "zorder": 1}) for name, rows in (ghosts or {}).items()]
    words = []
    for name, rows, style in looks:
        seconds, losses = loss_curve(rows)
        shown = figures.series_name(name, rows) if name else ""
        gaps = _gaps(rows)
        ax.plot(*_parted(seconds, losses, gaps), label=shown or None, markevery=max(1, len(losses) // 8), **style)
        words.append(curve(shown, seconds, losses) + _draw_failures(ax, rows, (seconds, losses), gaps))
    every = [row for rows in runs.values() for row in rows]
    return finish(ax, every, _("seconds of training"), _("training loss"), words)


def _gaps(rows: list[dict]) -> list[tuple[float, float]]:
    """When a run had failed and not gone on yet, on the clock of its `loss_curve`."""
    if not any(row["kind"] == "restart" and "cause" in row for row in rows):
        return []
    start, _end = span(rows)
    failed = [row for row in attempts(rows) if row["restart_s"]]
    return [(row["end_s"] - start, row["end_s"] + row["restart_s"] - start) for row in failed]


def _parted(seconds: list[float], losses: list[float], gaps: list[tuple[float, float]]) -> tuple[list, list]:
    """A curve that isn't drawn across gaps."""
    points = sorted([*zip(seconds, losses, strict=True), *((begin, math.nan) for begin, _end in gaps)])
    return [second for second, _loss in points], [loss for _second, loss in points]


def _draw_failures(ax: Axes, rows: list[dict], drawn: tuple, gaps: list[tuple[float, float]]) -> str:
    """Mark on a loss curve where its run failed, until when, and its checkpoints; return that in words."""
    if not gaps:
        return ""
    seconds, losses = drawn
    known = ax.get_legend_handles_labels()[1]  # each is named once
    failure, pause, saved = (
        None if title in known else title for title in (_("failure"), _("until it went on"), _("checkpoint"))
    )
    for number, (begin, end) in enumerate(gaps):
        ax.axvspan(begin, end, color="0.75", linewidth=0, zorder=0, label=None if number else pause)
        height = losses[max((place for place, second in enumerate(seconds) if second <= begin), default=0)]
        mark: dict[str, Any] = {"color": "black", "marker": "X", "linestyle": "none", "markersize": 9, "zorder": 5}
        ax.plot(begin, height, label=None if number else failure, **mark)
    start, _end = span(rows)
    at = [row["time_s"] - start for row in rows if row["kind"] == "checkpoint"]
    ax.plot(at, [0.015] * len(at), "|", color="0.4", transform=ax.get_xaxis_transform(), label=saved)
    spans = ", ".join(f"{figures.number(begin)}-{figures.number(end)}" for begin, end in gaps)
    return _("; failed and went on at {spans} s", spans=spans)


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
    ideal = [row["speedup"] / row["efficiency"] for row in _cases(rows)]
    return _ideal(ax, ideal)


def efficiency(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw the efficiency of each case, its speed-up divided by the CPUs that it uses; the ideal is 1.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.summary`.
    """
    return _ideal(_bars(rows, "efficiency", _("efficiency"), ax), [1.0] * len(_cases(rows)))


def law(rows: list[dict], fit: "LawFit", forecast: list[dict] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the throughput of a sweep over ranks, and a law with its band.

    The law ends where the measurements end: beyond, it says nothing unless its cause is known. With a forecast, which
    knows one, both go on, and it is seen where they part.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.sweep`: each trial is a point.
    fit : laws.LawFit
        As from `scaling.fit`.
    forecast : list of dict, optional
        As from `forecast.Forecast.rows`.
    """
    ax = figures.axes(ax)
    rows = sorted(some(rows, "trial"), key=lambda row: (row["ranks"], row["samples_per_s"]))
    forecast = sorted(some(forecast, "forecast"), key=lambda row: row["ranks"]) if forecast else []
    counts = [row["ranks"] for row in rows]
    words = [_cloud(ax, rows, counts, [row["samples_per_s"] for row in rows])]
    n = np.geomspace(min(counts), max([*counts, *(row["ranks"] for row in forecast)]), 100)
    band = draw_band(ax, n, *fit.band(n), 1)
    ax.plot(n, fit(n), color=COLOURS[1], linestyle="--", label=_("{law} with its band", law=fit.law))
    words.append(curve(fit.law, n, fit(n)) + band)
    if forecast:
        names = ("ranks", "samples_per_s", "samples_per_s_low", "samples_per_s_high")
        at, rates, low, high = (np.array([row[name] for row in forecast]) for name in names)
        band = draw_band(ax, at, low, high, 2)
        words.append(_line(ax, _("forecast"), at, rates, **look(2)) + band)
    logarithmic(ax, "{x:g}", "{x:,.0f}", base=2)
    return finish(ax, rows + forecast, _("ranks"), _("samples a second"), words)


def forecasts(curves: dict[str, dict], measured: list[dict] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the efficiency that is forecast for many ranks, a line a case, and the points that were measured.

    A line by itself has its band; of several, which would hide each other, the band at the end of each is drawn. Bands
    end at 1, which no forecast exceeds.

    Parameters
    ----------
    curves : dict of str to dict
        As from `forecast.Forecast.columns`, by the name to show.
    measured : list of dict, optional
        Rows with ``ranks`` and ``efficiency``.
    """
    ax = figures.axes(ax)
    words = []
    for place, (name, columns) in enumerate(curves.items()):
        ranks = columns["ranks"]
        low, high = (np.minimum(columns[f"efficiency_{end}"], 1.0) for end in ("low", "high"))
        style = look(place)
        if len(curves) == 1:
            band = draw_band(ax, ranks, low, high, place)
        else:
            ax.plot([ranks[-1] * 1.08 ** (place + 1)] * 2, [low[-1], high[-1]], color=style["color"], marker="_")
            band = _ends(low, high)
        words.append(_line(ax, name, ranks, columns["efficiency"], markevery=0.12, **style) + band)
    if measured:
        star: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 11, "linestyle": "none", "zorder": 5}
        points = [[row[name] for row in measured] for name in ("ranks", "efficiency")]
        words.append(_cloud(ax, measured, *points, **star))
    logarithmic(ax, "{x:g}", base=2)
    ax.set_ylim(0, 1.1)
    return finish(ax, [{"source": "forecast"}, *(measured or [])], _("ranks"), _("efficiency"), words)


def split(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw where the time of a step goes, a bar a rank.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.split`.
    """
    ax = figures.axes(ax)
    rows = sorted(some(rows, "split"), key=lambda row: row["rank"])
    names = [str(row["rank"]) for row in rows]
    titles = {
        "compute_s": _("computing"),
        "comm_s": _("communication"),
        "straggle_s": _("waiting for others") if len(rows) > 1 else _("waiting for a CPU"),
        "data_s": _("data"),
    }
    starts, longest = np.zeros(len(rows)), max(1e3 * row["step_s"] for row in rows)
    for place, (measure, title) in enumerate(titles.items()):
        width = np.array([1e3 * (row[measure] or 0.0) for row in rows])
        ax.barh(names, width, left=starts, label=title, **_bar(place))
        for bar, value in enumerate(width):
            if value > 0.05 * longest:
                ax.annotate(f"{value:.3g}", (starts[bar] + value / 2, bar), ha="center", va="center", color="white")
        starts += width
    ax.invert_yaxis()
    words = [_shares(row["rank"], {title: row[measure] for measure, title in titles.items()}) for row in rows]
    finish(ax, rows, _("milliseconds of a step"), _("rank"), words)
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
    rows = some(rows, "span")
    ranks = draw_tracks(ax, rows, "rank", "name", titles, below="all-reduce")
    words = [
        _shares(rank, {title: sum(duration for _start, duration in bars[name]) for name, title in titles.items()})
        for rank, bars in ranks.items()
    ]
    ax.set_yticks(range(len(ranks)), [_("rank {rank}", rank=rank) for rank in ranks])
    finish(ax, rows, _("milliseconds"), "", words)
    return figures.legend_above(ax, columns=3)


def timelines(stacked: Iterable[list[dict]], height: float = 2.3) -> None:
    """Draw timelines one below the other, on the same scale, below one legend.

    Parameters
    ----------
    stacked : iterable of lists of dict
        Each as for `timeline`.
    height : float, default 2.3
        Inches of each.
    """
    stacked = list(stacked)
    _shown, axes = figures.subplots(len(stacked), 1, size=(8, height * len(stacked)))
    for ax, rows in zip(axes, stacked, strict=True):
        timeline(rows, ax)
        ax.get_legend().remove()
        ax.set_xlim(0, 1e3 * max(row["start_s"] + row["duration_s"] for rows in stacked for row in rows))
    figures.legend_above(axes[0], columns=3, of=list(axes))


def gantt(jobs: list[dict], ax: Axes | None = None, now: float | None = None) -> Axes:
    """Draw when each job of a queue waited (a thin line), and when and on which nodes it ran (a bar).

    Parameters
    ----------
    jobs : list of dict
        As from ``Slurm.jobs()``; the newest `JOBS` are shown, by their number.
    now : float, optional
        Seconds since the epoch up to which jobs that have not ended are drawn. Default: this moment.
    """
    ax = figures.axes(ax)
    jobs = sorted(jobs, key=lambda job: job["job"])[-JOBS:]
    jobs.sort(key=_place)
    now = time.time() if now is None else now
    first = min((job["submitted_s"] for job in jobs), default=now)
    nodes = sorted({job["nodes"] for job in jobs if job["nodes"]})
    names = [f"{job.get('array') or job['job']} {job['name']}" for job in jobs]
    words = []
    for line, (job, name) in enumerate(zip(jobs, names, strict=True)):
        end = now if job["ended_s"] is None else job["ended_s"]
        start = end if job["started_s"] is None else job["started_s"]
        submitted, start, end = (moment - first for moment in (job["submitted_s"], start, end))
        ax.plot([submitted, start], [line, line], color="0.5", linewidth=1.5, label=None if line else _("waits"))
        values = {"job": name, "seconds": figures.number(start - submitted)}
        if job["started_s"] is None:
            words.append(_("{job}: waited {seconds} s", **values))
            continue
        _ran(ax, line, start, end, job, nodes.index(job["nodes"]))
        values |= {"state": job["state"], "ran": figures.number(end - start), "nodes": job["nodes"]}
        words.append(_("{job}: waited {seconds} s, ran {ran} s on {nodes} ({state})", **values))
    ax.set_yticks(range(len(jobs)), names, fontsize="small")
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    return figures.legend_above(finish(ax, jobs, _("seconds since the first was submitted"), _("job"), words), 1)


def _place(job: dict) -> tuple[int, int]:
    """Of a job among others: tasks of an array by their numbers, of which Slurm gives the last one the array's own."""
    array, _underscore, task = (job.get("array") or str(job["job"])).partition("_")
    return int(array), int(task) if task.isdecimal() else -1


def _ran(ax: Axes, line: int, start: float, end: float, job: dict, place: int) -> None:
    """A bar for the time in which a job ran; its look says where, and so does its label, with dots if it still runs."""
    style: dict[str, Any] = {
        "facecolor": COLOURS[place % len(COLOURS)],
        "hatch": HATCHES[place // len(COLOURS) % len(HATCHES)],
        "alpha": 0.6 if job["ended_s"] is None else 1.0,
    }
    ax.barh(line, end - start, left=start, height=0.7, edgecolor="0.2", **style)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    label: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": "small", "bbox": box}
    ax.annotate(job["nodes"] + (" ..." if job["ended_s"] is None else ""), (end, line), (4, 0), **label)


def allreduce(rows: list[dict], fit: "LawFit | None" = None, ax: Axes | None = None) -> Axes:
    """Draw the milliseconds of all-reduces against their bytes, and the alpha-beta line.

    Parameters
    ----------
    rows : list of dict
        As from `scaling.allreduce`.
    fit : laws.LawFit, optional
        As from `laws.fit_alpha_beta`.
    """
    ax = figures.axes(ax)
    rows = sorted(some(rows, "allreduce"), key=lambda row: (row["nbytes"], row["duration_s"]))
    size = np.array([row["nbytes"] for row in rows], dtype=float)
    words = [_cloud(ax, rows, size, [1e3 * row["duration_s"] for row in rows], alpha=0.5)]
    if fit is None:
        ax.get_lines()[0].set_label("")  # points by themselves need no legend: the title says their source
    else:
        at = np.geomspace(max(1.0, size.min()), max(1.0, size.max()), 100)
        words.append(_line(ax, _("alpha + beta x bytes"), at, 1e3 * fit(at), color=COLOURS[1], linestyle="--"))
    ax.set_xscale("log" if size.min() > 0 else "symlog")
    logarithmic(ax, "", "{x:g}")
    return finish(ax, rows, _("bytes"), _("milliseconds of an all-reduce"), words)


def ratios(rows: list[dict], label: str, ax: Axes | None = None) -> Axes:
    """Ratios with their intervals, one below the other; rows are those of `ratios.paired`.

    Parameters
    ----------
    label : str
        What is over what.
    """
    ax = figures.subplots(size=(6.4, 0.8 + 0.6 * len(rows)))[1] if ax is None else ax
    for place, row in enumerate(rows):
        ends = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        ax.errorbar(row["ratio"], place, xerr=ends, capsize=4, **figures.points(0))
    ax.set_yticks(range(len(rows)), [row["measure"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.axvline(1, color="black", linestyle=":")
    words = [f"{row['measure']}: {row['ratio']:.4g} ({row['low']:.4g}-{row['high']:.4g})" for row in rows]
    return finish(ax, rows, label, "", words)


class _Drawable(list):
    """Rows that `drawable` has been through."""


def drawable(rows: list[dict]) -> list[dict]:
    """Rows as figures and tables need them, since functions report what they like.

    A measure of a step that is no number, or (but for the loss) an infinite one or NaN, becomes None; a step that
    doesn't say when it was isn't among them. The loss stays NaN: that it was is worth seeing.
    """
    if isinstance(rows, _Drawable):
        return rows
    return _Drawable(tidy for row in rows if (tidy := _tidy(row)) is not None)


def _tidy(row: dict) -> dict | None:
    is_step = row["kind"] == "step"
    odd = [
        name
        for name in (MEASURES if is_step else ("step",))
        if (value := row.get(name)) is not None
        and not (value.__class__ in (int, float) and -LARGEST < value < LARGEST)  # the usual case: rows are many
        and not _usable(name, value)
    ]
    if odd:
        row = row | dict.fromkeys(odd)
    return None if is_step and row.get("time_s") is None else row


def _usable(name: str, value: Any) -> bool:
    """Whether a measure is a number that figures can draw."""
    if not isinstance(value, int | float):
        return False
    return -LARGEST < value < LARGEST or (name == "loss" and isinstance(value, float) and not math.isfinite(value))


def loss_curve(rows: list[dict], points: int = 40) -> tuple[list[float], list[float]]:
    """Seconds of training and mean loss of a run's rows, in about so many points."""
    rows = drawable(rows)
    steps: dict[Any, list[dict]] = {}
    for number, row in enumerate(kept(rows)):
        if row["kind"] == "step" and row.get("loss") is not None:
            step = row.get("step")
            steps.setdefault(("row", number) if step is None else step, []).append(row)  # one without is a point
    if not steps:
        return [], []
    start, _end = span(rows)
    means = sorted(
        (max(row["time_s"] for row in at) - start, sum(sorted(row["loss"] for row in at)) / len(at))
        for at in steps.values()
    )
    size = max(1, len(means) // points)
    parts = [means[first : first + size] for first in range(0, len(means), size)]
    return [part[-1][0] for part in parts], [sum(value for _seconds, value in part) / len(part) for part in parts]


def rate(rows: list[dict], ax: Axes | None = None, points: int = 40) -> Axes:
    """Draw what all ranks do a second: samples, or steps where the rows tell none; nothing while there is but one."""
    ax = figures.axes(ax)
    rows = drawable(rows)
    steps = sorted((row for row in rows if row["kind"] == "step"), key=lambda row: row["time_s"])
    counted = "samples" if steps and steps[0].get("samples") is not None else None
    if not steps or steps[-1]["time_s"] <= (first := span(steps)[0]):
        return ax
    width = (steps[-1]["time_s"] - first) / max(1, min(points, len(steps) // 16))
    sums: dict[int, float] = {}
    for row in steps:
        place = int((row["time_s"] - first) / width * (1 - 1e-9))  # the last step belongs to the last part
        sums[place] = sums.get(place, 0.0) + ((row.get(counted) or 0) if counted else 1)
    seconds, rates = [(place + 1) * width for place in sums], [total / width for total in sums.values()]
    words = [_line(ax, "", seconds, rates, **look(0))]
    ax.set_ylim(0, 1.1 * max(rates) or 1)
    title = _("samples a second") if counted else _("steps a second, of all ranks")
    return finish(ax, rows, _("seconds of training"), title, words)


def _bars(rows: list[dict], measure: str, title: str, ax: Axes | None) -> Axes:
    ax = figures.axes(ax)
    rows = _cases(rows)
    names = [figures.series_name(row["label"], [row]) for row in rows]
    words = []
    for place, row in enumerate(rows):
        value, low, high = (row[f"{measure}{end}"] for end in ("", "_low", "_high"))
        ax.errorbar(place, value, yerr=[[value - low], [high - value]], capsize=6, **figures.points(place))
        ax.annotate(figures.number(value), (place, value), xytext=(10, 0), textcoords="offset points", va="center")
        value, low, high = map(figures.number, (value, low, high))
        words.append(f"{' '.join(names[place].split())}: {value} ({low}-{high})")
    ax.set_xticks(range(len(rows)), names)
    ax.set_xlim(-0.5, len(rows) - 0.3)
    ax.set_ylim(0, max(row[f"{measure}_high"] for row in rows) * 1.2)
    repeats = min(row["repeats"] for row in rows)
    return finish(ax, rows, _("median and range of {repeats} repeats", repeats=repeats), title, words)


def _cases(rows: list[dict]) -> list[dict]:
    """Rows of kind "summary", as their sweep had them: its first case is the baseline."""
    return sorted(some(rows, "summary"), key=lambda row: row.get("case", 0))


def _ideal(ax: Axes, values: list[float]) -> Axes:
    ax.plot(range(len(values)), values, color="0.5", linestyle=":", marker="_", markersize=18, label=_("ideal"))
    ax.set_ylim(0, max(ax.get_ylim()[1], max(values) * 1.1))
    ax.legend(frameon=False, loc="upper left")
    return figures.set_font(ax)


def _bar(place: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[place], "hatch": HATCHES[place % len(HATCHES)], "edgecolor": "white"}


def _line(ax: Axes, name: str, x: Values, y: Values, **style: Any) -> str:
    """Draw a line, and say in words what it shows."""
    ax.plot(x, y, label=name or None, **style)
    return curve(name, x, y)


def _cloud(ax: Axes, rows: list[dict], x: Values, y: Values, **style: Any) -> str:
    """Draw what rows have measured, by the name of their source, and say it in words."""
    word = figures.source_word(source(rows))
    ax.plot(x, y, label=word, **figures.points(0) | style)
    return cloud(word, x, y)


def draw_band(ax: Axes, x: Values, low: Values, high: Values, place: int) -> str:
    """Draw a band, in the colour of the line at this place, and say where it ends."""
    ax.fill_between(x, low, high, color=COLOURS[place], alpha=0.3, linewidth=0)
    return _ends(low, high)


def _ends(low: Values, high: Values) -> str:
    return _(", its band from {low} to {high}", low=figures.number(low[-1]), high=figures.number(high[-1]))


def logarithmic(ax: Axes, x: str, y: str = "", base: float = 10) -> None:
    """Give axes a logarithmic scale with numbers of these formats; `base` is that of the first.

    Of less than two decades, 2 and 5 times the powers of ten have numbers, too.
    """
    if x:
        ax.set_xscale("log", base=base)
        _number(ax.xaxis, x, ax.get_xlim(), base)
    if y:
        ax.set_yscale("log")
        _number(ax.yaxis, y, ax.get_ylim())


def _number(axis: Axis, form: str, limits: tuple[float, float], base: float = 10) -> None:
    """Put numbers of this format on a logarithmic axis with these limits."""
    low, high = limits
    axis.set_major_locator(LogLocator(base, (1, 2, 5) if base == 10 and high < 100 * low else (1,)))
    axis.set_major_formatter(form)
    axis.set_minor_formatter(NullFormatter())


def draw_tracks(
    ax: Axes, rows: list[dict], owner: str, kind: str, titles: dict[str, str], below: str = ""
) -> dict[Any, dict]:
    """Draw a track of bars in time for each owner, such as a rank; those of the kind `below` are narrow.

    Returns (start, seconds) of each bar, by owner and kind.
    """
    owners = {
        number: {name: [(row["start_s"], row["duration_s"]) for row in own if row[kind] == name] for name in titles}
        for number, own in grouped(sorted(rows, key=lambda row: row["start_s"]), owner).items()
    }
    for number, (name, title) in enumerate(titles.items()):
        named = False  # each kind once
        for place, kinds in enumerate(owners.values()):
            if bars := [(1e3 * start, 1e3 * seconds) for start, seconds in kinds[name]]:
                height = (place + 0.25, 0.2) if name == below else (place - 0.4, 0.6 if below else 0.8)
                ax.broken_barh(bars, height, label=None if named else title, linewidth=0.3, **_bar(number))
                named = True
    ax.invert_yaxis()
    return owners


def _shares(rank: int, seconds: dict[str, float]) -> str:
    """What a rank's seconds went into, for a caption."""
    spent = {title: figures.number(1e3 * seconds) for title, seconds in seconds.items() if seconds}
    return f"{_('rank {rank}', rank=rank)}: {', '.join(f'{title} {ms} ms' for title, ms in spent.items())}"

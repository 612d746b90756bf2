"""Figures that one notebook draws, as those of `hpclab.plots`, from where they can be had, too."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hpclab import figures
from hpclab.figures import COLOURS, cloud, curve, finish, look
from hpclab.language import translate_drawn as _
from hpclab.plots import draw_band, draw_tracks, logarithmic
from hpclab.rows import attempts, some

if TYPE_CHECKING:
    from hpclab.laws import LawFit


def tasks(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw what each worker did when: a bar a task.

    Parameters
    ----------
    rows : list of dict
        As from `tasks.spans`.
    """
    ax = figures.axes(ax)
    titles = {"compute": _("computing"), "transfer": _("fetching what a task needs")}
    rows = some(rows, "task")
    workers = draw_tracks(ax, rows, "worker", "action", titles)
    words = []
    for worker, bars in workers.items():
        busy = figures.number(1e3 * sum(duration for _start, duration in bars["compute"]))
        line = _(
            "worker {worker}: computing for {busy} ms, tasks: {tasks}",
            worker=worker,
            busy=busy,
            tasks=len(bars["compute"]),
        )
        words.append(line)
    ax.set_yticks(range(len(workers)), [_("worker {worker}", worker=worker) for worker in workers])
    finish(ax, rows, _("milliseconds"), "", words)
    return figures.legend_above(ax, columns=2)


def memory(rows: list[dict], limit_bytes: float, ax: Axes | None = None) -> Axes:
    """Draw what fills the memory of the rank that needs most, a bar a layout, and the memory that a GPU has.

    Parameters
    ----------
    rows : list of dict
        As from `forecast.plan`, the best first.
    limit_bytes : float
        Memory of a GPU.
    """
    ax, rows = figures.axes(ax), some(rows, "plan")
    names = [f"{place}. dp {row['dp']}, tp {row['tp']}, pp {row['pp']}" for place, row in enumerate(rows, 1)]
    words = _stacks(ax, names, [{part: row[f"{part}_bytes"] / 1e9 for part in _PARTS} for row in rows])
    ax.axvline(limit_bytes / 1e9, color="black", linestyle="--", label=_("memory of a GPU"))
    finish(ax, rows, _("GB of the fullest rank"), "", words)
    return figures.legend_above(ax, columns=3)


def needs(rows: list[dict]) -> Axes:
    """Draw what fills a rank's memory by formula, a bar a strategy, and the peak that was measured.

    Parameters
    ----------
    rows : list of dict
        Of kind "need", with ``strategy``, ``peak_mb``, and the MB of each part (``weights_mb``, ...).
    """
    rows = some(rows, "need")
    ax = figures.subplots(size=(9, 1.4 + 0.32 * len(rows)))[1]
    names = [row["strategy"] for row in rows]
    words = _stacks(ax, names, [{part: row[f"{part}_mb"] for part in _PARTS} for row in rows])
    peaks = [row["peak_mb"] for row in rows]
    ax.plot(peaks, names, label=_("measured peak"), **figures.points(0) | {"color": "black", "markersize": 8})
    words = [f"{line}, {_('measured peak')} {figures.number(peak)}" for line, peak in zip(words, peaks, strict=True)]
    finish(ax, rows, _("MB of the fullest rank"), "", words)
    return figures.legend_above(ax, columns=3)


_PARTS = ("weights", "gradients", "optimiser", "activations", "buffers")


def _stacks(ax: Axes, names: list[str], stacks: list[dict[str, float]]) -> list[str]:
    """Draw horizontal bars, each of the same parts, the first on top; what they show in words, a line a bar."""
    titles = {
        "weights": _("weights"),
        "gradients": _("gradients"),
        "optimiser": _("optimiser"),
        "activations": _("activations"),
        "buffers": _("buffers"),
    }
    starts = np.zeros(len(names))
    for place, (part, title) in enumerate(titles.items()):
        sizes = [stack[part] for stack in stacks]
        hatch = figures.HATCHES[place % len(figures.HATCHES)]
        ax.barh(names, sizes, left=starts, label=title, color=COLOURS[place], hatch=hatch, edgecolor="white")
        starts += sizes
    ax.invert_yaxis()
    return [
        f"{name}: " + ", ".join(f"{title} {figures.number(stack[part])}" for part, title in titles.items())
        for name, stack in zip(names, stacks, strict=True)
    ]


def schedule(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw what each rank of a simulated cluster did in which step: computing and waiting, below them its messages.

    Parameters
    ----------
    rows : list of dict
        Those of a `simulated.Schedule`.
    """
    rows = some(rows, "action")
    ranks = range(rows[0]["ranks"])
    titles = {"compute": _("computing"), "wait": _("waiting"), "send": _("sending to"), "receive": _("receiving from")}
    lanes = {"compute": (-0.42, 0.36), "wait": (-0.42, 0.36), "send": (-0.04, 0.22), "receive": (0.2, 0.22)}
    last = max(row["start"] + row["steps"] for row in rows)
    edge = [withStroke(linewidth=2.5, foreground="white")]  # a box would hide short bars
    ax = figures.subplots(size=(8, 1.2 + 0.6 * len(ranks)))[1] if ax is None else ax
    for place, (action, title) in enumerate(titles.items()):
        style: dict[str, Any] = {
            "facecolor": (*COLOURS[:1], "0.65", *COLOURS[1:3])[place],
            "hatch": ("", "..", "/", "\\")[place],
        }
        own = [row for row in rows if row["action"] == action]
        for number, row in enumerate(own):
            low, height = lanes[action]
            bar = [(row["start"], row["steps"])], (row["rank"] + low, height)
            ax.broken_barh(*bar, edgecolor="white", linewidth=1.5, label=None if number else title, **style)
            text = {"compute": row.get("label", ""), "wait": "", "send": f"→{row.get('peer')}"}
            said = text.get(action, f"←{row.get('peer')}")
            if said and row["steps"] * 80 >= last * len(said):  # else it has no room
                middle = row["start"] + row["steps"] / 2, row["rank"] + low + height / 2
                ax.text(*middle, said, ha="center", va="center", fontsize="small", path_effects=edge)
    ax.set_yticks(ranks, [_("rank {rank}", rank=rank) for rank in ranks])
    ax.set_ylim(ranks[-1] + 0.5, ranks[0] - 0.5)
    ax.set_xlim(0, last)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(ax, rows, _("step"), "", [_spent(rank, rows) for rank in ranks])
    return figures.legend_above(ax, columns=4)


def _spent(rank: int, rows: list[dict]) -> str:
    """What a rank of a simulated cluster did, in words."""
    own = [row for row in rows if row["rank"] == rank]
    steps = {action: sum(row["steps"] for row in own if row["action"] == action) for action in ("compute", "wait")}
    messages = {action: sum(row["action"] == action for row in own) for action in ("send", "receive")}
    end = max((row["start"] + row["steps"] for row in own), default=0)
    return _(
        "rank {rank}: computes {compute} steps, waits {wait}; sends {send} messages, receives {receive}; ends at {end}",
        rank=rank,
        end=end,
        **steps,
        **messages,
    )


def grain(rows: list[dict], fit: "LawFit", unseen: list[dict] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the seconds of the same work against the size of its tasks, and a law with its band and its knee.

    Parameters
    ----------
    rows : list of dict
        As from `tasks.sweep`.
    fit : laws.LawFit
        As from `laws.fit_alpha_beta`, of the seconds against the number of tasks. Its knee is where handing out takes
        as long as all the rest.
    unseen : list of dict, optional
        Rows that the law hasn't seen, to look whether it foretells them.
    """
    ax = figures.axes(ax)
    rows = sorted(some(rows, "grain"), key=lambda row: (row["tasks"], row["duration_s"]))
    unseen = some(unseen, "grain") if unseen else []
    if len(works := {row["items"] for row in [*rows, *unseen]}) > 1:
        raise ValueError(f"rows are of different work (items: {sorted(works)}); draw those of one size.")
    items, words = works.pop(), []
    for place, (word, some_rows) in enumerate({_("measured"): rows, _("not used for the law"): unseen}.items()):
        if some_rows:
            sizes, seconds = zip(*((items / row["tasks"], row["duration_s"]) for row in some_rows), strict=True)
            ax.plot(sizes, seconds, alpha=0.7, label=word, **figures.points(place))
            words.append(cloud(word, sizes, seconds))
    n = np.geomspace(max(2, min(fit.n)), max(row["tasks"] for row in rows + unseen), 100)
    band = draw_band(ax, items / n, *fit.band(n, new=True), 2)
    ax.plot(items / n, fit(n), color=COLOURS[2], label=_("alpha + beta x tasks, and its band for one more run"))
    words.append(curve(_("the law"), items / n, fit(n)) + band)
    knee = items * fit.values["beta"] / fit.values["alpha"] if fit.values["alpha"] else float("inf")
    if knee < items:
        ax.axvline(knee, color="black", linestyle=":", label=_("handing out takes as long as working"))
        words.append(_("handing out takes as long as working: tasks of {knee}", knee=figures.number(knee)))
    logarithmic(ax, "{x:,g}", "{x:g}")
    finish(ax, rows, _("items in a task"), _("seconds for all"), words)
    return figures.legend_above(ax, columns=1)


def roofline(rows: list[dict], ceiling: dict, ax: Axes | None = None) -> Axes:
    """Draw the rate of operations against their intensity, below the two ceilings of this machine.

    Parameters
    ----------
    rows : list of dict
        As from `roofline.measure`.
    ceiling : dict
        As from `roofline.ceilings`, with as many threads.
    """
    ax = figures.subplots(size=(8, 4.2))[1] if ax is None else ax
    peak, bandwidth, ridge = ceiling["flops_per_s"], ceiling["bytes_per_s"], ceiling["ridge"]
    rows = some(rows, "roofline")
    intensities = [*(row["intensity"] for row in rows), ridge]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 4, 200)
    label = _("the lower of the two ceilings")
    ax.plot(x, np.minimum(peak, bandwidth * x) / 1e9, color="black", label=label)
    ax.axvline(ridge, color="0.5", linestyle=":", label=_("ridge"))
    values = {"peak": figures.number(peak / 1e9), "bandwidth": figures.number(bandwidth / 1e9)}
    words = [_("ceilings: {peak} Gflop/s and {bandwidth} GB/s", **values) + f", {_('ridge')} {figures.number(ridge)}"]
    for place, row in enumerate(rows):
        rate, roof = row["flops_per_s"], min(peak, bandwidth * row["intensity"])
        values = {"name": row["name"], "rate": figures.number(rate / 1e9), "share": f"{rate / roof:.0%}"}
        values |= {"intensity": figures.number(row["intensity"])}
        words.append(_("{name}: {rate} Gflop/s at {intensity} flop a byte, {share} of the roof", **values))
        style = figures.points(place) | {"markersize": 9}
        if place >= len(figures.MARKERS):  # its marker is taken: hollow
            style |= {"markerfacecolor": "white", "markeredgewidth": 2}
        ax.plot(row["intensity"], rate / 1e9, label=row["name"], zorder=3, **style)
    logarithmic(ax, "{x:,g}", "{x:,g}")
    finish(ax, [*rows, ceiling], _("intensity (flop a byte)"), _("Gflop/s"), words)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    return figures.set_font(ax)


def recovery(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw how far a run has come, second by second: an attempt a line, and what was lost with each.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.
    """
    some(rows, "step")
    ax = figures.axes(ax)
    titles = {
        "kept": _("steps that count"),
        "lost": _("steps that were lost"),
        "failure": _("failure"),
        "restart": _("until the next attempt's first step"),
    }  # each is named once
    looks: dict[str, dict[str, Any]] = {
        "kept": look(0) | {"marker": ""},
        "lost": look(1) | {"marker": "", "linewidth": 2.5, "linestyle": "-"},
        "failure": {"color": "black", "marker": "X", "linestyle": "none"},
    }
    words = []
    for row in attempts(rows):
        own = [step for step in rows if step["kind"] == "step" and step["attempt"] == row["attempt"]]
        steps = sorted((step["time_s"], step["step"] + 1) for step in own if step["rank"] == 0)
        done = row["first"] + row["kept"]
        parts = {
            "kept": [point for point in steps if point[1] <= done],
            "lost": [point for point in steps if point[1] >= done] if row["first"] + len(steps) > done else [],
        }
        for name, points in parts.items():
            if len(points) > 1:
                ax.plot(*zip(*points, strict=True), label=titles.pop(name, None), **looks[name])
        values = {"number": row["attempt"] + 1, "first": row["first"] + 1, "last": row["last"] + 1}
        line = _(
            "attempt {number}: steps {first} to {last}, {lost} of them lost", lost=row["last"] + 1 - done, **values
        )
        if row["cause"] is not None:
            ends = row["end_s"], row["end_s"] + row["restart_s"]
            ax.axvspan(*ends, color="0.75", linewidth=0, label=titles.pop("restart", None))
            ax.plot(row["end_s"], row["last"] + 1, label=titles.pop("failure", None), **looks["failure"])
            line += f" ({row['cause']})"
        words.append(line)
    finish(ax, rows, _("seconds since the launch"), _("steps done"), words)
    return figures.legend_above(ax, columns=2)


def waits(rows: list[dict], ax: Axes | None = None) -> Axes:
    """Draw what each rank computes and waits in a step, a bar a rank, for each way to deal the data.

    Parameters
    ----------
    rows : list of dict
        As from `ragged.waits`.
    """
    ax, rows = figures.axes(ax), some(rows, "wait")
    names = [_("{case}, rank {rank}", case=row["case"], rank=row["rank"]) for row in rows]
    titles = {"compute_s": _("computing"), "wait_s": _("waiting for others")}
    starts = np.zeros(len(rows))
    for place, (measure, title) in enumerate(titles.items()):
        widths = np.array([1e3 * row[measure] for row in rows])
        hatch = figures.HATCHES[place]
        ax.barh(names, widths, left=starts, label=title, color=COLOURS[place], hatch=hatch, edgecolor="white")
        starts += widths
    for line, row in enumerate(rows):
        share = row["wait_s"] / (row["compute_s"] + row["wait_s"])
        ax.annotate(f"{share:.0%}", (starts[line], line), xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_xlim(0, 1.1 * starts.max())
    ax.invert_yaxis()
    words = [
        f"{name}: " + ", ".join(f"{title} {figures.number(1e3 * row[measure])}" for measure, title in titles.items())
        for name, row in zip(names, rows, strict=True)
    ]
    finish(ax, rows, _("milliseconds of a step, as CPU time"), "", words)
    return figures.legend_above(ax, columns=2)


def progress(runs: list[list[dict]]) -> None:
    """Draw the loss against the bytes that a rank has sent, and beside it against the seconds, a panel a link.

    Parameters
    ----------
    runs : list of list of dict
        Each as from `links.progress`, of as many links for each strategy.
    """
    links = list(dict.fromkeys(rows[0]["link"] for rows in runs))
    _shown, axes = figures.subplots(1, 1 + len(links), size=(3.6 * (1 + len(links)), 3.6))
    panels = {axes[0]: ("sent_mb", links[0], _("MB that a rank has sent"))}
    for ax, link in zip(axes[1:], links, strict=True):
        panels[ax] = "seconds", link, _("seconds on the link: {link}", link=link)
    for ax, (measure, link, title) in panels.items():
        own, words = [rows for rows in runs if rows[0]["link"] == link], []
        for place, rows in enumerate(own):
            x, losses, name = [row[measure] for row in rows], [row["loss"] for row in rows], rows[0]["way"]
            ax.plot(x, losses, label=name, markevery=max(1, len(x) // 4), **look(place))
            words.append(curve(name, x, losses))
        logarithmic(ax, "{x:.3g}", base=2)
        said = [{"source": "formula"}] if measure == "sent_mb" else [row for rows in own for row in rows]
        finish(ax, said, title, _("loss"), words)


def pictures(batch: np.ndarray, titles: Sequence[str]) -> None:
    """Show grey pictures, four side by side, each below its title.

    Parameters
    ----------
    batch : ndarray, shape (k, 1, height, width)
    titles : sequence of str, length k
    """
    rows = -(-len(titles) // 4)
    _shown, axes = figures.subplots(rows, min(4, len(titles)), size=(6.4, 1.9 * rows))
    for ax in np.ravel(axes):
        ax.axis("off")
    for ax, picture, title in zip(np.ravel(axes), batch, titles, strict=False):  # the last row may have fewer
        ax.imshow(picture[0], cmap="gray_r")
        ax.set_title(title, fontsize="small")
        figures.set_font(ax)


def spread(numbers: dict[str, np.ndarray], parts: int = 32) -> np.ndarray:
    """Draw how whole numbers spread over all that 64 bits can hold.

    Parameters
    ----------
    numbers : dict of str to ndarray of uint64
        By the name to show.
    parts : int, default 32
        Equal parts of 0 to 2**64 in which they are counted.

    Returns
    -------
    ndarray, shape (len(numbers), parts)
        The counts.
    """
    ax = figures.subplots(size=(6.4, 3))[1]
    shares, edges = [found / 2**64 for found in numbers.values()], np.linspace(0, 1, parts + 1)
    looks: dict[str, Any] = {"label": [*numbers], "color": COLOURS[: len(numbers)]}
    counts = np.atleast_2d(ax.hist(shares, edges, log=True, histtype="step", linewidth=1.5, **looks)[0])
    ax.set_ylim(1)
    words = [
        _("{name}: {least:,.0f} to {most:,.0f} in each part", name=name, least=found.min(), most=found.max())
        for name, found in zip(numbers, counts, strict=True)
    ]
    ylabel = _("numbers in each of {parts} parts", parts=parts)
    finish(ax, [{"source": "measured"}], _("number / 2⁶⁴"), ylabel, words)
    return counts


def intervals(every: Sequence[float], simulated: np.ndarray, measured: dict[int, float], young: float) -> Axes:
    """Draw the time that failures cost against the steps between checkpoints.

    Parameters
    ----------
    every : sequence of float, length k
        Steps between checkpoints.
    simulated : ndarray, shape (k, draws)
        Time lost, as a share of the work.
    measured : dict of int to float
        The same, by the steps between.
    young : float
        Steps between checkpoints by Young's formula.
    """
    ax = figures.subplots()[1]
    low, middle, high = np.quantile(simulated, [0.05, 0.5, 0.95], axis=1)
    ax.fill_between(every, low, high, alpha=0.2)
    ax.plot(every, middle, label=_("simulated: median, and the middle 90 % of draws"))
    ax.plot([*measured], [*measured.values()], label=_("measured, once each"), **figures.points(1))
    ax.axvline(young, linestyle=":", color="black", label=_("Young: sqrt(2 x save x MTBF)"))
    logarithmic(ax, "{x:g}")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    words = [curve(_("simulated"), every, middle), cloud(_("measured"), [*measured], [*measured.values()])]
    words.append(_("Young: {steps:.0f}", steps=young))
    ylabel = _("time lost, as a share of the work")
    finish(ax, [{"source": "simulated"}, {"source": "measured"}], _("steps between checkpoints"), ylabel, words)
    return figures.legend_above(ax, columns=1)

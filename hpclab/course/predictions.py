"""Predictions with intervals, written down before the run; their score afterwards; and a report of both."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hpclab.language import translate as _
from hpclab.pages import HEADING, html
from hpclab.rows import append, lines, some
from hpclab.tables import Table, markup

if TYPE_CHECKING:
    from hpclab.figures import Figure

LEVEL = 0.9
"""Probability that an interval claims."""


def interval_score(low: float, high: float, value: float, level: float = LEVEL) -> float:
    """Score of an interval once the value is known; less is better.

    Its width, and if it missed 2 / (1 - level) times how far. In the long run none scores less than the interval from
    the quantile (1 - level) / 2 to the quantile (1 + level) / 2 of what one believes, neither a wide one nor a bold.

    Parameters
    ----------
    low, high : float
    value : float
        What was measured.
    level : float, default 0.9
        Probability that the interval claims, between 0 and 1.

    Raises
    ------
    ValueError
        If low exceeds high, a number isn't finite, or the level isn't between 0 and 1.

    Notes
    -----
    Winkler (1972); Gneiting and Raftery, Strictly proper scoring rules, prediction, and estimation (2007), equation 43.

    Examples
    --------
    >>> interval_score(1.0, 3.0, value=2.0)
    2.0
    >>> round(interval_score(1.0, 3.0, value=3.5), 6)
    12.0
    """
    if not all(map(math.isfinite, (low, high, value))):
        raise ValueError(f"low (={low}), high (={high}) and value (={value}) must be finite.")
    if low > high:
        raise ValueError(f"low (={low:g}) must be at most high (={high:g}).")
    _probability(level)
    return high - low + 2 / (1 - level) * max(low - value, value - high, 0.0)


def log_score(low: float, high: float, value: float, level: float = LEVEL) -> float:
    """`interval_score` of the logarithms: for numbers above 0, whatever their unit, so that scores can be added.

    Examples
    --------
    >>> round(log_score(1.0, 2.0, 1.5), 3), round(log_score(1000.0, 2000.0, 1500.0), 3)
    (0.693, 0.693)
    """
    if min(low, high, value) <= 0:
        raise ValueError(f"low (={low}), high (={high}) and value (={value}) must be above 0 to take logarithms.")
    return interval_score(math.log(low), math.log(high), math.log(value), level)


def write(path: str | os.PathLike, predicted: dict[str, tuple[float, float]], level: float = LEVEL) -> dict:
    """Write predictions down, at the end of a file that keeps all that were ever written, and return the new entry.

    Each entry has its time, and a hash over itself and the entry before: a later change of the file shows, in `read`.
    (Someone who writes the whole file anew isn't found out; to prove a prediction to others, tell them its hash before
    you measure.) If the newest predictions are the same, nothing is added.

    Parameters
    ----------
    path : path
    predicted : dict of str to (float, float)
        Low and high end, both above 0, by the name of what is predicted.
    level : float, default 0.9
        Probability that each interval claims.

    Raises
    ------
    ValueError
        If an interval is none, or the file isn't as it was written.
    """
    ends = {name: _ends(name, interval) for name, interval in predicted.items()}
    if not ends:
        raise ValueError("predicted is empty; give an interval, such as {'strong': (1.2, 1.8)}.")
    _probability(level)
    place = Path(path).expanduser()
    known = read(place) if place.exists() else []
    newest = next((entry for entry in reversed(known) if "predicted" in entry), {"predicted": None, "level": None})
    if (newest["predicted"], newest["level"]) == (ends, level):
        return newest
    return _chained(place, known, {"predicted": ends, "level": level})


def begin(path: str | os.PathLike, folder: str | os.PathLike) -> dict:
    """Note in a file of predictions that a measurement begins now, and return the entry; call it before you measure.

    Parameters
    ----------
    path : path
        Of the file.
    folder : path
        Where the measurement's rows will go.

    Raises
    ------
    ValueError
        If there are no predictions in the file yet, or it isn't as it was written.
    FileNotFoundError
        If there is no file.
    """
    place = Path(path).expanduser()
    known = read(place)
    if not any("predicted" in entry for entry in known):
        raise ValueError(f"path (={str(path)!r}) holds no predictions; write them before you measure.")
    return _chained(place, known, {"measures": os.fspath(folder)})


def _chained(place: Path, known: list[dict], entry: dict) -> dict:
    """Append an entry, with its time, and a hash over it and what is known already."""
    entry |= {"written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "before": known[-1]["sha256"] if known else ""}
    entry["sha256"] = _digest(entry)
    append(place, entry)
    return entry


def read(path: str | os.PathLike) -> list[dict]:
    """All that `write` and `begin` noted in a file, oldest first; a last line whose writing never ended is none.

    Raises
    ------
    ValueError
        If the file isn't as `write` wrote it.
    """
    entries: list[dict] = []
    for number, entry in lines(Path(path).expanduser()):
        last = entries[-1]["sha256"] if entries else ""
        if entry is None or (entry.get("sha256"), entry.get("before")) != (_digest(entry), last):
            raise ValueError(
                f"path (={str(path)!r}) was changed after it was written, in line {number} or before; start a new file."
            )
        entries.append(entry)
    return entries


def before(entries: list[dict], rows: list[dict]) -> dict:
    """The newest predictions that were written before the measurement of these rows began.

    Parameters
    ----------
    entries : list of dict
        As from `read`.
    rows : list of dict
        What was measured.

    Returns
    -------
    dict
        The entry, and ``seen``: how many measurements had begun before it was written. Those aren't forecasts from
        causes alone: the writer may have looked.

    Raises
    ------
    ValueError
        If no `begin` is noted from before the first row, or no prediction from before that: what is written
        afterwards is no prediction.
    """
    started = min(datetime.fromisoformat(row["started"]) for row in rows)
    # Both clocks tell whole seconds; no run is over within the one in which it started.
    early = [entry for entry in entries if datetime.fromisoformat(entry["written"]) <= started]
    begun = [place for place, entry in enumerate(early) if "measures" in entry]
    if not begun:
        raise ValueError(
            f"entries record no measurement that began before {started}, when the first row was measured; predict, call"
            " predictions.begin(path, folder), and measure again."
        )
    place = max(place for place in range(begun[-1]) if "predicted" in early[place])
    return early[place] | {"seen": sum(run < place for run in begun)}


def history(entries: list[dict]) -> Table:
    """All that a file of predictions notes, to read: what was written when, and which measurement began when."""
    return Table(
        {
            _("written"): entry["written"],
            _("what"): _("measurement") if "measures" in entry else _("prediction"),
            _("content"): entry.get("measures")
            or "; ".join(f"{name}: {low:.3g} - {high:.3g}" for name, (low, high) in entry["predicted"].items()),
            "sha256": entry["sha256"][:12],
        }
        for entry in entries
    )


def score(entry: dict, measured: dict[str, float]) -> list[dict]:
    """Score predictions by what was measured.

    Returns
    -------
    list of dict
        One row of kind "score" a prediction: ``name``, ``low``, ``high``, ``measured``, ``held``, ``width`` and
        ``miss`` (both in logarithms; the second with its factor) and ``score``, their sum.

    Raises
    ------
    ValueError
        If one was not measured.
    """
    if lacks := [name for name in entry["predicted"] if name not in measured]:
        raise ValueError(f"measured lacks {lacks[0]!r}, which was predicted; it has {', '.join(measured)}.")
    rows = []
    for name, (low, high) in entry["predicted"].items():
        total, width = log_score(low, high, measured[name], entry["level"]), math.log(high / low)
        rows.append(
            {"kind": "score", "name": name, "low": low, "high": high, "measured": measured[name]}
            | {"held": low <= measured[name] <= high, "width": width, "miss": max(0.0, total - width), "score": total}
        )
    return rows


def total(scores: list[dict]) -> float:
    """The mean score: 0.2 is that of intervals about a fifth wide which all held."""
    return sum(row["score"] for row in scores) / len(scores)


def table(scores: list[dict]) -> Table:
    """Scores to read."""
    return Table(
        {
            _("prediction"): row["name"],
            _("interval"): _("{low} to {high}", low=f"{row['low']:.3g}", high=f"{row['high']:.3g}"),
            _("measured"): f"{row['measured']:.3g}",
            _("held"): _("yes") if row["held"] else _("no"),
            _("width"): f"{row['width']:.2f}",
            _("for the miss"): f"{row['miss']:.2f}",
            _("score"): f"{row['score']:.2f}",
        }
        for row in scores
    )


def figure(scores: list[dict], rows: Sequence[dict]) -> "Figure":
    """Draw each interval, and what was measured.

    Parameters
    ----------
    scores : list of dict
        As from `score`.
    rows : sequence of dict
        What was measured, for the line that says on what machine.
    """
    from matplotlib.ticker import LogLocator, NullLocator  # a check doesn't need matplotlib

    from hpclab import figures
    from hpclab.language import translate_drawn as _

    shown = figures.Figure(figsize=(7.0, 1.2 + 0.55 * len(scores)), layout="constrained")
    ax = shown.subplots()
    captions, values = [], [row["measured"] for row in scores]
    for place, row in enumerate(scores):
        ends = row["low"], row["high"]
        label = _("predicted") if place == 0 else None
        ax.plot(ends, [place] * 2, color=figures.COLOURS[0], linewidth=6, solid_capstyle="butt", label=label)
        predicted = f"{row['low']:.3g}-{row['high']:.3g}"
        captions.append(
            _("{name}: predicted {ends}, measured {value:.3g}", name=row["name"], ends=predicted, value=values[place])
        )
    ax.plot(values, range(len(scores)), label=_("measured"), markersize=9, **figures.points(1))
    ax.set_yticks(range(len(scores)), [row["name"] for row in scores])
    ax.set_ylim(len(scores) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    figures.finish(ax, list(rows), _("ratio"), "", captions)
    figures.legend_above(ax, columns=2)
    return shown


def report(
    path: str | os.PathLike,
    entry: dict,
    scores: list[dict],
    rows: list[dict],
    meaning: dict[str, str],
    entries: list[dict] | None = None,
) -> Path:
    """Write predictions, scores, and the study that judged them, as one page that needs no other file and no network.

    Parameters
    ----------
    path : path
    entry : dict
        As from `before`.
    scores : list of dict
        As from `score`.
    rows : list of dict
        Of the study, as `study.read` gives them; and trials in other settings, whose ``regime`` is "setting".
    meaning : dict of str to str
        What each prediction is about, by its name.
    entries : list of dict, optional
        All of the file of predictions, as from `read`, to be shown too.
    """
    from hpclab import study

    written = {
        _("written"): entry["written"],
        _("first measured"): min(row["started"] for row in some(rows, "trial")),
        _("level"): f"{entry['level']:.0%}",
        _("measurements begun before it was written"): entry.get("seen", 0),
    }
    trials = [row for row in rows if row.get("regime") == "setting"]
    settings = Table(
        {
            _("case"): row["label"],
            _("step (ms)"): f"{1e3 * row['step_s']:.1f}",
            _("samples a second"): f"{row['samples_per_s']:,.0f}",
            _("source"): _("emulated") if row["source"] == "emulated" else _("measured"),
        }
        for row in trials
    )
    mean = _("Mean score: {score:.2f}", score=total(scores))
    measured = some(rows, "trial")
    terms = "<dl>{% for name, text in meaning.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>"
    parts = [
        html(HEADING, text=_("Written before the run")),
        markup(Table([written])),
        html('<p style="overflow-wrap: anywhere">sha256: {{ sha256 }}</p>', sha256=entry["sha256"]),
        html(terms, meaning=meaning),
        html(HEADING, text=_("Predicted and measured")),
        figure(scores, measured).picture(),
        markup(table(scores)),
        html("<p><strong>{{ mean }}</strong></p>", mean=mean),
        *study.sections([row for row in rows if row.get("regime") != "setting"]),
    ]
    if trials:
        parts += [html(HEADING, text=_("Other settings")), markup(settings)]
    if entries:
        parts += [html(HEADING, text=_("All predictions and measurements")), markup(history(entries))]
    place = Path(path).expanduser()
    place.write_text(study.page(_("Capstone: predict, then measure"), [*parts, study.carried(rows)]), "utf-8")
    return place


def _probability(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level (={level}) must be between 0 and 1, such as 0.9.")


def _ends(name: str, interval: object) -> list[float]:
    try:
        low, high = map(float, interval)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise ValueError(f"predicted[{name!r}] (={interval!r}) must be (low, high), two numbers above 0.")
    return [low, high]


def _digest(entry: dict) -> str:
    hashed = {name: value for name, value in entry.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

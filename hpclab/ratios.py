"""By how much one thing differs from another on a machine that drifts: ratios from measurements in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from hpclab import live
from hpclab.language import translate as _
from hpclab.laws import LEVEL, quantile

Measures = Mapping[str, Callable[[Any], float]]


def paired(
    measures: Measures, one: Any, other: Any, rounds: int, level: float = LEVEL, *, progress: bool = True
) -> list[dict]:
    """Measure two things in turn, and give the ratio of the other to the one, with an interval.

    Parameters
    ----------
    measures : dict of str to callable
        Each is called with `one` and with `other`, and returns a number above 0.
    rounds : int
        How often, >= 2; each round gives a ratio of its own, since machines drift.
    level : float, default LEVEL
        Of the interval, by Student's t on the ratios' logarithms.
    progress : bool, default True
        Show a line that says how far it is.

    Returns
    -------
    list of dict
        ``measure``, ``ratio`` (the geometric mean), ``low``, ``high``, ``rounds`` and ``source``.

    Examples
    --------
    >>> rows = paired({"length": len}, "ab", "abcd", rounds=3, progress=False)
    >>> rows[0]["ratio"].round(6), rows[0]["low"].round(6)
    (np.float64(2.0), np.float64(2.0))
    """
    if rounds < 2:
        raise ValueError(f"rounds (={rounds}) must be >= 2, as one ratio has no interval.")
    ratios: dict[str, list[float]] = {name: [] for name in measures}
    with live.bar(rounds, ", ".join(measures), _("round")) if progress else nullcontext() as bar:
        for turn in range(rounds):
            for name, measure in measures.items():
                first, second = (one, other) if turn % 2 == 0 else (other, one)
                values = [measure(first), measure(second)][:: (-1) ** turn]
                if not min(values) > 0:
                    raise ValueError(f"measures[{name!r}] gave {min(values)!r}; a ratio needs numbers above 0.")
                ratios[name].append(values[1] / values[0])
            if bar is not None:
                bar.update()
    return [
        {"measure": name, **interval(ratios[name], level), "rounds": rounds, "source": "measured"} for name in measures
    ]


def interval(ratios: Sequence[float] | np.ndarray, level: float = LEVEL) -> dict[str, float]:
    """Geometric mean of ratios from two rounds or more, and the ends of its interval: `ratio`, `low`, `high`.

    Parameters
    ----------
    ratios : array_like, shape (rounds,)
        Each above 0.
    level : float, default LEVEL
        Of the interval, by Student's t on the ratios' logarithms.

    Examples
    --------
    >>> interval([2.0, 2.0, 2.0])["low"].round(6)
    np.float64(2.0)
    """
    logs = np.log(ratios)
    half = quantile(level, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return dict(zip(("ratio", "low", "high"), np.exp(logs.mean() + half * np.array([0, -1, 1])), strict=True))


def sooner(cases: Mapping[str, Callable[[], Any]], baseline: Callable[[], Any], rounds: int, calls: int) -> list[dict]:
    """Measure how many times as fast as a baseline each case is, in turn with it; rows are those of `paired`.

    Parameters
    ----------
    cases : dict of str to callable
        What to call, without arguments, by name.
    baseline : callable
        The same.
    rounds, calls : int
        So many rounds, as for `paired`, of so many calls each; all are called once before, to warm up.
    """

    def seconds(work: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        for _call in range(calls):
            work()
        return time.perf_counter() - begun

    for work in (baseline, *cases.values()):
        work()
    return [row for name, case in cases.items() for row in paired({name: seconds}, case, baseline, rounds)]


def told(row: dict) -> str:
    """A row's ratio in words: "no difference shown" where its interval holds 1.

    Examples
    --------
    >>> told({"ratio": 1.75, "low": 1.62, "high": 1.89})
    '1.75 (1.62 to 1.89)'
    """
    ends = {"low": row["low"], "high": row["high"]}
    if row["low"] <= 1 <= row["high"]:
        return _("no difference shown ({low:.2f} to {high:.2f})", **ends)
    return _("{ratio:.2f} ({low:.2f} to {high:.2f})", ratio=row["ratio"], **ends)

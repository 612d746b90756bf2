"""Checks of the notebook *scaling*: what is claimed of many planted sweeps is counted, as no single one can tell."""

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Truths, statements
from hpclab.course.verdicts import Result, call, exercise, failed, numpy_dice, passed, reject
from hpclab.language import translate as _

CLEAR, UNCLEAR = 20, 6
"""Planted sweeps of each law, and of each reason to name none."""
MISSES = 7
"""Of the 40 intervals, so many may miss: at 95 %, more do in one of 1,400 draws."""
MISTAKES = 3
"""Laws that may be wrong or missing among the 40, and claims that may be made where none holds among the 24."""


@dataclass
class _Sweep:
    """Rows, the law that they can tell or the reason why none, and its sigma."""

    rows: list[dict]
    truth: str
    sigma: float


@exercise("scaling.curves", imports=("scipy.optimize", "scipy.stats"))
def _curves(judge: object) -> Result:
    sweeps = _sweeps()
    named = [_law_and_interval(call(judge, sweep.rows)) for sweep in sweeps]
    pairs = Counter((sweep.truth, law) for sweep, (law, _interval) in zip(sweeps, named, strict=True))
    if message := _overclaimed(pairs):
        return failed(message)
    intervals = [
        (sweep.sigma, interval)
        for sweep, (law, interval) in zip(sweeps, named, strict=True)
        if law is not None and law == sweep.truth
    ]
    if any(interval is None for _sigma, interval in intervals):
        return failed(_("You named a law without an interval for its sigma: how far off could sigma be?"))
    ends = [(sigma, *interval) for sigma, interval in intervals if interval is not None]
    counts = {"held": sum(low <= sigma <= high for sigma, low, high in ends), "of": len(ends)}
    if counts["of"] - counts["held"] > MISSES:
        return failed(
            _(
                "Only {held} of your {of} intervals contain the planted sigma, and 95 % of them should: which rows"
                " are fast or slow together, and so aren't independent repeats?",
                **counts,
            )
        )
    if pairs["amdahl", None] + pairs["usl", None] > MISTAKES:
        return failed(
            _(
                "You named no law for sweeps where 16 workers and little noise show one; note that rows of one run are"
                " fast or slow together."
            )
        )
    if pairs["amdahl", "usl"] > MISTAKES:
        return failed(
            _(
                "A law with more parameters always fits at least as well: which is the smallest that no larger one"
                " beats?"
            )
        )
    if pairs["usl", "amdahl"] > MISTAKES:
        return failed(
            _("A tight interval is no evidence for a law: look at what a law with more parameters explains beyond it.")
        )
    if median(high - low for _sigma, low, high in ends) > 0.06:
        return failed(_("Your intervals for sigma are so wide that they say nothing."))
    return passed(
        _(
            "You named the right laws, and none where the rows can't show one; {held} of {of} intervals contain the"
            " true value. A miss isn't your mistake: of 95 % intervals, 1 in 20 misses, and nobody can see which.",
            **counts,
        )
    )


def _overclaimed(pairs: Counter) -> str | None:
    """What was named that is no law, or where there was none to see, if anything; from counts by (truth, name)."""
    if any(law == "linear" for _truth, law in pairs):
        return _("Linear would mean a speed-up equal to the number of workers: look at the last points.")
    if odd := [law for _truth, law in pairs if law not in ("amdahl", "usl", None)]:
        return _(
            "The law's name must be 'amdahl' or 'usl', or None where no law can be identified; not {named!r}.",
            named=odd[0],
        )
    reasons = {
        "weak": _("You named a law from weak scaling: these laws are about work that stays the same."),
        "few": _("You named a law from at most 4 workers, where other laws fit as well."),
        "noisy": _("You named a law from data so noisy that other laws fit them as well."),
        "emulated": _("You named a law from emulated rows, whose ranks took turns: no machine has that speed."),
    }
    claims = {truth: sum(pairs[truth, law] for law in ("amdahl", "usl")) for truth in reasons}
    if sum(claims.values()) > MISTAKES:
        return reasons[max(claims, key=lambda truth: claims[truth])]
    return None


def _sweeps() -> list[_Sweep]:
    """Sweeps in shuffled order; nothing is drawn again, so intervals miss as often as they should."""
    draws = numpy_dice("scaling.curves")
    truths = ["amdahl", "usl"] * CLEAR + ["weak", "emulated", "few", "noisy"] * UNCLEAR
    return [_sweep(draws, str(truth)) for truth in draws.permutation(truths)]


def _sweep(draws: np.random.Generator, truth: str) -> _Sweep:
    """Four runs of each count, with rows of four epochs each: what slows a run slows all its epochs."""
    from hpclab import laws

    counts = [1, 2, 4] if truth == "few" else [1, 2, 4, 8, 16]
    noise = 0.3 if truth == "noisy" else 0.02
    sigma, kappa = draws.uniform(0.05, 0.12), 0.0 if truth in ("amdahl", "weak") else 0.005
    one, rows = draws.uniform(100, 400), []
    for run, ranks in enumerate(draws.permutation(counts * 4).tolist()):
        rate = one * float(laws.usl(ranks, sigma, kappa)) * np.exp(noise * draws.standard_normal())
        row = {
            "kind": "trial",
            "run": run,
            "ranks": ranks,
            "threads": 1,
            "batch": 32 * ranks if truth == "weak" else 512,
        }
        row["source"] = "emulated" if truth == "emulated" and ranks > 4 else "measured"
        for epoch in range(4):
            rows.append(row | {"epoch": epoch, "samples_per_s": rate * (1 + 0.003 * draws.standard_normal())})
    return _Sweep(rows, truth, float(sigma))


def _law_and_interval(returned: Any) -> tuple[Any, tuple[float, float] | None]:
    try:
        law, interval = returned
        if interval is None:
            return law, None
        low, high = interval
        return law, (float(low), float(high))
    except (TypeError, ValueError):
        reject(
            _(
                "The function must return a pair: a law's name and (low, high) for its sigma, or None and None; not"
                " {returned!r}.",
                returned=returned,
            )
        )


@statements("scaling.quiz_timeline")
def _timeline() -> Truths:
    spent: Counter = Counter()
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for row in quizzes.TIMELINE:
        spent[row["rank"], row["name"]] += row["duration_s"]
        end = row["start_s"] + row["duration_s"]
        bars.setdefault((row["rank"], row["name"]), []).append((row["start_s"], end))
    computing = [spent[rank, "forward"] + spent[rank, "backward"] for rank in (0, 1)]
    first, backward = bars[1, "all-reduce"][0], bars[1, "backward"][0]
    network = min(spent[rank, "waiting"] for rank in (0, 1))  # what even the last rank waits for
    truths = {
        "a": computing[1] > computing[0],
        "b": bool(np.isclose(network, 0.025)),
        "c": backward[0] <= first[0] and first[1] <= backward[1],
        "d": bool(np.isclose(network, 0.005)),
        "e": computing[0] > computing[1],
        "f": False,
    }
    return truths, {
        "b": _("Rank 0 mostly waits for the other rank; the network's part is the time that even the last rank waits."),
        "e": _("All ranks wait for the slowest one. Which one is that?"),
        "f": _("A bar begins when a rank is ready and ends for all ranks at once: its length shows who was early."),
    }


@statements("scaling.quiz_regime")
def _regime() -> Truths:
    one, *_others, last = quizzes.SWEEP
    weak = all(row["samples a rank and step"] == one["samples a rank and step"] for row in quizzes.SWEEP)
    efficiency = one["step (ms)"] / last["step (ms)"]
    rates = [row["ranks"] * row["samples a rank and step"] / row["step (ms)"] for row in (one, last)]
    truths = {
        "a": weak,
        "b": efficiency == 0.625,
        "c": bool(np.isclose(rates[1] / rates[0], 5)),
        "d": rates[1] < rates[0],
        "e": not weak,
        "f": not weak,
    }
    return truths, {
        "d": _("A step takes longer, but an epoch has fewer of them."),
        "e": _("Amdahl's law is about a fixed amount of work, shared by more and more ranks."),
        "f": _("Here the work grows with the ranks: no two rows have the same total batch."),
    }

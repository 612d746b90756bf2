"""Check of the notebook *scaling*: curves are drawn from a known law, and one must be named only where it shows."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hpclab.course.verdicts import Result, call, exercise, failed, numpy_dice, passed, reject
from hpclab.language import translate as _


@exercise("scaling.curves", imports=("scipy.optimize", "scipy.stats"))
def _curves(judge: object) -> Result:
    for n, x, law, sigma in _planted_curves():
        named, interval = _law_and_interval(call(judge, n, x))
        if named == "linear":
            return failed(_("Linear would be as many times as fast as there are workers: look at the last points."))
        if named not in ("amdahl", "usl", None):
            return failed(
                _("The law's name is 'amdahl' or 'usl', or None where no law is told; not {named!r}.", named=named)
            )
        if law is None and named is not None:
            if (most := max(n)) > 4:
                return failed(_("You named a law from data so noisy that others fit it as well."))
            return failed(_("You named a law from up to {most} workers, where others fit as well.", most=most))
        if law is not None and named is None:
            return failed(_("You found no law where 16 workers and little noise tell one."))
        if named != law:
            return failed(
                _("A larger law always fits at least as well: which is the smallest that none beats?")
                if law == "amdahl"
                else _("A tight interval is no evidence for a law: look at what a larger law explains beyond it.")
            )
        if law is None:
            continue
        if interval is None:
            return failed(_("A law without an interval of its sigma: how far could that be off?"))
        if not interval[0] <= sigma <= interval[1]:
            return failed(_("Your interval of sigma misses the planted one."))
        if interval[1] - interval[0] > 0.05:
            return failed(_("Your interval of sigma is so wide that it says nothing."))
    return passed(_("The right law where the data tells it, an interval that holds the truth, and silence elsewhere."))


def _planted_curves() -> Iterator[tuple[list[int], list[float], str | None, float]]:
    """Workers, throughput, the law that can be named, and its sigma."""
    many, few = sorted([1, 2, 4, 8, 16] * 4), sorted([1, 2, 4] * 4)
    draws = numpy_dice("scaling.curves")
    yield many, *_curve(draws, many, 0.01, "amdahl", (0.1, 0.0))
    yield many, *_curve(draws, many, 0.01, "usl", (0.05, 0.005))
    yield few, *_curve(draws, few, 0.01, None, (0.05, 0.005))
    yield many, *_curve(draws, many, 0.12, None, (0.08, 0.0))


def _curve(
    draws: np.random.Generator, n: list[int], noise: float, law: str | None, values: tuple[float, float]
) -> tuple[list[float], str | None, float]:
    """A noisy curve, its law and its sigma; noise that would make an honest answer wrong is drawn again."""
    from hpclab import laws

    sigma, kappa = values[0] * draws.uniform(0.9, 1.1), values[1]
    speed = draws.uniform(100, 400) * laws.usl(n, sigma, kappa)
    while True:
        x = (speed * (1 + noise * draws.standard_normal(len(n)))).tolist()
        verdict = laws.choose(n, x)
        if law is None and not verdict.identifiable:
            return x, law, sigma
        best = min(verdict.fits, key=lambda fit: fit.aicc).law
        if verdict.identifiable and verdict.law == best == law:
            low, high = verdict.fit.intervals["sigma"]
            if abs(sigma - (low + high) / 2) < 0.4 * (high - low) < 0.016:
                return x, law, sigma


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
                "The function returns a pair: a law's name and (low, high) for its sigma, or None and None; not"
                " {returned!r}.",
                returned=returned,
            )
        )

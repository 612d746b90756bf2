"""Check of the notebook *capstone*: what a score rewards is seen in what it says of planted intervals."""

import math
from typing import Any

from hpclab.course import quizzes
from hpclab.course.predictions import interval_score
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, dice, exercise, failed, number, passed, reject
from hpclab.language import translate as _


@exercise("capstone.score")
def _score(score: Any) -> Result:
    hidden = dice("capstone.score")
    for level in (0.9, 0.5, 0.8):
        low = hidden.uniform(-2, 2)
        high = low + hidden.uniform(1, 3)
        if message := _misjudged(score, low, high, level):
            return failed(message)
    return passed(
        _("With this score, neither a huge interval nor a bold one wins: it is best to say what you believe.")
    )


def _misjudged(score: Any, low: float, high: float, level: float) -> str | None:
    """What a score gets wrong about an interval, if anything."""

    def paid(low: float, high: float, value: float, level: float = level) -> float:
        return _score_of(call(score, low, high, value, level))

    middle, width = (low + high) / 2, high - low
    if paid(low, high, middle) < 0:
        return _("Lower is better here: a score is what an interval costs, and is never below 0.")
    if math.isclose(paid(low - 5, high + 5, middle), paid(low, high, middle)):
        return _("Width costs nothing: saying 'anything from zero to infinity' would win.")
    for place in (0.5, 0.2, 0.9):
        if not _same(held := paid(low, high, low + place * width), width):
            return _(
                "An interval of width {width:.3g} that contains the value costs its width, wherever in it the value"
                " lies, not {found:.3g}.",
                width=width,
                found=held,
            )
    near, far = ([paid(low, high, value) - width for value in (low - by, high + by)] for by in (0.5, 1.5))
    if all(_same(miss, 0) for miss in near):
        return _("A miss costs nothing: naming a single point would win.")
    if any(_same(miss, 0) for miss in near):
        return _("You count a miss on one side only: a value can lie below an interval or above it.")
    if all(map(_same, near, far)):
        return _("A far miss costs no more than a near one.")
    if _same(near[0], paid(low, high, low - 0.5, 0.5) - width) and level != 0.5:
        return _("A miss costs the same whether you claim 50 % or {level:.0%}.", level=level)
    if near[0] < paid(low, high, low - 0.5, level - 0.2) - width:
        return _("The more you claim, the less a miss costs: look at what you divide by.")
    for miss, value in zip(near + far, (low - 0.5, high + 0.5, low - 1.5, high + 1.5), strict=True):
        right = interval_score(low, high, value, level) - width
        if not _same(miss, right):
            price = _("Too cheap") if miss < right else _("Too expensive")
            return _(
                "{told}: with this price for a miss, an honest {level:.0%} interval would lose to another one.",
                told=price,
                level=level,
            )
    return None


def _same(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-4, abs_tol=1e-5)


def _score_of(returned: Any) -> float:
    score = number(returned)
    if score is None or not math.isfinite(score):
        reject(_("The function must return a score (a number), not {returned!r}.", returned=returned))
    return score


@statements("capstone.quiz_score")
def _scores() -> Truths:
    def scores(name: str) -> list[float]:
        return [interval_score(row[name][0], row[name][1], row["measured"], 0.9) for row in quizzes.FORECASTS]

    means = {name: sum(scores(name)) / len(quizzes.FORECASTS) for name in "ABC"}
    held = {name: sum(row[name][0] <= row["measured"] <= row[name][1] for row in quizzes.FORECASTS) for name in "ABC"}
    truths = {
        "a": held["A"] == len(quizzes.FORECASTS),
        "b": min(means, key=lambda name: means[name]) == "A",
        "c": min(means, key=lambda name: means[name]) == "B",
        "d": min(means, key=lambda name: means[name]) == "C",
        "e": 1 - 0.9 ** len(quizzes.FORECASTS) < 0.05,
        "f": held["C"] == 0,
    }
    return truths, {
        "b": _("An interval that says nothing can always contain the value: its width costs."),
        "d": _("A narrow interval is good only if it contains the value: add up what the misses cost."),
        "e": _("If all four 90 % intervals are honest, how often does at least one of them miss?"),
    }


@numbers("capstone.quiz_ranks")
def _best_ranks() -> Numbers:
    times = {ranks: 64 / ranks + 2 * (ranks - 1) * 0.5 for ranks in range(1, 65)}
    best = min(times, key=lambda ranks: times[ranks])
    return (best, times[best]), [
        ((64, times[64]), _("More ranks compute less each, but send more messages one after the other.")),
        ((best, 64 / best), _("What about the messages?")),
        ((11, 64 / 11 + 5), _("Each of the 2 (p - 1) messages takes 0.5 ms, not each pair of them.")),
    ]

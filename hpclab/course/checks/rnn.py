"""Checks of the notebook *rnn*: a plan is followed step by step, on planted lengths."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from hpclab.course import quizzes, ragged
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, exercise, failed, numpy_dice, passed, reject
from hpclab.language import translate as _

IDLE, PADDED = 0.06, 0.37
"""Shares of the time and of the frames that a plan may waste; random batches waste 0.09 and 0.51 or more."""
SAME_BATCHES = 0.5
"""Share of an epoch's batches that may come again in the next."""
TREND = 0.8
"""Rank correlation of a step's frames with its place in the epoch, beyond which the steps are sorted."""

Batches = list[list[list[int]]]


@dataclass
class _Case:
    """What the reader's function is given, but for the epoch."""

    lengths: np.ndarray
    ranks: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """The fewest that take all talks."""
        return -(-len(self.lengths) // (self.ranks * self.batch_size))


@exercise("rnn.plan", imports=("torch.utils.data",))  # what readers shuffle with
def _plan(plan: object) -> Result:
    for case in _cases():
        epochs = [_batches(plan, case, epoch) for epoch in (0, 1)]
        for epoch in epochs:
            if message := _undealt(epoch, case):
                return failed(message)
        if message := _unshuffled(plan, epochs, case) or _wasted(epochs, case):
            return failed(message)
    return passed(
        _("Each talk once, equally many steps and nearly equal frames on all ranks, little padding, and reshuffled.")
    )


def _cases() -> Iterator[_Case]:
    """Lengths with a long tail, as of speech; their number is no multiple of the ranks."""
    draws = numpy_dice("rnn.plan")
    for ranks, batch_size, steps in ((2, 8, 16), (4, 6, 12)):
        count = steps * ranks * batch_size - ranks - 1
        lengths = np.clip(np.exp(draws.normal(3.8, 0.7, count)), 5, 400).astype(int)
        yield _Case(lengths, ranks, batch_size, int(draws.integers(100)))


def _batches(plan: object, case: _Case, epoch: int, seed: int | None = None) -> Batches:
    seed = case.seed if seed is None else seed
    returned: Any = call(plan, case.lengths.copy(), case.ranks, case.batch_size, seed, epoch)
    try:
        return [[[index(talk) for talk in batch] for batch in batches] for batches in returned]
    except (TypeError, ValueError):
        reject(
            _(
                "The function must return a list of batches for each rank, and a batch is a list of indices: not"
                " this {kind}.",
                kind=type(returned).__name__,
            )
        )


def _undealt(epoch: Batches, case: _Case) -> str | None:
    """What is wrong with who gets which talks, if anything."""
    if len(epoch) != case.ranks:
        return _("The plan has batches for {given} ranks, not for {ranks}.", given=len(epoch), ranks=case.ranks)
    most, least = (function(map(len, epoch)) for function in (max, min))
    if most > least:
        return _(
            "One rank has {most} batches, another {least}: the first goes on alone, and waits in vain.",
            most=most,
            least=least,
        )
    dealt = [talk for batches in epoch for batch in batches for talk in batch]
    if len(dealt) > len(set(dealt)):
        return _("Some talks are seen twice in an epoch.")
    if set(dealt) != set(range(len(case.lengths))):
        return _("In an epoch, the ranks together don't see every talk.")
    if most > case.steps:
        values = {"steps": most, "least": case.steps}
        return _("An epoch takes {steps} steps, where {least} would do: fill the batches.", **values)
    if not all(batch for batches in epoch for batch in batches):
        return _("A batch is empty: its rank has no gradient to bring to the mean.")
    if max(len(batch) for batches in epoch for batch in batches) > case.batch_size:
        return _("A batch has more than `batch_size` talks: it may not fit into memory.")
    return None


def _unshuffled(plan: object, epochs: list[Batches], case: _Case) -> str | None:
    """Whether another epoch, seed or call gives what it should, or a message that says what it doesn't."""
    first, second = epochs
    if _batches(plan, case, 0) != first:
        return _("The same seed and epoch gave two plans: the ranks, which each make their own, would disagree.")
    if first == second:
        return _("Two epochs have the same plan: what makes the shuffling differ between them?")
    if first == _batches(plan, case, 0, case.seed + 100):
        return _("Two seeds give the same plan: a run with another seed would repeat the first.")
    met, again = ({frozenset(batch) for batches in epoch for batch in batches} for epoch in epochs)
    if len(met & again) > SAME_BATCHES * len(met):
        return _("The batches come in another order, but hold the same talks as in the epoch before.")
    frames = [sum(int(case.lengths[batch].sum()) for batch in batches) for batches in zip(*first, strict=True)]
    trend = np.corrcoef(np.argsort(np.argsort(frames)), range(len(frames)))[0, 1]
    if abs(trend) > TREND:
        return _("The steps are in order of length: the model would see the short talks of each epoch first, or last.")
    return None


def _wasted(epochs: list[Batches], case: _Case) -> str | None:
    """Whether ranks wait, or batches are padded, more than they need; if so, what the plan is."""
    idle, padded = (
        float(np.mean([measure(case.lengths, epoch) for epoch in epochs])) for measure in (ragged.idle, ragged.padding)
    )
    if idle > IDLE and padded > PADDED:
        return _(
            "Equal numbers of talks aren't equal work: on average the ranks wait {idle:.0%} of the time for the one"
            " with the most frames.",
            idle=idle,
        )
    if idle > IDLE:
        return _(
            "There is little padding, but in one step the ranks have different numbers of frames, so they wait"
            " {idle:.0%} of the time: which talks must meet in one step?",
            idle=idle,
        )
    if padded > PADDED:
        return _(
            "The ranks have equal frames, but {padded:.0%} of a padded batch is padding: short talks are beside long"
            " ones.",
            padded=padded,
        )
    return None


@statements("rnn.quiz_waits")
def _waits() -> Truths:
    steps = [(row["rank 0"], row["rank 1"]) for row in quizzes.FRAMES]
    totals, longest = np.sum(steps, axis=0), sum(map(max, steps))
    truths = {
        "a": totals[0] == totals[1],
        "b": longest == totals[0],
        "c": bool(longest - totals[0] == longest - totals[1] == 60),
        "d": sum(max(a, b) for a, b in zip(*map(sorted, zip(*steps, strict=True)), strict=True)) < longest,
        "e": False,
    }
    return truths, {
        "b": _("The ranks meet in every step, so the longer one counts in each, not only in the sum."),
        "e": _("A faster network delivers the gradients sooner, but it can't send those that aren't there yet."),
    }


@numbers("rnn.quiz_mean")
def _mean() -> Numbers:
    counts, losses = (300, 100), (1.0, 3.0)
    token = float(np.average(losses, weights=counts))
    return (float(np.mean(losses)), token, float(counts[0] / np.mean(counts))), [
        (
            (token, token, 1.5),
            _("DDP knows nothing of tokens: it averages the ranks' gradients, so each rank's mean counts as much."),
        ),
        ((2.0, 2.0, 1.0), _("The mean over the tokens counts each token once: rank 0 has three times as many.")),
        ((2.0, token, 0.75), _("The mean over the ranks divides by their number: the weights must add up to it.")),
    ]

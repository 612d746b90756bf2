"""Checks of the notebook *cnn*: orders are followed rank by rank; a step is compared with those that it replaces."""

from collections.abc import Iterator
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Result, call, dice, exercise, failed, number, passed, reject
from hpclab.language import translate as _


@exercise("cnn.order", imports=("torch.utils.data",))  # what readers shuffle with
def _order(epoch_order: object) -> Result:
    for length, ranks, seed in _datasets():
        orders = [_ranks(epoch_order, length, ranks, seed, epoch) for epoch in (0, 1, 2)]
        if orders[2] != _ranks(epoch_order, length, ranks, seed, 2):
            return failed(_("The same seed and epoch gave two orders: nobody could repeat or resume this run."))
        if orders[0] == orders[1]:
            return failed(_("Two epochs have the same order: what makes the shuffling differ between them?"))
        if orders[0] == _ranks(epoch_order, length, ranks, seed + 100, 0):
            return failed(_("Two seeds give the same order: a run with another seed would repeat the first."))
        for epoch in orders:
            if message := _unshared(epoch, length, ranks):
                return failed(message)
        if sorted(orders[0][0]) == sorted(orders[1][0]):
            return failed(
                _(
                    "The order changes, but each rank keeps the same images: they must be shared out again in each"
                    " epoch."
                )
            )
        if any(_shifted(own, length) for own in orders[0]):
            return failed(_("Nothing is shuffled: images that are neighbours in the file stay neighbours."))
    return passed(_("A new order in each epoch, every image, equal shares, and repeatable."))


def _datasets() -> Iterator[tuple[int, int, int]]:
    """Number of images, ranks (which divide it only once) and the seed."""
    hidden = dice("cnn.order")
    for ranks, rest in ((2, 0), (2, 1), (4, 3)):
        yield ranks * hidden.randint(12, 40) + rest, ranks, hidden.randint(0, 99)


def _ranks(epoch_order: object, length: int, ranks: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each rank."""
    return [_indices(call(epoch_order, length, rank, ranks, seed, epoch)) for rank in range(ranks)]


def _unshared(epoch: list[list[int]], length: int, ranks: int) -> str | None:
    """What is wrong with how an epoch's images are shared out, if anything."""
    counts = [len(own) for own in epoch]
    if len(set(counts)) > 1:
        most, least = max(counts), min(counts)
        return _(
            "One rank has {most} images, another {least}: the first may go a step further, and wait in vain.",
            most=most,
            least=least,
        )
    visited = [image for own in epoch for image in own]
    padding = -length % ranks
    if len(visited) - len(set(visited)) > padding:
        return _("Some images are visited twice in an epoch: the ranks don't divide up one common order.")
    if set(visited) != set(range(length)):
        return _("In an epoch, the ranks together don't visit every image.")
    return None


def _shifted(own: list[int], length: int) -> bool:
    """Whether most images of a rank come at one distance from each other."""
    distances = [(later - sooner) % length for sooner, later in pairwise(own)]
    return 2 * max(map(distances.count, distances)) > len(distances)


def _indices(returned: Any) -> list[int]:
    try:
        return [index(item) for item in returned]
    except TypeError:
        reject(_("The function must return a list of indices (ints), not {returned!r}.", returned=returned))


@exercise("cnn.learning_rate")
def _learning_rate(scaled_lr: object) -> Result:
    variants = list(_recipes())
    rates = np.array([_rate(call(scaled_lr, *variant)) for variant in variants])
    ratios = np.array([_moved(rate, *variant) for rate, variant in zip(rates, variants, strict=True)])
    if np.allclose(ratios, 1):
        return passed(_("One large step moves the weights as far as the small ones together."))
    for message, misconceived in _misconceptions(variants).items():
        if np.allclose(rates, misconceived):
            return failed(message)
    ratio = ratios[0]
    return failed(_("One large step moves the weights {ratio:.3g} times as far as the small ones.", ratio=ratio))


def _misconceptions(variants: list[tuple[float, int, int, int]]) -> dict[str, np.ndarray]:
    """The message to each misconception, and the rates that it gives for the variants."""
    base, base_batch, batch, ranks = np.array(variants).T
    factor = batch * ranks / base_batch
    return {
        _("Unscaled: an epoch has fewer steps now, and each goes no further than before."): base,
        _("Scaled by a square root: that keeps the noise of a step, not its length."): base * np.sqrt(factor),
        _("You divided where you should multiply: there are fewer steps, and each is shorter."): base / factor,
        _("Scaled by the number of ranks alone: one rank's batch isn't the base batch."): base * ranks,
        _("Scaled by one rank's batch: the step uses the other ranks' images too."): base * batch / base_batch,
        _("Scaled by the global batch: the base rate already belongs to a batch size of its own."): base
        * batch
        * ranks,
    }


def _recipes() -> Iterator[tuple[float, int, int, int]]:
    """Base rate, base batch, batch a rank, ranks; only the global batch is a multiple of the base batch."""
    hidden = dice("cnn.learning_rate")
    for ranks, halves in zip((2, 4, 6), hidden.sample((3, 5, 7), 3), strict=True):
        base_batch = hidden.choice((4, 8, 16))
        yield hidden.uniform(0.01, 0.2), base_batch, base_batch // 2 * halves, ranks


def _rate(returned: Any) -> float:
    if (rate := number(returned)) is None:
        reject(_("The function must return a learning rate (a float), not {returned!r}.", returned=returned))
    return rate


def _moved(rate: float, base: float, base_batch: int, batch: int, ranks: int) -> float:
    """One step on the global batch, as a multiple of all its base batches' steps from the same weights.

    Plain SGD on least squares; with every gradient taken at the same weights the linear scaling rule is exact
    (Goyal et al. 2017, arXiv:1706.02677, section 2.1).
    """
    draw = np.random.default_rng(batch)
    x, y, weights = draw.normal(size=(batch * ranks, 3)), draw.normal(size=batch * ranks), draw.normal(size=3)
    gradients = 2 * (x @ weights - y)[:, None] * x  # (global batch, 3)
    small = sum(base * chunk.mean(axis=0) for chunk in np.split(gradients, len(x) // base_batch))
    return float(rate * gradients.mean(axis=0) @ small / (small @ small))


@statements("cnn.quiz_interval")
def _intervals() -> Truths:
    rows = {row["measure"]: row for row in quizzes.RATIOS}
    truths = {
        "a": rows["A"]["low"] > 1,
        "b": rows["B"]["low"] == rows["B"]["high"] == 1,
        "c": rows["C"]["low"] > 1,
        "d": rows["A"]["low"] > rows["C"]["high"],
        "e": False,
        "f": True,
    }
    return truths, {
        "b": _("An interval that contains 1 shows no difference. It doesn't show that there is none."),
        "d": _("Two intervals that overlap this much don't show which of the two is faster."),
        "e": _("The interval is for the mean ratio; single rounds vary much more."),
    }


@numbers("cnn.quiz_batch")
def _batch() -> Numbers:
    pictures, ranks, batch, rate, base_batch = 40_000, 4, 25, 0.1, 20
    steps = sum(1 for _first in range(0, pictures, ranks * batch))
    return (steps, rate * ranks * batch / base_batch), [
        ((pictures / batch, rate * batch / base_batch), _("A step uses the images of all ranks.")),
        ((pictures / batch, rate * ranks * batch / base_batch), _("A step uses the images of all ranks.")),
        ((steps, rate * ranks), _("Scaled by the number of ranks alone: one rank's batch isn't the base batch.")),
        ((steps, rate), _("Unscaled: an epoch has fewer steps now, and each goes no further than before.")),
    ]

"""Checks of the notebook *cnn*: real samplers are read, and a step is compared with the steps that it replaces."""

from collections.abc import Iterator
from operator import index
from typing import Any

import numpy as np

from hpclab.course.verdicts import Result, call, dice, exercise, failed, number, passed, reject
from hpclab.language import translate as _


@exercise("cnn.order", imports=("torch.utils.data",))
def _order(epoch_order: object) -> Result:
    for length, seed in _datasets():
        orders = _orders(epoch_order, length, seed, epochs=[0, 1, 2])
        if orders[0][0] == orders[1][0]:
            return failed(_("Two epochs have the same order: when read, the sampler knew of no new epoch."))
        if orders[2:] != _orders(epoch_order, length, seed, epochs=[2]):
            return failed(_("One seed and epoch gave two orders: nobody could repeat or resume this run."))
        for ranks in orders:
            visited = sorted(ranks[0] + ranks[1])
            if len(set(visited)) < len(visited):
                return failed(_("An image is visited twice in an epoch: the ranks don't share out one order."))
            if visited != list(range(length)):
                return failed(_("In an epoch the ranks together don't visit every image."))
        if sorted(orders[0][0]) == sorted(orders[1][0]):
            return failed(_("The order changes, but each rank keeps its images: none are shared out anew."))
    return passed(_("A new order in each epoch, every image once, shared out, and repeatable."))


def _datasets() -> Iterator[tuple[int, int]]:
    """Number of images (even, so that the sampler pads nothing) and the sampler's seed."""
    hidden = dice("cnn.order")
    for _variant in range(3):
        yield 2 * hidden.randint(12, 40), hidden.randint(0, 999)


def _orders(epoch_order: object, length: int, seed: int, epochs: list[int]) -> list[list[list[int]]]:
    """Indices by epoch and by rank (2), from samplers that live through the epochs, as in training."""
    from torch.utils.data import DistributedSampler

    images: Any = range(length)  # of a data set, a sampler asks no more than its length
    samplers: list = [DistributedSampler(images, num_replicas=2, rank=rank, seed=seed) for rank in range(2)]
    return [[_indices(call(epoch_order, sampler, epoch)) for sampler in samplers] for epoch in epochs]


def _indices(returned: Any) -> list[int]:
    try:
        return [index(item) for item in returned]
    except TypeError:
        reject(_("The function returns a list of indices (ints), not {returned!r}.", returned=returned))


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
        _("Divided where it should grow: fewer steps, and each of them shorter."): base / factor,
        _("Scaled by the ranks alone: one rank's batch isn't the base batch."): base * ranks,
        _("Scaled by one rank's batch: the step has the others' images too."): base * batch / base_batch,
        _("Scaled by the global batch: the base rate was made for a batch already."): base * batch * ranks,
    }


def _recipes() -> Iterator[tuple[float, int, int, int]]:
    """Base rate, base batch, batch a rank, ranks; only the global batch is a multiple of the base batch."""
    hidden = dice("cnn.learning_rate")
    for ranks, halves in zip((2, 4, 6), hidden.sample((3, 5, 7), 3), strict=True):
        base_batch = hidden.choice((4, 8, 16))
        yield hidden.uniform(0.01, 0.2), base_batch, base_batch // 2 * halves, ranks


def _rate(returned: Any) -> float:
    if (rate := number(returned)) is None:
        reject(_("The function returns a learning rate (a float), not {returned!r}.", returned=returned))
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

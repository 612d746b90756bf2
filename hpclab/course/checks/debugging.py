"""Checks of the notebook *debugging*: programs run on real ranks, and are compared with one process.

That process is written here, apart from what the notebook has; it also takes the steps of each misconception.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, pairwise, product
from pathlib import Path
from random import Random
from typing import Any

from hpclab.course import ranks
from hpclab.course.verdicts import Result, call, dice, exercise, failed, passed, reject
from hpclab.language import translate as _

TORCH = ("torch._dynamo", "torch.distributed", "torch.nn.utils", "torch.optim", "numpy")
"""What ranks would else import, each for itself; an optimiser's first step takes torch._dynamo, of 1 to 2.5 s."""
FEATURES = 3
"""Numbers in a sample."""
LONGEST = 15
"""Steps after which a program ends that never reaches its target."""


@dataclass
class Trained:
    """What became of a program on one rank."""

    weights: Any = None
    """What it returned."""
    inputs: list = field(default_factory=list)
    """What its model was given, (B, features), in each forward pass that autograd followed."""
    begun: Any = None
    """Weights at the first of them."""

    def watch(self, model: Any) -> Any:
        """The model, of which these forward passes are written down from now on."""
        import torch

        def note(_module: Any, given: tuple) -> None:
            if torch.is_grad_enabled():
                self.begun = _flat(model) if self.begun is None else self.begun
                self.inputs.append(given[0].detach().clone())

        next(module for module in model.modules() if not list(module.children())).register_forward_pre_hook(note)
        return model


def _flat(model: Any) -> Any:
    from torch.nn.utils import parameters_to_vector

    return parameters_to_vector(model.parameters()).detach().clone()


def _gang(program: object, given: Callable[[Trained], tuple], size: int, numbers: int = FEATURES + 1) -> list[Trained]:
    """What becomes of a program on ranks; the check ends if they don't end with the same weights.

    `given` makes its arguments, on each rank; `numbers` weights are to be returned.
    """
    import torch

    def work(_rank: int) -> Trained:
        trained = Trained()
        returned = call(program, *given(trained))
        if not isinstance(returned, torch.Tensor) or returned.numel() != numbers:
            kind = type(returned).__name__
            reject(_("The function must return its model's weights as one tensor, not this {kind}.", kind=kind))
        trained.weights = returned.detach().flatten()
        return trained

    gang = ranks.run(work, size)
    begun = [one.begun for one in gang if one.begun is not None]
    if not all(torch.equal(begun[0], weights) for weights in begun):
        reject(_("The ranks begin with different weights, and equal steps never make them equal."))
    if not all(torch.allclose(gang[0].weights, one.weights, rtol=1e-4, atol=1e-6, equal_nan=True) for one in gang):
        reject(_("The ranks end with different weights: from some step on each goes its own way."))
    return gang


def _count(gang: list[Trained], x: Any, least: int, most: int) -> None:
    """End the check unless the ranks together trained on each sample so often."""
    import torch

    inputs = torch.cat([part for one in gang for part in one.inputs] or [x[:0]])
    counts = (x[:, None] == inputs[None]).all(2).sum(1)  # (N,)
    if (counts < least).any():
        seldom = int((counts < least).sum())
        reject(_("{seldom} of {number} samples are used less often than asked for.", seldom=seldom, number=len(x)))
    if (counts > most).any() or len(inputs) > counts.sum():
        reject(_("Some samples are used more often than asked for."))


def _judge(weights: Any, right: Any, wrong: list[tuple[str, Any]]) -> None:
    """End the check unless weights are those of one process; a misconception that gives them has its message."""
    if not _same(weights, right):
        generic = _("The weights aren't those of one process with all samples.")
        reject(next((message for message, misconceived in wrong if _same(weights, misconceived)), generic))


def _same(left: Any, right: Any) -> bool:
    """Whether weights differ by rounding only."""
    import torch

    return torch.allclose(left, right, rtol=1e-4, atol=1e-5)


def _problem(hidden: Random, number: int, scales: Sequence[float] = (0.3,)) -> tuple[Any, Any, Any]:
    """A linear model, samples (N, features), and targets (N, 1) with noise of these scales in turn."""
    import torch

    draws = torch.Generator().manual_seed(hidden.getrandbits(32))
    x = torch.randn(number, FEATURES, generator=draws)
    noise = torch.randn(number, 1, generator=draws) * torch.tensor(scales).repeat(number)[:number, None]
    return _layers(draws, FEATURES, 1), x, x.sum(1, keepdim=True) + 1 + noise


def _layers(draws: Any, *sizes: int) -> Any:
    """A linear layer, or several in turn, with drawn weights."""
    import torch

    layers = [torch.nn.Linear(*pair) for pair in pairwise(sizes)]
    for layer in layers:
        for weight in layer.parameters():
            weight.data = 0.5 * torch.randn(weight.shape, generator=draws)
    return torch.nn.Sequential(*layers) if len(layers) > 1 else layers[0]


def _descend(model: Any, losses: Sequence[Callable[[Any], Any]], lr: float, decay: float = 0.0) -> Any:
    """Weights after plain gradient descent on losses in turn, as one process takes it."""
    import torch

    model = copy.deepcopy(model)
    for loss in losses:
        gradients = torch.autograd.grad(loss(model), list(model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(model.parameters(), gradients, strict=True):
                weight -= lr * (gradient + decay * weight)
    return _flat(model)


def _mean_square(x: Any, y: Any, factor: float = 1.0) -> Callable[[Any], Any]:
    return lambda model: factor * (model(x) - y).square().mean()


@exercise("debugging.division", imports=TORCH)
def _division(program: object) -> Result:
    hidden = dice("debugging.division")
    for size, parts in ((2, 3), (3, 1), (1, hidden.choice((2, 3))), (hidden.choice((2, 3)), hidden.choice((4, 5)))):
        _share_out(program, hidden, size, parts)
    return passed(_("However the samples are shared out, the steps are those of one process."))


def _share_out(program: object, hidden: Random, size: int, parts: int) -> None:
    model, x, y = _problem(hidden, 4 * size * parts)
    steps = hidden.choice((2, 3))

    def scaled(factor: float, lr: float = 0.3, own: slice = slice(None)) -> Any:
        return _descend(model, [_mean_square(x[own], y[own], factor)] * steps, lr, decay=0.01)

    counts = {"ranks": size, "pieces": parts, "product": size * parts}
    gang = _gang(program, lambda trained: (trained.watch(model), x, y, steps, parts), size)
    wrong = [
        (_("The weights haven't changed: no step was taken."), _flat(model)),
        (
            _("All ranks have the same weights, but learned them from one rank's samples only."),
            scaled(1, own=slice(0, None, size)),
        ),
        (
            _("A lower learning rate only hides it, and weakens the weight decay: the gradient is still not a mean."),
            scaled(size * parts, lr=0.3 / (size * parts)),
        ),
        (_("The ranks' gradients are averaged, but those of the {pieces} pieces are summed.", **counts), scaled(parts)),
        (_("The pieces' gradients are averaged, but those of the {ranks} ranks are summed.", **counts), scaled(size)),
        (
            _("With {ranks} ranks of {pieces} pieces, the gradient is {product} times that of one process.", **counts),
            scaled(size * parts),
        ),
    ]
    short = _("You divided by more than you added up: the steps are shorter than those of one process.")
    wrong += [(short, scaled(size**i * parts**j)) for i, j in ((-1, 0), (0, -1), (-1, -1))]
    _judge(gang[0].weights, scaled(1), wrong)
    _count(gang, x, steps, steps)


@exercise("debugging.collective", imports=TORCH)
def _collective(program: object) -> Result:
    hidden = dice("debugging.collective")
    for size in (3, 2):
        problem, path, stops, target = _stopping(hidden, size)
        _stop(program, size, problem, target, path, stops)
        _stop(program, size, problem, 0.0, path, stops | {"mean": LONGEST})
    return passed(_("All ranks stop after the same step, the one after which a single process would stop."))


def _stop(program: object, size: int, problem: tuple, target: float, path: list, stops: dict[str, int]) -> None:
    """End the check unless the ranks stop when the mean does, with one process's weights."""
    model, x, y = problem
    gang = _gang(program, lambda trained: (trained.watch(model), x, y, target, LONGEST), size)
    steps = next((step for step, weights in enumerate(path) if _same(gang[0].weights, weights)), None)
    if steps is None:
        reject(_("One process with all samples doesn't have these weights after any number of steps."))
    if steps != stops["mean"]:
        reject(_stopped(steps, stops))
    _count(gang, x, steps, steps + 1)


def _stopping(hidden: Random, size: int) -> tuple[tuple, list, dict[str, int], float]:
    """A problem, its weights by step, after how many steps each rule reaches the target, and the target.

    No other rule stops when the mean does, and of three ranks no two rules stop together.
    """
    import torch

    while True:
        model, x, y = _problem(hidden, 8 * size, scales=(0.3, 0.1, 0.6)[:size])
        path = [_descend(model, [_mean_square(x, y)] * steps, lr=0.1) for steps in range(LONGEST + 1)]
        weights = torch.stack(path, 1)  # (features + 1, steps)
        errors = x @ weights[:FEATURES] + weights[FEATURES] - y  # (N, steps)
        losses = torch.stack([errors[rank::size].square().mean(0) for rank in range(size)])  # (ranks, steps)
        mean = losses.mean(0)
        stop = hidden.randint(2, LONGEST - 5)
        target = float(mean[stop - 1 : stop + 1].mean())
        rules = {"mean": mean, "sum": losses.sum(0), "first": losses[0], "any": losses.amin(0), "all": losses.amax(0)}
        stops = {rule: next((s for s in range(LONGEST) if at[s] < target), LONGEST) for rule, at in rules.items()}
        known = list(stops.values())
        if LONGEST not in known and known.count(stops["mean"]) == 1 and len(set(known)) >= size + 2:
            return (model, x, y), path, stops, target


def _stopped(steps: int, stops: dict[str, Any]) -> str:
    """What is wrong with a program that stopped after another number of steps than one process."""
    for rule, message in {
        "first": _("All ranks stop when one of them has reached the target by its own samples."),
        "any": _("All ranks stop as soon as any of them has reached the target by its own samples."),
        "all": _(
            "The ranks go on until each has reached the target by its own samples; their mean reached it earlier."
        ),
        "sum": _("The ranks' losses are added up, and compared with a target for their mean."),
    }.items():
        if steps == stops[rule]:
            return message
    if steps == LONGEST:
        return _("The ranks never stop early, not even when the mean loss over all samples is below the target.")
    return _("The ranks stop after {steps} steps, but one process stops after {stop}.", steps=steps, stop=stops["mean"])


@exercise("debugging.last_batch", imports=TORCH)
def _last_batch(program: object) -> Result:
    hidden = dice("debugging.last_batch")
    for size, batch_size, left in ((2, 8, 5), (3, 6, 1), (3, 9, 5), (2, 6, 0)):
        _leave_over(program, hidden, size, batch_size, left)
    return passed(
        _("Each sample counts once, and as much as any other of its batch, however many are left for the last one.")
    )


def _leave_over(program: object, hidden: Random, size: int, batch_size: int, left: int) -> None:
    """End the check unless an epoch is one process's, whose last batch has `left` samples."""
    model, x, y = _problem(hidden, hidden.choice((2, 3)) * batch_size + left)
    batches = [range(first, min(first + batch_size, len(x))) for first in range(0, len(x), batch_size)]

    def epoch(weigh: Callable[[int, int], float]) -> Any:
        """One process's weights; given the size of a batch, a rule says what the error at a place counts."""

        def loss(batch: range) -> Callable[[Any], Any]:
            weights = x.new_tensor([weigh(len(batch), place) for place in range(len(batch))])[:, None]
            return lambda model: (weights * (model(x[batch]) - y[batch]).square()).sum()

        return _descend(model, [loss(batch) for batch in batches], lr=0.1)

    def own(count: int, place: int) -> int:
        return len(range(place % size, count, size))

    too_long = _("Errors are added up, not averaged: the steps are too long.")
    wrong = [
        (_("The weights haven't changed: no step was taken."), _flat(model)),
        (
            _("The ranks have unequal shares of the last batch, but all shares count the same."),
            epoch(lambda count, place: 1 / (size * own(count, place))),
        ),
        (
            _("The last batch has fewer samples, but is divided as if it were full: the step is too short."),
            epoch(lambda count, place: 1 / batch_size),
        ),
        (too_long, epoch(lambda count, place: 1)),
        (too_long, epoch(lambda count, place: 1 / size)),
    ]
    gang = _gang(program, lambda trained: (trained.watch(model), x, y, batch_size), size)
    _count(gang, x, 1, 1)
    _judge(gang[0].weights, epoch(lambda count, place: 1 / count), wrong)


@exercise("debugging.batchnorm", imports=TORCH)
def _batchnorm(program: object) -> Result:
    hidden = dice("debugging.batchnorm")
    for size in (2, 3):
        _normed(program, hidden, size)
    return passed(_("Forward and backward, it is the batch norm of one process with the whole batch."))


def _normed(program: object, hidden: Random, size: int) -> None:
    """End the check unless a network with a batch norm takes one process's steps."""
    import torch

    _one, x, y = _problem(hidden, 6 * size)
    x[::size] += 1  # the ranks' shares differ
    model = _layers(torch.Generator().manual_seed(hidden.getrandbits(32)), FEATURES, 4, 1)
    steps = hidden.choice((2, 3))

    def trained_by(norm: Callable[[list], list]) -> Any:
        """One process's weights, with a norm that takes the features of each rank's share, and gives them normed."""

        def loss(model: Any) -> Any:
            normed = norm([model[0](x[rank::size]) for rank in range(size)])
            errors = [model[1](part) - y[rank::size] for rank, part in enumerate(normed)]
            return torch.cat(errors).square().mean()

        return _descend(model, [loss] * steps, lr=0.1)

    gang = _gang(program, lambda trained: (trained.watch(model), x, y, steps), size, numbers=len(_flat(model)))
    _count(gang, x, steps, steps)
    right = trained_by(partial(_norm, mean=_over_ranks, variance=_over_ranks))
    unfollowed = _(
        "The forward pass is right, but autograd doesn't see what came from other ranks: the gradient is wrong."
    )
    wrong = [
        (_("The weights haven't changed: no step was taken."), _flat(model)),
        (
            _("Each rank normalises by its own share of the batch, so each computes a different function."),
            trained_by(_norm),
        ),
        (
            _("The mean is that of the whole batch now, but the variance is still each rank's own."),
            trained_by(partial(_norm, mean=_over_ranks)),
        ),
        (
            _("The ranks' own variances are averaged: that leaves out how far apart their means are."),
            trained_by(partial(_norm, variance=_over_ranks)),
        ),
        (
            _("The ranks' own variances are averaged: that leaves out how far apart their means are."),
            trained_by(partial(_norm, mean=_over_ranks, variance=_over_ranks, around_own=True)),
        ),
        *((unfollowed, trained_by(partial(_norm, mean=blind, variance=blind))) for blind in _blind(size)),
        (_("There is no batch norm left: that is a different network."), trained_by(lambda parts: parts)),
    ]
    _judge(gang[0].weights, right, wrong)


def _norm(parts: list, mean: Callable = list, variance: Callable = list, around_own: bool = False) -> list:
    """Ranks' features (B, features), normed; `mean` and `variance` make of the ranks' own what each of them uses."""
    own = [part.mean(0) for part in parts]
    means = mean(own)
    centres = own if around_own else means
    spreads = variance([(part - m).square().mean(0) for part, m in zip(parts, centres, strict=True)])
    return [(part - m) / (v + 1e-5).sqrt() for part, m, v in zip(parts, means, spreads, strict=True)]


def _over_ranks(values: list) -> list:
    return [sum(values) / len(values)] * len(values)


def _blind(size: int) -> list[Callable[[list], list]]:
    """Means over the ranks of which autograd knows a part: a rank's own value, or its share of the mean, or nothing."""

    def mean(known: float, values: list) -> list:
        whole = _over_ranks(values)[0].detach()
        return [whole + known * (value - value.detach()) for value in values]

    return [partial(mean, known) for known in (1.0, 1 / size, 0.0)]


@exercise("debugging.seed", imports=TORCH)
def _seed(program: object) -> Result:
    hidden = dice("debugging.seed")
    size, steps, seed = 3, 3, hidden.randint(1, 900)
    _model, x, y = _problem(hidden, 32 * size)
    noise, again, later = (_noise(program, x, y, chosen, steps, size) for chosen in (seed, seed, seed + 1))
    places = [(rank, step) for rank in range(size) for step in range(steps)]
    if any(not _same(noise[place], again[place]) for place in places):
        return failed(_("Two runs with the same seed draw different numbers: nobody could repeat this run."))
    for (rank, step), (other, at) in combinations(places, 2):
        if _same(noise[rank, step], noise[other, at]):
            return failed(_twice(rank, step, other, at))
        if abs((noise[rank, step] * noise[other, at]).mean()) > 0.5 * noise.var():
            return failed(_("The noise in one place can be computed from that in another: they aren't independent."))
    if shared := [(one[0], other[0]) for one, other in product(places, places) if _same(noise[one], later[other])]:
        runs = {"rank": shared[0][0], "seed": seed, "other": shared[0][1], "later": seed + 1}
        return failed(
            _("With seed {seed}, rank {rank} sees the noise that rank {other} sees with seed {later}.", **runs)
        )
    return passed(
        _("Equal weights on all ranks, different noise on each and for the next seed, and all of it repeatable.")
    )


def _noise(program: object, x: Any, y: Any, seed: int, steps: int, size: int) -> Any:
    """The noise that the ranks' samples had, shape (ranks, steps, N / ranks, features)."""
    import torch

    def given(trained: Trained) -> tuple:
        return lambda: trained.watch(torch.nn.Linear(FEATURES, 1)), x, y, seed, steps

    gang = _gang(program, given, size)
    shares = [x[rank::size] for rank in range(size)]
    if any([part.shape for part in one.inputs] != [shares[0].shape] * steps for one in gang):
        reject(_("In each step, a rank must train on all of its share of the samples, with noise."))
    noise = torch.stack([torch.stack(one.inputs) - own for one, own in zip(gang, shares, strict=True)])
    if not 0.2 < noise.std() < 0.4 or abs(noise.mean()) > 0.15:
        width = {"mean": float(noise.mean()), "width": float(noise.std())}
        reject(
            _("The noise isn't what it was: its mean is {mean:.2f}, and its standard deviation {width:.2f}.", **width)
        )
    return noise


def _twice(rank: int, step: int, other: int, at: int) -> str:
    """What is wrong if a noise is there twice in a run."""
    if rank == other:
        return _("A rank sees the same noise in one step as in another.")
    if step == at:
        return _(
            "Ranks {rank} and {other} see the same noise: two ranks try no more noises than one would.",
            rank=rank,
            other=other,
        )
    return _("What one rank sees in one step, another sees in a later one: they draw from one sequence.")


@exercise("debugging.checkpoint", imports=TORCH)
def _checkpoint(program: object) -> Result:
    hidden = dice("debugging.checkpoint")
    for size, stops in ((2, (3, 6)), (3, (2, 4, 5))):
        with tempfile.TemporaryDirectory() as folder:
            _resume(program, hidden, size, stops, Path(folder))
    return passed(_("Interrupted or not, the weights are equal to the last bit, and no step was taken twice."))


def _resume(program: object, hidden: Random, size: int, stops: tuple[int, ...], folder: Path) -> None:
    """End the check unless a run that goes on from checkpoints equals one that never stopped."""
    import torch

    model, *_others = _problem(hidden, 1)
    grid = list(product((-3.0, -1.0, 1.0, 3.0), repeat=FEATURES))
    x = torch.tensor(hidden.sample(grid, 20))  # so far apart that it is seen which of them has been given noise
    y, seeds = x.sum(1, keepdim=True), [hidden.getrandbits(32) for _rank in range(size)]

    def run(steps: int, name: str) -> list[Trained]:
        return _gang(program, lambda trained: (trained.watch(model), x, y, seeds, steps, folder / name), size)

    whole, done = run(stops[-1], "whole"), 0
    draws = [[_drawn(part, x) for part in one.inputs] for one in whole]
    for steps in stops:
        parts = run(steps, "parts")
        for rank, part in enumerate(parts):
            if len(part.inputs) != steps - done:
                counts = {"steps": len(part.inputs), "left": steps - done}
                reject(_("It took {steps} steps, but {left} were left to take.", **counts))
            if message := _astray(rank, [_drawn(given, x) for given in part.inputs], draws, done):
                reject(message)
        done = steps
    if not torch.equal(parts[0].weights, whole[0].weights):
        reject(_("The random numbers continue as they should, but the weights differ: something else was forgotten."))


def _drawn(given: Any, x: Any) -> tuple[list[int], Any]:
    """Which samples a network was given, and their noise."""
    import torch

    chosen = torch.cdist(given, x).argmin(1)
    return chosen.tolist(), given - x[chosen]


def _astray(rank: int, drawn: list, draws: list[list], done: int) -> str | None:
    """What is wrong with what a rank has drawn after an interruption, beside all ranks' draws of a run without one."""
    steps = slice(done, done + len(drawn))
    chosen, noise = (_agree(drawn, draws[rank][steps], part) for part in (0, 1))
    if chosen and noise:
        return None
    if done == 0:
        return _("Two runs with the same seeds draw different numbers, even before any interruption.")
    if any(_agree(drawn, draws[other][steps], part) for other in range(rank) for part in (0, 1)):
        return _("Rank {rank} continues with another rank's random numbers.", rank=rank)
    if noise:
        return _("The noise continues as it should, but the choice of samples doesn't.")
    if chosen:
        return _("The choice of samples continues as it should, but the noise doesn't.")
    if any(_agree(drawn, draws[rank][: len(drawn)], part) for part in (0, 1)):
        return _("After the interruption, rank {rank} draws the same numbers as at the start.", rank=rank)
    return _("After the interruption, rank {rank} draws different numbers from those it would have drawn.", rank=rank)


def _agree(drawn: list, others: list, part: int) -> bool:
    """Whether the same samples (part 0) were drawn, or the same noise (part 1)."""
    pairs = [(one[part], other[part]) for one, other in zip(drawn, others, strict=False)]
    return all(one == other if part == 0 else _same(one, other) for one, other in pairs)

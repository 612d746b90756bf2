"""Exercise checks: three answers, each naming a misconception and never the solution.

A check never depends on absolute time, and an answer that isn't there yet, or that breaks, is a verdict and no error.
"""

import json
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import index
from typing import Any

import numpy as np

from hpclab import machine
from hpclab.course import logbook
from hpclab.course.checks import capstone as capstone
from hpclab.course.checks import dask as dask
from hpclab.course.checks import one_process as one_process
from hpclab.course.checks import queues as queues
from hpclab.course.checks import security as security
from hpclab.course.verdicts import CHECKS, Result, Verdict, answered, call, dice, exercise, failed, numpy_dice, passed
from hpclab.course.verdicts import inconclusive as inconclusive
from hpclab.language import translate as _


def check(exercise_id: str, answer: object) -> Result:
    """Check the answer to an exercise.

    Parameters
    ----------
    exercise_id : str
        For example "start.gang": the notebook's slug and the exercise's name.
    answer : object
        What the exercise asks for: a value or a function.

    Returns
    -------
    Result
        Shows itself in a notebook; true only if the answer passed.

    Raises
    ------
    ValueError
        If there is no such exercise.
    AssertionError
        Under nbgrader (it sets `NBGRADER_EXECUTION` when it grades or validates), for anything but a pass.
    """
    if exercise_id not in CHECKS:
        raise ValueError(f"exercise_id (={exercise_id!r}) is no exercise; use one of {', '.join(sorted(CHECKS))}.")
    try:
        answered(answer)
        result = CHECKS[exercise_id](answer)
    except Verdict as verdict:
        result = verdict.result
    if result:
        logbook.remember(exercise_id)
    if "NBGRADER_EXECUTION" in os.environ and not result:
        raise AssertionError(result.message)
    return result


def judged(nonce: str, exercise_id: str, seed: str, answer: Callable[[], object]) -> str:
    """For `hpclab grade`, in a student's kernel: a verdict on what `answer` returns, as JSON, with the word asked for.

    The seed is there only while the check runs, and nbgrader's way of failing isn't.
    """
    before = {name: os.environ.pop(name, None) for name in ("HPCLAB_SEED", "NBGRADER_EXECUTION")}
    os.environ["HPCLAB_SEED"] = seed
    try:
        result = check(exercise_id, answer())
        return json.dumps([nonce, result.status, result.message])
    except NameError as error:
        message = _("{name} isn't there: the cell that makes it is missing, or raised an error.", name=error.name)
        return json.dumps([nonce, "fail", message])
    finally:
        del os.environ["HPCLAB_SEED"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@exercise("start.gang", fork=False)
def _gang(answer: object) -> Result:
    if isinstance(answer, bool) or not isinstance(answer, int | np.integer):
        return failed(_("The answer is a whole number of ranks (an int), not {answer!r}.", answer=answer))
    ranks, fits = int(answer), machine.fits()
    if ranks == fits:
        return passed(_("One rank more wouldn't fit, and one fewer would leave a part of this machine idle."))
    if ranks < 1:
        return failed(_("A gang has at least one rank."))
    if ranks < fits:
        return failed(_("It fits, but isn't the largest: a part of what you may use would stay idle."))
    if ranks == machine.cpus():
        return failed(_("The CPUs would do, but not the memory: each rank needs its own share of it."))
    if ranks == os.cpu_count():
        return failed(_("That is the host's CPU count. You share the host: how much of it is yours?"))
    return failed(_("Too large: some of its ranks would wait for others, or run out of memory."))


PATIENCE_SECONDS = 5.0
"""How long a simulated rank waits for a message; one that is sent is there at once."""


@exercise("ddp-from-scratch.reduce_scatter", imports=("torch",))
def _reduce_scatter(reduce_scatter: object) -> Result:
    for ranks in (4, 3, 2, dice("ddp-from-scratch.reduce_scatter").choice((5, 6, 7))):
        ring = [_Neighbour(rank, ranks) for rank in range(ranks)]
        for one, other in zip(ring, ring[1:] + ring[:1], strict=True):
            one.right = other.inbox
        for own, counts in enumerate(_together(partial(_scattered, reduce_scatter, ranks), ring)):
            if message := _miscounted(counts, own):
                return failed(message)
        if any(one.sent > ranks - 1 for one in ring):
            return failed(_("The sums are right, but a rank has sent more parts than it needs to."))
    return passed(_("Each rank has the sum of its part, and has sent every other part once."))


class _Neighbour:
    """A simulated rank in a ring, with queues in place of a network."""

    def __init__(self, rank: int, ranks: int):
        self.rank = rank
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.right: queue.SimpleQueue = self.inbox
        self.sent = 0.0
        self.part = ranks * ranks
        """Numbers in a part."""

    def shift(self, outgoing: Any) -> Any:
        """Send a tensor to the right, and return what comes from the left."""
        self.sent += outgoing.numel() / self.part
        self.right.put(outgoing.clone())
        try:
            return self.inbox.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            message = _("A rank waits for a message that nobody sends: all must exchange equally often.")
            raise Verdict(failed(message)) from None


def _scattered(answer: object, ranks: int, one: _Neighbour) -> Any:
    """What a rank gets, as how often it holds each rank's numbers of each part, shape (ranks, ranks).

    Every rank's part has a one in a place of its own, so a sum counts what went into it.
    """
    import torch

    places = torch.eye(ranks * ranks).reshape(ranks, ranks, -1)  # (rank, part, place)
    returned = call(answer, list(places[one.rank].clone()), one.shift, one.rank, ranks)
    if not isinstance(returned, torch.Tensor) or returned.numel() != one.part:
        kind = type(returned).__name__
        raise Verdict(failed(_("The function returns one part, a tensor of its size, not this {kind}.", kind=kind)))
    return returned.reshape(ranks, ranks).numpy()


def _miscounted(counts: np.ndarray, own: int) -> str | None:
    """What is wrong with the sum that a rank has of its part, if anything is."""
    ranks = len(counts)
    parts = [part for part in range(ranks) if counts[:, part].any()]
    if len(parts) > 1:
        return _("Numbers of different parts are added: what arrives belongs to the part it was sent from.")
    if np.allclose(counts.sum(), 1) and np.count_nonzero(counts) < ranks:
        return _("This part has one rank's numbers only: nothing was added to it, or what arrived took its place.")
    if (counts > 1.5).any():
        return _("Some numbers are in the sum twice: count the steps, and what each of them brings.")
    if np.count_nonzero(counts) < ranks:
        return _("Numbers of some ranks are missing: a rank passes on what has come, with its own added.")
    if not np.allclose(counts[counts > 0], 1):
        return _("A sum is wanted here, and no average.")
    if parts != [own]:
        return _("The sum is whole, but of another part than the rank's own: with which part must it begin?")
    return None


def _together(work: Callable[[Any], Any], ranks: list) -> list:
    """Run simulated ranks side by side; what each returns, or what the first of them raises."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


@exercise("ddp-from-scratch.step", imports=("torch",))
def _step(step: object) -> Result:
    import torch

    hidden = dice("ddp-from-scratch.step")
    ranks, rate = hidden.choice((3, 4, 5)), round(hidden.uniform(0.1, 0.5), 2)
    draws = torch.Generator().manual_seed(hidden.getrandbits(32))
    weights = torch.randn(6, generator=draws)
    gradients = torch.randn(ranks, 6, generator=draws)
    asked: list = []

    def all_reduce(rank: int, tensor: Any) -> Any:
        """The sum over the ranks of what this one gives, if it is made of the weights and of its gradient alone."""
        asked.append(tensor)
        known = torch.stack([weights, gradients[rank]], 1)  # (6, 2)
        shares = torch.linalg.lstsq(known, tensor[:, None]).solution[:, 0]
        if not torch.allclose(known @ shares, tensor, atol=1e-5):
            raise Verdict(failed(_("What is summed is neither the ranks' gradients nor their weights after a step.")))
        return shares[0] * ranks * weights + shares[1] * gradients.sum(0)

    stepped = []
    for rank in range(ranks):
        found = call(step, weights.clone(), gradients[rank].clone(), partial(all_reduce, rank), ranks, rate)
        if not isinstance(found, torch.Tensor) or found.shape != weights.shape:
            kind = type(found).__name__
            return failed(
                _("The function returns the new weights, a tensor of their shape, not this {kind}.", kind=kind)
            )
        stepped.append(found)
    moved = (torch.stack(stepped) - weights) / -rate  # (ranks, 6)
    mean = gradients.mean(0)
    if torch.allclose(moved, mean.expand_as(moved), atol=1e-5):
        return passed(_("All ranks take the step of the whole batch."))
    if not asked:
        return failed(_("Each rank goes its own way: from the first step on their weights differ."))
    for message, wrong in {
        _("The gradients are summed, so the step is as many times too long as there are ranks."): mean * ranks,
        _("Divided by the ranks twice: the step is too short."): mean / ranks,
        _("Uphill: the loss grows along the gradient."): -mean,
    }.items():
        if torch.allclose(moved, wrong.expand_as(moved), atol=1e-5):
            return failed(message)
    return failed(_("That isn't the step of the whole batch."))


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
        message = _("The function returns a list of indices (ints), not {returned!r}.", returned=returned)
        raise Verdict(failed(message)) from None


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
    """What each misconception is told, and the rates that it gives for the variants."""
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
    try:
        return float(returned)
    except (TypeError, ValueError):
        message = _("The function returns a learning rate (a float), not {returned!r}.", returned=returned)
        raise Verdict(failed(message)) from None


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


@exercise("scaling.curves", imports=("scipy.optimize", "scipy.stats"))
def _curves(judge: object) -> Result:
    for n, x, law, sigma in _planted_curves():
        named, interval = _judged(call(judge, n, x))
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
    """A noisy curve of which can be told what is told of it: with other noise an honest answer would be wrong."""
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


def _judged(returned: Any) -> tuple[Any, tuple[float, float] | None]:
    message = _(
        "The function returns a pair: a law's name and (low, high) for its sigma, or None and None; not {returned!r}.",
        returned=returned,
    )
    try:
        law, interval = returned
        if interval is None:
            return law, None
        low, high = interval
        return law, (float(low), float(high))
    except (TypeError, ValueError):
        raise Verdict(failed(message)) from None


@exercise("faults.interval", imports=("scipy.optimize",))
def _interval(interval: object) -> Result:
    cases = [(5.0, 3600.0, 30.0), (60.0, 86400.0, 300.0), (0.01, 5.0, 0.3), (120.0, 3600.0, 600.0)]
    hidden = dice("faults.interval")
    cases = [(save_s, mtbf * hidden.uniform(0.8, 1.2), restart_s) for save_s, mtbf, restart_s in cases]
    found = [_seconds(call(interval, *case)) for case in cases]
    for (save_s, mtbf, restart_s), seconds in zip(cases, found, strict=True):
        if np.isclose(seconds, _seconds(call(interval, 3 * save_s, mtbf, restart_s))):
            return failed(_("A checkpoint that takes longer to write gets the same interval from you."))
        if np.isclose(seconds, _seconds(call(interval, save_s, 3 * mtbf, restart_s))):
            return failed(_("A machine that fails less often gets the same interval from you."))
        best = _best_interval(save_s, mtbf, restart_s)
        cost, least = (_cost(at, save_s, mtbf, restart_s) - 1 for at in (seconds, best))
        if cost > 1.1 * least:
            told = {"mtbf": mtbf, "save": save_s, "cost": cost, "least": least}
            if seconds < best:
                return failed(
                    _(
                        "You write too often: with a failure every {mtbf:g} s and {save:g} s to write, {cost:.1%} is"
                        " spent; {least:.1%} would do.",
                        **told,
                    )
                )
            return failed(
                _(
                    "You write too seldom, and each failure loses much: with one every {mtbf:g} s and {save:g} s to"
                    " write, {cost:.1%} is spent; {least:.1%} would do.",
                    **told,
                )
            )
    return passed(_("No other interval costs much less: neither for a laptop nor for a supercomputer."))


def _cost(interval: float, save_s: float, mtbf: float, restart_s: float) -> float:
    """Expected time over the time without failures or checkpoints (Daly 2006, equation 13, for long runs)."""
    return mtbf * np.exp(restart_s / mtbf) * np.expm1((interval + save_s) / mtbf) / interval


def _best_interval(save_s: float, mtbf: float, restart_s: float) -> float:
    from scipy.optimize import minimize_scalar

    return float(minimize_scalar(_cost, bounds=(save_s / 100, 10 * mtbf), args=(save_s, mtbf, restart_s)).x)


def _seconds(returned: Any) -> float:
    try:
        seconds = float(returned)
    except (TypeError, ValueError, OverflowError):
        seconds = 0.0
    if not 0 < seconds < 1e9:  # thirty years
        message = _("The function returns seconds, a number above 0, not {returned!r}.", returned=returned)
        raise Verdict(failed(message))
    return seconds


@exercise("faults.state", imports=("torch",))
def _state(functions: Any) -> Result:
    import torch

    try:
        pack, unpack = functions
    except (TypeError, ValueError):
        return failed(_("The answer is a pair of functions, (pack, unpack), not {answer!r}.", answer=functions))
    with torch.random.fork_rng(devices=[]):  # the reader's own random numbers stay as they are
        return _resume(pack, unpack)


def _resume(pack: Any, unpack: Any) -> Result:
    """Train, pack after some steps, unpack into another training, and compare them to the twelfth."""
    import torch

    hidden = dice("faults.state")
    crash = hidden.randint(4, 8)
    undisturbed = _Training(seed=hidden.getrandbits(32))
    undisturbed.train(until=crash)
    packed = call(pack, undisturbed.model, undisturbed.optimizer, undisturbed.schedule, undisturbed.step)
    written = _written(packed)
    draws = torch.get_rng_state()
    resumed = _Training(seed=hidden.getrandbits(32))
    step = call(unpack, written, resumed.model, resumed.optimizer, resumed.schedule)
    try:
        resumed.step = index(step)
    except (TypeError, ValueError, RuntimeError):  # what numpy and torch raise of several numbers
        return failed(_("unpack returns the step to go on with, a whole number, not {step!r}.", step=step))
    for message, same in {
        _(
            "It goes on at step {step!r}, and the checkpoint was after {crash}.", step=resumed.step, crash=crash
        ): resumed.step == crash,
        _("Its weights aren't those of the checkpoint."): _same(resumed.model, undisturbed.model),
        _("The optimiser has forgotten its momentum."): _same(resumed.optimizer, undisturbed.optimizer),
        _("The learning rate is where it was at the start."): _same(resumed.schedule, undisturbed.schedule),
        _("Dropout draws other numbers than it would have drawn."): torch.equal(torch.get_rng_state(), draws),
    }.items():
        if not same:
            return failed(message)
    resumed.train(until=12)
    torch.set_rng_state(draws)
    undisturbed.train(until=12)
    if not _same(resumed.model, undisturbed.model):
        return failed(_("It begins as it should, and ends with other weights: something else went on changing."))
    return passed(_("Twelve steps with a crash among them, and not a bit differs."))


class _Training:
    """A small training of which every part has a memory: weights, momentum, learning rate, random numbers, step."""

    def __init__(self, seed: int):
        import torch
        from torch import nn

        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)
        self.step = 0

    def train(self, until: int) -> None:
        import torch

        for step in range(self.step, until):
            inputs = torch.sin(torch.arange(12.0).reshape(3, 4) * (step + 1))  # (B, features): another batch each step
            self.optimizer.zero_grad()
            (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
        self.step = until


def _written(packed: Any) -> Any:
    """A state as it comes back from a disk."""
    import io

    import torch

    disk = io.BytesIO()
    try:
        torch.save(packed, disk)
        disk.seek(0)
        return torch.load(disk, weights_only=True)
    except Exception as error:
        message = _(
            "What you packed can't be written and read again as plain tensors and numbers: {error}", error=error
        )
        raise Verdict(failed(message)) from error


def _same(one: Any, other: Any) -> bool:
    """Whether two modules, optimisers or schedules hold the same, to the last bit."""
    import torch

    def plain(state: Any) -> Any:
        if isinstance(state, torch.Tensor):
            return state.tolist()
        if isinstance(state, dict):
            return {name: plain(value) for name, value in state.items()}
        return [plain(value) for value in state] if isinstance(state, list | tuple) else state

    return plain(one.state_dict()) == plain(other.state_dict())

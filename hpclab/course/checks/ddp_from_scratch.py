"""Checks of the notebook *ddp-from-scratch*: simulated ranks exchange tensors whose every number tells its origin."""

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, numbers
from hpclab.course.verdicts import Result, call, dice, exercise, failed, passed, reject
from hpclab.language import translate as _

PATIENCE_SECONDS = 5.0
"""How long a simulated rank waits for a message; one that is sent is there at once."""


@exercise("ddp-from-scratch.reduce_scatter", imports=("torch",))
def _reduce_scatter(reduce_scatter: object) -> Result:
    for ranks in (4, 3, 2, dice("ddp-from-scratch.reduce_scatter").choice((5, 6, 7))):
        ring = [_Neighbour(rank, ranks) for rank in range(ranks)]
        for neighbour, right in zip(ring, ring[1:] + ring[:1], strict=True):
            neighbour.right = right.inbox
        for own, counts in enumerate(_together(partial(_scattered, reduce_scatter, ranks), ring)):
            if message := _miscounted(counts, own):
                return failed(message)
        if any(neighbour.sent > ranks - 1 for neighbour in ring):
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
            reject(_("A rank waits for a message that nobody sends: all ranks must exchange equally often."))


def _scattered(answer: object, ranks: int, own: _Neighbour) -> Any:
    """What a rank gets, as how often it holds each rank's numbers of each part, shape (ranks, ranks).

    Every rank's part has a one in a place of its own, so a sum counts what went into it.
    """
    import torch

    places = torch.eye(ranks * ranks).reshape(ranks, ranks, -1)  # (rank, part, place)
    returned = call(answer, list(places[own.rank].clone()), own.shift, own.rank, ranks)
    if not isinstance(returned, torch.Tensor) or returned.numel() != own.part:
        kind = type(returned).__name__
        reject(_("The function must return one part, a tensor of its size, not this {kind}.", kind=kind))
    return returned.reshape(ranks, ranks).numpy()


def _miscounted(counts: np.ndarray, own: int) -> str | None:
    """What is wrong with the sum that a rank has of its part, if anything is."""
    ranks = len(counts)
    parts = [part for part in range(ranks) if counts[:, part].any()]
    if len(parts) > 1:
        return _("Numbers from different parts were added: what arrives belongs to the part it was sent from.")
    if np.allclose(counts.sum(), 1) and np.count_nonzero(counts) < ranks:
        return _("This part has one rank's numbers only: nothing was added to it, or what arrived took its place.")
    if (counts > 1.5).any():
        return _("Some numbers are in the sum twice: count the steps, and what each of them adds.")
    if np.count_nonzero(counts) < ranks:
        return _("Some ranks' numbers are missing: a rank must add its own to what arrived before it passes that on.")
    if not np.allclose(counts[counts > 0], 1):
        return _("This needs a sum, not an average.")
    if parts != [own]:
        return _("The sum is complete, but it isn't that of the rank's own part: which part must the rank begin with?")
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
            reject(_("What is summed is neither the ranks' gradients nor their weights after a step."))
        return shares[0] * ranks * weights + shares[1] * gradients.sum(0)

    stepped = []
    for rank in range(ranks):
        returned = call(step, weights.clone(), gradients[rank].clone(), partial(all_reduce, rank), ranks, rate)
        if not isinstance(returned, torch.Tensor) or returned.shape != weights.shape:
            kind = type(returned).__name__
            return failed(
                _("The function must return the new weights, a tensor of their shape, not this {kind}.", kind=kind)
            )
        stepped.append(returned)
    moved = (torch.stack(stepped) - weights) / -rate  # (ranks, 6)
    mean = gradients.mean(0)
    if torch.allclose(moved, mean.expand_as(moved), atol=1e-5):
        return passed(_("All ranks take the step of the whole batch."))
    if not moved.any():
        return failed(_("The weights haven't moved."))
    if not asked:
        return failed(_("Each rank goes its own way: from the first step on their weights differ."))
    for message, wrong in {
        _("The gradients are summed, so with n ranks the step is n times too long."): mean * ranks,
        _("Divided by the number of ranks twice: the step is too short."): mean / ranks,
        _("Uphill: the loss grows along the gradient."): -mean,
    }.items():
        if torch.allclose(moved, wrong.expand_as(moved), atol=1e-5):
            return failed(message)
    return failed(_("That isn't the step of the whole batch."))


@numbers("ddp-from-scratch.quiz_deadlock", tolerance=0)
def _deadlock() -> Numbers:
    place = dict.fromkeys(quizzes.EXCHANGE, 0)

    def now(rank: int) -> tuple[int, str, int]:
        own = quizzes.EXCHANGE[rank]
        return own[place[rank]] if place[rank] < len(own) else (0, "", -1)

    while pair := next(
        (
            (rank, now(rank)[2])
            for rank in place
            if now(rank)[1] == "send" and now(now(rank)[2])[1:] == ("receive", rank)
        ),
        None,
    ):
        for rank in pair:
            place[rank] += 1
    return tuple(now(rank)[0] for rank in place), [
        ((3, 6, 9, 12), _("Ranks 1 and 2 do meet: one sends what the other receives. Where do they wait after that?")),
        ((0, 0, 0, 0), _("Which of ranks 0, 2 and 3 could go first?")),
        ((3, 0, 0, 12), _("Rank 2 needs a message from rank 3, and rank 1 one from rank 0: do they ever send it?")),
    ]


@numbers("ddp-from-scratch.quiz_line", tolerance=0.3)
def _line() -> Numbers:
    nbytes, seconds = np.array([(row["nbytes"], row["duration_s"]) for row in quizzes.MESSAGES]).T
    weights = 1 / seconds  # each point to a share of itself
    beta, alpha = np.polyfit(nbytes, seconds, 1, w=weights)
    microseconds, megabytes = 1e6 * float(alpha), 1e-6 / float(beta)
    return (microseconds, megabytes), [
        ((megabytes, microseconds), _("Swapped: alpha is the time of a message that is all but empty.")),
        ((microseconds, 8 * megabytes), _("That is in megabits a second; the question asks for megabytes.")),
        (
            (microseconds, 1e5 / 4e-4 / 1e6),
            _("A small message's time is mostly latency: read the bandwidth where the bytes take the time."),
        ),
    ]

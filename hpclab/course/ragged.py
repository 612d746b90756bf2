"""Talks of very different lengths, dealt to ranks by a plan: how much of each batch is padding, and who waits for whom.

A plan has a list of batches for each rank, ``plan[rank][step]``, and a batch is a list of numbers of series. All ranks
have equally many batches, since they meet in every step.
"""

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from hpclab import data as datasets
from hpclab.gangs.rank import report
from hpclab.rows import grouped, some, source
from hpclab.training.strategies.shares import weights

if TYPE_CHECKING:
    from torch import Tensor, nn

Plan = Sequence[Sequence[Sequence[int]]]
MOST_JOINED = 12
"""Recordings of the longest talk."""


class Talks:
    """Talks of different lengths: recordings of the data set "japanese_vowels", joined where the speaker is the same.

    Its recordings have 7 to 29 frames each; here a talk has as many of them as a geometric distribution says, from 1 to
    `MOST_JOINED`, which gives the long tail of real speech and text. A recording may be in several talks.

    Parameters
    ----------
    split : str, default "train"
    count : int, default 270
        Number of talks.
    seed : int, default 0
        The same arguments give the same talks, on any rank.

    Attributes
    ----------
    classes : list of str
        The speakers.
    labels : ndarray of int64, shape (count,)
        Who speaks.
    lengths : ndarray of int64, shape (count,)
        Frames of each.
    """

    def __init__(self, split: str = "train", count: int = 270, seed: int = 0):
        recordings, dice = datasets.load("japanese_vowels", split), np.random.default_rng(seed)
        self.classes = recordings.classes
        self.labels = dice.integers(len(self.classes), size=count)
        joined = np.minimum(dice.geometric(0.3, count), MOST_JOINED)
        own = [np.flatnonzero(recordings.labels == speaker) for speaker in range(len(self.classes))]
        chosen = [dice.choice(own[who], many) for who, many in zip(self.labels, joined, strict=True)]
        self.frames = [np.concatenate([recordings[number][0] for number in numbers]) for numbers in chosen]  # (T, 12)
        self.lengths = np.array([len(frames) for frames in self.frames])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, numbers: Sequence[int]) -> "tuple[Tensor, Tensor, Tensor]":
        """Some of them as padded frames, shape (B, T, 12), their lengths, shape (B,), and their labels, shape (B,)."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        chosen = np.asarray(numbers)
        frames = pad_sequence([torch.from_numpy(self.frames[number]) for number in chosen], batch_first=True)
        return frames, torch.from_numpy(self.lengths[chosen]), torch.from_numpy(self.labels[chosen])


def padding(lengths: ArrayLike, plan: Plan) -> float:
    """Share of the padded batches' frames that are padding.

    Parameters
    ----------
    lengths : array_like of int, shape (N,)
        Frames of each series.
    plan : list of list of list of int

    Examples
    --------
    >>> padding([1, 2, 3], [[[0, 2]], [[1]]])
    0.25
    """
    own = np.asarray(lengths)
    padded = sum(len(batch) * int(own[list(batch)].max()) for batches in plan for batch in batches)
    return 1 - float(_frames(own, plan).sum()) / padded


def idle(lengths: ArrayLike, plan: Plan) -> float:
    """Share of their time that the ranks wait, on average, if a step takes as long as its rank with the most frames.

    Parameters and layout as for `padding`.

    Examples
    --------
    >>> idle([1, 2, 3], [[[0, 2]], [[1]]])
    0.25
    """
    frames = _frames(np.asarray(lengths), plan)  # (ranks, steps)
    return 1 - float(frames.mean(0).sum() / frames.max(0).sum())


def _frames(lengths: np.ndarray, plan: Plan) -> np.ndarray:
    """Frames of each rank in each step, shape (ranks, steps)."""
    return np.array([[lengths[list(batch)].sum() for batch in batches] for batches in plan])


def follow(plans: dict[str, list[Plan]], seed: int = 0) -> None:
    """On every rank: train a network by each case's plans, an epoch of each case in turn, and report the steps.

    Each rank computes the gradient of its own batch, waits until all have theirs, and takes the mean, in which every
    talk weighs the same. Rows of kind "step" say how long the rank computed (``compute_s``, the CPU time of its thread)
    and waited (``barrier_s``, by the clock); in the end one of kind "epoch" for each case has ``test_accuracy``.

    Parameters
    ----------
    plans : dict of str to list
        By case: a plan of `Talks()` for each epoch.
    seed : int, default 0
        Of the weights, the same for all cases.
    """
    import torch
    import torch.distributed as dist

    from hpclab.models import RNN
    from hpclab.training.strategies.engine import average

    talks, rank, models, step = Talks(), dist.get_rank(), {}, 0
    for case in plans:
        torch.manual_seed(seed)
        models[case] = RNN(classes=len(talks.classes))
    optimizers = {case: torch.optim.Adam(model.parameters(), 3e-3) for case, model in models.items()}
    for epoch in range(len(next(iter(plans.values())))):
        for case, model in models.items():
            for batches in zip(*plans[case][epoch], strict=True):
                weight = weights([len(batch) for batch in batches])[rank]
                times = _gradient(model, talks.batch(batches[rank]), weight)
                average([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
                optimizers[case].step()
                report(step=step, case=case, epoch=epoch, samples=len(batches[rank]), **times)
                step += 1
    if rank == 0:
        for place, (case, model) in enumerate(models.items()):
            report(kind="epoch", step=step + place, case=case, test_accuracy=_accuracy(model))


def _gradient(model: "nn.Module", batch: "tuple[Tensor, Tensor, Tensor]", weight: float) -> dict[str, float]:
    """Leave a batch's weighed gradient in the model, then wait for the others; how long both took."""
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy

    start, busy = time.perf_counter(), time.thread_time()
    frames, lengths, labels = batch
    model.zero_grad()
    loss = cross_entropy(model(frames, lengths), labels)
    (weight * loss).backward()
    compute, ready = time.thread_time() - busy, time.perf_counter()
    dist.barrier()
    end = time.perf_counter()
    return {"loss": loss.item(), "compute_s": compute, "barrier_s": end - ready, "step_s": end - start}


def _accuracy(model: "nn.Module") -> float:
    """Share of other talks whose speaker the network names."""
    import torch

    from hpclab.training.objectives import accuracy

    test = Talks("test")
    frames, lengths, labels = test.batch(range(len(test)))
    with torch.no_grad():
        return accuracy(model(frames, lengths), labels).item()


def waits(rows: list[dict]) -> list[dict]:
    """What each rank computed and waited in a step of each case, on average, without the first epoch.

    A rank waits for the one that computes longest in the same step. Both are CPU times: on a busy machine a rank also
    waits for a CPU, which isn't the plan's fault.

    Parameters
    ----------
    rows : list of dict
        Those of a run of `follow`.

    Returns
    -------
    list of dict
        Of kind "wait": ``case``, ``rank``, ``compute_s``, ``wait_s``, and ``barrier_s`` by the clock.
    """
    steps = [row for row in some(rows, "step") if row["epoch"]]
    cases = sorted(grouped(steps, "case").items(), key=lambda one: one[1][0]["step"])  # in the order of the plans
    means = []
    for case, own in cases:
        longest = {step: max(row["compute_s"] for row in group) for step, group in grouped(own, "step").items()}
        for rank, group in sorted(grouped(own, "rank").items()):
            compute = statistics.fmean(row["compute_s"] for row in group)
            wait = statistics.fmean(longest[row["step"]] - row["compute_s"] for row in group)
            barrier = statistics.fmean(row["barrier_s"] for row in group)
            times = {"compute_s": compute, "wait_s": wait, "barrier_s": barrier}
            means.append({"kind": "wait", "case": case, "rank": rank, **times})
    return [row | {"source": source(steps)} for row in means]

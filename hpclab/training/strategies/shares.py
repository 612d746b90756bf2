"""Unequal ranks: a batch dealt by their speeds, and what each share weighs, so that the result is one process's.

A mean over the ranks counts each rank once, however many samples it saw. So each rank's loss is weighed by its share.
"""

from collections.abc import Sequence

from hpclab._arguments import whole_number


def shares(speeds: Sequence[float], batch: int) -> list[int]:
    """Samples a step for each rank, so that the last one ends as early as it can: about in proportion to its speed.

    Parameters
    ----------
    speeds : sequence of float
        Samples a second of each rank, above 0, as measured with equal shares.
    batch : int
        Samples a step, of all ranks together; at least one a rank.

    Returns
    -------
    list of int
        They add up to the batch; each rank has at least one sample.

    Examples
    --------
    >>> shares([100, 50], 64)
    [43, 21]
    """
    ranks, batch = len(speeds), whole_number("batch", batch, least=len(speeds))
    if not all(0 < speed < float("inf") for speed in speeds):
        raise ValueError(f"speeds (={list(speeds)!r}) must all be above 0, in samples a second.")
    dealt = [1] * ranks
    for _ in range(batch - ranks):
        dealt[min(range(ranks), key=lambda rank: (dealt[rank] + 1) / speeds[rank])] += 1
    return dealt


def weights(samples: Sequence[int]) -> list[float]:
    """What each rank's loss is multiplied by, so that the mean over the ranks is the mean over all samples.

    Examples
    --------
    >>> weights([3, 1])
    [1.5, 0.5]
    """
    return [len(samples) * share / sum(samples) for share in samples]

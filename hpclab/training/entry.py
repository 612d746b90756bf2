"""Where a rank of `train` begins: what the notebook's kernel can send without importing torch."""

from hpclab.training.job import Job


def replicate(job: Job) -> tuple[bytes, dict[str, float]]:
    """What every rank runs; returns the weights, from rank 0, and the figures of the last test."""
    from hpclab.training import loop  # here, since it imports torch, which the notebook's kernel need not

    return loop.replicate(job)

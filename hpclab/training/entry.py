"""Where a rank of `train` begins: what the notebook's kernel can send without importing torch."""

from hpclab.training.job import Job


def replicate(job: Job) -> tuple[bytes, float | None]:
    """What every rank runs; returns the weights, from rank 0, and the last test accuracy."""
    from hpclab.training import loop  # here, since it imports torch, which the notebook's kernel need not

    return loop.replicate(job)

"""Training by several strategies over several links: how far the loss has come, after which bytes and seconds."""

import statistics
from collections.abc import Sequence

import numpy as np

from hpclab.rows import grouped, some, source

SMOOTH = 10
"""Steps over which the loss is averaged."""


def progress(rows: list[dict], way: str, link: str, step_bytes: float, first_bytes: Sequence[float] = ()) -> list[dict]:
    """How far a run had come after each step.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.
    way, link : str
        What the strategy and the link are called.
    step_bytes : float
        Bytes that a rank sends in a step, as from `strategies.wire.wire`.
    first_bytes : sequence of float, optional
        The same of the first steps, where they differ.

    Returns
    -------
    list of dict
        Of kind "progress": ``way``, ``link``, ``step`` (from 1), ``sent_mb``, ``seconds`` since the first step began,
        and ``loss``, the mean over the ranks and the last `SMOOTH` steps. The first `SMOOTH` - 1 steps have none.
    """
    steps = grouped(some(rows, "step"), "step")
    losses = [statistics.fmean(row["loss"] for row in group) for group in steps.values()]
    seconds = np.cumsum([max(row["step_s"] for row in group) for group in steps.values()])
    sent = np.cumsum([*first_bytes, *[step_bytes] * len(losses)])
    return [
        {"kind": "progress", "way": way, "link": link, "step": step, "sent_mb": float(sent[step - 1] / 1e6)}
        | {"seconds": float(seconds[step - 1]), "loss": statistics.fmean(losses[step - SMOOTH : step])}
        | {"source": source(rows)}
        for step in range(SMOOTH, len(losses) + 1)
    ]


def reached(rows: list[dict], loss: float) -> dict | None:
    """The first row of kind "progress" with a loss that low; None if there is none."""
    return next((row for row in rows if row["loss"] <= loss), None)


def common_loss(runs: list[list[dict]]) -> float:
    """The lowest loss that all runs have reached; each is rows of kind "progress"."""
    return max(min(row["loss"] for row in rows) for rows in runs)

"""A summary of one run of a job: its throughput, and where its time went."""

import math
import statistics
from typing import Any

from hpclab.rows import grouped, kept, label, machine, some, source, span

LEAST_STEPS = 6
"""Steps that a throughput needs, so that there are some after the warm-up."""
STEADY, SLOWER = 3, 1.25
"""How many steps in a row end the warm-up, and how much slower than later ones they may be."""


def trial(rows: list[dict]) -> dict:
    """Summarise the rows of one training run.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.

    Returns
    -------
    dict
        ``kind`` "trial", ``run``, ``label``, ``ranks``, ``threads``, ``batch`` (samples a step, of all ranks),
        ``samples_per_s`` (see `throughput`), ``warm_up`` (steps that aren't counted), ``step_s`` and its `split`
        (means), ``jitter_s`` (standard deviation of a rank's computing), ``data_share`` (of the step's time),
        ``start_s`` (launch to first step), ``train_s`` (first step to last), ``loss`` (mean of the last five steps;
        None if not reported), ``accuracy`` (None if untested), ``source``, and the machine. Whatever your own function
        doesn't report is None.

    Raises
    ------
    ValueError
        If there are too few steps, some lack their ``samples``, or a rank reports no steps.
    """
    first = some(rows, "run")[0]
    steps = _warm(rows)
    starts = [row for row in rows if row["kind"] in ("run", "restart")]
    ranks = max(starts, key=lambda row: row.get("attempt", 0) if row["kind"] == "restart" else -1)["ranks"]
    if silent := sorted({*range(ranks)} - {row["rank"] for row in steps}):
        raise ValueError(
            f"rows hold no steps of rank {silent[0]} of {ranks} after the warm-up; every rank must report each of its"
            " steps, with the samples that it worked on itself."
        )
    shares = split(rows)
    means: dict[str, Any] = {name: _mean(shares, name) for name in shares[0] if name.endswith("_s")}
    start_s, end_s = span(rows)
    last = max(row["step"] for row in steps)
    losses = [row["loss"] for row in steps if row["step"] > last - 5 and row.get("loss") is not None]
    tests = [row for row in rows if row["kind"] == "epoch"]
    newest: dict = max(tests, key=lambda row: (row.get("attempt", 0), row.get("epoch") or 0), default={})
    return {
        "kind": "trial",
        "run": first["run"],
        "label": label(first["ranks"], first["threads"]),
        "ranks": first["ranks"],
        "threads": first["threads"],
        "batch": sum(row["samples"] for row in steps if row["step"] == last),
        "samples_per_s": throughput(rows),
        "warm_up": min(row["step"] for row in steps),
        "jitter_s": _jitter(steps),
        "data_share": None if means["data_s"] is None else means["data_s"] / means["step_s"],
        "start_s": start_s,
        "train_s": end_s - start_s,
        "loss": statistics.fmean(losses) if losses else None,
        "accuracy": newest.get("test_accuracy"),
        "source": source(rows),
        **means,
        **machine(rows),
    }


def throughput(rows: list[dict]) -> float:
    """Samples per second of a training run, over all ranks, without tests and the warm-up."""
    steps = _warm(rows)
    seconds = max(sum(row["step_s"] for row in group) for group in grouped(steps, "rank").values())
    return sum(row["samples"] for row in steps) / seconds


def warm_up(seconds: list[float]) -> int:
    """How many first steps of a run are slower than later ones, because they allocate memory that later ones use again.

    Parameters
    ----------
    seconds : list of float
        Of each step.

    Returns
    -------
    int
        The first step from which `STEADY` in a row take at most `SLOWER` times the median of the second half; never
        more than half of the steps.

    Examples
    --------
    >>> warm_up([2.0, 0.5, 0.1, 0.11, 0.1, 0.1, 0.11, 0.1, 0.1, 0.11])
    2
    """
    half = len(seconds) // 2
    usual = statistics.median(seconds[half:]) if seconds else 0.0
    for place in range(half):
        if all(value <= SLOWER * usual for value in seconds[place : place + STEADY]):
            return place
    return half


def split(rows: list[dict]) -> list[dict]:
    """Where the time of a run's steps went, by rank, after the warm-up.

    Parameters
    ----------
    rows : list of dict
        As from ``Run.rows`` of `train`.

    Returns
    -------
    list of dict
        One row of kind "split" per rank: ``rank``, and the means over steps of ``step_s`` and its parts ``data_s``,
        ``compute_s``, ``comm_s`` and ``straggle_s``. The last rank to reach an all-reduce waits only for the network,
        so the shortest wait of a step is its exposed communication; any longer wait of other ranks is for that last
        rank. A single rank doesn't communicate: its wait, for a CPU, is ``straggle_s``. Parts that the rows lack are
        None.
    """
    steps = _warm(rows)
    waits = all("wait_s" in row for row in steps)
    shortest: dict[int, float] = {}
    for row in steps:
        shortest[row["step"]] = min(row.get("wait_s", 0.0), shortest.get(row["step"], math.inf))
    if len(ranks := grouped(steps, "rank")) == 1:
        shortest = dict.fromkeys(shortest, 0.0)
    splits = []
    for rank, group in ranks.items():
        comm = statistics.fmean(shortest[row["step"]] for row in group) if waits else None
        straggle = None if comm is None else statistics.fmean(row["wait_s"] for row in group) - comm
        means = {name: _mean(group, name) for name in ("step_s", "data_s", "compute_s")}
        splits.append({"kind": "split", "rank": rank, **means, "comm_s": comm, "straggle_s": straggle})
    return [row | {"source": source(rows)} for row in splits]


def _mean(rows: list[dict], name: str) -> float | None:
    """The mean of a measure; None if a row doesn't tell it."""
    values = [row.get(name) for row in rows]
    return None if None in values else statistics.fmean(values)  # type: ignore[arg-type]


def _jitter(steps: list[dict]) -> float | None:
    """Standard deviation of the computing of a rank's step, the mean over the ranks; of a lone rank's whole step."""
    ranks = grouped(steps, "rank")
    if len(ranks) == 1:
        return statistics.pstdev(row["step_s"] for row in steps)
    if not all("wait_s" in row for row in steps):
        return None
    return statistics.fmean(
        statistics.pstdev(row["step_s"] - row["wait_s"] for row in group) for group in ranks.values()
    )


def _warm(rows: list[dict]) -> list[dict]:
    """Rows of the steps after the warm-up."""
    steps = _timed([row for row in kept(rows) if row["kind"] == "step"])
    slowest: dict[int, float] = {}
    for row in steps:
        slowest[row["step"]] = max(row["step_s"], slowest.get(row["step"], 0.0))
    if len(slowest) < LEAST_STEPS:
        raise ValueError(f"rows hold {len(slowest)} steps; a throughput needs {LEAST_STEPS}: train longer.")
    order = sorted(slowest)
    first = order[warm_up([slowest[step] for step in order])]
    return [row for row in steps if row["step"] >= first]


def _timed(steps: list[dict]) -> list[dict]:
    """Steps with their seconds; where they don't tell them, since the same rank's step before, so without its first."""
    if lacks := [name for name in ("step", "samples") if any(row.get(name) is None for row in steps)]:
        raise ValueError(
            f"rows of steps lack {lacks[0]!r}; a sweep needs hpclab.report(step=..., samples=...) each step."
        )
    ends: dict[int, float] = {}
    timed = []
    for row in sorted(steps, key=lambda row: row["time_s"]):
        start = ends.get(row["rank"])
        ends[row["rank"]] = row["time_s"]
        if "step_s" in row:
            timed.append(row)
        elif start is not None:
            timed.append(row | {"step_s": row["time_s"] - start})
    return timed

"""The network between ranks: all-reduces measured, and the link that explains them."""

import math
from collections.abc import Iterable
from typing import Any

from distributed import Client

from hpclab import laws
from hpclab._arguments import whole_number
from hpclab.gangs.launch import launch
from hpclab.gangs.rank import report
from hpclab.network import WARM_ROUNDS, Network, allreduce_seconds
from hpclab.rows import machine, some


def allreduce(
    client: Client,
    ranks: int = 2,
    sizes: Iterable[int] = (1_000, 10_000, 100_000, 1_000_000, 4_000_000),
    repeats: int = 20,
    **settings: Any,
) -> list[dict]:
    """Measure the network between ranks: how long they take to sum arrays of several sizes.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    ranks : int, default 2
    sizes : iterable of int
        Bytes, each a multiple of 4.
    repeats : int, default 20
        Repeats of each size, interleaved, after a few that don't count.
    **settings
        For `launch`, such as ``oversubscribe=True``.

    Returns
    -------
    list of dict
        Rows of kind "allreduce": ``ranks``, ``nbytes``, ``duration_s`` (of the slowest rank), ``source``, and the
        machine.
    """
    repeats = whole_number("repeats", repeats)
    sizes = tuple(whole_number("sizes", size, 4) for size in sizes)
    if not sizes:
        raise ValueError("sizes is empty; give some bytes, such as sizes=[1_000, 1_000_000].")
    if odd := [size for size in sizes if size % 4]:
        raise ValueError(f"sizes (={odd[0]}) must be a multiple of 4 bytes, which a number takes.")
    run = launch(client, _time_allreduce, sizes, repeats, ranks=ranks, name="allreduce", **settings)
    run.result()
    return by_slowest(run.rows)


def by_slowest(rows: list[dict]) -> list[dict]:
    """Rows of all-reduces that each rank has timed: of each step that of the slowest rank, with the machine.

    Parameters
    ----------
    rows : list of dict
        Of a run; those of kind "allreduce" have ``step``, ``nbytes`` and ``duration_s``.
    """
    slowest: dict[int, dict] = {}
    for row in some(rows, "allreduce"):
        if row["duration_s"] >= slowest.get(row["step"], row)["duration_s"]:
            slowest[row["step"]] = row
    names = ("kind", "run", "ranks", "nbytes", "source", "duration_s")
    where = machine(rows)
    return [{name: row[name] for name in names} | where for row in slowest.values()]


def _time_allreduce(sizes: tuple[int, ...], repeats: int) -> None:
    """What each rank runs: reports its seconds of each all-reduce, once all are done."""
    order = sizes * (repeats + WARM_ROUNDS)
    seconds = allreduce_seconds(order)
    for step in range(len(sizes) * WARM_ROUNDS, len(order)):
        report(kind="allreduce", step=step, nbytes=order[step], duration_s=seconds[step])


def network(rows: list[dict]) -> Network:
    """Latency and bandwidth of a ring that takes as long as these all-reduces; by `laws.fit_alpha_beta`.

    Parameters
    ----------
    rows : list of dict
        As from `allreduce`, all with the same number of ranks.
    """
    rows = some(rows, "allreduce")
    if len(counts := {row["ranks"] for row in rows}) != 1 or min(counts) < 2:
        raise ValueError(
            f"rows are of {sorted(counts)} ranks; a network is fitted to rows of one rank count, at least 2."
        )
    ranks = counts.pop()
    line = laws.fit_alpha_beta([row["nbytes"] for row in rows], [row["duration_s"] for row in rows]).values
    hops = 2 * (ranks - 1)
    bandwidth = 8 * hops / ranks / line["beta"] if line["beta"] else math.inf  # more bytes took no longer
    return Network(latency=line["alpha"] / hops, bandwidth=bandwidth)

"""What tasks cost, and what workers did when: rows of measurements, and of Dask's own task stream."""

import statistics
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from dask.utils import key_split
from distributed import Client

from hpclab import laws, machine
from hpclab.gangs.scheduler import Ledger, consult


def clock(client: Client, function: Callable, *pieces: Collection, **settings: Any) -> float:
    """Seconds to have a function applied to each piece by a task of its own, until all results are here.

    Parameters
    ----------
    client : distributed.Client
    function : callable
    *pieces : collection
        As for ``client.map``: several go side by side.
    **settings
        Given to the function in every task.
    """
    start = time.perf_counter()
    client.gather(client.map(function, *pieces, pure=False, **settings))
    return time.perf_counter() - start


def sweep(
    run: Callable[[int], float], tasks: Iterable[int], items: int, repeats: int = 5, client: Client | None = None
) -> list[dict]:
    """Time the same work cut into different numbers of tasks, in turns.

    Parameters
    ----------
    run : callable
        Given a number of tasks, cuts the work into them and returns the seconds that it took.
    tasks : iterable of int
        Numbers of tasks, each once in every turn.
    items : int
        What is cut: how many pieces there are at most.
    repeats : int, default 5
        Number of turns.
    client : distributed.Client, optional
        Whose workers do the tasks. Default: the newest client that is open; this process itself, if there is none.

    Returns
    -------
    list of dict
        One row of kind "grain" a run: ``tasks``, ``items``, ``duration_s``, and the machines of those workers.
    """
    tasks = list(tasks)
    measured = _machines(client) | {"source": "measured", "started": time.strftime("%Y-%m-%dT%H:%M:%S")}
    return [
        {"kind": "grain", "tasks": count, "items": items, "duration_s": run(count)} | measured
        for _ in range(repeats)
        for count in tasks
    ]


def _machines(client: Client | None) -> dict:
    try:
        client = client or Client.current()
    except ValueError:  # there is none
        return machine.together([machine.introduce()])
    return consult(client, Ledger.machines)


def race(functions: Iterable[Callable], clients: dict[str, Client], pieces: int, repeats: int = 5) -> list[dict]:
    """Compare how fast clusters apply functions to pieces, to this process by itself, in turns.

    Returns
    -------
    list of dict
        One row for each function and cluster: ``function``, ``cluster``, ``speedup`` (the median of the ratios within a
        turn: as many times as fast as this process), and the lowest and highest of them, ``low`` and ``high``.
    """
    functions = list(functions)
    ratios: dict[tuple[str, str], list[float]] = {}
    for function in functions * repeats:
        start = time.perf_counter()
        for piece in range(pieces):
            function(piece)
        alone = time.perf_counter() - start
        for name, client in clients.items():
            ratio = alone / clock(client, function, range(pieces))
            ratios.setdefault((function.__name__, name), []).append(ratio)
    return [
        {"function": function, "cluster": name}
        | {"speedup": statistics.median(turns), "low": min(turns), "high": max(turns)}
        for (function, name), turns in ratios.items()
    ]


def overhead(clients: dict[str, Client], tasks: Iterable[int] = (10, 100, 400), repeats: int = 5) -> list[dict]:
    """Measure what a task with nothing in it costs, on several clusters in turns.

    Returns
    -------
    list of dict
        One row for each cluster: ``cluster``, ``task_ms`` (milliseconds for one more task, from a line through all
        runs), ``low_ms`` and ``high_ms`` (its interval).
    """
    counts = list(tasks) * repeats
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    for count in counts:
        for name, client in clients.items():
            seconds[name].append(clock(client, abs, range(count)))
    lines = {name: laws.fit_alpha_beta(counts, durations) for name, durations in seconds.items()}
    return [
        {"cluster": name, "task_ms": 1e3 * line.values["beta"]}
        | {f"{end}_ms": 1e3 * value for end, value in zip(("low", "high"), line.intervals["beta"], strict=True)}
        for name, line in lines.items()
    ]


def spans(records: Iterable[dict[str, Any]]) -> list[dict]:
    """Rows of a recorded task stream.

    Parameters
    ----------
    records : iterable of dict
        The ``data`` of what ``with distributed.get_task_stream() as stream:`` gives, once the block has ended. Each
        record has a ``worker``, a ``key`` and ``startstops``.

    Returns
    -------
    list of dict
        One row of kind "task" for each thing that a worker did for a task: ``worker`` (its number, from 0 by address),
        ``name`` of the task's function, ``action`` ("compute", "transfer" of what it needs, ...), ``start_s`` (zero is
        the first start) and ``duration_s``.

    Notes
    -----
    Dask sets the workers' clocks by the answers to their heartbeats: on a busy machine they may be some ten
    milliseconds off.

    Examples
    --------
    >>> parts = [{"action": "compute", "start": 5.0, "stop": 5.5}]
    >>> [row] = spans([{"worker": "tls://127.0.0.1:40001", "key": "abs-1f", "startstops": parts}])
    >>> row["worker"], row["name"], row["start_s"], row["duration_s"]
    (0, 'abs', 0.0, 0.5)
    """
    records = list(records)
    workers = sorted({record["worker"] for record in records})
    begin = min((part["start"] for record in records for part in record["startstops"]), default=0.0)
    rows = [
        {
            "kind": "task",
            "worker": workers.index(record["worker"]),
            "name": key_split(record["key"]),
            "action": part["action"],
            "start_s": part["start"] - begin,
            "duration_s": part["stop"] - part["start"],
            "source": "measured",
        }
        for record in records
        for part in record["startstops"]
    ]
    return sorted(rows, key=lambda row: row["start_s"])

"""Kernel: `launch`, which checks its arguments and makes a run of them.

A gang is ranks, processes that start together, can talk by torch.distributed, and end together.
"""

import math
import os
import re
import reprlib
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cloudpickle
from dask.utils import format_bytes
from distributed import Client

from hpclab._arguments import plain, size, whole_number
from hpclab.gangs.attempt import RunSettings
from hpclab.gangs.run import Run
from hpclab.gangs.scheduler import Booking, Ledger, consult

LARGE_BYTES = 2**23
"""Smaller messages fit anywhere."""
COPIES, IDLE_BYTES = 3, 2**28
"""How often a worker holds a message to a rank at once (as it came in, in parts, and unpacked), and what it takes
without one."""
TITLE_BYTES = 100
"""Of a run's name in the names of its files, which may have 255."""


def launch(
    client: Client,
    function: Callable,
    *args: Any,
    ranks: int | None = None,
    threads: int = 1,
    oversubscribe: bool = False,
    wait: bool = False,
    init: bool = True,
    memory: int | str | None = None,
    hang_after: float | None = 60.0,
    max_restarts: int = 0,
    min_ranks: int | Iterable[int] | None = None,
    resume: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    name: str | None = None,
) -> Run:
    """Run a function on every rank of a gang, and return at once.

    Each rank is its own process, started and watched by a worker of the cluster. In it, torch.distributed is
    initialised (gloo), and the environment holds RANK and WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (on the same
    host) and, as under torchrun, GROUP_RANK and GROUP_WORLD_SIZE (the host's number, and the number of hosts).

    Parameters
    ----------
    client : distributed.Client
        From `connect`, or any other client of a cluster whose workers can import hpclab.
    function : callable
        Called as ``function(*args)`` on every rank. It may be defined in the notebook.
    *args
        Its arguments; they must be picklable.
    ranks : int, optional
        Number of ranks. Each takes as many CPUs as it has threads. The gang is placed whole or not at all: on one host
        if it fits, else on as few as possible. Default: as many as the cluster has room for.
    threads : int, default 1
        Threads that torch may use in each rank.
    oversubscribe : bool, default False
        Start the gang even if there are too few CPUs, or other gangs hold them. Its ranks then take turns, and its rows
        say "emulated".
    wait : bool, default False
        If other gangs hold the CPUs, queue for them; otherwise that is an error. With True, a gang that lost workers
        also waits as long as it takes for new ones, such as for a job in a site's queue; otherwise for a minute.
    init : bool, default True
        Initialise torch.distributed. False leaves that to the function, which finds the variables that torchrun sets
        (MASTER_ADDR, MASTER_PORT and so on): a function written for torchrun, Accelerate or Lightning runs unchanged.
        Its ranks still find each other through a private file or Dask's connections, not torch's open TCPStore.
    memory : int or str, optional
        What each rank may allocate after its start, in bytes or as "2GB"; allocating more raises an error in the rank.
        Default: its share of its worker's limit. Only Linux enforces it.
    hang_after : float, default 60
        End the gang when no rank has made progress (reported, printed, or used a CPU) for this many seconds, and one
        waits in a collective; the error shows where each rank is. None waits for ever.
    max_restarts : int, default 0
        How many times to restart when a rank's process, its worker or its host is lost, or the walltime of its
        worker's job is nearly over (ranks that call `should_stop` then end in time, and can save). The same function
        starts again, and continues from its last `save` if it calls `restore`. An exception in the function never
        causes a restart. A lost worker's newest rows and prints, up to a few tenths of a second of them, are lost too.
    min_ranks : int or iterable of int, optional
        The fewest ranks to continue with, or all numbers of ranks allowed, if lost workers don't come back within 10
        seconds. Default: as many as before.
    resume : path, optional
        Folder of an earlier run; `restore` returns the newest checkpoint there.
    folder : path, optional
        Where ``rows.jsonl``, the ranks' logs and checkpoints go; must be new or empty. For checkpoints of a gang on
        other hosts, it must be on a disk that they share. Default: ``results/<time>-<name>-<id>``.
    name : str, optional
        Name of the run. Default: the function's.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the cluster can never have room for that many ranks, the function and its arguments would fill a worker's
        memory, the folder is occupied, or the folder to resume has no checkpoint.
    RuntimeError
        If the cluster has no room now, and `wait` is False.
    TypeError
        If `client` is not a client, or the function or an argument can't be pickled; the message says which.
    PermissionError
        If the folder can't be written.

    Notes
    -----
    A rank ends as a Python program does: its threads may finish, exit handlers run, and open files are flushed, for up
    to 10 seconds (2 after an error; none for a killed rank). ``sys.exit(0)`` counts as returning None. On Linux every
    process that a rank has started ends with it, whatever its session. Settings that bind threads to CPUs
    (OMP_PROC_BIND and the like) don't reach ranks: all ranks would bind to the same first CPU. Return values pass
    through the worker's memory, so a value of more than a quarter of the rank's share is refused.
    """
    max_restarts = whole_number("max_restarts", max_restarts, least=0)
    ranks = gang_size(client, ranks, threads, oversubscribe)
    threads = whole_number("threads", threads)
    if not callable(function):
        raise TypeError(f"function (={function!r}) must be callable.")
    named = {"function": function} | {f"args[{i}]": arg for i, arg in enumerate(args)}
    payload = pickled((function, args), named)
    check_size(client, len(payload), ranks, "the function and its arguments")
    title = str(name or getattr(function, "__name__", type(function).__name__))
    title = re.sub(r"[^\w.=-]+", "-", title).strip("-").encode()[:TITLE_BYTES].decode(errors="ignore")
    run = f"{time.strftime('%Y%m%d-%H%M%S')}-{title}-{uuid.uuid4().hex[:4]}"
    booking = Booking(run, client.id, ranks, threads, oversubscribe, goes_on=max_restarts > 0)
    limit = None if memory is None else size("memory", memory)
    settings = RunSettings(init, limit, hang_after, wait, max_restarts, _sizes(ranks, min_ranks), _resumable(resume))
    return Run(client, booking, settings, payload, Path(folder or Path("results", run)))


def gang_size(client: Client, ranks: int | None, threads: int = 1, oversubscribe: bool = False) -> int:
    """Return the number of ranks of a gang, by default as many as the cluster takes, or raise as `launch` does."""
    if not isinstance(client, Client):
        raise TypeError(f"client (={reprlib.repr(client)}) must be a distributed.Client, which hpclab.connect() gives.")
    if client.status != "running":
        raise ValueError(f"client is {client.status}; open a new one with hpclab.connect().")
    threads = whole_number("threads", threads)
    wish = 1 if ranks is None else whole_number("ranks", ranks)
    most, wrong = consult(client, Ledger.room, Booking("", client.id, wish, threads, oversubscribe))
    if wrong:
        cluster: Any = client.cluster
        if hasattr(cluster, "standing") and cluster.worker_spec and not cluster.scheduler.workers:
            wrong += f" Its jobs: {cluster.standing()}."  # which may wait for ever
        raise ValueError(wrong)
    return most if ranks is None else wish


def _sizes(ranks: int, min_ranks: int | Iterable[int] | None) -> tuple[int, ...]:
    """Numbers of ranks that a gang may have, the largest first."""
    if min_ranks is None:
        return (ranks,)
    several = isinstance(plain(min_ranks), Iterable)
    try:
        sizes = [whole_number("min_ranks", size, 1, ranks) for size in (min_ranks if several else [min_ranks])]  # type: ignore[union-attr]
    except ValueError:
        raise ValueError(f"min_ranks (={min_ranks!r}) must be from 1 to ranks (={ranks}).") from None
    every = sizes if several else range(sizes[0], ranks)
    return tuple(sorted({ranks, *every}, reverse=True))


def _resumable(folder: str | os.PathLike | None) -> str | None:
    if folder is None:
        return None
    path = Path(folder).expanduser().absolute()
    if not any((path / "checkpoints").glob("step-*.pt")):
        raise ValueError(
            f"resume (={str(folder)!r}) holds no checkpoints/step-*.pt; name the folder of a run that does."
        )
    return str(path)


def pickled(content: object, parts: dict[str, Any]) -> bytes:
    """Pickle what is sent to the ranks, or raise a TypeError that names the first of its parts that can't be."""
    try:
        return cloudpickle.dumps(content)
    except Exception:
        check_pickles(parts)
        raise


def check_size(client: Client, nbytes: int, ranks: int, what: str) -> None:
    """Raise a ValueError if what is sent to each rank would take the memory of its worker."""
    if nbytes < LARGE_BYTES:
        return
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limit = min((worker["memory_limit"] for worker in workers if worker["memory_limit"]), default=math.inf)
    if COPIES * nbytes * math.ceil(ranks / max(1, len(workers))) > limit - IDLE_BYTES:
        raise ValueError(
            f"{what} take {format_bytes(nbytes)} when they are pickled, and a worker with"
            f" {format_bytes(int(limit))} of memory would hold {COPIES} copies for each of its ranks; read large"
            " data from a file inside the function, as hpclab.data does, or give workers more: connect(memory=...)."
        )


def check_pickles(values: dict[str, Any]) -> None:
    """Raise a TypeError that names the first of some values, by name, that can't be pickled."""
    for name, value in values.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"{name} (={value!r}) can't be pickled and sent to the ranks: {error}; make it inside the function."
            ) from error

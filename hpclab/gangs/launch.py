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

    Each rank is a process of its own, started and watched by a worker of the cluster. In it, torch.distributed is
    initialised (gloo) and the environment holds RANK and WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (on the same host)
    and, as torchrun has it, GROUP_RANK and GROUP_WORLD_SIZE (the host's number, and how many there are).

    Parameters
    ----------
    client : distributed.Client
        From `connect`, or any other client of a cluster whose workers can import hpclab.
    function : callable
        Called as ``function(*args)`` on every rank. It may be defined in the notebook.
    *args
        Its arguments; they must be picklable.
    ranks : int, optional
        Number of ranks. Each takes as many CPUs as it has threads; the gang gets all or none, on one host if that takes
        it, else on as few as do. Default: as many as the cluster takes.
    threads : int, default 1
        Threads that torch may use in each rank.
    oversubscribe : bool, default False
        Start the gang even where there are fewer CPUs than it takes, or other gangs hold them. Its ranks then take
        turns, and its rows say "emulated".
    wait : bool, default False
        If other gangs hold the CPUs, wait in a queue for them; else that is an error. One that was lost then waits too
        for as long as it takes, such as for a job in a site's queue, else a minute.
    init : bool, default True
        Initialise torch.distributed. False leaves that to the function: it then finds what torchrun sets (MASTER_ADDR,
        MASTER_PORT and so on), so one that was written for torchrun, Accelerate or Lightning runs as it is. Its ranks
        still find each other by a private file, or over Dask's connections, not by torch's open TCPStore.
    memory : int or str, optional
        What each rank may allocate beyond its start, in bytes or as "2GB"; what goes beyond raises an error in it.
        Default: its share of its worker's limit. Only Linux enforces it.
    hang_after : float, default 60
        End the gang when for so many seconds no rank has got on (reported, printed, or used a CPU), and one waits in a
        collective; the error shows where each stands. None waits for ever.
    max_restarts : int, default 0
        How often to begin another attempt when a rank's process, its worker or its host is lost, or the walltime of its
        worker's job is nearly over (ranks that ask `should_stop` then end in time, and can save): with the same
        function, which goes on from what it gave to `save` if it asks `restore`. An exception of the function is never
        a reason for one. What a lost worker had not yet passed on of its ranks' rows and prints is lost too, up to some
        tenths of a second.
    min_ranks : int or iterable of int, optional
        The fewest ranks to go on with, or all numbers that may be, when workers that were lost don't come back within
        some seconds. Default: as many as before.
    resume : path, optional
        Folder of an earlier run; `restore` gives the newest checkpoint there.
    folder : path, optional
        Where ``rows.jsonl``, the ranks' logs and checkpoints go; must be new or empty, and for checkpoints of a gang on
        other hosts on a disk that they share. Default: ``results/<time>-<name>-<id>``.
    name : str, optional
        Name of the run. Default: the function's.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the cluster never has room for that many ranks, the function and its arguments would take the memory of a
        worker, the folder is occupied, or the one to resume has no checkpoint.
    RuntimeError
        If it has none now, and `wait` is False.
    TypeError
        If the client is none, or the function or an argument can't be pickled; the message says which.
    PermissionError
        If the folder can't be written.

    Notes
    -----
    A rank ends as a Python program does: threads that it started may finish, exit handlers run, open files get what was
    written to them, for up to 10 seconds (2 after an error; a rank that is killed has none of this). Leaving by
    ``sys.exit(0)`` is returning None. On Linux every process that a rank has started ends with it, whatever session it
    has moved to. Settings that bind threads to CPUs (OMP_PROC_BIND and its like) don't reach ranks: each would bind
    itself to the same first CPU. What a rank returns passes through its worker's memory, so a value of more than a
    quarter of its share is refused.
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

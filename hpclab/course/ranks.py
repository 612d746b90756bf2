"""Ranks of a check: processes that talk by real torch.distributed, and are seen when they wait for each other for ever.

That they wait is no matter of seconds: in round after round each of them is asked where it is, and answers; when all
that are left are in the same call of torch.distributed as a second's rounds before, nobody is left to answer them.
"""

import linecache
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import cloudpickle
import psutil

from hpclab.course import fork
from hpclab.course.verdicts import Decided, Result, failed, reject
from hpclab.language import translate as _

PAUSE_SECONDS = 0.02
"""Between two rounds of asking."""
ROUNDS = 50
"""Number of rounds in turn in which all must be in the same call, to count as waiting for ever."""


def run(work: Callable[[int], Any], ranks: int) -> list:
    """What `work(rank)` returns in each of some processes that are one group of gloo's, by rank.

    Parameters
    ----------
    work : callable
        What it returns must be picklable. Random numbers of torch, numpy and Python are fresh where it begins.
    ranks : int
        Number of processes.

    Raises
    ------
    Decided
        If a rank has decided the check, or ended its process, or if ranks wait for each other.
    """
    context: Any = get_context("fork" if fork.possible() else "spawn")
    packed = work if fork.possible() else cloudpickle.dumps(work)
    owner = os.getpid() if sys.platform == "linux" else 0
    gang = []
    with tempfile.TemporaryDirectory(prefix="hpclab-ranks-") as folder:
        try:
            for rank in range(ranks):
                ours, theirs = Pipe()
                place = (rank, ranks, str(Path(folder, "store")), owner)
                process = context.Process(target=_main, args=(packed, place, theirs), daemon=True)
                process.start()
                theirs.close()
                gang.append(_Rank(process, ours))
            return _returned(gang)
        finally:
            for member in gang:
                member.process.kill()
                member.process.join()


class _Rank:
    """A rank, seen from the check."""

    def __init__(self, process: Any, connection: Connection):
        self.process = process
        self.connection = connection
        self.answer: Any = None
        self.ended = False
        self.decided: Result | None = None
        self.quiet = 0
        """Rounds for which it has been in the same call of torch.distributed."""
        self.where = ""

    def ask(self) -> None:
        """Ask it where it is, and take in what it says; what it returned comes in the same way."""
        try:
            self.connection.send_bytes(b"?")
            kind, content = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            if self.process.exitcode == -signal.SIGABRT:
                reject(_("Ranks met in different calls, or with tensors of different sizes, and gloo aborted a rank."))
            reject(_("Your function ended its own process; it should return instead."))
        if kind == "returned":
            self.answer, self.ended = content, True
        elif kind == "decided":
            self.decided = content
        else:
            same, self.where = content
            self.quiet = self.quiet + 1 if same else 0


def _returned(gang: list[_Rank]) -> list:
    """What all ranks return."""
    left = gang
    while left:
        for member in left:
            member.ask()  # all of them first: one that was aborted is the cause of what the others then raise
        for member in left:
            if member.decided is not None:
                raise Decided(member.decided)
        left = [member for member in left if not member.ended]
        if left and all(member.quiet > ROUNDS for member in left):
            raise Decided(_hanging(gang))
        time.sleep(PAUSE_SECONDS)
    return [member.answer for member in gang]


def _hanging(gang: list[_Rank]) -> Result:
    stands = [
        _("rank {rank} has returned", rank=rank)
        if member.ended
        else _("rank {rank} waits in {where}", rank=rank, where=member.where)
        for rank, member in enumerate(gang)
    ]
    text = "; ".join(stands)
    if any("barrier" in member.where for member in gang):
        return failed(
            _(
                "Deadlock: {stands}. A barrier is one more call that every rank must reach, and not every rank does.",
                stands=text,
            )
        )
    return failed(
        _("Deadlock: {stands}. All ranks must make the same calls, in the same order and equally often.", stands=text)
    )


def _main(work: Any, place: tuple[int, int, str, int], connection: Connection) -> None:
    """What a rank does: the work, while a thread says where it is; it stays until it is killed.

    One that left would cut the connections of those that still wait for it, and they couldn't be seen to wait.
    """
    import numpy as np
    import torch
    import torch.distributed as dist

    rank, ranks, store, owner = place
    if owner:
        fork.die_with(owner)
    if isinstance(work, bytes):
        work = pickle.loads(work)
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.seed):
        seed()
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what all ranks print is shown once
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": _loopback()}
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    outcome: list = []
    threading.Thread(target=_answer, args=(connection, outcome), daemon=True).start()
    try:
        outcome.append(pickle.dumps(("returned", work(rank))))
    except Decided as decided:
        outcome.append(pickle.dumps(("decided", decided.result)))
    threading.Event().wait()


def _answer(connection: Connection, outcome: list[bytes]) -> None:
    """Answer the check for ever: with where the main thread is, until there is an outcome."""
    last: tuple[Any, int] = (None, 0)
    while _asked(connection):
        if outcome:
            connection.send_bytes(outcome[0])
            continue
        frame: Any = sys._current_frames()[threading.main_thread().ident]  # type: ignore[index]
        # A frame that is held is of this one call, whatever is called later.
        now = (frame, frame.f_lasti)
        connection.send_bytes(pickle.dumps(("is", (now == last and _waits(frame), _place(frame)))))
        last = now


def _asked(connection: Connection) -> bool:
    """Wait for the check to ask; if the check is gone, this process ends."""
    try:
        return bool(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


def _line(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()


def _waits(frame: FrameType) -> bool:
    """Whether the innermost call is one that waits for other ranks."""
    return "torch/distributed" in Path(frame.f_code.co_filename).as_posix() or ".wait(" in _line(frame)


def _place(frame: FrameType | None) -> str:
    """The line of the reader's in which a rank is: the innermost that is neither torch's nor hpclab's."""
    others = f"{os.sep}torch{os.sep}", str(Path(__file__).parents[1])
    while frame and any(other in frame.f_code.co_filename for other in others):
        frame = frame.f_back
    return _line(frame) if frame else "?"


def _loopback() -> str:
    """The network interface of this machine alone: gloo would look for another by the machine's name."""
    addresses = psutil.net_if_addrs()
    return next((name for name, at in addresses.items() if any(one.address == "127.0.0.1" for one in at)), "lo")

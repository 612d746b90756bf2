"""Rank: a process of its own that runs the user's function, and what the function finds: report, should_stop, store.

It talks to its worker by three pipes. Standard input brings its `wire.Work`, then orders, and stays open for as long as
the worker lives. Standard output carries records. Standard error carries all that is printed, by Python or C.
"""

import faulthandler
import functools
import importlib
import itertools
import math
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from hpclab.gangs import rank_end, wire

RESERVED = ("run", "attempt", "rank", "ranks", "source")
RESERVED_KINDS = ("run", "restart", "attempt", "end")
"""Kinds of rows that a run itself writes."""
NUMBERS = (
    *("step", "epoch", "loss", "samples", "step_s", "data_s", "compute_s", "wait_s", "cpu_s", "save_s", "peak_mb"),
    *("test_loss", "test_accuracy", "test_bits"),
)
"""What figures and tables compute with, if a row has it."""
LONGEST_ROW = 1_000_000
"""Characters of a row of measurements; rows gather in the worker's memory and in the scheduler's."""
BEAT_SECONDS = 1.0
"""How often a rank shows that its Python still runs; one that holds the GIL can't."""


class Context:
    """This rank's place in its gang, and its line to its worker."""

    def __init__(self, work: wire.Work, records: BinaryIO):
        self.work = work
        self.place = work.place
        self.records = records
        self.lock = threading.Lock()
        self.pid = os.getpid()
        self.turn: int | None = None
        """File that this process and its forks lock in turn before they write a record, where they can share one."""
        self.main = threading.get_ident()
        self.writing = self.postponed = False
        """Whether the main thread writes a record, and whether it was interrupted meanwhile."""
        self.interrupt: Callable[[], object] = functools.partial(signal.default_int_handler, signal.SIGINT, None)
        """What an interrupt does, in the main thread."""
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        """Orders for what runs here."""
        self.answers: dict[int, queue.SimpleQueue] = {}
        """Where questions wait for their answers, by number."""
        self.numbers = itertools.count()
        self.calls = 0
        """Of `should_stop`."""
        self.stop = threading.Condition()
        self.stopping = False
        self.stop_at: int | None = None
        """The call of `should_stop` at which all ranks end."""

    def send(self, record: wire.Record) -> None:
        """Write one record, whole, from any thread, and from forks of this process."""
        mine = threading.get_ident() == self.main
        try:
            with self.lock, self._alone():
                self.writing |= mine
                self.records.write(wire.encode(record))
                self.records.flush()
        finally:
            self.writing &= not mine
        if mine and self.postponed:
            self.postponed = False
            self.interrupt()

    def on_signal(self, *_: Any) -> None:
        """Interrupt the main thread, but not in the middle of a record, of which Python would drop the rest."""
        if self.writing:
            self.postponed = True
        else:
            self.interrupt()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep forks of this process from writing meanwhile: a pipe takes no more than 4,096 bytes in one piece.

        The system frees this kind of lock when its holder is killed, and it belongs to the process, not to the open
        file that a fork shares.
        """
        if self.turn is None:
            yield
            return
        import fcntl

        fcntl.lockf(self.turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.turn, fcntl.LOCK_UN)

    def share(self, turn: int) -> None:
        """Have forks of this process take turns with it; no thread of it is in the middle of a record when it forks."""

        def begin() -> None:
            self.lock = threading.Lock()
            self.inherited = self.records  # kept, as its end would write what is left in it, and close the pipe
            self.records = os.fdopen(self.records.fileno(), "wb", closefd=False)

        self.turn = turn
        take, give_back = (lambda: self.lock.acquire()), (lambda: self.lock.release())  # of this lock or a fork's own
        os.register_at_fork(before=take, after_in_parent=give_back, after_in_child=begin)

    def obey(self, orders: Iterator[wire.Message]) -> None:
        """Take orders until the owner has gone; then end this process, and all that it started."""
        for order in orders:
            with self.stop:
                match order:
                    case wire.Stop():
                        # From here on no call goes through before all ranks have told how far they were, and agreed.
                        self.stopping = True
                        self.send(wire.Calls(calls=self.calls))
                    case wire.StopAt():
                        self.stop_at = order.calls
                        self.stop.notify_all()
                    case wire.Answer():
                        self.answers.pop(order.to).put(order)
                    case _:
                        self.inbox.put(order)
        if hasattr(os, "killpg"):
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    def ask(self, question: wire.Ask) -> wire.Answer:
        """Put a question about the other ranks to the scheduler, and wait for its answer."""
        if os.getpid() != self.pid:
            raise RuntimeError("a process that a rank has forked can't ask for the other ranks; the rank itself can.")
        question.number = next(self.numbers)
        reply = self.answers[question.number] = queue.SimpleQueue()
        self.send(question)
        return reply.get()

    def beat(self) -> None:
        """Show for ever that Python runs here."""
        while True:
            self.send(wire.Beat())
            time.sleep(BEAT_SECONDS)

    def should_stop(self) -> bool:
        """See the function of this name; a fork of this process hears of no stop, and is no rank."""
        if os.getpid() != self.pid:
            return False
        with self.stop:
            self.calls += 1
            if self.calls == 1:
                self.send(wire.Cooperates())
            while self.stopping and self.stop_at is None:
                self.stop.wait()
            return self.stop_at is not None and self.calls >= self.stop_at


_context: Context | None = None


def current() -> Context:
    """This rank, in whose process it is called."""
    assert _context is not None
    return _context


def report(**row: Any) -> None:
    """Report one row of measurements from inside a rank: it streams to the notebook and to the run's ``rows.jsonl``.

    Outside a gang it does nothing, so the same function also runs by itself.

    Parameters
    ----------
    **row
        Numbers, strings, booleans or None, with the unit in the name (``step_s=0.02``); a tensor or array of one
        element counts as its number; NaN and infinity become null in the file. You may pass ``kind`` (default "step")
        and ``time_s`` (default: seconds since the launch); hpclab adds run, attempt, rank, ranks and source. ``step``,
        ``epoch``, ``loss``, ``samples`` and the other columns that hpclab computes with (see `hpclab.rows`) must be
        numbers or None.

    Raises
    ------
    ValueError
        If a name is one that hpclab adds, or the kind is one that hpclab writes itself ("run", "restart", "attempt",
        "end"); if an integer is larger than any float; if the row has more than a million characters.
    TypeError
        If a value can't be written as JSON, or isn't a number where one is needed; the message names it.
    """
    if _context is None:
        return
    place = _context.place
    if taken := [name for name in RESERVED if name in row]:
        raise ValueError(f"report({taken[0]}=...) is set by the launcher; choose another name.")
    row = {name: _plain(name, value) for name, value in row.items()}
    row = {"kind": "step", "time_s": time.time() - place.launched - _context.work.ahead} | row
    _check_columns(row)
    row |= {"run": place.run, "attempt": place.attempt, "rank": place.rank, "ranks": place.ranks}
    record = wire.Row.of(row)
    if len(record.body) > LONGEST_ROW:
        raise ValueError(
            f"report(...) of {len(record.body):,} characters exceeds {LONGEST_ROW:,}; return what is large, or write it"
            " to a file."
        )
    _context.send(record)


def should_stop() -> bool:
    """Whether the run should end here; call it once a step, on every rank.

    After a stop (Ctrl-C, the Stop button, ``run.stop()``) it is True at the *same* call on every rank, so that no rank
    waits in a collective for one that has left. The function can then save its state and return; its values are kept.
    A function that never calls it is interrupted instead, as by Ctrl-C. Outside a gang this is False.
    """
    return _context is not None and _context.should_stop()


def _check_columns(row: dict) -> None:
    """Raise if a row could not be told from the run's own, or computed with."""
    if not isinstance(row["kind"], str):
        raise TypeError(f"report(kind={row['kind']!r}) must be text, such as 'step'.")
    if row["kind"] in RESERVED_KINDS:
        raise ValueError(f"report(kind={row['kind']!r}) is a kind of row that hpclab writes itself; choose another.")
    for name in NUMBERS:
        if isinstance(row.get(name), str):
            raise TypeError(f"report({name}={row[name]!r}) must be a number, or None.")
    time_s = row["time_s"]
    if not isinstance(time_s, int | float) or not math.isfinite(time_s):
        raise TypeError(f"report(time_s={time_s!r}) must be a finite number of seconds.")


def emulate() -> None:
    """Have the rows of this run say that they are emulated: something other than this machine sets their times."""
    if _context is not None:
        _context.send(wire.Emulated())


def in_gang() -> bool:
    """Whether this process is a rank."""
    return _context is not None


def restore_folders() -> list[Path]:
    """Folders of runs whose checkpoints this rank goes on from, the nearest first."""
    if _context is None:
        return []
    own = [run_folder()] if _context.place.attempt else []
    return own + [Path(folder) for folder in [_context.place.resume] if folder]


def clock_ahead() -> float:
    """Seconds by which the clock of this rank's machine is ahead of the kernel's."""
    return current().work.ahead


def run_folder() -> Path:
    """Folder of this run's results, from inside a rank."""
    return Path(current().place.folder)


def main() -> None:
    """Run this process as a rank."""
    global _context
    owner = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    records = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Made anew, as those of the zygote may be of a file; whatever the locale, names of files may hold what is no text.
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )
    orders = wire.read_frames(owner)
    work = next(orders, None)
    if not isinstance(work, wire.Work):
        return
    _context = context = Context(work, records)
    signal.signal(signal.SIGINT, context.on_signal)
    for background in (lambda: context.obey(orders), context.beat):
        threading.Thread(target=background, daemon=True).start()
    sys.path[:] = work.sys_path
    try:
        stacks = open(work.stacks, "w")  # noqa: SIM115  # open until the end
        if hasattr(faulthandler, "register"):  # from C, so it is written also while some call holds the GIL
            faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
        if hasattr(os, "memfd_create"):
            context.share(os.memfd_create("hpclab-turn"))
        value = rank_end.dumps(_run(work), "the return value", work.place.worker_memory)
    except BaseException as error:
        # Peers must not wait for a rank that will never answer.
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second interrupt would cut this short
        context.send(rank_end.failure(error, work.place, __file__))
        rank_end.leave(1, rank_end.FAILED_SECONDS)
    context.send(wire.Value(body=value))
    rank_end.leave(0, rank_end.EXIT_SECONDS)


def _run(work: wire.Work) -> Any:
    import torch
    import torch.distributed as dist

    from hpclab.gangs import buckets
    from hpclab.gangs.store import check_ways

    place = work.place
    torch.set_num_threads(place.threads)
    rank_end.limit_memory(place.memory)
    _keep_groups()
    buckets.settle()
    function, arguments = pickle.loads(work.body)
    work.body = b""  # it may be large
    meeting = store()
    if not place.store and place.local_rank == 0:
        check_ways(meeting, place.host, place.rank)
    if not place.init:
        with _environment_of_torchrun(meeting, place):
            return _call(function, arguments)
    dist.init_process_group(backend(), store=meeting, rank=place.rank, world_size=place.ranks)
    value = _call(function, arguments)
    if dist.is_initialized():
        dist.barrier()  # a rank that left now would cut the connections of those still in a collective
    return value


def _call(function: Callable, arguments: tuple) -> Any:
    """Call the user's function; one that leaves by ``sys.exit(0)`` has succeeded, as any program has."""
    try:
        value = function(*arguments)
    except SystemExit as left:
        if left.code not in (None, 0):
            raise
        value = None
    current().send(wire.Returned())
    return value


@functools.cache
def store() -> Any:
    """Where this gang's ranks find each other: a file that only this user can open; over several hosts the ledger."""
    import torch.distributed as dist

    from hpclab.gangs.store import GangStore

    place = current().place
    if not place.store:
        return GangStore(current().ask)
    file = dist.FileStore(place.store, place.ranks)
    file.set_timeout(timedelta(days=1))  # a gang that hangs is found by its progress
    return file


def _keep_groups() -> None:
    """Keep a process group that the function destroys until this process ends.

    When the last one that holds it is a DDP model, torch (2.13) waits in its destructor, with the GIL, for a thread of
    gloo that needs the GIL to forget the last all-reduce: one in five functions that end right after a step hung.
    """
    import torch.distributed as dist

    destroy, kept = dist.destroy_process_group, []

    @functools.wraps(destroy)
    def destroy_and_keep(group: Any = None) -> None:
        kept.append(group or dist.group.WORLD)
        destroy(group)

    dist.destroy_process_group = destroy_and_keep


def backend() -> str:
    """Gloo; for tensors on GPUs NCCL, where each rank of the host has one (conventional, and not run by our tests)."""
    import torch

    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        return "gloo"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _environment_of_torchrun(store: Any, place: wire.RankPlace) -> Iterator[None]:
    """Let a function start its own process group by env://, as one written for torchrun does.

    It gets this gang's store: torchrun's TCPStore would let in whoever reaches its port. MASTER_PORT is free, for those
    who serve something there themselves. All stay until all have ended.
    """
    handlers = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    from hpclab.gangs.store import listen

    if place.rank == 0:
        with listen(place.main) as listener:
            store.set("port", str(listener.getsockname()[1]))
    os.environ |= {"MASTER_ADDR": place.main, "MASTER_PORT": store.get("port").decode()}
    # torch's `register_rendezvous_handler` refuses a scheme that is there.
    handlers["env"] = lambda url, **_: iter([(store, place.rank, place.ranks)])
    yield
    store.set(f"ended-{place.rank}", "")
    store.wait([f"ended-{other}" for other in range(place.ranks)], timedelta(days=365))


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # what numpy and torch raise for more than one element
            value = value.item()
    if value is not None and not isinstance(value, str | int | float | bool):
        raise TypeError(
            f"report({name}={value!r}) must be a number, a string, a boolean, None, or a tensor of one element."
        )
    if isinstance(value, int) and value.bit_length() > 1000:  # a float ends below 2**1024
        raise ValueError(f"report({name}=...) is a whole number of {value.bit_length()} bits; report it as text.")
    return value

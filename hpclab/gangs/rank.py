"""The inside of a rank: a process of its own that runs the user's function and talks to its supervisor by three pipes.

Standard input brings a header, the pickled function, and stays open for as long as the owner lives. Standard output
carries records (see `frame`). Standard error carries all that is printed, by Python or C.
"""

import atexit
import faulthandler
import functools
import gc
import importlib
import io
import itertools
import json
import math
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from hpclab import _namesakes

RESERVED = ("run", "attempt", "rank", "ranks", "source")
RESERVED_KINDS = ("run", "restart", "attempt", "end")
"""Kinds of rows that a run's driver writes."""
NUMBERS = (
    *("step", "epoch", "loss", "samples", "step_s", "data_s", "compute_s", "wait_s", "cpu_s", "save_s"),
    *("test_loss", "test_accuracy"),
)
"""What figures and tables compute with, if a row has it."""
LONGEST_ROW = 1_000_000
"""Characters of a row of measurements; rows gather in the worker's memory and in the scheduler's."""
VALUE_SHARE = 4
"""A value passes through its worker's memory in up to so many copies."""
LONGEST_MESSAGE = 100_000
"""Characters of an error's message or traceback that the notebook is told."""
LONGEST_LINE = 10_000_000
"""Bytes of a record without its body."""
LARGEST_ERROR = 10_000_000
"""Bytes of an error that goes to the notebook as it is."""
EXIT_SECONDS, FAILED_SECONDS = 10.0, 2.0
"""How long exit handlers may take after a function has returned; and after it failed, while its peers wait in vain."""
WRITE_SECONDS = 1.0
"""How long open files may take to be written when that time is over."""
BEAT_SECONDS = 1.0
"""How often a rank shows that its Python still runs; one that holds the GIL can't."""
# What a rank says when a peer has gone: gloo's words, and torch's own classes for it.
_CONSEQUENCE = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Timed out|[Tt]imeout|Broken pipe|Socket (closed|is closed)"
)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory")


class Context:
    """This rank's place in its gang, and its line to the supervisor."""

    def __init__(self, header: dict, records: BinaryIO):
        self.header = header
        self.records = records
        self.lock = threading.Lock()
        self.pid = os.getpid()
        self.turn: int | None = None
        """File that processes lock in turn before they write a record, once this one has been forked."""
        self.main = threading.get_ident()
        self.writing = self.postponed = False
        """Whether the main thread writes a record, and whether it was interrupted meanwhile."""
        self.interrupt: Callable[[], None] = _interrupt
        """What an interrupt does, in the main thread."""
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        """Orders, with their bodies, for what runs here."""
        self.answers: dict[int, queue.SimpleQueue] = {}
        """Where questions wait for their answers, by number."""
        self.numbers = itertools.count()
        self.calls = 0
        """Of `should_stop`."""
        self.stop = threading.Condition()
        self.stopping = False
        self.stop_at: int | None = None
        """The call of `should_stop` at which all ranks end."""

    def send(self, record: dict, body: bytes = b"") -> None:
        """Write one record, whole, from any thread, and from forks of this process."""
        mine = threading.get_ident() == self.main
        try:
            with self.lock, self._alone():
                self.writing |= mine
                self.records.write(frame(record, body))
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

        The kernel frees this kind of lock when its holder is killed, and it belongs to the process, not to the open
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

        def go_on() -> None:
            self.turn = turn
            self.lock.release()

        def begin() -> None:
            self.turn, self.lock = turn, threading.Lock()
            self.inherited = self.records  # kept, as its end would write what is left in it, and close the pipe
            self.records = os.fdopen(self.records.fileno(), "wb", closefd=False)

        os.register_at_fork(before=lambda: self.lock.acquire(), after_in_parent=go_on, after_in_child=begin)

    def obey(self, orders: Iterator[tuple[dict, bytes]]) -> None:
        """Take orders until the owner has gone; then end this process, and all that it started."""
        for order, body in orders:
            with self.stop:
                if order["order"] == "stop":
                    # From here on no call goes through before all ranks have told how far they were, and have agreed.
                    self.stopping = True
                    self.send({"record": "calls", "calls": self.calls})
                elif order["order"] == "stop_at":
                    self.stop_at = order["calls"]
                    self.stop.notify_all()
                elif order["order"] == "answer":
                    self.answers[order["to"]].put((order, body))
                else:
                    self.inbox.put((order, body))
        if hasattr(os, "killpg"):
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    def ask(self, question: dict, body: bytes = b"") -> tuple[dict, bytes]:
        """Put a question about the other ranks to the scheduler, and wait for its answer, or what is the ``error``."""
        if os.getpid() != self.pid:
            raise RuntimeError("a process that a rank has forked can't ask for the other ranks; the rank itself can.")
        number = next(self.numbers)
        self.answers[number] = queue.SimpleQueue()
        self.send({"record": "store", "number": number, "question": question}, body)
        answer, value = self.answers[number].get()
        del self.answers[number]
        return answer, value

    def beat(self) -> None:
        """Show for ever that Python runs here."""
        while True:
            self.send({"record": "beat"})
            time.sleep(BEAT_SECONDS)

    def should_stop(self) -> bool:
        """See the function of this name; a fork of this process hears of no stop, and is no rank."""
        if os.getpid() != self.pid:
            return False
        with self.stop:
            self.calls += 1
            if self.calls == 1:
                self.send({"record": "cooperates"})
            while self.stopping and self.stop_at is None:
                self.stop.wait()
            return self.stop_at is not None and self.calls >= self.stop_at


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


_context: Context | None = None


def report(**row: Any) -> None:
    """Report one row of measurements from inside a rank: it streams to the notebook and to the run's ``rows.jsonl``.

    Outside a gang it does nothing, so the same function also runs by itself.

    Parameters
    ----------
    **row
        Numbers, strings, booleans or None, with the unit in the name (``step_s=0.02``); a tensor or array of one
        element counts as its number; NaN and infinity become null in the file. ``kind`` (default "step") and ``time_s``
        (default: seconds since the launch) can be given; run, attempt, rank, ranks and source are added. ``step``,
        ``epoch``, ``loss``, ``samples`` and the other columns that hpclab computes with (see `hpclab.rows`) are numbers
        or None.

    Raises
    ------
    ValueError
        If a name is one of those that are added, or the kind one that hpclab writes itself ("run", "restart",
        "attempt", "end"); if a whole number is larger than any float; if the row has more than a million characters.
    TypeError
        If a value can't be written as JSON, or is no number where one is needed; the message names it.
    """
    if _context is None:
        return
    header = _context.header
    if taken := [name for name in RESERVED if name in row]:
        raise ValueError(f"report({taken[0]}=...) is set by the launcher; choose another name.")
    row = {name: _plain(name, value) for name, value in row.items()}
    row = {"kind": "step", "time_s": time.time() - header["launched"]} | row
    _check_columns(row)
    text = json.dumps(row | header["row"])
    if len(text) > LONGEST_ROW:
        raise ValueError(
            f"report(...) of {len(text):,} characters exceeds {LONGEST_ROW:,}; return what is large, or write it to a"
            " file."
        )
    _context.send({"record": "row"}, text.encode())


def should_stop() -> bool:
    """Whether the run shall end here; to be called once a step, by every rank.

    After a stop (Ctrl-C, the Stop button, ``run.stop()``) it is True at the *same* call on every rank, so that none
    waits in a collective for one that has left. The function can then save what it has and return; its values are kept.
    One that never asks is interrupted instead, as by Ctrl-C. Outside a gang this is False.
    """
    return _context is not None and _context.should_stop()


def _check_columns(row: dict) -> None:
    """Raise if a row could not be told from the driver's own, or computed with."""
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
        _context.send({"record": "emulated"})


def in_gang() -> bool:
    """Whether this process is a rank."""
    return _context is not None


def restore_folders() -> list[Path]:
    """Folders of runs whose checkpoints this rank goes on from, the nearest first."""
    if _context is None:
        return []
    own = [run_folder()] if _context.header["row"]["attempt"] else []
    return own + [Path(folder) for folder in [_context.header["resume"]] if folder]


def clock_ahead() -> float:
    """Seconds by which the clock of this rank's machine is ahead of the driver's."""
    assert _context is not None
    return _context.header["ahead"]


def run_folder() -> Path:
    """Folder of this run's results, from inside a rank."""
    assert _context is not None
    return Path(_context.header["folder"])


def frame(record: dict, body: bytes = b"") -> bytes:
    """One record on the wire: a line of JSON, then as many bytes as its ``nbytes`` says."""
    return head(record, body) + body


def head(record: dict, body: bytes) -> bytes:
    """What goes before the body of a record."""
    return json.dumps(record | {"nbytes": len(body)}).encode() + b"\n"


def take_frame(buffer: bytearray) -> tuple[dict, bytes] | None:
    """Take one record off the front of what came in; None if it isn't whole yet."""
    end = buffer.find(b"\n") + 1
    if end == 0:
        if len(buffer) > LONGEST_LINE:
            raise ValueError(f"no end of line in {len(buffer):,} bytes")
        return None
    record = json.loads(buffer[:end])
    stop = end + record["nbytes"]
    if len(buffer) < stop:
        return None
    with memoryview(buffer) as view:  # a slice of the buffer itself would be another copy
        body = bytes(view[end:stop])
    del buffer[:stop]
    return record, body


def read_frames(stream: BinaryIO, pause: float = 0.0) -> Iterator[tuple[dict, bytes]]:
    """Records of a stream, until it ends; what ends in the middle of one is dropped.

    A `pause` after a few rows lets the next gather in the pipe, where they are safe even if their writer dies.
    """
    buffer = bytearray()
    while chunk := os.read(stream.fileno(), 1 << 20):
        buffer += chunk
        found = None
        while (taken := take_frame(buffer)) is not None:
            found = taken
            yield found
        if found is not None and found[0].get("record") == "row" and len(chunk) < 1 << 15:
            time.sleep(pause)


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
    orders = read_frames(owner)
    first = next(orders, None)
    if first is None:
        return
    header, payload = first
    _context = context = Context(header, records)
    signal.signal(signal.SIGINT, context.on_signal)
    for work in (lambda: context.obey(orders), context.beat):
        threading.Thread(target=work, daemon=True).start()
    sys.path[:] = header["sys_path"]
    try:
        stacks = open(header["stacks"], "w")  # noqa: SIM115  # open until the end
        if hasattr(faulthandler, "register"):  # from C, so it is written also while some call holds the GIL
            faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
        if hasattr(os, "memfd_create"):
            context.share(os.memfd_create("hpclab-turn"))
        value = dumps(_run(header, payload), "the return value", header["worker_memory"])
    except BaseException as error:
        _fail(error, header)
    context.send({"record": "value"}, value)
    leave(0, EXIT_SECONDS)


def _run(header: dict, payload: bytes) -> Any:
    import torch
    import torch.distributed as dist

    from hpclab.gangs import buckets
    from hpclab.gangs.store import check_ways

    torch.set_num_threads(header["threads"])
    _limit_memory(header["memory"])
    _keep_groups()
    buckets.settle()
    function, arguments = pickle.loads(payload)
    rank, ranks = header["row"]["rank"], header["row"]["ranks"]
    meeting = store()
    if not header["store"] and os.environ["LOCAL_RANK"] == "0":
        check_ways(meeting, header["host"], rank)
    if not header["init"]:
        with _environment_of_torchrun(meeting, rank, ranks):
            return _call(function, arguments)
    dist.init_process_group(backend(), store=meeting, rank=rank, world_size=ranks)
    value = _call(function, arguments)
    if dist.is_initialized():
        dist.barrier()  # a rank that left now would cut the connections of those still in a collective
    return value


def _call(function: Callable, arguments: tuple) -> Any:
    """Call the user's function; one that leaves by ``sys.exit(0)`` has succeeded, as any program has."""
    assert _context is not None
    try:
        value = function(*arguments)
    except SystemExit as left:
        if left.code not in (None, 0):
            raise
        value = None
    _context.send({"record": "returned"})
    return value


@functools.cache
def store() -> Any:
    """Where this gang's ranks find each other: a file that only this user can open; over several hosts the ledger."""
    import torch.distributed as dist

    from hpclab.gangs.store import GangStore

    assert _context is not None
    header = _context.header
    if not header["store"]:
        return GangStore(_context.ask)
    found = dist.FileStore(header["store"], header["row"]["ranks"])
    found.set_timeout(timedelta(days=1))  # a gang that hangs is found by its progress
    return found


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
def _environment_of_torchrun(store: Any, rank: int, ranks: int) -> Iterator[None]:
    """Let a function start its own process group by env://, as one written for torchrun does.

    It gets this gang's store: torchrun's TCPStore would let in whoever reaches its port. MASTER_PORT is free, for those
    who serve something there themselves. All stay until all have ended.
    """
    handlers = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers
    from hpclab.gangs.store import listen

    main = _context.header["main"]  # type: ignore[union-attr]
    if rank == 0:
        with listen(main) as listener:
            store.set("port", str(listener.getsockname()[1]))
    os.environ |= {"MASTER_ADDR": main, "MASTER_PORT": store.get("port").decode()}
    # torch's `register_rendezvous_handler` refuses a scheme that is there.
    handlers["env"] = lambda url, **_: iter([(store, rank, ranks)])
    yield
    store.set(f"ended-{rank}", "")
    store.wait([f"ended-{other}" for other in range(ranks)], timedelta(days=365))


def _limit_memory(limit: int | None) -> None:
    """Let this rank allocate so many bytes more than it has now; beyond, an allocation raises an error in it."""
    if limit is None or sys.platform != "linux":
        return
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # what RLIMIT_DATA counts
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    least = min([held + limit, *(bound for bound in limits if bound != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (least, limits[1]))


def dumps(value: Any, what: str, memory: int | None) -> bytes:
    """Pickle a value that goes to the notebook, or raise an error that calls it by a name.

    Parameters
    ----------
    memory : int or None
        This rank's share of its worker's limit, in bytes.
    """
    import cloudpickle

    try:
        body = cloudpickle.dumps(value)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{what} (of type {type(value).__name__}) can't be pickled: {message(error)}") from error
    if memory is not None and len(body) > memory // VALUE_SHARE:
        raise ValueError(
            f"{what} takes {len(body):,} bytes, more than a worker with {memory:,} bytes a rank can pass on"
            f" ({memory // VALUE_SHARE:,}); write it to a file, or connect with fewer workers or more memory."
        )
    return body


def _fail(error: BaseException, header: dict) -> NoReturn:
    """Tell who failed and how, then leave: peers must not wait for a rank that will never answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second interrupt would cut this short
    _lift_limit()
    tell_of_limit(error, header["memory"], "launch")
    for text in filter(None, _ways_out(error, header)):
        note(error, text)
    failure = {
        "type": type(error).__name__,
        "message": message(error),
        "traceback": printable(_traceback(error)),
        "time": time.time(),
        "consequence": is_consequence(error),
    }
    try:
        import cloudpickle

        body = cloudpickle.dumps(error)
        pickle.loads(body)
        if len(body) > LARGEST_ERROR:
            body = b""
    except BaseException:  # its own code may do anything, such as exit
        body = b""  # the client then raises a RankError with this traceback
    assert _context is not None
    _context.send({"record": "failure", "failure": failure}, body)
    leave(1, FAILED_SECONDS)


def leave(code: int, seconds: float) -> NoReturn:
    """End this process as Python ends: threads end, exit handlers run, open files get what was written to them.

    Unlike Python, it has a limit, and then takes nothing down: what torch keeps running could hang there.
    """

    def give_up() -> None:
        writing = threading.Thread(target=_write_files, daemon=True)
        writing.start()
        writing.join(WRITE_SECONDS)
        os._exit(code)

    try:
        _lift_limit()
        patience = threading.Timer(seconds, give_up)
        patience.daemon = True
        patience.start()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        _write_files()
    finally:
        os._exit(code)


def _write_files() -> None:
    """Have all open files write what they still hold; one may wait for ever, such as a pipe that nobody reads."""
    for file in [sys.stdout, sys.stderr, *gc.get_objects()]:
        with suppress(Exception):  # of a class of the user's own
            if issubclass(type(file), io.IOBase) and not file.closed:  # isinstance would run code of a proxy
                file.flush()


def _lift_limit() -> None:
    """Give what ends this process the memory for it: a thread takes some, and what was raised may hold the rest."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def note(error: BaseException, text: str) -> None:
    """Add a note to an error, if it takes one: that of a frozen dataclass doesn't."""
    with suppress(Exception):
        error.add_note(text)


def message(error: BaseException) -> str:
    """What an error says, fit to be shown; its own code may fail."""
    try:
        return printable(str(error))
    except BaseException as failed:
        return f"(its message can't be had: {type(failed).__name__})"


def printable(text: str) -> str:
    """A text that any file, terminal or browser takes: lone surrogates are spelt out, and of a huge one the ends stay.

    Examples
    --------
    >>> printable("caf\\udce9")
    'caf\\\\udce9'
    """
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def _ways_out(error: BaseException, header: dict) -> Iterator[str]:
    """What to do about an error whose own words speak of something else."""
    if isinstance(error, ImportError | AttributeError):
        yield _namesakes.blame(message(error))
    if isinstance(error, ValueError) and "default process group twice" in message(error) and header["init"]:
        yield (
            "hpclab.launch has initialised it already, for this function: leave that call out, or use"
            " launch(..., init=False), as for functions that were written for torchrun."
        )
    if isinstance(error, RuntimeError) and "find_unused_parameters=True" in message(error):
        yield "hpclab.train has that argument, too: train(..., find_unused_parameters=True)."


def tell_of_limit(error: BaseException, limit: int | None, verb: str) -> None:
    """Add to an error of a lack of memory that this rank has a limit, which a verb of hpclab sets."""
    if limit and (isinstance(error, MemoryError) or _NO_MEMORY.search(message(error))):
        note(error, f"This rank's limit is {limit:,} bytes of memory; {verb}(memory=...) sets it.")


def _traceback(error: BaseException) -> str:
    """Text of the traceback from the user's function on, without this module's own frames at its top."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None and step.tb_frame.f_code.co_filename == __file__:
        step = step.tb_next
    return "".join(traceback.format_exception(type(error), error, step))


def is_consequence(error: BaseException) -> bool:
    """Whether the error only says that a peer has gone."""
    import torch.distributed as dist

    named = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
    return named or (isinstance(error, RuntimeError) and bool(_CONSEQUENCE.search(message(error))))


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

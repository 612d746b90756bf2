"""Worker: one rank's task, which starts the rank as a process, passes on what it says, and ends it.

It runs in a thread of the Dask worker and never unpickles the user's objects, so that the worker stays small.
"""

import codecs
import math
import os
import queue
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from dask.typing import Key
from distributed import Status, Worker, get_worker, secede
from distributed.utils import sync

from hpclab import _private, machine
from hpclab.gangs import wire
from hpclab.gangs.host import MALLOC, import_path, unbound
from hpclab.gangs.process import Process, ZygoteDied, inboxes, open_inbox, start
from hpclab.gangs.progress import RankProgress
from hpclab.gangs.scheduler import topic

BATCH_SECONDS = 0.1
"""Rows and prints travel in batches of this length; each batch costs the scheduler about a millisecond."""
GATHER_SECONDS = 0.1
"""How long rows gather in the pipe before this process wakes to read them: its CPU is one that ranks compute on."""
CELL_SECONDS = 0.02
"""As `BATCH_SECONDS`, for what a cell of an interactive gang prints; its answer is sent at once."""
CHUNK_BYTES = 1 << 16
TEXTS = 16
"""Prints of a rank in one batch; one that prints faster waits, as it would for a slow terminal."""
ROWS = 10_000
"""Rows of a rank in one batch; one that reports faster waits."""
ON_DEMAND = ", on request"
"""What is said of a rank that was killed to see what follows."""
CLOSE_SECONDS = 5.0
"""How long the streams of a rank that has ended may stay open; but on Linux, what it left behind may hold them."""
CLOCK_SECONDS = 10.0
"""How long the scheduler may take to tell its time."""
GRACE_SECONDS = 1.0
"""How long a rank that never asks `should_stop` may take to end after it was interrupted."""
NOTICE = (0.2, 60.0)
"""How long before that ranks are told to save: this part of the worker's time, and at most this many seconds."""
BROKEN = "wrote to the pipe that hpclab reads its records from; don't write to files that you didn't open"
OURS = re.compile(r'hpclab/gangs/(rank\w*|store|zygote)\.py"|"<string>"')
"""Frames of a stack below the user's function."""
_values: dict[tuple[str, int], bytes] = {}
"""What ranks of interactive gangs were asked for, by run and rank, until it is fetched."""


def supervise(place: wire.RankPlace, payload: bytes) -> wire.RankOutcome:
    """Run one rank from start to end; the Dask task of a rank."""
    worker = get_worker()
    key = worker.get_current_task()
    secede()  # the gang holds CPUs by the ledger; a thread of the worker would keep others' gangs and tasks out
    inbox = open_inbox(place.run, place.rank, place.attempt)
    outcome = wire.RankOutcome(place.rank, machine.node())
    stacks = Path(worker.local_directory, f"{place.run}-{place.attempt}-{place.rank}.stacks")
    process, ahead = None, 0.0
    try:
        for folder in filter(None, {worker.local_directory, os.path.dirname(place.store)}):
            _private.restore(Path(folder))
        ahead = _ahead(place, worker)
        process = start(_environment(place, worker.address), worker.scheduler.address)
        supervisor = _Supervisor(place, outcome, worker, process, inbox, ahead, stacks)
        supervisor.feed(payload)
        while supervisor.take():
            if _cancelled(worker, key):
                process.kill()
        process.kill()
        supervisor.close(process.wait())
    except ZygoteDied as error:
        outcome.failure = wire.Failed(type="RankDied", message=str(error))
    except (RuntimeError, OSError) as error:  # such as no more threads, or files of the worker's that have gone
        kind, what = "BrokeOff", "was ended, because its worker can't continue"
        if process is None:
            kind, what = "NotStarted", "could not start"
        message = ". ".join(filter(None, [f"{what}: {error}", machine.remedy(error)])).rstrip(".")
        outcome.failure = wire.Failed(type=kind, message=message)
    finally:
        if process is not None:
            process.kill()
        del inboxes[place.run, place.rank, place.attempt]
        _values.pop((place.run, place.rank), None)
        stacks.unlink(missing_ok=True)
        if place.rank == 0 and place.store:
            Path(place.store).unlink(missing_ok=True)
    if outcome.failure is not None:
        outcome.failure.time -= ahead  # one clock decides which failure was the first
    return outcome


def fetch(run: str) -> dict[int, bytes]:
    """Take what the ranks of an interactive gang were asked for, by rank; called on the worker by the kernel."""
    return {rank: _values.pop((name, rank)) for name, rank in list(_values) if name == run}


@dataclass(eq=False)
class _Supervisor:
    """Carries what a rank says to the kernel, in batches, and the kernel's orders to it; keeps how it ended."""

    place: wire.RankPlace
    outcome: wire.RankOutcome
    worker: Worker
    process: Process
    inbox: queue.SimpleQueue
    """Orders, records and texts as they come in; the error of what is none; None at the end of a stream."""
    ahead: float
    """Seconds by which the clock here is ahead of the kernel's."""
    stacks: Path
    """File that the rank's stack is written to on demand."""
    stack_end: int = 0
    """Characters of it that were read."""
    batch: list[wire.Message] = field(default_factory=list)
    text_room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(TEXTS))
    row_room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(ROWS))
    orders: queue.SimpleQueue[wire.Message | None] = field(default_factory=queue.SimpleQueue)
    sent: float = 0.0
    pause: float = BATCH_SECONDS
    streams: int = 2
    cooperates: bool = False
    returned: bool = False
    """Whether the rank's function has returned."""
    ended: bool = False
    """Whether the rank said how it ended."""
    ended_by_kernel: bool = False
    on_demand: bool = False
    """Whether it was killed to see what follows."""
    deadline: float = math.inf
    """When the streams are given up, or a rank that was interrupted."""

    def __post_init__(self) -> None:
        self.progress = RankProgress(self.process.pid)
        self.notice = _notice()
        """When the rank is to hear that its job ends."""

    def feed(self, payload: bytes) -> None:
        """Hand the rank its work, and start the threads that listen to it."""
        work = wire.Work(
            place=self.place, ahead=self.ahead, stacks=str(self.stacks), sys_path=import_path(), body=payload
        )
        self.orders.put(work)
        for carry in (self._read_records, self._read_text, self._write):
            threading.Thread(target=carry, daemon=True).start()

    def take(self) -> bool:
        """Take what has come in; False when the rank has ended and all it said is here."""
        with suppress(queue.Empty):
            self._take(self.inbox.get(timeout=self.pause))
        self._look()
        if time.monotonic() - self.sent > self.pause:
            self._send()
        return self.streams > 0 and time.monotonic() < self.deadline

    def close(self, returncode: int) -> None:
        """Send the rest, and name an end that the rank could not tell of itself."""
        self.orders.put(None)
        self._send()
        if self.ended_by_kernel and not self.outcome.value:
            self.outcome.failure = wire.Failed(type="Stopped", message="ended by its driver", consequence=True)
        elif not self.ended:
            cause = _cause(returncode, self.on_demand, self.returned)
            self.outcome.failure = wire.Failed(type="RankDied", message=cause)

    def _take(self, message: wire.Message | Exception | None) -> None:
        if isinstance(message, wire.Order):  # an error of the kernel's order is none of the rank's
            self._obey(message)
            return
        try:
            match message:
                case None:
                    self.streams -= 1
                case Exception():
                    raise message
                case _:
                    self._hear(message)
        except (KeyError, TypeError, ValueError) as error:  # the rank can't be understood
            self._end(wire.Failed(type="BrokenRecord", message=f"{BROKEN} ({error!r})"))
            self.process.kill()

    def _end(self, failure: wire.Failed | None) -> None:
        self.outcome.failure, self.ended = failure, True

    def _hear(self, message: wire.Message) -> None:
        """Take in what the rank says; what is not for this worker goes on to the kernel."""
        match message:
            case wire.Beat():
                self.progress.beat()
            case wire.Cooperates():
                self.cooperates = True
            case wire.Returned():
                self.returned = True
            case wire.Ask():
                self.worker.loop.add_callback(self._find_others, message)
            case wire.Value():
                self.outcome.value = message.body
                self._end(None)
            case wire.Failed():
                self._end(message)
            case wire.FromCell():
                self._relay(message)
            case _:
                self.batch.append(message)
                if isinstance(message, wire.Row | wire.Text):
                    self.progress.renew()

    def _relay(self, message: wire.FromCell) -> None:
        """Pass on what a rank of an interactive gang says: prints soon, answers at once, values when fetched."""
        if isinstance(message, wire.CellFailed):
            message.time -= self.ahead
        self.pause = CELL_SECONDS
        if not isinstance(message, wire.Printed):
            self.sent = -math.inf
        if message.body:
            _values[self.place.run, self.place.rank], message.body = message.body, b""
        self.batch.append(message)

    async def _find_others(self, question: wire.Ask) -> None:
        """Put a rank's question about the others to the scheduler's ledger, and hand it the answer."""
        place = self.place
        ask = self.worker.scheduler.hpclab_rendezvous
        try:
            [answer] = wire.decode(await ask(run=place.run, attempt=place.attempt, question=wire.encode(question)))
        except Exception as error:
            answer = wire.Answer(to=question.number, error=f"{type(error).__name__}: {error}")
        self.orders.put(answer)

    def _obey(self, order: wire.Order) -> None:
        match order:
            case wire.Kill():
                self.on_demand = True
                self.process.kill()
            case wire.End():
                self.ended_by_kernel = not self.ended
                self.process.kill()
            case wire.ShowStack():
                self.batch.append(wire.Stack(text=self._stack()))
            case wire.Stop() if not self.cooperates:
                self.ended_by_kernel = not self.ended
                self.process.send_signal("SIGINT")
                self.deadline = time.monotonic() + GRACE_SECONDS
            case wire.Expire():
                if self.cooperates:
                    self.orders.put(wire.Stop())
            case _:
                self.orders.put(order)

    def _look(self) -> None:
        if self.process.poll() is not None:
            self.process.kill()  # its children, which hold its streams open
            self.deadline = min(self.deadline, time.monotonic() + CLOSE_SECONDS)
        elif self.progress.due():
            self.batch.append(wire.Stuck(seconds=self.progress.stuck_s()))
        if time.time() > self.notice:
            self.notice = math.inf
            self.batch.append(wire.Expires(at=float(os.environ[machine.ENDS]) - self.ahead))

    def _send(self) -> None:
        self.sent = time.monotonic()
        if not self.batch:
            return
        batch, self.batch, self.pause = self.batch, [], BATCH_SECONDS
        head = wire.Batch(rank=self.place.rank, attempt=self.place.attempt)
        # As bytes: msgpack takes no whole number beyond 64 bits, and no text that isn't UTF-8, and what it doesn't take
        # breaks the worker's connection for good.
        self.worker.log_event(topic(self.place.run), b"".join(map(wire.encode, [head, *batch])))
        self.outcome.batches += 1
        for room, kind in ((self.text_room, wire.Text), (self.row_room, wire.Row)):
            if count := sum(isinstance(message, kind) for message in batch):
                room.release(count)

    def _stack(self) -> str:
        """The main thread's Python stack; asked for by a signal, since a rank that hangs answers nothing else."""
        if not self.stacks.exists() or not self.process.send_signal("SIGUSR1"):
            return "(this system can't show it)"
        time.sleep(0.1)
        text = self.stacks.read_text(errors="replace")[self.stack_end :]
        self.stack_end += len(text)
        lines = [line for line in text.splitlines() if not OURS.search(line)]
        if self.returned:
            lines.append("(its function has returned, and it waits for those of the other ranks)")
        return "\n".join(lines[1:]) or "(none: it is stopped, or had not started yet)"

    def _read_records(self) -> None:
        try:
            for record in wire.read_frames(self.process.stdout, pause=GATHER_SECONDS):
                if not isinstance(record, wire.Record):
                    raise TypeError(f"no such record: {record!r}")
                if isinstance(record, wire.Row):
                    self.row_room.acquire()
                self.inbox.put(record)
        except (ValueError, TypeError, KeyError) as error:  # the function has written into this pipe
            self.inbox.put(error)
        self.inbox.put(None)

    def _read_text(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(self.process.stderr.fileno(), CHUNK_BYTES):
            self.text_room.acquire()
            self.inbox.put(wire.Text(body=decoder.decode(chunk).encode()))
        self.inbox.put(None)

    def _write(self) -> None:
        """Hand the rank its work, then orders: in a thread of its own, since one that was stopped reads nothing."""
        with suppress(BrokenPipeError):  # it has ended, and how is seen elsewhere
            while (order := self.orders.get()) is not None:
                self.process.stdin.write(wire.head(order))
                self.process.stdin.write(order.body)  # apart: both in one piece would be another copy
                self.process.stdin.flush()


def _ahead(place: wire.RankPlace, worker: Worker) -> float:
    """Seconds by which the clock of this machine is ahead of the kernel's."""
    if place.clock == machine.boot():
        return -place.ahead
    ask = worker.scheduler.hpclab_clock
    return machine.ahead(lambda: sync(worker.loop, ask, callback_timeout=CLOCK_SECONDS)) - place.ahead


def _environment(place: wire.RankPlace, address: str) -> dict[str, str]:
    # What job queues export of the worker's own place would mislead the libraries in a rank.
    env = {name: value for name, value in unbound(os.environ).items() if not name.startswith("SLURM_")} | MALLOC
    numbers = {
        "OMP_NUM_THREADS": place.threads,
        "OPENBLAS_NUM_THREADS": place.threads,
        "RANK": place.rank,
        "WORLD_SIZE": place.ranks,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_ranks,
        "GROUP_RANK": place.node,
        "GROUP_WORLD_SIZE": place.nodes,
    }
    if not place.init:
        env |= {"ROLE_NAME": "default", "TORCHELASTIC_RUN_ID": place.run}
        numbers |= {"ROLE_RANK": place.rank, "ROLE_WORLD_SIZE": place.ranks}
        numbers |= {"TORCHELASTIC_MAX_RESTARTS": 0, "TORCHELASTIC_RESTART_COUNT": 0}
    if interface := _interface(address):
        env["GLOO_SOCKET_IFNAME"] = interface
    return env | {name: str(number) for name, number in numbers.items()}


def _interface(address: str) -> str | None:
    """Name of the network interface that owns the worker's address, so that gloo neither guesses nor looks up names."""
    host = wire.host_of(address)
    listed = {host, "127.0.0.1"} if host.startswith("127.") else {host}  # of all of 127.0.0.0/8 only the first is
    for name, owned in psutil.net_if_addrs().items():
        if not listed.isdisjoint(entry.address for entry in owned):
            return name
    return None


def _notice() -> float:
    """When ranks are to be told that the job of this worker ends, in seconds since the epoch; never, if none does."""
    ends = float(os.environ.get(machine.ENDS, "inf"))
    part, most = NOTICE
    return ends - min(most, part * (ends - psutil.Process().create_time()))


def _cancelled(worker: Worker, key: Key) -> bool:
    """Whether the kernel has gone or let go of this task, or the worker closes: Dask ends no running thread itself."""
    state = worker.state.tasks.get(key)
    return state is None or state.state == "cancelled" or worker.status in (Status.closing, Status.closed)


def _cause(returncode: int, on_demand: bool, returned: bool) -> str:
    when = f" {'after' if returned else 'before'} its function returned"
    if returncode >= 0:
        return f"exited with code {returncode}{when}"
    name = signal.Signals(-returncode).name
    hint = ON_DEMAND if on_demand else " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}{when * returned}"

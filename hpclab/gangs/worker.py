"""The worker's side of a gang: a Dask task that starts one rank as a process, relays what it says, and ends it.

Runs in a thread of the Dask worker and never unpickles the user's objects, so that the worker stays small.
"""

import codecs
import json
import math
import os
import queue
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from dask.typing import Key
from distributed import Status, Worker, get_worker, secede
from distributed.utils import sync

from hpclab import _private, machine
from hpclab.gangs.host import BINDING, MALLOC, import_path
from hpclab.gangs.process import Process, ZygoteDied, inboxes, open_inbox, start
from hpclab.gangs.progress import RankProgress
from hpclab.gangs.rank import frame, head, read_frames
from hpclab.gangs.scheduler import topic

BATCH_SECONDS = 0.1
"""Rows and prints travel in batches of this length; each batch costs the scheduler about a millisecond."""
GATHER_SECONDS = 0.1
"""How long rows gather in the pipe before this process wakes to read them: its CPU is one that ranks compute on."""
CELL_SECONDS = 0.02
"""As `BATCH_SECONDS`, for what a cell of an interactive gang prints; its answer is sent at once."""
CHUNK_BYTES = 1 << 16
CHUNKS = 16
"""Prints of a rank in one batch; one that prints faster waits, as it would for a slow terminal."""
ROWS = 10_000
"""Rows of a rank in one batch; one that reports faster waits."""
ON_DEMAND = ", on demand"
"""What is said of a rank that was killed to see what follows."""
CLOSE_SECONDS = 5.0
"""How long the streams of a rank that has ended may stay open; but on Linux, what it left behind may hold them."""
CLOCK_SECONDS = 10.0
"""How long the scheduler may take to tell its time."""
GRACE_SECONDS = 1.0
"""How long a rank that never asks `should_stop` may take to end after it was interrupted."""
NOTICE = (0.2, 60.0)
"""How long before that ranks are told to save: this part of the worker's time, and at most so many seconds."""
BROKEN = "wrote what is no record to the pipe that hpclab reads its records from; leave open files of others alone"
OURS = re.compile(r'hpclab/gangs/(rank|rank_cells|store|zygote)\.py"|"<string>"')
"""Frames of a stack below the user's function."""
_values: dict[tuple[str, int], bytes] = {}
"""What ranks of interactive gangs were asked for, by run and rank, until it is fetched."""


@dataclass
class Place:
    """One rank's place, as the driver planned it."""

    run: str
    attempt: int
    folder: str
    """Folder of the run's results, as the driver sees it."""
    rank: int
    ranks: int
    worker: str
    """Address of the Dask worker."""
    local_rank: int
    local_ranks: int
    """Ranks on the same host."""
    node: int
    """Number of the host among those of the gang."""
    nodes: int
    main: str
    """Address of rank 0's host."""
    threads: int
    launched: float
    """When the driver launched the gang, in seconds since the epoch by the driver's clock."""
    clock: str
    """The scheduler's machine."""
    ahead: float
    """Seconds by which the driver's clock is ahead of the scheduler's."""
    store: str
    """File of the rendezvous; "" over several hosts, as the scheduler then keeps it."""
    init: bool
    """Whether torch.distributed is initialised for the function; else the environment is torchrun's."""
    memory: int | None
    """Bytes that the rank may allocate; None sets no limit."""
    worker_memory: int | None
    """Its share of its worker's limit, in bytes; None if that has none."""
    resume: str | None
    """Folder of an earlier run to start from."""


@dataclass
class Outcome:
    """How one rank ended: with a value, or with a failure."""

    rank: int
    host: str
    attempt: int = 0
    value: bytes = b""
    failure: dict | None = None
    error: bytes = b""
    """The pickled exception, if it can be pickled."""
    batches: int = 0
    """Batches of rows and prints that were sent before."""


def supervise(place: Place, payload: bytes) -> Outcome:
    """Run one rank from start to end; the Dask task of a rank."""
    worker = get_worker()
    key = worker.get_current_task()
    secede()  # the gang holds CPUs by the ledger; a thread of the worker would keep others' gangs and tasks out
    inbox = open_inbox(place.run, place.rank, place.attempt)
    outcome = Outcome(place.rank, machine.node(), place.attempt)
    ahead = 0.0
    try:
        for folder in {Path(worker.local_directory), *(Path(file).parent for file in [place.store] if file)}:
            _private.restore(folder)
        ahead = _ahead(place, worker)
        process = start(_environment(place, worker.address), worker.scheduler.address)
    except ZygoteDied as error:
        outcome.failure = failure("RankDied", str(error))
    except (RuntimeError, OSError) as error:
        outcome.failure = failure("NotStarted", _said("could not start", error))
    else:
        try:
            supervisor = _Supervisor(place, outcome, worker, process, inbox, ahead)
            supervisor.feed(payload)
            while supervisor.take():
                if _cancelled(worker, key):
                    process.kill()
            process.kill()
            supervisor.close(process.wait())
        except (RuntimeError, OSError) as error:  # no more threads, or files of the worker's that have gone
            outcome.failure = failure("BrokeOff", _said("was ended, since its worker can't go on", error))
        finally:
            process.kill()
    finally:
        del inboxes[place.run, place.rank, place.attempt]
        _values.pop((place.run, place.rank), None)
        for file in [place.store] * (place.rank == 0 and bool(place.store)) + [_stacks(place, worker)]:
            Path(file).unlink(missing_ok=True)
    if outcome.failure is not None:
        outcome.failure["time"] -= ahead  # which failure was the first is told by one clock
    return outcome


def _said(what: str, error: Exception) -> str:
    return ". ".join(filter(None, [f"{what}: {error}", machine.remedy(error)])).rstrip(".")


def fetch(run: str) -> dict[int, bytes]:
    """Take what the ranks of an interactive gang were asked for, by rank; called on the worker by the driver."""
    return {rank: _values.pop((name, rank)) for name, rank in list(_values) if name == run}


class _Supervisor:
    """Carries what a rank says to the driver, in batches, and the driver's orders to it; keeps how it ended."""

    def __init__(
        self,
        place: Place,
        outcome: Outcome,
        worker: Worker,
        process: Process,
        inbox: queue.SimpleQueue,
        ahead: float,
    ) -> None:
        self.place = place
        self.outcome = outcome
        self.worker = worker
        self.process = process
        self.inbox = inbox
        self.ahead = ahead
        """Seconds by which the clock here is ahead of the driver's."""
        self.rows: list[str] = []
        """Each as JSON."""
        self.text: list[str] = []
        self.news: dict = {}
        """What else the next batch tells."""
        self.room = threading.Semaphore(CHUNKS)
        self.row_room = threading.Semaphore(ROWS)
        self.orders: queue.SimpleQueue = queue.SimpleQueue()
        self.sent = 0.0
        self.streams = 2
        self.cooperates = False
        self.notice = _notice()
        """When the rank is to be told that its job ends."""
        self.returned = False
        """Whether the rank's function has returned."""
        self.told = False
        """Whether the rank told how it ended."""
        self.ended_by_driver = False
        self.on_demand = False
        """Whether it was killed to see what follows."""
        self.deadline = math.inf
        """When the streams are given up, or a rank that was interrupted."""
        self.progress = RankProgress(process.pid)
        self.seen = 0
        """Characters of the file of stacks."""

    def feed(self, payload: bytes) -> None:
        """Hand the rank its work, and start the threads that listen to it."""
        place = self.place
        header = {
            "row": {"run": place.run, "attempt": place.attempt, "rank": place.rank, "ranks": place.ranks},
            "stacks": _stacks(place, self.worker),
            "sys_path": import_path(),
            "host": host_of(place.worker),
            "launched": place.launched + self.ahead,
            "ahead": self.ahead,
        } | {
            name: getattr(place, name)
            for name in ("threads", "store", "main", "folder", "init", "memory", "worker_memory", "resume", "worker")
        }
        self.orders.put(head(header, payload))
        self.orders.put(payload)  # apart: both in one piece would be another copy
        for work in (self._read_records, self._read_text, self._write):
            threading.Thread(target=work, daemon=True).start()

    def take(self) -> bool:
        """Take what has come in; False when the rank has ended and all it said is here."""
        pause = CELL_SECONDS if "said" in self.news else BATCH_SECONDS
        try:
            kind, content = self.inbox.get(timeout=pause)
        except queue.Empty:
            kind, content = "quiet", None
        if kind == "text":
            self.text.append(content)
            self.progress.renew()
        elif kind == "end":
            self.streams -= 1
        elif kind == "record":
            self._hear(*content)
        elif kind == "broken":
            self._break(content)
        elif kind == "order":
            self._obey(content)
        self._look()
        if time.monotonic() - self.sent > pause:
            self._send()
        return self.streams > 0 and time.monotonic() < self.deadline

    def close(self, returncode: int) -> None:
        """Send the rest, and name an end that the rank could not tell of itself."""
        self.orders.put(None)
        self._send()
        if self.ended_by_driver and not self.outcome.value:
            self.outcome.failure = failure("Stopped", "ended by its driver", consequence=True)
        elif not self.told:
            self.outcome.failure = failure("RankDied", _cause(returncode, self.on_demand, self.returned))

    def _hear(self, record: dict, body: bytes) -> None:
        try:
            self._record(record, body)
        except (KeyError, TypeError, ValueError) as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """End a rank that can't be understood."""
        self.outcome.failure, self.told = failure("BrokenRecord", f"{BROKEN} ({error!r})"), True
        self.process.kill()

    def _record(self, record: dict, body: bytes) -> None:
        match record["record"]:
            case "row":
                self.rows.append(body.decode())
                self.progress.renew()
            case "returned":
                self.returned = True
            case "beat":
                self.progress.beat()
            case "cooperates":
                self.cooperates = True
            case "emulated":
                self.news["emulated"] = True
            case "calls":
                self.news["calls"] = record["calls"]
            case "cell":
                self._relay(record, body)
            case "store":
                self.worker.loop.add_callback(self._find_others, record, body)
            case "value":
                self.outcome.value, self.told = body, True
            case "failure":
                self.outcome.failure, self.outcome.error, self.told = record["failure"], body, True
            case other:
                raise ValueError(f"no such record: {other!r}")

    def _relay(self, record: dict, body: bytes) -> None:
        """Pass on what a rank of an interactive gang says: prints soon, answers at once, values when fetched."""
        if record.get("failure"):
            record["failure"]["time"] -= self.ahead
        self.news.setdefault("said", []).append(record)
        if record["said"] != "print":
            self.sent = -math.inf
        if body:
            _values[self.place.run, self.place.rank] = body

    async def _find_others(self, record: dict, body: bytes) -> None:
        """Put a rank's question about the others to the scheduler's ledger, and hand it the answer."""
        try:
            answer = await self.worker.scheduler.hpclab_rendezvous(
                run=self.place.run, attempt=self.place.attempt, question=record["question"], value=body
            )
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        value = answer.pop("value", b"")
        self.orders.put(frame({"order": "answer", "to": record["number"]} | answer, value))

    def _obey(self, order: dict) -> None:
        match order["order"]:
            case "kill":
                self.on_demand = True
                self.process.kill()
            case "end":
                self.ended_by_driver = not self.told
                self.process.kill()
            case "frame":
                self.orders.put(order["frame"])
            case "stacks":
                self.news["stack"] = self._stack()
            case "stop" if not self.cooperates:
                self.ended_by_driver = not self.told
                self.process.interrupt()
                self.deadline = time.monotonic() + GRACE_SECONDS
            case "expire":
                if self.cooperates:
                    self.orders.put(frame({"order": "stop"}))
            case _:
                self.orders.put(frame(order))

    def _look(self) -> None:
        if self.process.poll() is not None:
            self.process.kill()  # its children, which hold its streams open
            self.deadline = min(self.deadline, time.monotonic() + CLOSE_SECONDS)
        elif self.progress.due():
            self.news["stuck_s"] = self.progress.stuck_s()
        if time.time() > self.notice:
            self.notice, self.news["expires"] = math.inf, float(os.environ[machine.ENDS]) - self.ahead

    def _send(self) -> None:
        self.sent = time.monotonic()
        if self.rows or self.text or self.news:
            batch = {
                "rank": self.place.rank,
                "attempt": self.place.attempt,
                "rows": self.rows,
                "text": "".join(self.text),
            }
            # As JSON, which is ASCII: msgpack takes no whole number beyond 64 bits, and no text that isn't UTF-8, and
            # what it doesn't take breaks the worker's connection for good.
            self.worker.log_event(topic(self.place.run), json.dumps(batch | self.news))
            self.outcome.batches += 1
            for room, content in ((self.room, self.text), (self.row_room, self.rows)):
                if content:
                    room.release(len(content))
            self.rows, self.text, self.news = [], [], {}

    def _stack(self) -> str:
        """The main thread's Python stack; asked for by a signal, since a rank that hangs answers nothing else."""
        file = Path(_stacks(self.place, self.worker))
        if not file.exists() or not self.process.dump():
            return "(this system can't show it)"
        time.sleep(0.1)
        text = file.read_text(errors="replace")[self.seen :]
        self.seen += len(text)
        lines = [line for line in text.splitlines() if not OURS.search(line)]
        if self.returned:
            lines.append("(its function has returned, and it waits for those of the other ranks)")
        return "\n".join(lines[1:]) or "(none: it is stopped, or was not up yet)"

    def _read_records(self) -> None:
        try:
            for record in read_frames(self.process.stdout, pause=GATHER_SECONDS):
                if record[0]["record"] == "row":
                    self.row_room.acquire()
                self.inbox.put(("record", record))
        except (ValueError, TypeError, KeyError) as error:  # the function has written into this pipe
            self.inbox.put(("broken", error))
        self.inbox.put(("end", None))

    def _read_text(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := os.read(self.process.stderr.fileno(), CHUNK_BYTES):
            self.room.acquire()
            self.inbox.put(("text", decoder.decode(chunk)))
        self.inbox.put(("end", None))

    def _write(self) -> None:
        """Hand the rank its work, then orders: in a thread of its own, since one that was stopped reads nothing."""
        with suppress(BrokenPipeError):  # it has ended, and how is seen elsewhere
            while (order := self.orders.get()) is not None:
                self.process.stdin.write(order)
                self.process.stdin.flush()


def _ahead(place: Place, worker: Worker) -> float:
    """Seconds by which the clock of this machine is ahead of the driver's."""
    if place.clock == machine.boot():
        return -place.ahead
    ask = worker.scheduler.hpclab_clock
    return machine.ahead(lambda: sync(worker.loop, ask, callback_timeout=CLOCK_SECONDS)) - place.ahead


def _environment(place: Place, address: str) -> dict[str, str]:
    # What job queues export of the worker's own place would mislead the libraries in a rank.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") and name not in BINDING}
    env |= MALLOC | {
        "OMP_NUM_THREADS": str(place.threads),
        "OPENBLAS_NUM_THREADS": str(place.threads),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.ranks),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_ranks),
        "GROUP_RANK": str(place.node),
        "GROUP_WORLD_SIZE": str(place.nodes),
    }
    if not place.init:
        env |= {
            "ROLE_NAME": "default",
            "ROLE_RANK": str(place.rank),
            "ROLE_WORLD_SIZE": str(place.ranks),
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": place.run,
        }
    if interface := _interface(address):
        env["GLOO_SOCKET_IFNAME"] = interface
    return env


def _stacks(place: Place, worker: Worker) -> str:
    """File that a rank's stack is written to on demand."""
    return f"{worker.local_directory}/{place.run}-{place.attempt}-{place.rank}.stacks"


def host_of(address: str) -> str:
    """The host of an address of Dask's, such as "tls://10.0.0.1:8786" or "tls://[fd00::1]:8786"."""
    return address.rsplit("://", 1)[-1].rsplit(":", 1)[0].strip("[]")


def _interface(address: str) -> str | None:
    """Name of the network interface that owns the worker's address, so that gloo neither guesses nor looks up names."""
    host = host_of(address)
    loopback = host.startswith("127.")  # all of 127.0.0.0/8 is there, and only 127.0.0.1 listed
    for name, owned in psutil.net_if_addrs().items():
        mine = [a.address for a in owned if a.family in (socket.AF_INET, socket.AF_INET6)]
        if host in mine or (loopback and "127.0.0.1" in mine):
            return name
    return None


def _notice() -> float:
    """When ranks are to be told that the job of this worker ends, in seconds since the epoch; never, if none does."""
    ends = float(os.environ.get(machine.ENDS, "inf"))
    part, most = NOTICE
    return ends - min(most, part * (ends - psutil.Process().create_time()))


def _cancelled(worker: Worker, key: Key) -> bool:
    """Whether the driver has gone or let go of this task, or the worker closes: Dask ends no running thread itself."""
    state = worker.state.tasks.get(key)
    return state is None or state.state == "cancelled" or worker.status in (Status.closing, Status.closed)


def _cause(returncode: int, on_demand: bool, returned: bool) -> str:
    when = f" {'after' if returned else 'before'} its function returned"
    if returncode >= 0:
        return f"exited with code {returncode}{when}"
    name = signal.Signals(-returncode).name
    hint = ON_DEMAND if on_demand else " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}{when * returned}"


def failure(type_: str, message: str, consequence: bool = False) -> dict:
    """How a rank ended that could not tell it itself."""
    return {"type": type_, "message": message, "traceback": "", "time": time.time(), "consequence": consequence}

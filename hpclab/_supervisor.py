"""The worker's side of a gang: a Dask task that starts one rank as a process, relays what it says, and ends it.

Runs in a thread of the Dask worker and never unpickles the user's objects, so that the worker stays small.
"""

import codecs
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import psutil
from dask.typing import Key
from distributed import Status, Worker, get_worker, secede

from hpclab._agent import MALLOC, Process, start
from hpclab._ledger import topic
from hpclab._rank import frame, read_frames

BATCH_SECONDS = 0.1
"""Rows and prints travel in batches of this length; each batch costs the scheduler about a millisecond."""
CLOSE_SECONDS = 5.0
"""How long the streams of a rank that has ended may stay open: what it left behind in other sessions holds them."""
GATHER_SECONDS = 0.03
"""How long rows gather in the pipe before this process wakes to read them: its CPU is one that ranks compute on."""
_inboxes: dict[tuple[str, int], queue.SimpleQueue] = {}


@dataclass
class Place:
    """One rank's place, as the driver planned it."""

    run: str
    folder: str
    """Folder of the run's results, as the driver sees it."""
    rank: int
    ranks: int
    worker: str
    """Address of the Dask worker."""
    local_rank: int
    local_ranks: int
    """Ranks on the same host."""
    threads: int
    launched: float
    """When the driver launched the gang, seconds since the epoch."""
    store: str
    """File of the rendezvous."""


@dataclass
class Outcome:
    """How one rank ended: with a value, or with a failure."""

    rank: int
    host: str
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
    outcome = Outcome(place.rank, socket.gethostname())
    inbox = _inboxes[place.run, place.rank] = queue.SimpleQueue()
    try:
        process = start(_environment(place, worker.address), worker.scheduler.address)
    except Exception as error:
        del _inboxes[place.run, place.rank]
        outcome.failure = failure("RankDied", f"could not start: {error}")
        return outcome
    try:
        relay = _Relay(place, outcome, worker)
        _feed(process, place, payload, inbox)
        while relay.take(inbox, process):
            if _cancelled(worker, key):
                process.kill()
        relay.close(process.wait())
    finally:
        process.kill()
        del _inboxes[place.run, place.rank]
        if place.rank == 0:
            Path(place.store).unlink(missing_ok=True)
    return outcome


def kill(run: str) -> None:
    """Have this worker end its ranks of a run; called on the worker by the driver."""
    for (name, _), inbox in list(_inboxes.items()):
        if name == run:
            inbox.put(("kill", None))


@dataclass
class _Relay:
    """Carries what a rank says to the driver, in batches, and keeps how it ended."""

    place: Place
    outcome: Outcome
    worker: Worker
    rows: list[dict] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    ended: bool = False
    killed: bool = False
    sent: float = 0.0
    streams: int = 2
    deadline: float = math.inf

    def take(self, inbox: queue.SimpleQueue, process: Process) -> bool:
        """Take what has come in; False when the rank has ended and all it said is here."""
        try:
            kind, content = inbox.get(timeout=BATCH_SECONDS)
        except queue.Empty:
            kind, content = "quiet", None
        if self.deadline == math.inf and process.poll() is not None:
            process.kill()  # its children, which hold its streams open
            self.deadline = time.monotonic() + CLOSE_SECONDS
        if kind == "kill":
            self.killed = True
            process.kill()
        elif kind == "text":
            self.text.append(content)
        elif kind == "end":
            self.streams -= 1
        elif kind == "record":
            self._record(*content)
        if time.monotonic() - self.sent > BATCH_SECONDS:
            self._send()
        return self.streams > 0 and time.monotonic() < self.deadline

    def _record(self, record: dict, body: bytes) -> None:
        if record["record"] == "row":
            self.rows.append(record["row"])
        elif record["record"] == "value":
            self.outcome.value, self.ended = body, True
        else:
            self.outcome.failure, self.outcome.error, self.ended = record["failure"], body, True

    def _send(self) -> None:
        self.sent = time.monotonic()
        if self.rows or self.text:
            batch = {"rank": self.place.rank, "rows": self.rows, "text": "".join(self.text)}
            self.worker.log_event(topic(self.place.run), batch)
            self.outcome.batches += 1
            self.rows, self.text = [], []

    def close(self, returncode: int) -> None:
        """Send the rest, and name an end that the rank could not tell of itself."""
        self._send()
        if self.killed and not self.ended:
            self.outcome.failure = failure("Stopped", "ended by its driver", consequence=True)
        elif not self.ended:
            self.outcome.failure = failure("RankDied", _cause(returncode))


def _environment(place: Place, address: str) -> dict[str, str]:
    # What job queues export of the worker's own place would mislead the libraries in a rank.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= MALLOC | {
        "OMP_NUM_THREADS": str(place.threads),
        "OPENBLAS_NUM_THREADS": str(place.threads),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.ranks),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_ranks),
    }
    if interface := _interface(address):
        env["GLOO_SOCKET_IFNAME"] = interface
    return env


def _interface(address: str) -> str | None:
    """Name of the network interface that owns the worker's address, so that gloo neither guesses nor looks up names."""
    host = address.rsplit("://", 1)[-1].rsplit(":", 1)[0].strip("[]")
    for name, owned in psutil.net_if_addrs().items():
        if any(a.address == host for a in owned if a.family in (socket.AF_INET, socket.AF_INET6)):
            return name
    return None


def _feed(process: Process, place: Place, payload: bytes, inbox: queue.SimpleQueue) -> None:
    """Hand the rank its work, and start the threads that listen to it."""
    row = {"run": place.run, "attempt": 0, "rank": place.rank, "ranks": place.ranks}
    header = {
        "row": row,
        "threads": place.threads,
        "store": place.store,
        "folder": place.folder,
        "launched": place.launched,
        "sys_path": sys.path,
    }
    for target, stream in ((_read_records, process.stdout), (_read_text, process.stderr)):
        threading.Thread(target=target, args=(stream, inbox), daemon=True).start()
    try:
        process.stdin.write(frame(header, payload))
        process.stdin.flush()
    except BrokenPipeError:
        inbox.put(("text", "the rank ended before it could read its work\n"))


def _read_records(stream: BinaryIO, inbox: queue.SimpleQueue) -> None:
    for record in read_frames(stream, pause=GATHER_SECONDS):
        inbox.put(("record", record))
    inbox.put(("end", None))


def _read_text(stream: BinaryIO, inbox: queue.SimpleQueue) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while chunk := os.read(stream.fileno(), 1 << 16):
        inbox.put(("text", decoder.decode(chunk)))
    inbox.put(("end", None))


def _cancelled(worker: Worker, key: Key) -> bool:
    """Whether the driver has gone or let go of this task, or the worker closes: Dask ends no running thread itself."""
    state = worker.state.tasks.get(key)
    return state is None or state.state == "cancelled" or worker.status in (Status.closing, Status.closed)


def _cause(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with code {returncode} before its function returned"
    name = signal.Signals(-returncode).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def failure(type_: str, message: str, consequence: bool = False) -> dict:
    """How a rank ended that could not tell it itself."""
    return {"type": type_, "message": message, "traceback": "", "time": time.time(), "consequence": consequence}

"""A simulated cluster: its ranks compute, send and receive in whole steps, so every schedule can be counted.

A rank's program is a plain function. Each runs in a thread of its own, one at a time: when it computes, or waits for a
message, it hands the turn back to the cluster's clock. What happens in a step depends on earlier steps only, so a run
always gives the same schedule.
"""

import ctypes
import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpclab.language import translate as _

MOST_STEPS = 10_000
"""A run that takes longer is stopped."""


@dataclass
class Schedule:
    """What a run did.

    Attributes
    ----------
    rows : list of dict
        Of kind "action": ``rank``, ``ranks``, ``action`` ("compute", "wait", "send", "receive"), ``start`` and
        ``steps``, and ``label`` (of a computation) or ``peer`` and ``nbytes`` (of a message).
    results : list
        What each rank's program returned.
    fault : str or None
        Why the run couldn't go on, and on which rank at which step.
    """

    rows: list[dict]
    results: list
    fault: str | None

    @property
    def steps(self) -> int:
        """Steps until the last action ended."""
        return max((row["start"] + row["steps"] for row in self.rows), default=0)

    @property
    def sent(self) -> list[int]:
        """Bytes that each rank sent."""
        return [
            sum(row["nbytes"] for row in self.rows if row["rank"] == rank and row["action"] == "send")
            for rank in range(len(self.results))
        ]

    @property
    def kept(self) -> list[int]:
        """Bytes of what each rank's program returned: what the rank still holds in the end."""
        return [_nbytes(result) for result in self.results]


def run(
    program: Callable[["Device"], Any],
    ranks: int,
    *,
    latency: int = 1,
    bandwidth: float = 8,
    cables: Collection[tuple[int, int]] | None = None,
) -> Schedule:
    """Run a program on each rank of a simulated cluster.

    Parameters
    ----------
    program : callable
        Given its `Device`; what it returns is the rank's result.
    ranks : int
    latency : int, default 1
        Steps that a message takes beside those for its bytes; in all at least one.
    bandwidth : float, default 8
        Bytes that a message moves in a step.
    cables : collection of (int, int), optional
        Pairs of sender and receiver. Default: every rank can send to every other one.

    Returns
    -------
    Schedule
        Up to the fault if there is one; an error that a program raised is raised here.
    """
    cluster = _Cluster(ranks, lambda nbytes: max(1, latency + math.ceil(nbytes / bandwidth)), cables)
    cluster.devices = [Device(rank, cluster, program) for rank in range(ranks)]
    try:
        for device in cluster.devices:
            device.thread.start()
        while not cluster.over:
            cluster.advance()
    finally:
        cluster.end()
    if cluster.error is not None:
        raise cluster.error
    rows = [row | {"steps": min(row["steps"], cluster.step - row["start"])} for row in cluster.rows]
    return Schedule([row for row in rows if row["steps"]], [device.result for device in cluster.devices], cluster.fault)


class _Stopped(BaseException):
    """Leaves a program when the run is over; no ``except Exception`` of the reader's catches it."""


@dataclass
class _Message:
    source: int
    to: int
    array: np.ndarray
    asked: int
    ends: int = 0


class Device:
    """What a program has of its rank: `rank`, `ranks`, and three things to do.

    A rank can compute, send one message and receive one message at the same time, and no more.
    """

    def __init__(self, rank: int, cluster: "_Cluster", program: Callable[["Device"], Any]):
        self.rank = rank
        self.ranks = cluster.ranks
        self.result: Any = None
        self.thread = threading.Thread(target=self._live, args=[program], daemon=True)
        self._cluster = cluster
        self._turn = threading.Semaphore(0)
        self._free_at = 0
        self._waits_for: int | None = None
        self._ended = False
        self._inbox: dict[int, deque[np.ndarray]] = defaultdict(deque)
        self._outbox: deque[_Message] = deque()
        self._sending: _Message | None = None
        self._receiving = False

    def compute(self, steps: int = 1, label: str = "") -> None:
        """Compute for some steps; messages travel meanwhile."""
        if not isinstance(steps, int | np.integer) or steps < 0:
            text = _("Rank {rank} computes for {steps!r} steps at step {step}; it must be a whole number of steps.",
                     steps=steps, **self._place())  # fmt: skip
            self._fail(text)
        self._note("compute", self._cluster.step, steps, label=label)
        self._free_at = self._cluster.step + steps
        while self._cluster.step < self._free_at:
            self._pause()

    def send(self, to: int, value: Any) -> None:
        """Send a copy of an array to a rank. Returns at once: the message leaves when both ranks are free for it."""
        self._known(to)
        if not isinstance(value, np.ndarray | np.generic | int | float) or np.asarray(value).dtype.kind not in "biuf":
            kind, place = type(value).__name__, self._place()
            self._fail(
                _("Rank {rank} sends a {kind} at step {step}; it must be an array of numbers.", kind=kind, **place)
            )
        if self._cluster.cables is not None and (self.rank, to) not in self._cluster.cables:
            place = self._place()
            self._fail(_("Rank {rank} sends to rank {to} at step {step}, but no cable leads there.", to=to, **place))
        self._outbox.append(_Message(self.rank, int(to), np.array(value), self._cluster.step))

    def recv(self, source: int) -> np.ndarray:
        """The next message from a rank; waits for it."""
        self._known(source)
        self._waits_for = source
        row = self._note("wait", self._cluster.step, MOST_STEPS, peer=source)
        while not self._inbox[source]:
            self._pause()
        self._waits_for, row["steps"] = None, self._cluster.step - row["start"]
        return self._inbox[source].popleft()

    def _known(self, other: Any) -> None:
        if not isinstance(other, int | np.integer) or not 0 <= other < self.ranks or other == self.rank:
            text = _("Rank {rank} names rank {other!r} at step {step}; it must name another rank, from 0 to {last}.",
                     other=other, last=self.ranks - 1, **self._place())  # fmt: skip
            self._fail(text)

    def _place(self) -> dict[str, int]:
        return {"rank": self.rank, "step": self._cluster.step}

    def _fail(self, fault: str) -> None:
        self._cluster.fault = self._cluster.fault or fault
        raise _Stopped

    def _note(self, action: str, start: int, steps: int, **others: Any) -> dict:
        """Write a row; of what hasn't ended when the run does, only the steps until then count."""
        row = {"kind": "action", "rank": self.rank, "ranks": self.ranks, "action": action, "source": "simulated"}
        self._cluster.rows.append(row | {"start": start, "steps": steps} | others)
        return self._cluster.rows[-1]

    def _live(self, program: Callable[["Device"], Any]) -> None:
        """The rank's thread."""
        try:
            with suppress(_Stopped):  # how `_fail` and the end of a run leave a program; the fault is noted already
                self._await_turn()
                self.result = program(self)
        except BaseException as error:
            error.add_note(f"on rank {self.rank} at step {self._cluster.step}")
            self._cluster.error = self._cluster.error or error
        finally:
            self._ended = True
            self._cluster.turn.release()

    def _pause(self) -> None:
        """Hand the turn back, until there is something to go on with."""
        self._cluster.turn.release()
        self._await_turn()

    def _await_turn(self) -> None:
        self._turn.acquire()
        if self._cluster.over:
            raise _Stopped

    def _ready(self) -> bool:
        waits = self._waits_for is not None and not self._inbox[self._waits_for]
        return not self._ended and self._cluster.step >= self._free_at and not waits


class _Cluster:
    """The clock of a run, and its messages."""

    def __init__(self, ranks: int, duration: Callable[[int], int], cables: Collection[tuple[int, int]] | None):
        self.ranks, self.duration, self.cables = ranks, duration, cables
        self.devices: list[Device] = []
        self.rows: list[dict] = []
        self.step = 0
        self.fault: str | None = None
        self.error: BaseException | None = None
        self.over = False
        self.running: Device | None = None
        self.turn = threading.Semaphore(0)

    def advance(self) -> None:
        """One step: programs first, then the messages that can leave."""
        for device in self.devices:
            if device._ready():
                self.running = device
                device._turn.release()
                self.turn.acquire()
                self.running = None
            if self.fault or self.error:
                self.over = True
                return
        self._depart()
        computing = any(not device._ended and device._free_at > self.step for device in self.devices)
        if not computing and not any(device._sending for device in self.devices):
            self.fault, self.over = self._standstill(), True
            return
        self.step += 1
        self._arrive()
        if self.step >= MOST_STEPS:
            self.fault, self.over = _("Stopped at step {step}: the programs still hadn't ended.", step=self.step), True

    def _depart(self) -> None:
        """Let the messages leave whose sender and receiver are free, the longest asked for first."""
        heads = [device._outbox[0] for device in self.devices if device._outbox and not device._sending]
        for message in sorted(heads, key=lambda message: (message.asked, message.source)):
            sender, receiver = self.devices[message.source], self.devices[message.to]
            if receiver._receiving:
                continue
            steps = self.duration(message.array.nbytes)
            message.ends = self.step + steps
            sender._sending, receiver._receiving = sender._outbox.popleft(), True
            sender._note("send", self.step, steps, peer=message.to, nbytes=message.array.nbytes)
            receiver._note("receive", self.step, steps, peer=message.source, nbytes=message.array.nbytes)

    def _arrive(self) -> None:
        for sender in self.devices:
            if (message := sender._sending) and message.ends == self.step:
                receiver = self.devices[message.to]
                receiver._inbox[message.source].append(message.array)
                sender._sending, receiver._receiving = None, False

    def _standstill(self) -> str | None:
        """Why nothing moves any more; None if all is done."""
        waiting = [(device.rank, device._waits_for) for device in self.devices if not device._ended]
        for rank, source in waiting:
            if source is not None and self.devices[source]._ended:
                place = {"rank": rank, "source": source, "step": self.step}
                return _("Rank {rank} waits at step {step} for a message that rank {source} never sent.", **place)
        if waiting:
            pairs = ", ".join(_("{rank} for {source}", rank=rank, source=source) for rank, source in waiting)
            return _("Deadlock at step {step}: ranks wait for each other ({pairs}).", step=self.step, pairs=pairs)
        for device in self.devices:
            for source, messages in device._inbox.items():
                if messages:
                    place = {"rank": device.rank, "source": source, "step": self.step}
                    return _(
                        "At step {step} all ranks have ended, but rank {rank} never received a message from rank"
                        " {source}.",
                        **place,
                    )
        return None

    def end(self) -> None:
        """Have the programs leave that still run, also one that was interrupted in an endless loop of its own."""
        self.over = True
        if self.running is not None:
            thread = ctypes.c_ulong(self.running.thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Stopped))
        for device in self.devices:
            device._turn.release()


def _nbytes(value: Any) -> int:
    """Bytes of the numbers in a value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    return np.asarray(value).nbytes if isinstance(value, np.ndarray | np.generic | int | float) else 0

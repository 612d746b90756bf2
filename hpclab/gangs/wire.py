"""All processes: what the kernel, the workers, the scheduler and the ranks of a gang say to each other, as types.

A message travels as a line of JSON, its head, then as many bytes as the head's ``body`` says. ``kind`` is the name of
its class. "Kernel" is the process of the notebook, or of any program that launches a gang. Ranks import this file, so
it imports neither Dask nor torch.

========  ======================  ======================================================================================
types     from, to                over
========  ======================  ======================================================================================
Work      worker, rank            the rank's standard input
Order     kernel, worker (rank)   Dask's stream from the scheduler to the worker; the worker passes some on to the rank
Record    rank, worker (kernel)   a pipe; the worker passes some on to the kernel, in a batch
News      worker, kernel          an event on the run's topic: a `Batch`, then what it holds; or one of the scheduler's
========  ======================  ======================================================================================
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any, BinaryIO, dataclass_transform

from hpclab import rows

LONGEST_HEAD = 10_000_000
"""Bytes of a message without its body."""
_KINDS: "dict[str, type[Message]]" = {}
_ENCODER = json.JSONEncoder(default=vars)  # `json.dumps` would make one for each message


@dataclass(kw_only=True)
class RankPlace:
    """One rank's place in an attempt, as the kernel planned it."""

    run: str
    attempt: int
    folder: str
    """Folder of the run's results, as the kernel sees it."""
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
    """When the kernel launched the gang, in seconds since the epoch by the kernel's clock."""
    clock: str
    """The scheduler's machine."""
    ahead: float
    """Seconds by which the kernel's clock is ahead of the scheduler's."""
    store: str
    """File of the rendezvous; "" over several hosts, whose ranks the scheduler serves."""
    init: bool
    """Whether torch.distributed is initialised for the function; else the environment is torchrun's."""
    memory: int | None
    """Bytes that the rank may allocate; None sets no limit."""
    worker_memory: int | None
    """Its share of its worker's limit, in bytes; None if that has none."""
    resume: str | None
    """Folder of an earlier run to start from."""

    @property
    def host(self) -> str:
        """Address of the rank's host."""
        return host_of(self.worker)


@dataclass_transform(kw_only_default=True)
@dataclass(kw_only=True)
class Message:
    """What one process says to another; a subclass is a dataclass, and one kind of message."""

    body: bytes = field(default=b"", repr=False)

    def __init_subclass__(cls) -> None:
        _KINDS[dataclass(kw_only=True)(cls).__name__] = cls


class Work(Message):
    """To a rank, first of all: where it is, and as its body the pickled function and arguments."""

    place: RankPlace
    ahead: float
    """Seconds by which the rank's clock is ahead of the kernel's."""
    stacks: str
    """File for the rank's stack, on demand."""
    sys_path: list[str]

    def __post_init__(self) -> None:
        if isinstance(self.place, dict):  # as it came
            self.place = RankPlace(**self.place)


class Order(Message):
    """From the kernel to ranks; their workers obey it, or pass it on."""


class Stop(Order):
    """End at an agreed call of `should_stop`; the worker interrupts a rank that never asks."""


class Expire(Order):
    """As `Stop`, but leave alone ranks that never ask."""


class StopAt(Order):
    """The agreed call."""

    calls: int


class ShowStack(Order):
    """Answer with a `Stack`."""


class End(Order):
    """Kill the rank: the kernel has a reason, so this is no failure."""


class Kill(Order):
    """Kill the rank, as a failing machine would."""


class Die(Order):
    """Kill the worker."""


class Answer(Order):
    """To an `Ask` of a rank, from the scheduler; the body is a value."""

    to: int = 0
    """The question's number."""
    result: Any = None
    error: str = ""


class RunCell(Order):
    """Run a cell; the body holds pickled values for its names."""

    cell: int
    name: str
    """Of its file, in tracebacks."""
    source: str
    """As it was written."""
    code: str
    """As Python."""
    pull: bool
    """Whether the value itself is asked for, or what it looks like."""
    on: list[int]
    """Ranks that run it."""
    group: int
    """Number of the process group."""


class Interrupt(Order):
    """Leave a cell."""

    cell: int


class Close(Order):
    """End an interactive gang."""


class Record(Message):
    """From a rank to its worker."""


class Row(Record):
    """Measurements. The body is the row's JSON text, which nobody parses or writes anew on its way to the file."""

    def __post_init__(self) -> None:
        if not self.body.isascii():
            raise ValueError(f"no text of a row: {self.body[:50]!r}")

    @classmethod
    def of(cls, row: dict) -> "Row":
        """A row that has all but its source."""
        return cls(body=json.dumps(row).encode())

    def parse(self, source: str) -> tuple[dict, str]:
        """The row with its source, and its line in the file; only one with NaN or infinity is written anew."""
        text = self.body.decode()
        row = json.loads(text) | {"source": source}
        odd = "NaN" in text or "Infinity" in text  # as numbers, or in a text, which comes out the same
        return row, rows.line(row) if odd else f'{text[:-1]}, "source": "{source}"}}\n'


class Beat(Record):
    """The rank's Python runs."""


class Cooperates(Record):
    """The function has asked `should_stop`."""


class Calls(Record):
    """How often it has asked; sent once it is told to stop."""

    calls: int


class Emulated(Record):
    """Something other than this machine sets the times."""


class Do(StrEnum):
    """What a rank asks of the scheduler's keys and values; see `store.GangStore`."""

    SET = auto()
    WAIT = auto()
    """Answered with the first key's value, once all are there."""
    ADD = auto()
    CHECK = auto()
    COMPARE_SET = auto()
    DELETE = auto()
    COUNT = auto()


class Ask(Record):
    """A question about the other ranks, for the scheduler; the body is a value."""

    number: int = 0
    do: Do
    keys: list[str]
    expected: str = ""


class Returned(Record):
    """The function has returned; the rank may still wait for others."""


class Value(Record):
    """The last record of a rank that succeeded: what its function returned, pickled."""


class Failed(Record):
    """How a rank failed, from itself or by whoever saw it; the body is the pickled exception, if there is one."""

    type: str
    message: str
    traceback: str = ""
    time: float = field(default_factory=time.time)
    consequence: bool = False
    """Whether it only followed from the failure of another."""


class FromCell(Record):
    """What the worker of an interactive gang passes on."""


class Ready(FromCell):
    """The rank takes cells."""

    worker: str
    """Address of its worker."""


class Printed(FromCell):
    """What a cell printed."""

    text: str


class Answered(FromCell):
    """A cell has ended; the body is the value, if it was asked for."""

    cell: int
    shown: str | None


class CellFailed(FromCell):
    """A cell has failed."""

    cell: int
    summary: str
    traceback: str
    missing: str | None
    """A name that wasn't there."""
    time: float
    awaited: tuple[str, int] | None
    """File and line where it awaited when it was interrupted."""
    interrupted: bool
    consequence: bool


class News(Message):
    """To the kernel, from a worker or the scheduler."""


class Batch(News):
    """Begins what a worker passes on of a rank, beside its own news of it."""

    rank: int
    attempt: int


class Text(News):
    """What a rank printed; the body is UTF-8."""


class Stuck(News):
    """How long a rank has not got on."""

    seconds: float


class Stack(News):
    """Where a rank stands."""

    text: str


class Expires(News):
    """When the job of the rank's worker ends, in seconds since the epoch by the kernel's clock."""

    at: float


class Queued(News):
    """The gang waits for room."""

    place: int
    """Its number in the queue."""


class Seated(News):
    """The gang is admitted: all by rank."""

    workers: list[str]
    hosts: list[str]
    memory: list[int | None]
    """Each rank's share of its worker's memory, in bytes."""
    store: str
    """As in `RankPlace`, without the attempt."""
    emulated: bool
    """Whether the ranks take turns, or hosts are none of their own."""
    machine: dict
    """The workers' machines, as `machine.together` has them."""
    clock: str
    """The scheduler's machine."""


class Crowded(News):
    """Other ranks have come to the gang's CPUs."""


class Lost(News):
    """A worker has gone."""

    worker: str


@dataclass
class RankOutcome:
    """How one rank ended: with a value, or with a failure. It comes back as the value of a Dask task."""

    rank: int
    host: str
    value: bytes = b""
    failure: Failed | None = None
    batches: int = 0
    """Batches that were sent before."""


def encode(message: Message) -> bytes:
    """A message as it travels."""
    return head(message) + message.body


def head(message: Message) -> bytes:
    """What goes before the body of a message."""
    fields = vars(message) | {"kind": type(message).__name__, "body": len(message.body)}
    return _ENCODER.encode(fields).encode() + b"\n"


def decode(event: bytes) -> list[Message]:
    """Messages, one after the other."""
    buffer = bytearray(event)
    return list(iter(lambda: take_frame(buffer), None))


def take_frame(buffer: bytearray) -> Message | None:
    """Take one message off the front of what came in; None if it isn't whole yet.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is none.
    """
    end = buffer.find(b"\n") + 1
    if end == 0:
        if len(buffer) > LONGEST_HEAD:
            raise ValueError(f"no end of line in {len(buffer):,} bytes")
        return None
    fields = json.loads(buffer[:end])
    stop = end + fields["body"]
    if len(buffer) < stop:
        return None
    with memoryview(buffer) as view:  # a slice of the buffer itself would be another copy
        fields["body"] = bytes(view[end:stop])
    del buffer[:stop]
    return _KINDS[fields.pop("kind")](**fields)


def read_frames(stream: BinaryIO, pause: float = 0.0) -> Iterator[Message]:
    """Messages of a stream, until it ends; what ends in the middle of one is dropped.

    A `pause` after a few rows lets the next gather in the pipe, where they are safe even if their writer dies.
    """
    buffer = bytearray()
    while chunk := os.read(stream.fileno(), 1 << 20):
        buffer += chunk
        message = None
        while (following := take_frame(buffer)) is not None:
            yield (message := following)
        if isinstance(message, Row) and len(chunk) < 1 << 15:
            time.sleep(pause)


def host_of(address: str) -> str:
    """The host of an address of Dask's, such as "tls://10.0.0.1:8786" or "tls://[fd00::1]:8786"."""
    return address.rsplit("://", 1)[-1].rsplit(":", 1)[0].strip("[]")

"""The inside of a rank: a process of its own that runs the user's function and talks to its supervisor by three pipes.

Standard input brings a header, the pickled function, and stays open for as long as the owner lives. Standard output
carries records (see `frame`). Standard error carries all that is printed, by Python or C.
"""

import json
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

RESERVED = ("run", "attempt", "rank", "ranks", "source")
# What a rank says when a peer has gone: gloo's words, and torch's own classes for it.
_CONSEQUENCE = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Timed out|[Tt]imeout|Broken pipe|Socket (closed|is closed)"
)


class Context:
    """This rank's place in its gang, and its line to the supervisor."""

    def __init__(self, header: dict, records: BinaryIO):
        self.header = header
        self.records = records
        self.lock = threading.Lock()

    def send(self, record: dict, body: bytes = b"") -> None:
        """Write one record, whole, from any thread."""
        with self.lock:
            self.records.write(frame(record, body))
            self.records.flush()


_context: Context | None = None


def report(**row: Any) -> None:
    """Report one row of measurements from inside a rank: it streams to the notebook and to the run's ``rows.jsonl``.

    Outside a gang it does nothing, so the same function also runs by itself.

    Parameters
    ----------
    **row
        Numbers, strings, booleans or None, with the unit in the name (``step_s=0.02``); a tensor or array of one
        element counts as its number; NaN and infinity become null in the file. ``kind`` (default "step") and ``time_s``
        (default: seconds since the launch) can be given; run, attempt, rank, ranks and source are added.

    Raises
    ------
    ValueError
        If a name is one of those that are added.
    TypeError
        If a value can't be written as JSON; the message names it.
    """
    if _context is None:
        return
    header = _context.header
    if taken := [name for name in RESERVED if name in row]:
        raise ValueError(f"report({taken[0]}=...) is set by the launcher; choose another name.")
    row = {name: _plain(name, value) for name, value in row.items()}
    common = {"kind": "step", "time_s": time.time() - header["launched"]}
    _context.send({"record": "row", "row": common | row | header["row"]})


def run_folder() -> Path:
    """Folder of this run's results, from inside a rank."""
    assert _context is not None
    return Path(_context.header["folder"])


def frame(record: dict, body: bytes = b"") -> bytes:
    """One record on the wire: a line of JSON, then as many bytes as its ``nbytes`` says."""
    return json.dumps(record | {"nbytes": len(body)}).encode() + b"\n" + body


def take_frame(buffer: bytearray) -> tuple[dict, bytes] | None:
    """Take one record off the front of what came in; None if it isn't whole yet."""
    end = buffer.find(b"\n") + 1
    if end == 0:
        return None
    record = json.loads(buffer[:end])
    stop = end + record["nbytes"]
    if len(buffer) < stop:
        return None
    body = bytes(buffer[end:stop])
    del buffer[:stop]
    return record, body


def read_frames(stream: BinaryIO, pause: float = 0.0) -> Iterator[tuple[dict, bytes]]:
    """Records of a stream, until it ends; what ends in the middle of one is dropped.

    A `pause` after each small read lets the records gather in the pipe, where they are safe even if their writer dies.
    """
    buffer = bytearray()
    while chunk := os.read(stream.fileno(), 1 << 20):
        buffer += chunk
        while (found := take_frame(buffer)) is not None:
            yield found
        if len(chunk) < 1 << 15:
            time.sleep(pause)


def main() -> None:
    """Run this process as a rank."""
    global _context
    _die_with_parent()
    owner = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    records = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    first = next(read_frames(owner), None)
    if first is None:
        return
    header, payload = first
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()
    _context = Context(header, records)
    sys.path[:] = header["sys_path"]
    try:
        value = _dumps(_run(header, payload))
    except BaseException as error:
        _fail(error, header)
    _context.send({"record": "value"}, value)
    _flush()
    os._exit(0)


def _run(header: dict, payload: bytes) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(header["threads"])
    function, arguments = pickle.loads(payload)
    rank, ranks = header["row"]["rank"], header["row"]["ranks"]
    dist.init_process_group("gloo", store=dist.FileStore(header["store"], ranks), rank=rank, world_size=ranks)
    value = function(*arguments)
    if dist.is_initialized():
        dist.barrier()  # a rank that left now would cut the connections of those still in a collective
    return value


def _dumps(value: Any) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        raise TypeError(f"the return value (of type {type(value).__name__}) can't be pickled: {error}") from error


def _fail(error: BaseException, header: dict) -> None:
    """Tell who failed and how, then leave at once: peers must not wait for a rank that will never answer."""
    failure = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": _traceback(error),
        "time": time.time(),
        "consequence": _is_consequence(error),
    }
    try:
        import cloudpickle

        body = cloudpickle.dumps(error)
        pickle.loads(body)
    except Exception:
        body = b""  # the client then raises a RankError with this traceback
    assert _context is not None
    _context.send({"record": "failure", "failure": failure}, body)
    _flush()
    os._exit(1)


def _traceback(error: BaseException) -> str:
    """Text of the traceback from the user's function on, without this module's own frames at its top."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None and step.tb_frame.f_code.co_filename == __file__:
        step = step.tb_next
    return "".join(traceback.format_exception(type(error), error, step))


def _is_consequence(error: BaseException) -> bool:
    """Whether the error only says that a peer has gone."""
    import torch.distributed as dist

    named = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
    return named or (isinstance(error, RuntimeError) and bool(_CONSEQUENCE.search(str(error))))


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # what numpy and torch raise for more than one element
            value = value.item()
    if value is not None and not isinstance(value, str | int | float | bool):
        raise TypeError(
            f"report({name}={value!r}) must be a number, a string, a boolean, None, or a tensor of one element."
        )
    return value


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _end_with(owner: BinaryIO) -> None:
    """End this process, and all that it started, when the other end of its standard input closes."""
    owner.read()
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _die_with_parent() -> None:
    """On Linux, have the kernel kill this process when the supervising thread ends, even while it holds the GIL."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, <sys/prctl.h>

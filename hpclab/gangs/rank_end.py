"""Rank: how it ends: what it tells of an error, its limit of memory, and how it leaves."""

import atexit
import gc
import io
import os
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hpclab import _namesakes
from hpclab.gangs import wire
from hpclab.gangs.errors import message, note, printable

VALUE_SHARE = 4
"""A value passes through its worker's memory in up to so many copies."""
LARGEST_ERROR = 10_000_000
"""Bytes of an error that goes to the notebook as it is."""
EXIT_SECONDS, FAILED_SECONDS = 10.0, 2.0
"""How long exit handlers may take after a function has returned; and after it failed, while its peers wait in vain."""
WRITE_SECONDS = 1.0
"""How long open files may take to be written when that time is over."""
# What a rank says when a peer has gone: gloo's words, and torch's own classes for it.
_CONSEQUENCE = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Timed out|[Tt]imeout|Broken pipe|Socket (closed|is closed)"
)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory")


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


def failure(error: BaseException, place: wire.RankPlace, file: str) -> wire.Failed:
    """What the notebook is told of an error; its traceback without the frames of a file, the caller's, at its top."""
    lift_limit()
    tell_of_limit(error, place.memory, "launch")
    for text in filter(None, _ways_out(error, place)):
        note(error, text)
    failed = wire.Failed(
        type=type(error).__name__,
        message=message(error),
        traceback=printable(_traceback(error, file)),
        consequence=is_consequence(error),
    )
    # Else the kernel raises a RankError with this traceback; the error's own code may do anything, such as exit.
    with suppress(BaseException):
        import cloudpickle

        body = cloudpickle.dumps(error)
        pickle.loads(body)
        if len(body) <= LARGEST_ERROR:
            failed.body = body
    return failed


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
        lift_limit()
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


def lift_limit() -> None:
    """Give what ends this process the memory for it: a thread takes some, and what was raised may hold the rest."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def limit_memory(limit: int | None) -> None:
    """Let this rank allocate so many bytes more than it has now; beyond, an allocation raises an error in it."""
    if limit is None or sys.platform != "linux":
        return
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # what RLIMIT_DATA counts
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    least = min([held + limit, *(bound for bound in limits if bound != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (least, limits[1]))


def _ways_out(error: BaseException, place: wire.RankPlace) -> Iterator[str]:
    """What to do about an error whose own words speak of something else."""
    if isinstance(error, ImportError | AttributeError):
        yield _namesakes.blame(message(error))
    if isinstance(error, ValueError) and "default process group twice" in message(error) and place.init:
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


def _traceback(error: BaseException, file: str) -> str:
    """Text of the traceback without the frames of a file at its top."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None and step.tb_frame.f_code.co_filename == file:
        step = step.tb_next
    return "".join(traceback.format_exception(type(error), error, step))


def is_consequence(error: BaseException) -> bool:
    """Whether the error only says that a peer has gone."""
    import torch.distributed as dist

    named = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
    return named or (isinstance(error, RuntimeError) and bool(_CONSEQUENCE.search(message(error))))

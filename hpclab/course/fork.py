"""Work in a fork that can be stopped as a whole: what a reader's function does there can't harm the kernel."""

import contextlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from hpclab import machine

PATIENCE_SECONDS = 30.0
"""How long the work may take, unless `HPCLAB_PATIENCE` says otherwise; longer where programs wait for CPUs."""
MEMORY = 2**30
"""Bytes that the work may take on top of what the kernel holds already."""
SAID = 4_000
"""Bytes of what is printed that are kept; the rest is read and thrown away."""


@dataclass
class Outcome:
    """How work apart ended: "done" with an `answer`, "patience", "memory", or "died" of `signal` (0: it left)."""

    how: str
    answer: Any = None
    signal: int = 0
    said: str = ""
    seconds: float = 0.0


def possible() -> bool:
    """Whether a fork of this process can do everything that it can: not elsewhere than on Linux, and not with a GPU."""
    torch = sys.modules.get("torch")
    return sys.platform == "linux" and not (torch and torch.cuda.is_available())


def patience() -> float:
    """Seconds that work apart may take.

    Raises
    ------
    ValueError
        If `HPCLAB_PATIENCE` is no number above 0.
    """
    given = os.environ.get("HPCLAB_PATIENCE") or PATIENCE_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"HPCLAB_PATIENCE (={given}) must be a number of seconds above 0.")
    return seconds


def apart(work: Callable[[], Any]) -> Outcome:
    """Do work in a fork, in a session of its own, and end all that it has started.

    What it returns must be plain enough for JSON: nothing that a reader's function made is unpacked here.
    """
    seconds = patience()
    answers, answer = os.pipe()
    prints, printed = os.pipe()
    sys.stdout.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: that there are threads; see `_child`
        child = os.fork()
    if child == 0:
        _child(work, parent, answer, printed)
    try:
        os.close(answer)
        os.close(printed)
        return _followed(child, answers, prints, seconds)
    finally:
        _end(child)
        os.close(answers)
        os.close(prints)


def _child(work: Callable[[], Any], parent: int, answer: int, printed: int) -> NoReturn:
    """What the fork does; it never returns, and runs none of the kernel's finalizers."""
    code = 1
    try:
        import gc

        os.setsid()
        _die_with(parent)
        gc.freeze()  # what the kernel holds is the kernel's to finalize
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", 1, encoding="utf-8", errors="replace", closefd=False)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # OpenMP's other threads aren't in a fork: to wait for them would be for ever
        _limit()
        try:
            told = ["done", work()]
        except MemoryError:
            told = ["memory", None]
        sys.stdout.flush()
        left = memoryview(json.dumps(told).encode())
        while left:
            left = left[os.write(answer, left) :]
        code = 0
    finally:
        os._exit(code)


def _die_with(parent: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _limit() -> None:
    """Have an allocation fail that goes beyond `MEMORY`, or half of this machine's, on top of what is there."""
    import resource

    with open("/proc/self/status") as status:
        held = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmData")), 0)
    limit = held + min(MEMORY, machine.memory() // 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def _followed(child: int, answers: int, prints: int, seconds: float) -> Outcome:
    """Wait for the fork's answer, its end, or the end of patience."""
    began = time.monotonic()
    told, said = b"", b""
    ended = None
    while True:
        ready, _, _ = select.select([answers, prints], [], [], 0 if ended else 0.05)
        if answers in ready:
            part = os.read(answers, 2**16)
            told += part
        if prints in ready:
            said = (said + os.read(prints, 2**16))[: SAID + 1]
        if outcome := _parsed(told):
            break
        if ended:
            if answers in ready and part:
                continue
            killed = ended.si_status if ended.si_code != os.CLD_EXITED else 0
            outcome = Outcome("died", signal=killed)
            break
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if not ended and time.monotonic() - began > seconds * _crowded():
            outcome = Outcome("patience", seconds=time.monotonic() - began)
            break
    while len(said) <= SAID and select.select([prints], [], [], 0)[0] and (part := os.read(prints, 2**16)):
        said += part
    outcome.said = said[:SAID].decode("utf-8", "replace") + (" ..." if len(said) > SAID else "")
    return outcome


def _parsed(told: bytes) -> Outcome | None:
    try:
        how, answer = json.loads(told)
    except ValueError:  # not all of it yet
        return None
    return Outcome(how, answer)


def _crowded() -> float:
    """How many programs wait for each CPU of the host, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _end(child: int) -> None:
    """Kill the fork and all that it has started, and take it off the list of processes."""
    import psutil

    family: list[Any] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(child).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # if it had no time to make a session of its own
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)

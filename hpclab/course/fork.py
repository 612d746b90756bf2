"""Work in a fork that can be stopped as a whole: what a reader's function does there can't harm the kernel.

It is forked by hand. A `multiprocessing.Process` is reaped as soon as any thread starts another one: by the time we
kill its group, that number could be a stranger's. And its sentinel stays open in whatever the reader's function has
forked, so it doesn't tell that the process itself has ended.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import psutil

from hpclab import machine

PATIENCE_SECONDS = 30.0
"""How long the work may take, unless `HPCLAB_PATIENCE` says otherwise; longer where programs wait for CPUs."""
MEMORY = 2**30
"""Bytes that the work may take on top of what the kernel holds already."""
PRINTED = 4_000
"""Bytes of what is printed that are kept; the rest is read and thrown away."""
CHARACTERS = 600
"""Of each text that the work returns: so few that it goes into a pipe as a whole or not at all (below PIPE_BUF)."""


@dataclass
class Ending:
    """How work in a fork ended: "done" with an `answer`, "patience", "memory", or "died" of `signal` (0: it left)."""

    how: str
    answer: Any = None
    signal: int = 0
    printed: str = ""
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
    text = os.environ.get("HPCLAB_PATIENCE") or PATIENCE_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"HPCLAB_PATIENCE (={text}) must be a number of seconds above 0.")
    return seconds


def run(work: Callable[[], list[str]]) -> Ending:
    """Do work in a fork, in a session of its own, and end all that it has started.

    The work returns texts, and long ones are cut: nothing that a reader's function made is unpacked here.
    """
    seconds = patience()
    answers, answer = Pipe(duplex=False)
    prints, printed = Pipe(duplex=False)
    with answers, answer, prints, printed:
        sys.stdout.flush()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: that there are threads; see `_child`
            child = os.fork()
        if child == 0:
            _child(work, parent, answer.fileno(), printed.fileno())
        try:
            return _followed(child, answers, prints, seconds)
        finally:
            started = family(child)
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)  # it may have had no time to lead a group
                kill(child, started)
                os.waitpid(child, 0)


def _child(work: Callable[[], list[str]], parent: int, answer: int, printed: int) -> NoReturn:
    """What the fork does; it never returns, and runs none of the kernel's finalizers."""
    code = 1
    try:
        os.setsid()
        die_with(parent)
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
            how, texts = "done", work()
        except MemoryError:
            how, texts = "memory", []
        sys.stdout.flush()
        short = [text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 3]}..." for text in texts]
        ending = json.dumps([how, short], ensure_ascii=False)
        os.write(answer, ending.encode("utf-8", "replace"))
        code = 0
    finally:
        os._exit(code)


def die_with(parent: int) -> None:
    """Have this process end as soon as the one that has forked it ends; only on Linux."""
    import ctypes

    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _limit() -> None:
    """Have an allocation fail that goes beyond `MEMORY`, or half of this machine's, on top of what is there."""
    import resource

    with open("/proc/self/status") as status:
        held = next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmData")), 0)
    lower(resource.RLIMIT_DATA, held + min(MEMORY, machine.memory() // 2))


def lower(kind: int, limit: int) -> None:
    """Lower a limit of this process and of those that it starts; where it is lower already, it stays."""
    import resource

    bounds = [bound for bound in resource.getrlimit(kind) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min([limit, *bounds]),) * 2)


def _followed(child: int, answers: Connection, prints: Connection, seconds: float) -> Ending:
    """Wait for the fork's answer, its end, or the end of patience."""
    began = time.monotonic()
    printed = b""
    ending = None
    while ending is None:
        # Asked before the pipes, which then hold all that an ended fork wrote. Not reaped yet: its id stays its own.
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ready = wait([answers, prints], 0 if ended else 0.05)
        if prints in ready:
            printed = (printed + os.read(prints.fileno(), 2**16))[: PRINTED + 1]
        if answers in ready:
            ending = _ending(os.read(answers.fileno(), 2**16))
        if ending is None and ended:
            ending = Ending("died", signal=ended.si_status if ended.si_code != os.CLD_EXITED else 0)
        elif ending is None and (spent := time.monotonic() - began) > seconds * _crowded():
            ending = Ending("patience", seconds=spent)
    while len(printed) <= PRINTED and wait([prints], 0):
        printed += os.read(prints.fileno(), 2**16)
    ending.printed = printed[:PRINTED].decode("utf-8", "replace") + (" ..." if len(printed) > PRINTED else "")
    return ending


def _ending(text: bytes) -> Ending | None:
    """What a fork wrote as its end; None if the reader's function has written there instead."""
    try:
        how, answer = json.loads(text)
        return Ending(how, answer)
    except (ValueError, TypeError):
        return None


def _crowded() -> float:
    """How many programs wait for each CPU of the host, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; empty if it has gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def kill(leader: int, started: Iterable[psutil.Process]) -> None:
    """Kill a group of processes, and of those that it started also the ones that have left it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()

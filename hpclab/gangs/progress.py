"""Worker and kernel: whether ranks get on. One that hangs in a collective still beats: only progress tells a hang."""

import linecache
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from hpclab.gangs import wire
from hpclab.gangs.rank import BEAT_SECONDS

LOOK_SECONDS = 1.0
"""How often to look whether a rank gets on."""
IDLE = 0.02
"""Share of a CPU below which a rank is idle; its heartbeat takes less."""
ANSWER_SECONDS = 3.0
"""How long ranks may take to show where they are."""
# The innermost call of a rank that waits for others: torch's own Python, or a line that waits for a handle.
_WAITS = re.compile(r"torch/(distributed/|autograd/graph.py|nn/parallel/distributed.py)|\.wait\(")
_FRAME = re.compile(r'\s*File "(?P<file>.+)", line (?P<line>\d+) in ')


class HangError(RuntimeError):
    """Ranks waited for each other for ever."""


class RankProgress:
    """Whether a rank gets on, seen from its host: it prints or reports, or its Python is alive and uses a CPU."""

    def __init__(self, pid: int):
        self.pid = pid
        self.cpu = self.children_cpu = 0.0
        self.looked = self.renewed = time.monotonic()
        self.alive = math.inf  # until its first beat it starts: a process that still imports torch can't beat

    def beat(self) -> None:
        """Its Python runs."""
        self.alive = time.monotonic()

    def renew(self) -> None:
        """It has printed or reported something."""
        self.alive = self.renewed = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to look again; looks at the CPU time, which also counts as getting on."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return False
        with suppress(psutil.Error):
            if self._works(IDLE * (now - self.looked)) and now - self.alive < 3 * BEAT_SECONDS:
                self.renewed = now
        self.looked = now
        return True

    def stuck_s(self) -> float:
        """Seconds for which it has not got on."""
        return time.monotonic() - self.renewed

    def _works(self, idle: float) -> bool:
        """Whether it, or else what it started, has used more CPU seconds than this: it may wait for its data."""
        process = psutil.Process(self.pid)
        cpu, before = sum(process.cpu_times()[:4]), self.cpu  # user and system, its own and of children that have ended
        self.cpu = cpu
        if cpu - before > idle:
            return True
        children, before = 0.0, self.children_cpu
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                children += sum(child.cpu_times()[:2])
        self.children_cpu = children
        return children - before > idle


class GangProgress:
    """Whether a gang gets on, seen from the kernel.

    Parameters
    ----------
    limit : float or None
        Seconds for which no rank may get on; None sets no limit.
    ask : callable
        Has the ranks show where they are.
    """

    def __init__(self, limit: float | None, ask: Callable[[], None]):
        self.limit = limit
        self.ask = ask
        self.stuck: dict[int, float] = {}
        """When each rank last made progress, as far as its worker reported."""
        self.stacks: dict[int, str] = {}
        self.asked = float("-inf")

    def hear(self, rank: int, news: wire.Stuck | wire.Stack) -> None:
        """Take in what a worker says of its rank."""
        if isinstance(news, wire.Stuck):
            self.stuck[rank] = time.monotonic() - news.seconds
        else:
            self.stacks[rank] = news.text

    def hang(self, left: set[int]) -> str | None:
        """Where each remaining rank is, if none has made progress for too long and one waits for others.

        A rank of which nothing was heard yet still starts. One that shows no stack in time is judged without it.
        """
        now = time.monotonic()
        stuck = min((now - self.stuck.get(rank, now) for rank in left), default=0.0)
        if self.limit is None or stuck < self.limit:
            return None
        if now - self.asked > max(self.limit, 2 * ANSWER_SECONDS):  # those who waited for nobody are asked again
            self.asked, self.stacks = now, {}
            self.ask()
        if not (left <= self.stacks.keys() or now - self.asked > ANSWER_SECONDS):
            return None
        shown = {rank: with_source(self.stacks.get(rank, "(no answer)")) for rank in sorted(left)}
        if not any(map(waits, shown.values())):
            return None
        return (
            f"made progress for {stuck:.0f} s, longer than hang_after (={self.limit}), and some wait for others."
            " Where each one is, innermost call first:\n"
            + "\n".join(f"rank {rank}:\n{stack}" for rank, stack in shown.items())
        )


def waits(stack: str) -> bool:
    """Whether the innermost call of a stack, with its line of code, is one that waits for other ranks."""
    first, _, rest = stack.partition("\n")
    return bool(_WAITS.search(first + rest.partition("\n")[0] * rest.startswith("    ")))


def with_source(stack: str) -> str:
    """A stack with the lines of code, as far as they are here: cells of the notebook are."""
    lines = []
    for line in stack.strip("\n").splitlines():
        lines.append(line)
        if frame := _FRAME.match(line):
            source = linecache.getline(frame["file"], int(frame["line"])).strip()
            lines += [f"    {source}"] * bool(source)
    return "\n".join(lines)

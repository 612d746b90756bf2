"""Clusters that come back to the size that was asked for: Dask's own never replace a worker that is lost for good."""

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import dask
import distributed
import psutil
from distributed import Nanny, Status

from hpclab._dask import HookedCluster
from hpclab.cluster.pages import Pages

if TYPE_CHECKING:
    from hpclab.gangs.host import KernelZygote

LOOK_SECONDS = 0.5
"""How often to look whether workers are missing."""
LOST_SECONDS = 15.0
"""How long a worker may be away, as one that is restarted is, before another takes its place."""
START_SECONDS = 300.0
"""How long the start of a worker may take before it is killed for another try."""
BACKOFF_SECONDS = (0.25, 60.0)
"""How much longer to wait each time before a worker that failed to start is started again, and how long at most.

Twenty workers that are killed while they start cost a few seconds; one that can't start takes ever less of the machine.
"""
TRIES = 6
"""Starts in a row, all but the last of which failed, that are worth a warning."""
_ENDED = (Status.closing, Status.closing_gracefully, Status.closed, Status.failed)

logger = logging.getLogger("hpclab")


class Tended(HookedCluster):
    """A cluster that looks after its workers, from its start until it closes.

    Attributes
    ----------
    pause : float
        Seconds from one look to the next.
    """

    pause = LOOK_SECONDS

    async def opened(self) -> None:
        """Look after the workers from now on."""
        self._ending = asyncio.Event()
        self._tending = asyncio.create_task(self._tend())

    async def _tend(self) -> None:
        while not self._ending.is_set():
            try:
                await self._look()
            except Exception as error:  # whatever it is, the next look may do without
                logger.warning("lost workers can't be replaced: %r", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self.pause)

    async def _look(self) -> None:
        """Replace the workers that are lost."""
        raise NotImplementedError

    def _differs(self) -> bool:
        """Whether other workers are there than were asked for."""
        return self.worker_spec.keys() != self.workers.keys() and not self._ending.is_set()

    async def closing(self) -> None:
        """Look no more: what closes now is not lost."""
        if hasattr(self, "_tending"):
            self._ending.set()
            await self._tending


class PatientNanny(Nanny):
    """Dask's nanny, but one that waits a while before it starts a worker again that hasn't lived to join the cluster.

    Attributes
    ----------
    tries : int
        Starts in a row; 0 once a worker has joined.
    starting : int
        How many of its calls start a worker just now.
    """

    tries = 0
    starting = 0

    async def instantiate(self) -> Status:
        """Start the worker, or try again."""
        self.tries += 1
        self.starting += 1
        late = asyncio.get_running_loop().call_later(START_SECONDS, self._kill)
        try:
            await asyncio.sleep(backoff(self.tries))
            if self.status in _ENDED:
                return self.status
            status = await super().instantiate()
            if status == Status.running:
                self.tries = 0
            return status
        finally:
            late.cancel()
            self.starting -= 1

    def _kill(self) -> None:
        """Kill a worker that doesn't get up; what follows is as after any other death."""
        if self.pid:
            with suppress(psutil.Error):
                psutil.Process(self.pid).kill()


def _worth_showing(record: logging.LogRecord) -> bool:
    """Whether what a nanny logs is news: that it does its work, starts a worker again or ends one, is none."""
    return not str(record.msg).startswith(("Restarting worker", "Worker process still alive after"))


class LocalCluster(Tended, distributed.LocalCluster):
    """Workers on this machine, the number asked for last, whatever happens to them.

    Most are started again by their nannies. But a nanny that meets an error closes, and so does one whose worker has
    quarrelled with the scheduler; Dask's cluster then lacks that worker for ever.
    """

    def __init__(self, zygote: "KernelZygote | None" = None, **options: Any):
        self._zygote = zygote
        self._up = False
        self._left: dict[str | int, float] = {}
        """Since when workers are away whose nannies don't start them."""
        self._tries = 1
        """Times in a row that workers were to be opened."""
        self._again = 0.0
        """When next, at the earliest."""
        self._why = ""
        """What the last error was."""
        self._warned = False
        logging.getLogger("distributed.nanny").addFilter(_worth_showing)
        env, pages = zygote.env if zygote else {}, Pages()
        with dask.config.set(pages.config):
            super().__init__(worker_class=PatientNanny, env=env, scheduler_kwargs=pages.options, **options)
        pages.serve(self.scheduler)
        self._up = True

    async def _close(self) -> None:
        try:
            await super()._close()
        finally:
            if self._zygote is not None:
                self._zygote.close()

    async def _look(self) -> None:
        if not self._up:  # an error of the first start is its caller's
            return
        present = {worker.name for worker in self.scheduler.workers.values()}
        for name, nanny in list(self.workers.items()):
            if name in present or nanny.starting or name not in self.worker_spec:
                self._left.pop(name, None)
            elif self._lost(name, nanny):
                await self._bury(name, nanny)
        if self._differs() and time.monotonic() > self._again:
            await self.correct_soon()
        self._tell()

    def _lost(self, name: str | int, nanny: Nanny) -> bool:
        """Whether a nanny whose worker is away won't bring it back."""
        away = time.monotonic() - self._left.setdefault(name, time.monotonic())
        # One that has closed may be one that is just scaled away: Dask's Adaptive retires a worker, then unlists it.
        return away > (LOOK_SECONDS if nanny.status in (Status.closed, Status.failed) else LOST_SECONDS)

    async def _bury(self, name: str | int, nanny: Nanny) -> None:
        """Make room for another of this name, unless it was scaled away meanwhile."""
        if self.workers.get(name) is nanny:
            del self.workers[name], self._left[name]
        if nanny.status not in (Status.closed, Status.failed):
            await nanny.close()

    async def correct(self) -> None:
        """Open the workers that are missing; if that fails, wait longer each time before the next try."""
        try:
            await super().correct()
            self._tries, self._why = 1, ""
        except Exception as error:  # most often of a worker that didn't start, whose nanny has closed
            if not self._up:
                raise
            self._tries += 1  # by the next look; `_tell` has its words
            self._again = time.monotonic() + backoff(self._tries)
            self._why = f" ({root(error)})"

    def _tell(self) -> None:
        """Say once that workers don't start, until they do."""
        tries = max([self._tries, *(nanny.tries for nanny in self.workers.values())])
        if tries >= TRIES and not self._warned:
            logger.warning(
                "a worker on this machine has failed to start %d times in a row%s; its output may say why. hpclab"
                " keeps trying, less and less often.",
                *(tries - 1, self._why),
            )
        self._warned = tries >= TRIES


def backoff(tries: int) -> float:
    """Seconds to wait before the last of this many starts in a row, all others of which failed.

    >>> [backoff(tries) for tries in (1, 2, 3, 1000)]
    [0.0, 0.25, 0.5, 60.0]
    """
    step, most = BACKOFF_SECONDS
    return min(step * (tries - 1), most)


def root(error: BaseException) -> BaseException:
    """What an error came of."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

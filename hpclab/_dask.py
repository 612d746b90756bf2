"""Private parts of Dask on which hpclab relies: no other file names one.

tests/test_dask_private.py says which of them a new release has renamed.
"""

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distributed import SpecCluster
from distributed.deploy import Cluster

if TYPE_CHECKING:
    from distributed import Scheduler

# --- clusters: what SpecCluster does when it opens, closes, and finds its workers to be others than it should have ---


class HookedCluster(SpecCluster):
    """A `distributed.SpecCluster` whose workers are looked after by a subclass, and left alone by itself."""

    scheduler: Any
    workers: dict[Any, Any]

    async def opened(self) -> None:
        """Run once the cluster is up; a subclass has more to do."""

    async def closing(self) -> None:
        """Run before the cluster closes, also one that isn't up; a subclass has more to do."""

    async def correct(self) -> None:
        """Open the workers that are missing, and close those that are too many; raises what one that can't start does.

        SpecCluster calls it for each `scale`, and `correct_soon` for whoever asks; a subclass may do more.
        """
        await super()._correct_state_internal()

    async def correct_soon(self) -> None:
        """Have `correct` run: once, whoever else asks meanwhile."""
        await self._correct_state()

    async def _start(self) -> None:
        await super()._start()
        await self.opened()

    async def _close(self) -> None:
        try:
            await self.closing()
        finally:
            await super()._close()

    async def _correct_state_internal(self) -> None:
        await self.correct()

    def _update_worker_status(self, op: str, msg: Any) -> None:
        # After 15 s without a worker, SpecCluster would close what keeps it (a nanny, or its new job that still waits
        # in the queue), and start nothing in its place; the subclass knows better.
        Cluster._update_worker_status(self, op, msg)


# --- gangs: topics of the scheduler ---


def keep_newest_event(scheduler: "Scheduler", topic: str) -> None:
    """Have a scheduler keep one event of a topic, for which there is no public way; by itself it keeps a thousand."""
    with suppress(AttributeError):  # of another Dask: then they take memory
        scheduler._broker._topics[topic].events = deque(maxlen=1)


def forget_topic(scheduler: "Scheduler", topic: str, seconds: float) -> None:
    """Drop a topic and its events after a while."""
    with suppress(AttributeError):  # as above
        scheduler.loop.call_later(seconds, scheduler._broker._topics.pop, topic, None)

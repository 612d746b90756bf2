"""Kernel: one attempt of a run, from the start of its ranks until the last has ended; and whom to blame."""

import logging
import math
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future
from distributed.comm import get_address_host

from hpclab.gangs import wire
from hpclab.gangs.errors import note
from hpclab.gangs.progress import GangProgress, HangError
from hpclab.gangs.scheduler import Ledger, aside, consult, send
from hpclab.gangs.worker import supervise

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""How long a gang in which a rank lost its peer may take to tell which rank was the cause."""
KILL_SECONDS = 5.0
"""How long workers may take to end their ranks before they are given up as lost."""
DRAIN_SECONDS = 5.0
"""How long rows that were sent may take to come in after the last rank has ended."""
GRACE_SECONDS = 5.0
"""How long ranks may take to agree on a step after a stop."""
SAVE_SECONDS = 60.0
"""How long ranks that have agreed may take to reach that step, save what they have, and return."""
LOST = ("RankDied", "WorkerLost")
"""Failures of the machine, not of the function: what a new attempt may help."""


@dataclass
class RunSettings:
    """How the ranks of a run are kept; see `launch`."""

    init: bool = True
    memory: int | None = None
    hang_after: float | None = 60.0
    wait: bool = False
    """Whether to wait for room, first and after a loss, for as long as it takes."""
    max_restarts: int = 0
    sizes: tuple[int, ...] = ()
    """Numbers of ranks to go on with, largest first, when workers don't come back."""
    resume: str | None = None
    """Folder of an earlier run, whose newest checkpoint is this one's start."""


class RankError(RuntimeError):
    """A rank that ended without a Python exception of its own, or with one that can't be brought here."""


class Attempt:
    """A gang at work. All but the fetching of outcomes happens in the thread of its run.

    Attributes
    ----------
    places : list of wire.RankPlace
        By rank.
    number : int
        0 for the first attempt of a run.
    outcomes : dict of int to wire.RankOutcome
        Of the ranks that have ended, or were given up.
    hang : HangError or None
    calls : dict of int to int
        How often each rank has asked `should_stop`, once it was told to stop.
    reported : bool
        Whether any rank has reported a row.
    """

    def __init__(self, client: Client, places: list[wire.RankPlace], hang_after: float | None):
        self.client = client
        self.places = places
        self.run, self.number = places[0].run, places[0].attempt
        self.outcomes: dict[int, wire.RankOutcome] = {}
        self.calls: dict[int, int] = {}
        self.hang: HangError | None = None
        self.reported = False
        self.deadline = math.inf
        self._futures: list[Future] = []
        self._batches = [0] * len(places)
        self._stopping = self._agreed = self._ending = False
        self._expires = ""
        """Whose job ends, and when, once that is near."""
        self._progress = GangProgress(hang_after, lambda: self.order(wire.ShowStack()))

    def start(self, payload: bytes, ended: Callable[[wire.RankOutcome], None]) -> None:
        """Have the workers start the ranks; what becomes of each is reported in a thread of its own."""
        for place in self.places:
            future = self.client.submit(
                supervise,
                place,
                payload,
                key=f"{self.run}-rank-{place.rank}-attempt-{self.number}",
                workers=[place.worker],
                allow_other_workers=False,  # else an idle worker may steal it; if this one goes, the ledger says so
                pure=False,
                retries=0,
            )
            self._futures.append(future)
            # Brought here in a thread of its own: its worker may die meanwhile, and then it never comes.
            future.add_done_callback(lambda future, place=place: aside(lambda: ended(_outcome(future, place))))

    def left(self) -> set[int]:
        """Ranks that have not ended."""
        return {place.rank for place in self.places} - self.outcomes.keys()

    def complete(self) -> bool:
        """Whether every rank has ended and all batches that it sent are here, or nothing more can come."""
        if self.left():
            return False
        whole = all(self._batches[rank] >= outcome.batches for rank, outcome in self.outcomes.items())
        self.deadline = min(self.deadline, time.monotonic() + DRAIN_SECONDS)
        return whole or time.monotonic() > self.deadline

    def hear(self, rank: int, batch: list[wire.Message]) -> None:
        """Take in what comes from a rank, or its worker says of it, beside rows and prints."""
        self._batches[rank] += 1
        for message in batch:
            match message:
                case wire.Row():
                    self.reported = True
                case wire.Calls():
                    self.calls[rank] = message.calls
                    self._agree()
                case wire.Expires():
                    self.expire(rank, message.at)
                case wire.Stuck() | wire.Stack():
                    self._progress.hear(rank, message)

    def end(self, outcome: wire.RankOutcome) -> None:
        """Take in how a rank ended; after a failure end the others: at once, or when its cause had time to show."""
        if outcome.rank in self.outcomes:
            return
        self.outcomes[outcome.rank] = outcome
        if outcome.failure is not None and outcome.failure.consequence:
            self.deadline = min(self.deadline, time.monotonic() + SETTLE_SECONDS)
        elif outcome.failure is not None and not self._ending:
            self.end_all()
        self._agree()

    def lose(self, workers: set[str]) -> None:
        """Give up the ranks whose workers are gone."""
        for place in self.places:
            if place.worker in workers:
                self.end(_lost(place, "was lost with its worker"))

    def look(self) -> None:
        """End a gang that hangs, and note where each rank is; end one whose time is over."""
        if not self._ending and (why := self._progress.hang(self.left())):
            self.hang = HangError(f"no rank of run {self.run} {why}")
            self.end_all()
        if time.monotonic() > self.deadline:
            self.end_all()

    def stop(self) -> None:
        """Have ranks that ask `should_stop` agree on a step to end at; the others are interrupted."""
        if not self._stopping:
            self.order(wire.Stop())
            self.deadline = min(self.deadline, time.monotonic() + GRACE_SECONDS)
        self._stopping = True

    def expire(self, rank: int, when: float) -> None:
        """Have ranks that ask `should_stop` end before a rank's job does, and no other attempt begin under its worker.

        Other ranks may still get done in time.
        """
        worker = self.places[rank].worker
        if not self._expires and not self._stopping:
            at = time.strftime("%H:%M:%S", time.localtime(when))
            self._expires = f"the walltime of rank {rank}'s worker {worker} ends at {at}"
            self.order(wire.Expire())
        with suppress(Exception):  # the scheduler has gone, which is seen elsewhere
            consult(self.client, Ledger.shun, [worker], True)

    def end_all(self) -> None:
        """Have the workers end the ranks that are left; asked again after a while, let go of those who didn't."""
        if not self.left():
            return
        if self._ending:
            self.let_go()
        else:
            self.order(wire.End())
        self._ending = True
        self.deadline = time.monotonic() + KILL_SECONDS

    def let_go(self) -> None:
        """Cancel the tasks: a worker that is still there then ends its ranks."""
        with suppress(Exception):
            self.client.cancel(self._futures, force=True)
            if self._ending and self.client.status == "running":
                left = self.left()
                consult(self.client, Ledger.shun, [place.worker for place in self.places if place.rank in left], False)
        for place in self.places:
            why = "did not end when it was told to, so it was abandoned"
            self.outcomes.setdefault(place.rank, _lost(place, why, "Unreachable", consequence=True))

    def order(self, order: wire.Order, rank: int | None = None) -> None:
        """Give an order to one rank, or all that are left, without waiting for the scheduler, which may have gone."""
        left = self.left()
        workers = [place.worker for place in self.places if place.rank in left and rank in (None, place.rank)]
        if workers:  # with a client that closes, its futures end, and the workers end their ranks
            aside(send, self.client, workers, self.run, order, rank, self.number)

    def close(self) -> None:
        """Let go of all that is left."""
        if self.left():
            self.let_go()
        if lost := [future for future in self._futures if not future.done()]:
            with suppress(Exception):  # else their tasks would stay with the scheduler
                self.client.cancel(lost, force=True)
        self._futures.clear()

    def failed(self) -> bool:
        """Whether a rank failed, for whatever reason."""
        return self.hang is not None or bool(self._failures())

    def at_fault(self) -> bool:
        """Whether a rank failed by itself, not in consequence of something else."""
        return self.hang is not None or not all(failure.consequence for failure, _ in self._failures())

    def expired(self) -> str:
        """Why its ranks ended early, all at one step, if they did so before a job's end; or nothing."""
        return self._expires if self._agreed and not self._stopping and not self.failed() else ""

    def lost(self) -> bool:
        """Whether it ended early since something beneath it went away: a rank's process, a worker, a host, a job."""
        causes = self._failures()[:1] if self.hang is None else []
        return bool(self.expired()) or any(failure.type in LOST for failure, _ in causes)

    def failed_at(self) -> float:
        """When it failed, in seconds since the epoch."""
        return next((failure.time for failure, _ in self._failures()), time.time())

    def blame(self) -> BaseException:
        """The error of the rank that failed first; what followed from it counts only if nothing else is known."""
        failures = self._failures()
        if why := self.expired():
            return RankError(why)
        if self.hang is not None or not failures:
            return self.hang or RankError(f"run {self.run} broke off.")
        (cause, culprit), *others = failures
        error = _error(culprit, cause, len(self.places))
        for failure, outcome in sorted(others, key=lambda pair: pair[1].rank):
            if failure.consequence and failure.type != "Stopped":
                words = " ".join(failure.message.split())[:300]
                note(error, f"As a consequence, rank {outcome.rank}: {failure.type}: {words}")
        returned = [rank for rank, outcome in self.outcomes.items() if not outcome.failure]
        if returned and cause.consequence and cause.traceback:
            note(error, f"Rank {min(returned)} returned without an error; a collective waits for all ranks.")
        return error

    def values(self) -> list[Any]:
        """What the ranks returned, by rank."""
        outcomes = sorted(self.outcomes.items())
        return [unpickle(outcome.value, f"the return value of rank {rank}") for rank, outcome in outcomes]

    def _failures(self) -> list[tuple[wire.Failed, wire.RankOutcome]]:
        """All failures, each with its outcome; the one that is to blame comes first."""
        failures = [(outcome.failure, outcome) for outcome in self.outcomes.values() if outcome.failure]
        return sorted(failures, key=lambda pair: (pair[0].consequence, pair[0].time, pair[1].rank))

    def _agree(self) -> None:
        """Once all remaining ranks have reported how often they asked, have them end at the call after the furthest.

        None has got further than that meanwhile, and none waits for one that has ended.
        """
        left = self.left()
        if (self._stopping or self._expires) and left and left <= self.calls.keys():
            self._agreed = True
            self.order(wire.StopAt(calls=max(self.calls.values()) + 1))
            self.deadline = time.monotonic() + SAVE_SECONDS


def _outcome(future: Future, place: wire.RankPlace) -> wire.RankOutcome:
    """The outcome that a task brought back, or one that says why there is none."""
    try:
        if future.status != "cancelled":
            return future.result()
        cause = "its task was cancelled"
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
    return _lost(place, f"was lost with its worker ({cause})", consequence=future.status == "cancelled")


def _lost(place: wire.RankPlace, why: str, kind: str = "WorkerLost", consequence: bool = False) -> wire.RankOutcome:
    """The outcome of a rank that can't bring one."""
    failure = wire.Failed(type=kind, message=why, consequence=consequence)
    return wire.RankOutcome(place.rank, get_address_host(place.worker), failure=failure)


def unpickle(body: bytes, what: str) -> Any:
    """Bring a value of a rank here, or raise a RankError that calls it by a name."""
    try:
        return pickle.loads(body)
    except (Exception, SystemExit) as error:  # its own code may do anything, such as exit
        raise RankError(f"{what} can't be unpickled here: {error!r}") from error


def _error(outcome: wire.RankOutcome, failure: wire.Failed, ranks: int) -> BaseException:
    who = f"rank {outcome.rank} of {ranks} on {outcome.host}"
    if not failure.traceback:
        return RankError(f"{who} {failure.message}.")
    origin = f"\nRaised first by {who}:\n{failure.traceback}"
    try:
        error = pickle.loads(failure.body)
        error.add_note(origin)
    except (Exception, SystemExit):  # it can't be brought here, or takes no note
        error = None
    if not isinstance(error, Exception):  # SystemExit and its like would end the notebook's kernel
        error = RankError(f"{failure.type}: {failure.message}")
        error.add_note(origin)
    return error

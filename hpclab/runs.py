"""A run: a gang of ranks at work, seen from the notebook, and what it leaves on disk."""

import logging
import math
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from distributed import Client, Future
from tqdm import tqdm

from hpclab import machine
from hpclab._ledger import Gang, admit, consult, release, remind, topic
from hpclab._progress import GangProgress, HangError
from hpclab._supervisor import Outcome, Place, failure, give, supervise
from hpclab.rows import line, read

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
REMIND_SECONDS = 2.0
"""How often a gang that waits has the ledger look whether workers have come."""
LOST_SECONDS = 2.0
"""How long the scheduler may be out of reach; one that comes back knows nothing of the gang."""


@dataclass
class Settings:
    """How the ranks of a run are kept; see `launch`."""

    init: bool = True
    memory: int | None = None
    hang_after: float | None = 60.0


class RankError(RuntimeError):
    """A rank that ended without a Python exception of its own, or with one that can't be brought here."""


_alive: "dict[str, Run]" = {}
"""Runs that have not ended, by name."""


def stop_all(client: Client) -> None:
    """Stop every run of a client that is still going, and wait for them."""
    mine = [run for run in list(_alive.values()) if run._client is client]
    for run in mine:
        run._inbox.put(("stop", False))
    for run in mine:
        run.wait()


class Record:
    """A run as its folder tells it: what is there also when the kernel has gone.

    Attributes
    ----------
    name : str
        Unique name of this run.
    folder : Path
        Holds ``rows.jsonl``, all rows, one a line, written as they come; and ``rank-<n>.log``, what each rank printed.
    rows : list of dict
        What the ranks reported so far, as `hpclab.rows` tells it; the first, of kind "run", tells the machine.
    ranks : int
        Number of ranks.
    status : str
        "waiting" (for room; ``place`` is its number in the queue), "running", "finished", "failed" or "stopped";
        "interrupted" if its kernel went before it.
    """

    def __init__(self, name: str, folder: Path, ranks: int, rows: list[dict], status: str):
        self.name = name
        self.folder = folder
        self.ranks = ranks
        self.rows = rows
        self.status = status
        self.place = 0
        self.quiet = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.state()}, {self.ranks} ranks, {len(self.rows)} rows>"

    def state(self) -> str:
        """The status, with the place in the queue of a run that waits."""
        return f"waiting, {self.place} in the queue" if self.status == "waiting" else self.status

    def _ipython_display_(self) -> None:
        from hpclab.views import show

        self.quiet = True  # the view shows what is printed
        show(self)

    def logs(self, rank: int | None = None) -> str:
        """Return what a rank printed so far; of all ranks, one after the other, if none is named."""
        if rank is None:
            return "".join(f"[rank {number}]\n{self.logs(number)}" for number in range(self.ranks))
        self._check_rank(rank)
        file = self.folder / f"rank-{rank}.log"
        if not file.exists():
            return ""
        with open(file, encoding="utf-8", newline="") as text:
            return text.read()

    def tail(self, rank: int, lines: int, size: int = 4096) -> list[str]:
        """Newest lines that a rank printed, of the last `size` bytes; of a progress bar its last state."""
        file = self.folder / f"rank-{rank}.log"
        if not file.exists():
            return []
        with open(file, "rb") as text:
            text.seek(max(0, file.stat().st_size - size))
            found = text.read().decode("utf-8", "replace").rstrip("\r\n").split("\n")
        return [one.rstrip("\r").rsplit("\r", 1)[-1] for one in found[-lines:]]

    def _check_rank(self, rank: int) -> None:
        if rank not in range(self.ranks):
            raise ValueError(f"rank (={rank!r}) must be from 0 to {self.ranks - 1}.")


def open_run(folder: str | os.PathLike) -> Record:
    """Show a run again from its folder: a finished one, or one whose kernel has gone.

    Raises
    ------
    FileNotFoundError
        If the folder holds no rows of a run.
    """
    path = Path(folder).absolute()
    found = read(path / "rows.jsonl") if (path / "rows.jsonl").is_file() else []
    if not found or found[0].get("kind") != "run":
        raise FileNotFoundError(
            f"folder (={str(folder)!r}) holds no rows.jsonl of a run; name one such as results/<run>."
        )
    status = found[-1]["status"] if found[-1]["kind"] == "end" else "interrupted"
    return Record(found[0]["run"], path, found[0]["ranks"], found, status)


class Run(Record):
    """A gang at work, or what it left; see `Record` for its attributes."""

    def __init__(self, client: Client, gang: Gang, settings: Settings, payload: bytes, folder: Path, wait: bool):
        super().__init__(gang.run, folder.absolute(), gang.ranks, [], "waiting")
        self._client = client
        self._gang = gang
        self._settings = settings
        self._payload = payload
        self._places: list[Place] = []
        self._futures: list[Future] = []
        self._outcomes: dict[int, Outcome] = {}
        self._batches = [0] * gang.ranks
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.said: queue.SimpleQueue = queue.SimpleQueue()
        """What ranks of an interactive gang say, as `hpclab.gangs` reads it."""
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._stopping = False
        self._calls: dict[int, int] = {}
        self._progress = GangProgress(settings.hang_after, lambda: self._order({"order": "stacks"}))
        self._ending = False
        self._emulated = False
        self._deadline = math.inf
        self._connected = time.monotonic()
        self._cut_off = False
        self._reminded = time.monotonic()
        self._gone: set[str] = set()
        self._broken: Exception | None = None
        self._watchers: list[Callable[[Run, list[dict]], None]] = []
        self._finish: Callable[[list], Any] = list
        client.subscribe_topic(topic(self.name), lambda event: self._inbox.put(("news", event[1])))
        try:
            answer = consult(client, admit, gang, wait)
            if refusal := answer.get("wrong") or answer.get("busy"):
                raise ValueError(refusal) if "wrong" in answer else RuntimeError(refusal)
            occupy(self.folder)
            (self.folder / "rows.jsonl").touch(exist_ok=False)  # from here on the folder is taken
        except BaseException:
            self._leave()
            raise
        self._logs = [Log(self.folder / f"rank-{rank}.log", rank) for rank in range(gang.ranks)]
        self._inbox.put(("news", answer))
        _alive[self.name] = self
        threading.Thread(target=self._drive, name=self.name, daemon=True).start()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, and return what the ranks returned: a list by rank.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait. Default: no limit.

        Raises
        ------
        Exception
            The error of the rank that failed first, with a note that tells the rank, its host and its traceback there.
        RankError
            If that rank died without an exception, if the run was stopped, or if the error can't be brought here.
        OSError
            If the rows or logs could not be written; the ranks were ended.
        TimeoutError
            If the run is still going after the timeout; it goes on.

        Notes
        -----
        Interrupted (Ctrl-C) while it waits, it stops the run and raises KeyboardInterrupt; interrupted again, it kills
        the ranks. What a stopped run's ranks have returned all the same, a second call of ``result()`` returns.
        """
        try:
            if not self.wait(timeout):
                raise TimeoutError(f"run {self.name} is still {self.status} after timeout (={timeout}) seconds.")
        except KeyboardInterrupt:
            try:
                self.stop()
            except KeyboardInterrupt:
                self.stop(now=True)
            raise
        if self._failed():
            raise self._blame()
        return self._finish([_value(self._outcomes[rank]) for rank in range(self.ranks)])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (default: no limit) for the end; return whether it has ended, however."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        # Short waits, since Windows takes no Ctrl-C while a lock is waited for.
        while (left := deadline - time.monotonic()) > 0:
            if self._ended.wait(min(left, 0.2)):
                return True
        return self._ended.is_set()

    def stop(self, now: bool = False) -> None:
        """End all ranks, and wait until they have.

        Parameters
        ----------
        now : bool, default False
            Kill them. Else ranks that ask `should_stop` end at one agreed step, and have a minute to get there and
            return; the others are interrupted, as by Ctrl-C, and have a second. What is left then is killed.
        """
        self._inbox.put(("stop", now))
        self.wait()

    def kill(self, rank: int) -> None:
        """Kill one rank, as a failing machine would; what follows is seen in the run."""
        self._check_rank(rank)
        self._inbox.put(("kill", rank))

    def then(self, finish: Callable[[list], Any]) -> "Run":
        """Have ``result()`` return ``finish(values)`` in place of the list of values; returns this run."""
        self._finish = finish
        return self

    def watch(self, watcher: "Callable[[Run, list[dict]], None]") -> None:
        """Have ``watcher(run, rows)`` called with all rows, as they come, and with none when the run has ended.

        It is called in a thread of the run, and must neither block nor wait for the run. One that raises is logged, and
        not called again.
        """
        with self._lock:
            self._watchers.append(watcher)
            watcher(self, self.rows.copy())
            if self._ended.is_set():
                watcher(self, [])

    def _drive(self) -> None:
        """Take in what happens until every rank has ended; the thread of this run."""
        try:
            with open(self.folder / "rows.jsonl", "w", encoding="utf-8") as file:
                while not self._complete():
                    try:
                        kind, content = self._inbox.get(timeout=0.1)
                    except queue.Empty:
                        kind, content = "quiet", None
                    self._take(kind, content, file)
                self._conclude()
                self._take_rows([self._end()], file)
        except Exception as error:  # such as a full disk
            log.exception("run %s breaks off", self.name)
            self._broken = error
        finally:
            self._close()

    def _complete(self) -> bool:
        """Whether every rank has ended and all batches that it sent are here, or nothing more can come."""
        if self._client.status == "running":
            self._connected = time.monotonic()
        self._cut_off = time.monotonic() - self._connected > LOST_SECONDS
        if self._cut_off or (self._stopping and not self._places):
            return True
        if not self._places or len(self._outcomes) < len(self._places):
            return False
        whole = all(self._batches[rank] >= outcome.batches for rank, outcome in self._outcomes.items())
        self._deadline = min(self._deadline, time.monotonic() + DRAIN_SECONDS)
        return whole or time.monotonic() > self._deadline

    def _take(self, kind: str, content: Any, file: TextIO) -> None:
        if kind == "news":
            self._take_news(content, file)
        elif kind == "done" and content.rank not in self._outcomes:
            self._outcomes[content.rank] = content
            self._weigh(content)
            self._agree()
        elif kind == "stop":
            self._stop(now=content)
        elif kind == "kill":
            self._order({"order": "kill"}, content)
        self._unknot()
        if time.monotonic() > self._deadline:
            self._end_all()
        if self.status == "waiting" and time.monotonic() - self._reminded > REMIND_SECONDS:
            self._reminded = time.monotonic()
            with suppress(Exception):  # tried again soon, and given up when the client is cut off
                consult(self._client, remind)

    def _stop(self, now: bool) -> None:
        if now:
            self._end_all()
        elif not self._stopping:
            self._order({"order": "stop"})
            self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        self._stopping = True

    def _agree(self) -> None:
        """Once all ranks that are left have told how often they asked, have them end at the call after the furthest.

        None has got further than that meanwhile, and none waits for one that has ended.
        """
        left = {place.rank for place in self._places} - self._outcomes.keys()
        if self._stopping and left and left <= self._calls.keys():
            self._order({"order": "stop_at", "calls": max(self._calls.values()) + 1})
            self._deadline = time.monotonic() + SAVE_SECONDS

    def _unknot(self) -> None:
        """End a gang that hangs, and keep where each rank stands."""
        left = {place.rank for place in self._places} - self._outcomes.keys()
        if not self._ending and (found := self._progress.hang(left)):
            self._broken = HangError(f"no rank of run {self.name} {found}")
            self._end_all()

    def _take_news(self, news: dict, file: TextIO) -> None:
        """Take in what a worker or the scheduler's ledger says on the run's topic."""
        if "rank" in news:
            self._batches[news["rank"]] += 1
            self._logs[news["rank"]].take(news["text"], shown=not self.quiet)
            self._emulated |= news.get("emulated", False)
            source = "emulated" if self._emulated else "measured"
            self._take_rows([row | {"source": source} for row in news["rows"]], file)
            self._take_state(news)
            if "said" in news or "stack" in news:
                self.said.put(news)  # last: what a cell reported is here before its answer
        elif "workers" in news and not self._places:
            self._emulated = news["emulated"]
            self._start(news, file)
        elif "crowded" in news:
            self._emulated = True
        elif "place" in news:
            self.place = news["place"]
        elif "lost" in news:
            self._gone.add(news["lost"])
            self._lose()

    def _take_state(self, news: dict) -> None:
        """Take in what a supervisor says of its rank beside rows and prints."""
        rank = news["rank"]
        if "calls" in news:
            self._calls[rank] = news["calls"]
            self._agree()
        self._progress.hear(news)

    def _start(self, seats: dict, file: TextIO) -> None:
        """Have the workers start the ranks, now that the gang is admitted."""
        self._places = _plan(self._gang, self.folder, self._settings, seats)
        self.status = "running"
        self._take_rows([_about(self._gang, self._places[0].launched)], file)
        self._futures = [
            self._client.submit(
                supervise,
                place,
                self._payload,
                key=f"{self.name}-rank-{place.rank}",
                workers=[place.worker],
                allow_other_workers=False,  # else an idle worker may steal it; if this one goes, the ledger says so
                pure=False,
                retries=0,
            )
            for place in self._places
        ]
        for place, future in zip(self._places, self._futures, strict=True):
            future.add_done_callback(lambda future, place=place: self._fetch(future, place))
        self._lose()

    def _lose(self) -> None:
        """Give up the ranks whose workers have gone."""
        for place in self._places:
            if place.worker in self._gone:
                why = f"was lost with its worker {place.worker}"
                self._inbox.put(("done", Outcome(place.rank, place.worker, failure=failure("WorkerLost", why))))

    def _fetch(self, future: Future, place: Place) -> None:
        """Bring an outcome here, in a thread of its own: its worker may die meanwhile, and then it never comes."""

        def fetch() -> None:
            self._inbox.put(("done", _outcome(future, place)))

        threading.Thread(target=fetch, name=f"{self.name}-fetch", daemon=True).start()

    def _take_rows(self, rows: list[dict], file: TextIO) -> None:
        if rows:
            file.writelines(line(row) for row in rows)
            file.flush()
            with self._lock:
                self.rows.extend(rows)
                self._tell(rows)

    def _tell(self, rows: list[dict]) -> None:
        for watcher in self._watchers.copy():
            try:
                watcher(self, rows)
            except Exception:
                log.exception("a watcher of run %s failed, and is not called again", self.name)
                self._watchers.remove(watcher)

    def _weigh(self, outcome: Outcome) -> None:
        """After a failure end the other ranks: at once if it is a cause, else when the cause had time to show."""
        if outcome.failure is None:
            return
        if outcome.failure["consequence"]:
            self._deadline = min(self._deadline, time.monotonic() + SETTLE_SECONDS)
        elif not self._ending:
            self._end_all()

    def _end_all(self) -> None:
        """Have the workers end the ranks that are left; asked again after a while, let go of those who didn't."""
        left = [place for place in self._places if place.rank not in self._outcomes]
        if self._places and not left:
            return
        if left and self._ending:
            self._let_go()
        elif left:
            self._order({"order": "end"})
        self._ending = True
        self._deadline = time.monotonic() + KILL_SECONDS

    def _order(self, order: dict, rank: int | None = None) -> None:
        """Give an order to one rank, or all that are left, without waiting for a worker that may have gone."""
        left = [place for place in self._places if place.rank not in self._outcomes and rank in (None, place.rank)]

        def send() -> None:
            with suppress(Exception):  # with a client that closes, its futures end, and the workers end their ranks
                workers = [place.worker for place in left]
                self._client.run(give, self.name, order, rank, workers=workers, on_error="ignore")

        if left:
            threading.Thread(target=send, name=f"{self.name}-order", daemon=True).start()

    def _let_go(self) -> None:
        """Cancel the tasks: a worker that is still there then ends its ranks."""
        with suppress(Exception):
            self._client.cancel(self._futures, force=True)
        for place in self._places:
            why = "did not end when it was told to, and was given up"
            lost = Outcome(place.rank, place.worker, failure=failure("Unreachable", why, consequence=True))
            self._outcomes.setdefault(place.rank, lost)

    def _close(self) -> None:
        try:
            if len(self._outcomes) < len(self._places):
                self._let_go()
            with suppress(Exception):  # of a rank that was lost the task would stay with the scheduler
                self._client.cancel([future for future in self._futures if not future.done()], force=True)
            self._futures.clear()
            self._leave()
            for rank_log in self._logs:
                rank_log.close()
        finally:
            self._conclude()
            with self._lock:
                self._tell([])
                self._ended.set()
            _alive.pop(self.name, None)

    def _conclude(self) -> None:
        causes = any(o.failure and not o.failure["consequence"] for o in self._outcomes.values())
        if self._stopping and not self._broken and not causes and (self._failed() or self._calls):
            self.status = "stopped"
        else:
            self.status = "failed" if self._failed() else "finished"

    def _end(self) -> dict:
        """The last row of a run."""
        launched = self._places[0].launched if self._places else time.time()
        row = {"kind": "end", "run": self.name, "status": self.status, "time_s": time.time() - launched}
        if self.status == "failed":
            error = self._blame()
            row["error"] = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        return row

    def _failed(self) -> bool:
        failures = any(outcome.failure for outcome in self._outcomes.values())
        return not self._places or self._broken is not None or failures

    def _leave(self) -> None:
        """Give the seats back."""
        if self._client.status != "running":
            return  # the ledger sees it go
        with suppress(Exception):  # a client that has closed: the ledger saw it go
            self._client.unsubscribe_topic(topic(self.name))
            consult(self._client, release, self.name)

    def _blame(self) -> BaseException:
        """The error of the rank that failed first; what followed from it counts only if nothing else is known."""
        if self._broken is not None:
            return self._broken
        if self.status == "stopped":
            return RankError(f"run {self.name} was stopped.")
        failures = [(o.failure["consequence"], o.failure["time"], o.rank) for o in self._outcomes.values() if o.failure]
        if not failures or self._cut_off:
            return RankError(f"run {self.name} broke off: its client is {self._client.status}, not connected.")
        _, _, first = min(failures)
        error = _error(self._outcomes[first], self.ranks)
        for consequence, _, rank in sorted(failures):
            told = self._outcomes[rank].failure
            if told is not None and consequence and rank != first and told["type"] != "Stopped":
                error.add_note(f"In consequence, rank {rank}: {told['type']}: {told['message'][:150]}")
        return error


class Log:
    """What one rank prints: all of it on disk, shown as it comes with the rank's number, and cut short in a flood."""

    LINES = 200
    """Lines that are shown a second."""

    def __init__(self, path: Path, rank: int):
        self.path = path
        self.rank = rank
        self.tail = ""
        self.second, self.shown, self.hidden = 0.0, 0, 0

    def take(self, text: str, shown: bool = True) -> None:
        """Keep what came, and show its whole lines."""
        if text:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        *lines, tail = (self.tail + text).split("\n")
        self.tail = tail.rpartition("\r")[2] or tail  # a progress bar overwrites itself, and may never end its line
        for whole in lines if shown else ():
            self._show(whole)

    def close(self) -> None:
        """Show a last line that has no end, and how many were not shown."""
        if self.tail:
            self._show(self.tail)
        self._own_up()

    def _show(self, line: str) -> None:
        now = time.monotonic()
        if now - self.second > 1:
            self._own_up()
            self.second, self.shown = now, 0
        if self.shown < self.LINES:
            self.shown += 1
            self._write(line.rstrip("\r").rpartition("\r")[2])
        else:
            self.hidden += 1

    def _own_up(self) -> None:
        if self.hidden:
            self._write(f"... {self.hidden:,} more lines are in {self.path}")
            self.hidden = 0

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that has gone shall not end a run
            tqdm.write(f"[rank {self.rank}] {line}")


def _plan(gang: Gang, folder: Path, settings: Settings, seats: dict) -> list[Place]:
    launched = time.time()
    return [
        Place(
            run=gang.run,
            folder=str(folder),
            rank=rank,
            ranks=gang.ranks,
            worker=worker,
            local_rank=rank,
            local_ranks=gang.ranks,
            threads=gang.threads,
            launched=launched,
            store=seats["store"],
            init=settings.init,
            memory=settings.memory or memory,
        )
        for rank, (worker, memory) in enumerate(zip(seats["workers"], seats["memory"], strict=True))
    ]


def _about(gang: Gang, launched: float) -> dict:
    """The first row of a run."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(launched))
    about = {"kind": "run", "run": gang.run, "started": started, "ranks": gang.ranks, "threads": gang.threads}
    return about | machine.describe()


def _outcome(future: Future, place: Place) -> Outcome:
    """The outcome that a task brought back, or one that says why there is none."""
    try:
        if future.status != "cancelled":
            return future.result()
        cause = "its task was cancelled"
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
    lost = failure("WorkerLost", f"was lost with its worker ({cause})", consequence=future.status == "cancelled")
    return Outcome(place.rank, place.worker, failure=lost)


def _value(outcome: Outcome) -> Any:
    try:
        return pickle.loads(outcome.value)
    except Exception as error:
        raise RankError(f"the return value of rank {outcome.rank} can't be unpickled here: {error!r}") from error


def _error(outcome: Outcome, ranks: int) -> BaseException:
    failure = outcome.failure
    assert failure is not None
    who = f"rank {outcome.rank} of {ranks} on {outcome.host}"
    if not failure["traceback"]:
        return RankError(f"{who} {failure['message']}.")
    try:
        error = pickle.loads(outcome.error)
    except Exception:
        error = None
    if not isinstance(error, Exception):  # SystemExit and its like would end the notebook's kernel
        error = RankError(f"{failure['type']}: {failure['message']}")
    error.add_note(f"\nRaised first by {who}:\n{failure['traceback']}")
    return error


def occupy(folder: str | os.PathLike) -> Path:
    """Make a folder for results; an existing one must be empty.

    Raises
    ------
    ValueError
        If the folder holds something, or is a file.
    PermissionError
        If it can't be written.
    """
    path = Path(folder).absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"folder (={str(folder)!r}) already holds something; name a new one, or remove it.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(
            f"folder (={str(folder)!r}) can't be made: {error}; name one that you may write."
        ) from None
    if not os.access(path, os.W_OK):
        raise PermissionError(f"folder (={str(folder)!r}) can't be written; name one that you may write.")
    return path

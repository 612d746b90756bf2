"""Run a function on a gang of ranks: processes that start together, can talk by torch.distributed, and end together."""

import json
import logging
import math
import os
import pickle
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import cloudpickle
from distributed import Client, Future
from tqdm import tqdm

from hpclab import machine
from hpclab._ledger import Gang, admit, consult, release, room, topic
from hpclab._supervisor import Outcome, Place, failure, kill, supervise

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0
"""How long a gang in which a rank lost its peer may take to tell which rank was the cause."""
KILL_SECONDS = 5.0
"""How long workers may take to end their ranks before they are given up as lost."""
DRAIN_SECONDS = 5.0
"""How long rows that were sent may take to come in after the last rank has ended."""


class RankError(RuntimeError):
    """A rank that ended without a Python exception of its own, or with one that can't be brought here."""


def launch(
    client: Client,
    function: Callable,
    *args: Any,
    ranks: int | None = None,
    threads: int = 1,
    oversubscribe: bool = False,
    wait: bool = False,
    folder: str | os.PathLike | None = None,
    name: str | None = None,
) -> "Run":
    """Run a function on every rank of a gang, and return at once.

    Each rank is a process of its own, started and watched by a worker of the cluster. In it, torch.distributed is
    initialised (gloo) and the environment holds RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Parameters
    ----------
    client : distributed.Client
        From `connect`, or any other client of a cluster whose workers can import hpclab.
    function : callable
        Called as ``function(*args)`` on every rank. It may be defined in the notebook.
    *args
        Its arguments; they must be picklable.
    ranks : int, optional
        Number of ranks. Each takes as many CPUs as it has threads, all on one host; the gang gets all or none.
        Default: as many as the cluster takes.
    threads : int, default 1
        Threads that torch may use in each rank.
    oversubscribe : bool, default False
        Start the gang even where there are fewer CPUs than it takes, or other gangs hold them. Its ranks then take
        turns, and its rows say "emulated".
    wait : bool, default False
        If other gangs hold the CPUs, wait in a queue for them; else that is an error.
    folder : path, optional
        Where ``rows.jsonl`` and the ranks' logs go; must be new or empty. Default: ``results/<time>-<name>-<id>``.
    name : str, optional
        Name of the run. Default: the function's.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the cluster never has room for that many ranks, or the folder is occupied.
    RuntimeError
        If it has none now, and `wait` is False.
    TypeError
        If the function or an argument can't be pickled; the message says which.
    PermissionError
        If the folder can't be written.
    """
    ranks = gang_size(client, ranks, threads, oversubscribe)
    payload = _pickle(function, args)
    title = str(name or getattr(function, "__name__", type(function).__name__))
    title = re.sub(r"[^\w.=-]+", "-", title).strip("-")
    run = f"{time.strftime('%Y%m%d-%H%M%S')}-{title}-{uuid.uuid4().hex[:4]}"
    gang = Gang(run, client.id, ranks, threads, oversubscribe)
    return Run(client, gang, payload, Path(folder or Path("results", run)), wait)


def gang_size(client: Client, ranks: int | None, threads: int = 1, oversubscribe: bool = False) -> int:
    """Return the number of ranks of a gang, by default as many as the cluster takes, or raise as `launch` does."""
    if client.status != "running":
        raise ValueError(f"client is {client.status}; open a new one with hpclab.connect().")
    whole_number("threads", threads)
    wish = 1 if ranks is None else whole_number("ranks", ranks)
    found = consult(client, room, Gang("", client.id, wish, threads, oversubscribe))
    if found["wrong"]:
        raise ValueError(found["wrong"])
    return found["ranks"] if ranks is None else ranks


class Run:
    """A gang at work, or what it left.

    Attributes
    ----------
    name : str
        Unique name of this run.
    folder : Path
        Holds ``rows.jsonl``, all rows, one a line, written as they come; and ``rank-<n>.log``, what each rank printed.
    rows : list of dict
        What the ranks reported so far; the first, of kind "run", tells the machine.
    status : str
        "waiting" (for room), "running", "finished", "failed" or "stopped".
    """

    def __init__(self, client: Client, gang: Gang, payload: bytes, folder: Path, wait: bool):
        self.name = gang.run
        self.status = "waiting"
        self.rows: list[dict] = []
        self._client = client
        self._gang = gang
        self._payload = payload
        self._places: list[Place] = []
        self._futures: list[Future] = []
        self._outcomes: dict[int, Outcome] = {}
        self._batches = [0] * gang.ranks
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._stopping = False
        self._ending = False
        self._emulated = False
        self._queued = 0
        self._deadline = math.inf
        self._broken: Exception | None = None
        self._watchers: list[Callable[[Run, list[dict]], None]] = []
        self._finish: Callable[[list], Any] = list
        client.subscribe_topic(topic(self.name), lambda event: self._inbox.put(("news", event[1])))
        try:
            answer = consult(client, admit, gang, wait)
            if refusal := answer.get("wrong") or answer.get("busy"):
                raise ValueError(refusal) if "wrong" in answer else RuntimeError(refusal)
            self.folder = occupy(folder)
        except BaseException:
            self._leave()
            raise
        self._logs = [Log(self.folder / f"rank-{rank}.log", rank) for rank in range(gang.ranks)]
        self._inbox.put(("news", answer))
        threading.Thread(target=self._drive, name=self.name, daemon=True).start()

    def __repr__(self) -> str:
        status = f"waiting, {self._queued} in the queue" if self.status == "waiting" else self.status
        return f"<Run {self.name}: {status}, {self._gang.ranks} ranks, {len(self.rows)} rows>"

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
        Interrupted (Ctrl-C) while it waits, it stops the run and raises KeyboardInterrupt.
        """
        try:
            if not self.wait(timeout):
                raise TimeoutError(f"run {self.name} is still {self.status} after timeout (={timeout}) seconds.")
        except KeyboardInterrupt:
            self.stop()
            raise
        if self.status != "finished":
            raise self._blame()
        return self._finish([_value(self._outcomes[rank]) for rank in range(self._gang.ranks)])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (default: no limit) for the end; return whether it has ended, however."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        # Short waits, since Windows takes no Ctrl-C while a lock is waited for.
        while (left := deadline - time.monotonic()) > 0:
            if self._ended.wait(min(left, 0.2)):
                return True
        return self._ended.is_set()

    def stop(self) -> None:
        """End all ranks, and wait until they have; a run whose ranks have all returned by then is finished."""
        self._inbox.put(("stop", None))
        self._ended.wait()

    def logs(self, rank: int | None = None) -> str:
        """Return what a rank printed so far; of all ranks, one after the other, if none is named."""
        if rank is None:
            return "".join(f"[rank {number}]\n{self.logs(number)}" for number in range(self._gang.ranks))
        if rank not in range(self._gang.ranks):
            raise ValueError(f"rank (={rank!r}) must be from 0 to {self._gang.ranks - 1}.")
        return self._logs[rank].read()

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
        except Exception as error:  # such as a full disk
            log.exception("run %s breaks off", self.name)
            self._broken = error
        finally:
            self._close()

    def _complete(self) -> bool:
        """Whether every rank has ended and all batches that it sent are here, or nothing more can come."""
        if self._client.status == "closed" or (self._stopping and not self._places):
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
        elif kind == "stop":
            self._stopping = True
        if (self._stopping and not self._ending) or time.monotonic() > self._deadline:
            self._end_all()

    def _take_news(self, news: dict, file: TextIO) -> None:
        """Take in what a worker or the scheduler's ledger says on the run's topic."""
        if "rank" in news:
            self._batches[news["rank"]] += 1
            self._logs[news["rank"]].take(news["text"])
            source = "emulated" if self._emulated else "measured"
            self._take_rows([row | {"source": source} for row in news["rows"]], file)
        elif "workers" in news and not self._places:
            self._emulated = news["emulated"]
            self._start(news["workers"], news["store"], file)
        elif "crowded" in news:
            self._emulated = True
        elif "place" in news:
            self._queued = news["place"]
        elif "lost" in news:
            for place in self._places:
                if place.worker == news["lost"]:
                    why = f"was lost with its worker {place.worker}"
                    self._inbox.put(("done", Outcome(place.rank, place.worker, failure=failure("WorkerLost", why))))

    def _start(self, workers: list[str], store: str, file: TextIO) -> None:
        """Have the workers start the ranks, now that the gang is admitted."""
        self._places = _plan(self._gang, self.folder, workers, store)
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

    def _fetch(self, future: Future, place: Place) -> None:
        """Bring an outcome here, in a thread of its own: its worker may die meanwhile, and then it never comes."""

        def fetch() -> None:
            self._inbox.put(("done", _outcome(future, place)))

        threading.Thread(target=fetch, name=f"{self.name}-fetch", daemon=True).start()

    def _take_rows(self, rows: list[dict], file: TextIO) -> None:
        if rows:
            file.writelines(_line(row) for row in rows)
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
        if left and self._ending:
            self._let_go()
        elif left:
            self._ask_workers(kill, [place.worker for place in left])
        self._ending = True
        self._deadline = time.monotonic() + KILL_SECONDS

    def _ask_workers(self, function: Callable[[str], None], workers: list[str]) -> None:
        """Call a function of the supervisors without waiting for an answer: a worker that has gone gives none."""

        def ask() -> None:
            with suppress(Exception):  # with a client that closes, its futures end, and the workers end their ranks
                self._client.run(function, self.name, workers=workers, on_error="ignore")

        threading.Thread(target=ask, name=f"{self.name}-ask", daemon=True).start()

    def _let_go(self) -> None:
        """Cancel the tasks: a worker that is still there then ends its ranks."""
        with suppress(Exception):
            self._client.cancel(self._futures, force=True)
        for place in self._places:
            why = "did not end when it was told to, and was given up"
            lost = Outcome(place.rank, place.worker, failure=failure("Unreachable", why, consequence=True))
            self._outcomes.setdefault(place.rank, lost)

    def _close(self) -> None:
        if len(self._outcomes) < len(self._places):
            self._let_go()
        self._leave()
        self._futures.clear()
        for rank_log in self._logs:
            rank_log.close()
        failed = not self._places or self._broken or any(outcome.failure for outcome in self._outcomes.values())
        self.status = "finished" if not failed else "stopped" if self._stopping and not self._broken else "failed"
        with self._lock:
            self._ended.set()
            self._tell([])

    def _leave(self) -> None:
        """Give the seats back."""
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
        if not failures or self._client.status == "closed":
            return RankError(f"run {self.name} broke off: its client was closed.")
        return _error(self._outcomes[min(failures)[2]], self._gang.ranks)


class Log:
    """What one rank prints: all of it on disk, shown as it comes with the rank's number, and cut short in a flood."""

    LINES = 200
    """Lines that are shown a second."""

    def __init__(self, path: Path, rank: int):
        self.path = path
        self.rank = rank
        self.tail = ""
        self.second, self.shown, self.hidden = 0.0, 0, 0

    def take(self, text: str) -> None:
        """Keep what came, and show its whole lines."""
        if text:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        *lines, self.tail = (self.tail + text).split("\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Show a last line that has no end, and how many were not shown."""
        if self.tail:
            self._show(self.tail)
        self._own_up()

    def read(self) -> str:
        """All that was printed so far."""
        if not self.path.exists():
            return ""
        with open(self.path, encoding="utf-8", newline="") as file:
            return file.read()

    def _show(self, line: str) -> None:
        now = time.monotonic()
        if now - self.second > 1:
            self._own_up()
            self.second, self.shown = now, 0
        if self.shown < self.LINES:
            self.shown += 1
            tqdm.write(f"[rank {self.rank}] {line.rstrip(chr(13)).rsplit(chr(13), 1)[-1]}")  # a bar overwrites itself
        else:
            self.hidden += 1

    def _own_up(self) -> None:
        if self.hidden:
            tqdm.write(f"[rank {self.rank}] ... {self.hidden:,} more lines are in {self.path}")
            self.hidden = 0


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is an int of at least `least`, else raise a ValueError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} (={value!r}) must be a whole number >= {least}.")
    return value


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


def _plan(gang: Gang, folder: Path, workers: list[str], store: str) -> list[Place]:
    launched = time.time()
    return [
        Place(gang.run, str(folder), rank, gang.ranks, worker, rank, gang.ranks, gang.threads, launched, store)
        for rank, worker in enumerate(workers)
    ]


def _about(gang: Gang, launched: float) -> dict:
    """The first row of a run."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(launched))
    about = {"kind": "run", "run": gang.run, "started": started, "ranks": gang.ranks, "threads": gang.threads}
    return about | machine.describe()


def _line(row: dict) -> str:
    """A row as a line of JSON, which knows neither NaN nor infinity: they become null."""
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:
        odd = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(row | dict.fromkeys(odd)) + "\n"


def _pickle(function: Callable, args: tuple) -> bytes:
    if not callable(function):
        raise TypeError(f"function (={function!r}) must be callable.")
    try:
        return cloudpickle.dumps((function, args))
    except Exception:
        check_pickles({"function": function} | {f"args[{i}]": arg for i, arg in enumerate(args)})
        raise


def check_pickles(values: dict[str, Any]) -> None:
    """Raise a TypeError that names the first of some values, by name, that can't be pickled."""
    for name, value in values.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"{name} (={value!r}) can't be pickled and sent to the ranks: {error}; make it inside the function."
            ) from error


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

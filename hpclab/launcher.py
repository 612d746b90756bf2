"""Run a function on a gang of ranks: processes that start together, can talk by torch.distributed, and end together."""

import json
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
from hpclab._supervisor import Outcome, Place, failure, kill, supervise, topic

SETTLE_SECONDS = 2.0
"""How long a gang in which a rank lost its peer may take to tell which rank was the cause."""
KILL_SECONDS = 5.0
"""How long workers may take to end their ranks before they are given up as lost."""


class RankError(RuntimeError):
    """A rank that ended without a Python exception of its own, or with one that can't be brought here."""


def launch(
    client: Client,
    function: Callable,
    *args: Any,
    ranks: int | None = None,
    threads: int = 1,
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
        Number of ranks, one a worker. Default: all workers.
    threads : int, default 1
        Threads that torch may use in each rank. Ranks times threads beyond a host's CPUs are marked as emulated.
    folder : path, optional
        Where ``rows.jsonl`` goes; must be new or empty. Default: ``results/<time>-<name>-<id>``.
    name : str, optional
        Name of the run. Default: the function's.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the cluster has not that many workers, or the folder is occupied.
    TypeError
        If the function or an argument can't be pickled; the message says which.
    PermissionError
        If the folder can't be written.
    """
    workers = workers_for(client, ranks)
    whole_number("threads", threads)
    payload = _pickle(function, args)
    title = str(name or getattr(function, "__name__", type(function).__name__))
    title = re.sub(r"[^\w.=-]+", "-", title).strip("-")
    run = f"{time.strftime('%Y%m%d-%H%M%S')}-{title}-{uuid.uuid4().hex[:4]}"
    path = occupy(folder or Path("results", run))
    return Run(client, _plan(run, path, workers, threads), payload, path)


class Run:
    """A gang at work, or what it left.

    Attributes
    ----------
    name : str
        Unique name of this run.
    folder : Path
        Holds ``rows.jsonl``: all rows, one a line, written as they come.
    rows : list of dict
        What the ranks reported so far; the first, of kind "run", tells the machine.
    status : str
        "running", "finished", "failed" or "stopped".
    """

    def __init__(self, client: Client, places: list[Place], payload: bytes, folder: Path):
        self.name = places[0].run
        self.folder = folder
        self.status = "running"
        self.rows: list[dict] = []
        self._client = client
        self._places = places
        self._text: list[list[str]] = [[] for _ in places]
        self._outcomes: dict[int, Outcome] = {}
        self._batches = [0] * len(places)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._stopping = False
        self._deadline = float("inf")
        self._ending = False
        self._watchers: list[Callable[[Run, list[dict]], None]] = []
        self._finish: Callable[[list], Any] = list
        self._begin(payload)

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.status}, {len(self._places)} ranks, {len(self.rows)} rows>"

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
        TimeoutError
            If the run is still going after the timeout; it goes on.

        Notes
        -----
        Interrupted (Ctrl-C) while it waits, it stops the run and raises KeyboardInterrupt.
        """
        try:
            if not self.wait(timeout):
                raise TimeoutError(f"run {self.name} is still going after timeout (={timeout}) seconds.")
        except KeyboardInterrupt:
            self.stop()
            raise
        if self.status != "finished":
            raise self._blame()
        return self._finish([_value(self._outcomes[rank]) for rank in range(len(self._places))])

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (default: no limit) for the end; return whether it has ended, however."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        # Short waits, since Windows takes no Ctrl-C while a lock is waited for.
        while (left := deadline - time.monotonic()) > 0:
            if self._ended.wait(min(left, 0.2)):
                return True
        return self._ended.is_set()

    def stop(self) -> None:
        """End all ranks, and wait until they have."""
        if self.status == "running":
            self._stopping = True
            self._inbox.put(("stop", None))
        self._ended.wait()

    def logs(self, rank: int | None = None) -> str:
        """Return what a rank printed so far; of all ranks, one after the other, if none is named."""
        if rank is None:
            return "".join(f"[rank {place.rank}]\n{self.logs(place.rank)}" for place in self._places)
        if rank not in range(len(self._places)):
            raise ValueError(f"rank (={rank!r}) must be from 0 to {len(self._places) - 1}.")
        return "".join(self._text[rank])

    def then(self, finish: Callable[[list], Any]) -> "Run":
        """Have ``result()`` return ``finish(values)`` in place of the list of values; returns this run."""
        self._finish = finish
        return self

    def watch(self, watcher: "Callable[[Run, list[dict]], None]") -> None:
        """Have ``watcher(run, rows)`` called with all rows, as they come, and with none when the run has ended.

        It is called in a thread of the run, and must neither block nor wait for the run.
        """
        with self._lock:
            self._watchers.append(watcher)
            watcher(self, self.rows.copy())
            if self._ended.is_set():
                watcher(self, [])

    def _begin(self, payload: bytes) -> None:
        self._client.subscribe_topic(topic(self.name), lambda event: self._inbox.put(("batch", event[1])))
        self._futures = [
            self._client.submit(
                supervise,
                place,
                payload,
                key=f"{self.name}-rank-{place.rank}",
                workers=[place.worker],
                # Pinned strictly, the task of a worker that died would wait for it for ever; it checks its place
                # itself.
                allow_other_workers=True,
                pure=False,
                retries=0,
            )
            for place in self._places
        ]
        for rank, future in enumerate(self._futures):
            future.add_done_callback(lambda future, rank=rank: self._inbox.put(("done", (rank, future))))
        threading.Thread(target=self._drive, name=self.name, daemon=True).start()

    def _drive(self) -> None:
        """Take in what happens until every rank has ended; the thread of this run."""
        try:
            with open(self.folder / "rows.jsonl", "w", encoding="utf-8") as file:
                self._take_rows([self._about()], file)
                while not self._complete() and self._client.status != "closed":
                    try:
                        kind, content = self._inbox.get(timeout=0.1)
                    except queue.Empty:
                        kind, content = "quiet", None
                    self._take(kind, content, file)
            with suppress(Exception):  # the client may close at any moment
                self._client.unsubscribe_topic(topic(self.name))
        finally:
            self._close()

    def _about(self) -> dict:
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._places[0].launched))
        gang = {"ranks": len(self._places), "threads": self._places[0].threads}
        return {"kind": "run", "run": self.name, "started": started} | gang | machine.describe()

    def _complete(self) -> bool:
        """Whether every rank has ended and all batches that it sent are here."""
        return len(self._outcomes) == len(self._places) and all(
            self._batches[rank] >= outcome.batches for rank, outcome in self._outcomes.items()
        )

    def _take(self, kind: str, content: Any, file: TextIO) -> None:
        if kind == "batch":
            self._batches[content["rank"]] += 1
            self._take_text(content["rank"], content["text"])
            self._take_rows(content["rows"], file)
        elif kind == "done":
            rank, future = content
            self._outcomes[rank] = _outcome(rank, future, self._places[rank])
            self._weigh(self._outcomes[rank])
        if kind == "stop" or time.monotonic() > self._deadline:
            self._end_all()

    def _take_text(self, rank: int, text: str) -> None:
        self._text[rank].append(text)
        for line in text.splitlines():
            tqdm.write(f"[rank {rank}] {line}")

    def _take_rows(self, rows: list[dict], file: TextIO) -> None:
        if rows:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            with self._lock:
                self.rows.extend(rows)
                self._tell(rows)

    def _tell(self, rows: list[dict]) -> None:
        for watcher in self._watchers:
            watcher(self, rows)

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
        with suppress(Exception):  # with a client that closes, its futures end, and the workers end their ranks
            if left and self._ending:
                self._client.cancel([self._futures[place.rank] for place in left], force=True)
            elif left:
                self._client.run(kill, self.name, workers=[place.worker for place in left], on_error="ignore")
        self._ending = True
        self._deadline = time.monotonic() + KILL_SECONDS

    def _close(self) -> None:
        failed = len(self._outcomes) < len(self._places) or any(o.failure for o in self._outcomes.values())
        self.status = "stopped" if self._stopping else "failed" if failed else "finished"
        with self._lock:
            self._ended.set()
            self._tell([])

    def _blame(self) -> BaseException:
        """The error of the rank that failed first; what followed from it counts only if nothing else is known."""
        if self.status == "stopped":
            return RankError(f"run {self.name} was stopped.")
        failures = [(o.failure["consequence"], o.failure["time"], o.rank) for o in self._outcomes.values() if o.failure]
        if not failures:
            return RankError(f"run {self.name} broke off; is its client still open?")
        outcome = self._outcomes[min(failures)[2]]
        return _error(outcome, len(self._places))


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


def workers_for(client: Client, ranks: int | None) -> list[tuple[str, dict]]:
    """Addresses and descriptions of the workers that take the ranks; those of one host stand together."""
    if client.status != "running":
        raise ValueError(f"client is {client.status}; open a new one with hpclab.connect().")
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        raise ValueError("client has a cluster without workers; wait for them with client.wait_for_workers(1).")
    ranks = len(workers) if ranks is None else whole_number("ranks", ranks)
    if ranks > len(workers):
        raise ValueError(
            f"ranks (={ranks}) exceeds the {len(workers)} workers of this cluster;"
            f" use connect(workers={ranks}) or ranks<={len(workers)}."
        )
    chosen = sorted(workers.items(), key=lambda item: (item[1]["host"], str(item[1]["id"])))[:ranks]
    if len(hosts := {info["host"] for _, info in chosen}) > 1:
        raise ValueError(f"ranks (={ranks}) would lie on {len(hosts)} hosts; this version runs a gang on one host.")
    return chosen


def _plan(run: str, folder: Path, workers: list[tuple[str, dict]], threads: int) -> list[Place]:
    store = os.path.join(workers[0][1]["local_directory"], run)
    launched = time.time()
    return [
        Place(run, str(folder), rank, len(workers), address, rank, len(workers), threads, launched, store)
        for rank, (address, _) in enumerate(workers)
    ]


def _pickle(function: Callable, args: tuple) -> bytes:
    if not callable(function):
        raise TypeError(f"function (={function!r}) must be callable.")
    try:
        return cloudpickle.dumps((function, args))
    except Exception:
        named = [("function", function)] + [(f"args[{i}]", arg) for i, arg in enumerate(args)]
        for name, value in named:
            try:
                cloudpickle.dumps(value)
            except Exception as error:
                raise TypeError(
                    f"{name} (={value!r}) can't be pickled and sent to the ranks: {error}; make it inside the function."
                ) from error
        raise


def _outcome(rank: int, future: Future, place: Place) -> Outcome:
    """The outcome that a task brought back, or one that says why there is none."""
    if future.status == "finished":
        try:
            return future.result()
        except Exception as error:  # its worker died with the result
            cause = f"{type(error).__name__}: {error}"
    else:
        cause = f"its task was {future.status}"
    lost = failure("WorkerLost", f"was lost with its worker ({cause})", consequence=future.status == "cancelled")
    return Outcome(rank, place.worker, failure=lost)


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

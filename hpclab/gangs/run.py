"""A run: a gang of ranks at work, seen from the notebook, and what it leaves on disk."""

import json
import logging
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from distributed import Client
from tqdm import tqdm

from hpclab import machine
from hpclab.gangs.attempt import Attempt, RankError, Settings, plan
from hpclab.gangs.rank import message, note, printable
from hpclab.gangs.scheduler import Gang, Ledger, consult, topic
from hpclab.gangs.worker import ON_DEMAND
from hpclab.rows import line, read

log = logging.getLogger(__name__)

REMIND_SECONDS = 2.0
"""How often a gang that waits has the ledger look whether workers have come."""
ROOM_SECONDS, RETURN_SECONDS, AGAIN_SECONDS = 60.0, 10.0, 0.25
"""How long another attempt may wait for room, and of that for as much as before; how often it asks."""
PAUSE_SECONDS = (0.5, 30.0)
"""How long to wait before another attempt when two or more in a row ended before they had reported anything: at first,
doubled each time, and at most."""
LOST_SECONDS = 2.0
"""How long the scheduler may be out of reach; one that comes back knows nothing of the gang."""


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
        "waiting" (for room; ``place`` is its number in the queue), "running", "recovering" (between two attempts),
        "finished", "failed" or "stopped"; "interrupted" if its kernel went before it.
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

    @property
    def going(self) -> bool:
        """Whether it has not ended."""
        return self.status in ("waiting", "running", "recovering")

    def error(self) -> str:
        """Return what ended a run that failed, as text; "" of any other."""
        ends = [row for row in self.rows if row.get("kind") == "end"]
        return ends[-1].get("error", "") if ends else ""

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
    path = Path(folder).expanduser().absolute()
    found = read(path / "rows.jsonl") if (path / "rows.jsonl").is_file() else []
    # Its first row, or if that is damaged any that a rank reported.
    about = next((row for row in found if row.get("kind") == "run" or {"run", "attempt", "ranks"} <= {*row}), None)
    if about is None:
        raise FileNotFoundError(
            f"folder (={str(folder)!r}) holds no rows.jsonl of a run; name one such as results/<run>."
        )
    status = next((row["status"] for row in found if row.get("kind") == "end" and "status" in row), "interrupted")
    return Record(about["run"], path, about["ranks"], found, status)


class Run(Record):
    """A gang at work, or what it left; see `Record` for its attributes."""

    def __init__(self, client: Client, gang: Gang, settings: Settings, payload: bytes, folder: Path):
        super().__init__(gang.run, folder.expanduser().absolute(), gang.ranks, [], "waiting")
        self._client = client
        self._gang = gang
        self._settings = settings
        self._payload = payload
        self._attempt: Attempt | None = None
        self._launched = 0.0
        self._ahead = 0.0
        """Seconds by which the clock here is ahead of the scheduler's."""
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.said: queue.SimpleQueue = queue.SimpleQueue()
        """What ranks of an interactive gang say, as `hpclab.gangs` reads it."""
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._stopping = False
        self._emulated = False
        self._connected = time.monotonic()
        self._cut_off = False
        self._reminded = time.monotonic()
        self._gone: set[str] = set()
        self._fruitless = 0
        """Attempts in a row that ended before they had reported anything."""
        self._broken: Exception | None = None
        self._watchers: list[Callable[[Run, list[dict]], None]] = []
        self._finish: Callable[[list], Any] = list
        client.subscribe_topic(topic(self.name), lambda event: self._inbox.put(("news", _read(event[1]))))
        try:
            answer = consult(client, Ledger.admit, gang, settings.wait)
            if refusal := answer.get("wrong") or answer.get("busy"):
                raise ValueError(refusal) if "wrong" in answer else RuntimeError(refusal)
            occupy(self.folder)
            (self.folder / "rows.jsonl").touch(exist_ok=False)  # from here on the folder is taken
        except BaseException as error:
            self._leave()
            if why := machine.remedy(error):
                note(error, why)
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
        the ranks. What a stopped run's ranks have returned all the same, a second call of ``result()`` returns. Of one
        that was stopped since the walltime of a job was over, it is returned with a warning.
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
        if self._attempt is None or self._failed():
            raise self._blame()
        if why := self._attempt.expired():
            goes_on = f"resume={str(self.folder)!r} goes on from its checkpoint"
            warnings.warn(
                f"run {self.name} was stopped before its end: {why}; {goes_on}, if it saved one.", stacklevel=2
            )
        return self._finish(self._attempt.values())

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
        self._inbox.put(("order", ({"order": "kill"}, rank)))

    def kill_worker(self, rank: int) -> None:
        """Kill the worker of one rank, and with it all its ranks; its cluster may start another."""
        self._check_rank(rank)
        self._inbox.put(("order", ({"order": "die"}, rank)))

    def left(self) -> list[int]:
        """Ranks that are at work."""
        attempt = self._attempt
        return [] if attempt is None else sorted(attempt.left())

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

    def error(self) -> str:
        """Return what ended it if it failed, as text, also when no row could tell, as on a full disk; else ""."""
        return super().error() or ("" if self._broken is None else _words(self._broken))

    def _drive(self) -> None:
        """Take in what happens, attempt after attempt, until the last has ended; the thread of this run."""
        try:
            with open(self.folder / "rows.jsonl", "w", encoding="utf-8") as file:
                self._follow(file)
                while self._goes_on() and (seats := self._find_seats(file)) is not None:
                    self._start(seats, file)
                    self._follow(file)
                self._conclude()
                self._take_rows([self._end()], file)
        except Exception as error:  # such as a full disk
            log.exception("run %s breaks off", self.name)
            error.add_note(f"Run {self.name}, of folder {self.folder}, broke off. {machine.remedy(error)}".rstrip())
            self._broken = error
        finally:
            self._close()

    def _follow(self, file: TextIO) -> None:
        """Take in what happens until the attempt has ended, or there is nothing to wait for."""
        while not self._complete():
            try:
                kind, content = self._inbox.get(timeout=0.1)
            except queue.Empty:
                kind, content = "quiet", None
            self._take(kind, content, file)

    def _complete(self) -> bool:
        if self._is_cut_off() or self._attempt is None:
            return self._cut_off or self._stopping
        return self._attempt.complete()

    def _is_cut_off(self) -> bool:
        """Whether the scheduler has been out of reach for too long."""
        if self._client.status == "running":
            self._connected = time.monotonic()
        self._cut_off = time.monotonic() - self._connected > LOST_SECONDS
        return self._cut_off

    def _take(self, kind: str, content: Any, file: TextIO) -> None:
        attempt = self._attempt
        if kind == "news":
            self._take_news(content, file)
        elif kind == "stop":
            self._stopping = True
            if attempt is not None and content:
                attempt.end_all()
            elif attempt is not None:
                attempt.stop()
        elif attempt is not None:
            self._take_up(attempt, kind, content)
        if self._attempt is not None:
            self._attempt.look()
        elif time.monotonic() - self._reminded > REMIND_SECONDS:
            self._reminded = time.monotonic()
            with suppress(Exception):  # tried again soon, and given up when the client is cut off
                consult(self._client, Ledger.advance)

    def _take_up(self, attempt: Attempt, kind: str, content: Any) -> None:
        """Take in what concerns the ranks at work."""
        if kind == "done" and content.attempt == attempt.number:
            attempt.end(content)
        elif kind == "order":
            attempt.order(*content)

    def _take_news(self, news: dict, file: TextIO) -> None:
        """Take in what a worker or the scheduler's ledger says on the run's topic."""
        if "rank" in news:
            self._logs[news["rank"]].take(news["text"], shown=not self.quiet)
            self._emulated |= news.get("emulated", False)
            source = "emulated" if self._emulated else "measured"
            self._take_rows([json.loads(row) | {"source": source} for row in news["rows"]], file)
            if self._attempt is not None and news["attempt"] == self._attempt.number:
                self._attempt.hear(news)
                if "expires" in news:
                    self._expire(self._attempt, news)
            if "said" in news or "stack" in news:
                self.said.put(news)  # last: what a cell reported is here before its answer
        elif "workers" in news and self._attempt is None:
            self._start(news, file)
        elif "crowded" in news:
            self._emulated = True
        elif "place" in news:
            self.place = news["place"]
        elif "lost" in news:
            self._gone.add(news["lost"])
            if self._attempt is not None:
                self._attempt.lose(self._gone)

    def _expire(self, attempt: Attempt, news: dict) -> None:
        """Have an attempt end before a job does, and no other begin under its worker."""
        attempt.expire(news["rank"], news["expires"])
        with suppress(Exception):  # the scheduler has gone, which is seen elsewhere
            consult(self._client, Ledger.expire, attempt.places[news["rank"]].worker)

    def _start(self, seats: dict, file: TextIO) -> None:
        """Begin an attempt: the first, or one that goes on after a loss."""
        before = self._attempt
        number = 0 if before is None else before.number + 1
        self._launched = self._launched or time.time()
        self._emulated |= seats["emulated"]
        self._gone -= set(seats["workers"]) if before else set()  # a worker that came back at its old address
        gang = replace(self._gang, ranks=len(seats["workers"]))
        if seats["clock"] != machine.boot():
            with suppress(Exception):  # the scheduler has gone, which is seen elsewhere
                self._ahead = machine.ahead(lambda: self._client.run_on_scheduler(time.time))
        places = plan(gang, self.folder, self._settings, seats, number, self._launched, self._ahead)
        self._attempt = Attempt(self._client, gang, self._settings, number, places)
        self.status = "running"
        first = _about(gang, self._launched) if before is None else self._restart(before, self._attempt)
        self._take_rows([first | seats["machine"]], file)
        self._attempt.start(self._payload, self._inbox)
        self._attempt.lose(self._gone)

    def _goes_on(self) -> bool:
        """Whether what ended the attempt is a reason for another."""
        attempt = self._attempt
        if attempt is None or self._stopping or self._cut_off:
            return False
        return attempt.lost() and attempt.number < self._settings.max_restarts

    def _find_seats(self, file: TextIO) -> dict | None:
        """Seats for another attempt: as many as before, or fewer if that may be and workers don't come back; or None.

        Stopped while it waits for them, the run ends as it failed.
        """
        assert self._attempt is not None
        self._attempt.close()
        self.status = "recovering"
        self._fruitless = 0 if self._attempt.reported else self._fruitless + 1
        if self._fruitless > 1:
            first, most = PAUSE_SECONDS
            self._pause(min(most, first * 2 ** (min(self._fruitless, 10) - 2)), file)
        started = time.monotonic()
        patience = math.inf if self._settings.wait else ROOM_SECONDS
        while (waited := time.monotonic() - started) < patience and not self._stopping and not self._is_cut_off():
            if seats := self._reseat(patient=waited < RETURN_SECONDS):
                return seats
            with suppress(queue.Empty):
                kind, content = self._inbox.get(timeout=AGAIN_SECONDS)
                self._take(kind, content, file)
        return None

    def _pause(self, seconds: float, file: TextIO) -> None:
        """Wait before what has failed at once, again and again, is tried once more."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stopping and not self._is_cut_off():
            with suppress(queue.Empty):
                kind, content = self._inbox.get(timeout=min(left, AGAIN_SECONDS))
                self._take(kind, content, file)

    def _reseat(self, patient: bool) -> dict:
        """Seats that there are now, or nothing; if `patient`, only for as many ranks as before."""
        sizes = self._settings.sizes[:1] if patient else self._settings.sizes
        try:
            going = self._client.status == "running"
            return consult(self._client, Ledger.reseat, self.name, sizes, patient) if going else {}
        except Exception as error:
            if self._client.status == "running" and not isinstance(error, OSError):
                raise
            return {}  # the client has gone, and is cut off soon

    def _restart(self, before: Attempt, after: Attempt) -> dict:
        """The row that tells of a new attempt."""
        cause = message(before.blame()).rstrip(".")
        if not self.quiet and ON_DEMAND not in cause:
            with suppress(OSError, ValueError):
                tqdm.write(f"[{self.name}] {cause}. Attempt {after.number + 1} goes on, with {after.ranks} ranks.")
        about = {"kind": "restart", "run": self.name, "attempt": after.number, "ranks": after.ranks, "cause": cause}
        return about | {"failed_s": before.failed_at() - self._launched, "time_s": time.time() - self._launched}

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

    def _close(self) -> None:
        try:
            if self._attempt is not None:
                self._attempt.close()
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
        attempt = self._attempt
        at_fault = attempt is not None and attempt.at_fault()
        agreed = attempt is not None and bool(attempt.calls)
        expired = attempt is not None and bool(attempt.expired())
        if expired or (self._stopping and not self._broken and not at_fault and (self._failed() or agreed)):
            self.status = "stopped"
        else:
            self.status = "failed" if self._failed() else "finished"

    def _end(self) -> dict:
        """The last row of a run."""
        launched = self._launched or time.time()
        row = {"kind": "end", "run": self.name, "status": self.status, "time_s": time.time() - launched}
        if self.status == "failed":
            row["error"] = _words(self._blame())
        return row

    def _failed(self) -> bool:
        return self._attempt is None or self._broken is not None or self._attempt.failed()

    def _leave(self) -> None:
        """Give the seats back."""
        if self._client.status != "running":
            return  # the ledger sees it go
        with suppress(Exception):  # a client that has closed: the ledger saw it go
            self._client.unsubscribe_topic(topic(self.name))
            consult(self._client, Ledger.release, self.name)

    def _blame(self) -> BaseException:
        if self._broken is not None:
            return self._broken
        if self.status == "stopped":
            return RankError(f"run {self.name} was stopped.")
        if self._attempt is None or self._cut_off or not self._attempt.failed():
            return RankError(f"run {self.name} broke off: its client is {self._client.status}, not connected.")
        error = self._attempt.blame()
        if self._attempt.lost() and (most := self._settings.max_restarts):
            why = f"max_restarts (={most})" if self._attempt.number == most else "no room was left for another"
            why = "the run was stopped" if self._stopping else why
            note(error, f"It was attempt {self._attempt.number + 1}, and the last: {why}.")
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


def _words(error: BaseException) -> str:
    """An error as text, with its notes."""
    notes = getattr(error, "__notes__", None)
    told = [printable(str(text)) for text in notes] if isinstance(notes, list) else []
    return "\n".join([f"{type(error).__name__}: {message(error)}", *told])


def _read(news: str | dict) -> dict:
    """What a supervisor says, as JSON, or the ledger."""
    return json.loads(news) if isinstance(news, str) else news


def _about(gang: Gang, launched: float) -> dict:
    """The first row of a run."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(launched))
    return {"kind": "run", "run": gang.run, "started": started, "ranks": gang.ranks, "threads": gang.threads}


def occupy(folder: str | os.PathLike) -> Path:
    """Make a folder for results; an existing one must be empty.

    Raises
    ------
    ValueError
        If the folder holds something, or is a file.
    PermissionError
        If it can't be written.
    """
    path = Path(folder).expanduser().absolute()
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

"""Kernel: a run, attempt after attempt until one succeeds or nothing more can be done."""

import logging
import math
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from distributed import Client
from IPython.display import display
from tqdm import tqdm

from hpclab import live, machine
from hpclab.gangs import errors, wire
from hpclab.gangs.attempt import Attempt, RankError, RunSettings
from hpclab.gangs.record import Log, Record, occupy
from hpclab.gangs.record import open_run as open_run
from hpclab.gangs.scheduler import Booking, Ledger, consult, topic
from hpclab.gangs.worker import ON_DEMAND
from hpclab.pages import Prose
from hpclab.rows import line

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
        run._inbox.put(partial(run._halt, now=False))
    for run in mine:
        run.wait()


class Run(Record):
    """A running gang, or what it left; see `Record` for its attributes."""

    def __init__(self, client: Client, booking: Booking, settings: RunSettings, payload: bytes, folder: Path):
        super().__init__(booking.run, folder.expanduser().absolute(), booking.ranks, [], "waiting")
        self._client = client
        self._booking = booking
        self._settings = settings
        self._payload = payload
        self._attempt: Attempt | None = None
        self._launched = 0.0
        self._ahead = 0.0
        """Seconds by which the clock here is ahead of the scheduler's."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """What is to be done next, in the run's thread."""
        self.said: queue.SimpleQueue[tuple[int, wire.Message]] = queue.SimpleQueue()
        """What ranks of an interactive gang say, for `cells`."""
        self._file: TextIO
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._stopping = self._emulated = self._cut_off = False
        self._connected = self._reminded = time.monotonic()
        self._gone: set[str] = set()
        self._fruitless = 0
        """Attempts in a row that ended before they had reported anything."""
        self._broken: Exception | None = None
        self._watchers: list[Callable[[Run, list[dict]], None]] = []
        self._finish: Callable[[list], Any] = list
        client.subscribe_topic(topic(self.name), lambda event: self._inbox.put(partial(self._hear, event[1])))
        try:
            answer = consult(client, Ledger.admit, booking, settings.wait)
            if isinstance(answer, Exception):
                raise answer
            occupy(self.folder)
            (self.folder / "rows.jsonl").touch(exist_ok=False)  # from here on the folder is taken
        except BaseException as error:
            self._leave()
            if why := machine.remedy(error):
                errors.note(error, why)
            raise
        self._logs = [Log(self.folder / f"rank-{rank}.log", rank) for rank in range(booking.ranks)]
        self._inbox.put(partial(self._hear_scheduler, answer))
        _alive[self.name] = self
        threading.Thread(target=self._drive, name=self.name, daemon=True).start()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end, and return what the ranks returned, as a list by rank.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait. Default: no limit.

        Raises
        ------
        Exception
            The error of the rank that failed first, with a note that has the rank, its host and its traceback there.
        RankError
            If that rank died without an exception, if the run was stopped, or if the error can't be sent here.
        OSError
            If the rows or logs could not be written; the ranks were ended.
        TimeoutError
            If the run is still going after the timeout; it continues.

        Notes
        -----
        If you interrupt it (Ctrl-C), it stops the run and raises KeyboardInterrupt; interrupt again, and it kills the
        ranks. If ranks of a stopped run still returned values, call ``result()`` again to get them. If the run was
        stopped because a job's walltime was over, they are returned with a warning.
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
            goes_on = f"resume={str(self.folder)!r} continues from its checkpoint"
            warnings.warn(f"run {self.name} was stopped early: {why}; {goes_on}, if it saved one.", stacklevel=2)
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
        """End all ranks, and wait until they have ended.

        Parameters
        ----------
        now : bool, default False
            Kill them. Otherwise, ranks that call `should_stop` end at one agreed step, and have a minute to get there
            and return; other ranks are interrupted, as by Ctrl-C, and have a second. Those still left are killed.
        """
        self._inbox.put(partial(self._halt, now))
        self.wait()

    def kill(self, rank: int) -> None:
        """Kill one rank, as a failing machine would; the run shows what follows."""
        self._check_rank(rank)
        self._inbox.put(partial(self._order, wire.Kill(), rank))

    def kill_worker(self, rank: int) -> None:
        """Kill the worker of one rank, and so all of that worker's ranks; the cluster may start another worker."""
        self._check_rank(rank)
        self._inbox.put(partial(self._order, wire.Die(), rank))

    def left(self) -> list[int]:
        """Ranks that are running."""
        attempt = self._attempt
        return [] if attempt is None else sorted(attempt.left())

    def then(self, finish: Callable[[list], Any]) -> "Run":
        """Have ``result()`` return ``finish(values)`` instead of the list of values; returns this run."""
        self._finish = finish
        return self

    def watch(self, watcher: "Callable[[Run, list[dict]], None]") -> None:
        """Call ``watcher(run, rows)`` with all rows, as they come, and with none when the run has ended.

        The call is made in a thread of the run, and must neither block nor wait for the run. A watcher that raises is
        logged, and not called again.
        """
        with self._lock:
            self._watchers.append(watcher)
            watcher(self, self.rows.copy())
            if self._ended.is_set():
                watcher(self, [])

    def error(self) -> str:
        """Return what ended it if it failed, as text, even if no row could say so, as on a full disk; else ""."""
        return super().error() or ("" if self._broken is None else _words(self._broken))

    def _drive(self) -> None:
        """Take in what happens, attempt after attempt, until the last has ended; the thread of this run."""
        try:
            with open(self.folder / "rows.jsonl", "w", encoding="utf-8") as self._file:
                self._follow()
                while self._goes_on() and (seats := self._find_seats()) is not None:
                    self._start(seats)
                    self._follow()
                self._conclude()
                self._write(self._end())
        except Exception as error:  # such as a full disk
            log.exception("run %s breaks off", self.name)
            error.add_note(f"Run {self.name}, of folder {self.folder}, broke off. {machine.remedy(error)}".rstrip())
            self._broken = error
        finally:
            self._close()

    def _follow(self) -> None:
        """Take in what happens until the attempt has ended, or there is nothing to wait for."""
        while not self._complete():
            self._take(0.1)

    def _take(self, seconds: float) -> None:
        """Do what is to be done next, waiting some time for it."""
        with suppress(queue.Empty):
            self._inbox.get(timeout=seconds)()
        if self._attempt is not None:
            self._attempt.look()
        elif time.monotonic() - self._reminded > REMIND_SECONDS:
            self._reminded = time.monotonic()
            with suppress(Exception):  # tried again soon, and given up when the client is cut off
                consult(self._client, Ledger.advance)

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

    def _halt(self, now: bool) -> None:
        self._stopping = True
        if self._attempt is not None and now:
            self._attempt.end_all()
        elif self._attempt is not None:
            self._attempt.stop()

    def _order(self, order: wire.Order, rank: int) -> None:
        if self._attempt is not None:
            self._attempt.order(order, rank)

    def _hear(self, event: bytes) -> None:
        """Take in what a worker or the scheduler's ledger says on the run's topic."""
        head, *messages = wire.decode(event)
        if not isinstance(head, wire.Batch):
            self._hear_scheduler(head)
            return
        for message in messages:
            if isinstance(message, wire.Text):
                self._logs[head.rank].take(message.body.decode(), shown=not self.quiet)
            elif isinstance(message, wire.Emulated):
                self._emulated = True
        source = "emulated" if self._emulated else "measured"
        self._take_rows([message.parse(source) for message in messages if isinstance(message, wire.Row)])
        if self._attempt is not None and head.attempt == self._attempt.number:
            self._attempt.hear(head.rank, messages)
        for message in messages:
            if isinstance(message, wire.FromCell | wire.Stack):
                self.said.put((head.rank, message))  # last: what a cell reported is here before its answer

    def _hear_scheduler(self, news: wire.Message) -> None:
        match news:
            case wire.Seated() if self._attempt is None:
                self._start(news)
            case wire.Crowded():
                self._emulated = True
            case wire.Queued():
                self.place = news.place
            case wire.Lost():
                self._gone.add(news.worker)
                if self._attempt is not None:
                    self._attempt.lose(self._gone)

    def _start(self, seats: wire.Seated) -> None:
        """Begin an attempt: the first, or one that goes on after a loss."""
        before = self._attempt
        number = 0 if before is None else before.number + 1
        self._launched = self._launched or time.time()
        self._emulated |= seats.emulated
        self._gone -= set(seats.workers) if before else set()  # a worker that came back at its old address
        if seats.clock != machine.boot():
            with suppress(Exception):  # the scheduler has gone, which is seen elsewhere
                self._ahead = machine.ahead(lambda: self._client.run_on_scheduler(time.time))
        attempt = self._attempt = Attempt(self._client, self._places(seats, number), self._settings.hang_after)
        self.status = "running"
        self._write((self._first_row() if before is None else self._restart(before, attempt)) | seats.machine)
        attempt.start(self._payload, lambda outcome: self._inbox.put(partial(attempt.end, outcome)))
        attempt.lose(self._gone)

    def _places(self, seats: wire.Seated, number: int) -> list[wire.RankPlace]:
        """The places of an attempt's ranks, on the seats that the ledger gave."""
        hosts, nodes = seats.hosts, list(dict.fromkeys(seats.hosts))
        return [
            wire.RankPlace(
                run=self.name,
                attempt=number,
                folder=str(self.folder),
                rank=rank,
                ranks=len(hosts),
                worker=worker,
                local_rank=hosts[:rank].count(hosts[rank]),
                local_ranks=hosts.count(hosts[rank]),
                node=nodes.index(hosts[rank]),
                nodes=len(nodes),
                main=hosts[0],
                threads=self._booking.threads,
                launched=self._launched,
                clock=seats.clock,
                ahead=self._ahead,
                store=seats.store and f"{seats.store}-{number}",
                init=self._settings.init,
                memory=self._settings.memory or memory,
                worker_memory=memory,
                resume=self._settings.resume,
            )
            for rank, (worker, memory) in enumerate(zip(seats.workers, seats.memory, strict=True))
        ]

    def _goes_on(self) -> bool:
        """Whether what ended the attempt is a reason for another."""
        attempt = self._attempt
        if attempt is None or self._stopping or self._cut_off:
            return False
        return attempt.lost() and attempt.number < self._settings.max_restarts

    def _find_seats(self) -> wire.Seated | None:
        """Seats for another attempt: as many as before, or fewer if that may be and workers don't come back; or None.

        Stopped while it waits for them, the run ends as it failed.
        """
        assert self._attempt is not None
        self._attempt.close()
        self.status = "recovering"
        self._fruitless = 0 if self._attempt.reported else self._fruitless + 1
        if self._fruitless > 1:
            shortest, longest = PAUSE_SECONDS
            self._pause(min(longest, shortest * 2 ** (min(self._fruitless, 10) - 2)))
        for waited in self._waiting(math.inf if self._settings.wait else ROOM_SECONDS):
            if seats := self._reseat(patient=waited < RETURN_SECONDS):
                return seats
        return None

    def _pause(self, seconds: float) -> None:
        """Wait before what has failed at once, again and again, is tried once more."""
        for _ in self._waiting(seconds):
            pass

    def _waiting(self, seconds: float) -> Iterator[float]:
        """Take in what happens for some time, if the run isn't stopped; yields, again and again, how long it has."""
        started = time.monotonic()
        while (waited := time.monotonic() - started) < seconds and not self._stopping and not self._is_cut_off():
            yield waited
            self._take(min(seconds - waited, AGAIN_SECONDS))

    def _reseat(self, patient: bool) -> wire.Seated | None:
        """Seats that there are now, if any; if `patient`, only for as many ranks as before."""
        sizes = self._settings.sizes[:1] if patient else self._settings.sizes
        try:
            going = self._client.status == "running"
            return consult(self._client, Ledger.reseat, self.name, sizes, patient) if going else None
        except Exception as error:
            if self._client.status == "running" and not isinstance(error, OSError):
                raise
            return None  # the client has gone, and is cut off soon

    def _first_row(self) -> dict:
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._launched))
        row = {"kind": "run", "run": self.name, "started": started}
        return row | {"ranks": self._booking.ranks, "threads": self._booking.threads}

    def _restart(self, before: Attempt, after: Attempt) -> dict:
        """The row that tells of a new attempt."""
        ranks = len(after.places)
        cause = errors.message(before.blame()).rstrip(".")
        if not self.quiet and ON_DEMAND not in cause:
            self._announce(f"{cause}. Attempt {after.number + 1} continues with {ranks} ranks.")
        row = {"kind": "restart", "run": self.name, "attempt": after.number, "ranks": ranks, "cause": cause}
        return row | {"failed_s": before.failed_at() - self._launched, "time_s": time.time() - self._launched}

    def _announce(self, text: str) -> None:
        """Tell the user: in a notebook below the cell, which says which run it is, else in a line with its name."""
        if live.in_notebook():
            display(Prose(text))
            return
        with suppress(OSError, ValueError):
            tqdm.write(f"[{self.name}] {text}")

    def _write(self, row: dict) -> None:
        """Add a row of the run's own."""
        self._take_rows([(row, line(row))])

    def _take_rows(self, rows: list[tuple[dict, str]]) -> None:
        """Take rows, and their lines for the file."""
        if rows:
            self._file.writelines(text for _, text in rows)
            self._file.flush()
            with self._lock:
                self.rows.extend(row for row, _ in rows)
                self._tell([row for row, _ in rows])

    def _tell(self, rows: list[dict]) -> None:
        for watcher in self._watchers.copy():
            try:
                watcher(self, rows)
            except Exception:
                log.exception("a watcher of run %s failed, and will not be called again", self.name)
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
        attempt, failed = self._attempt, self._failed()
        stopped = self._stopping and not self._broken
        if attempt is not None:
            stopped = bool(attempt.expired()) or (
                stopped and not attempt.at_fault() and (failed or bool(attempt.calls))
            )
        self.status = "stopped" if stopped else "failed" if failed else "finished"

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
        with suppress(Exception):  # of a client that goes just now; the ledger sees it go
            if self._client.status == "running":
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
            errors.note(error, f"It was attempt {self._attempt.number + 1}, and the last: {why}.")
        return error


def _words(error: BaseException) -> str:
    """An error as text, with its notes."""
    notes = getattr(error, "__notes__", None)
    texts = [errors.printable(str(text)) for text in notes] if isinstance(notes, list) else []
    return "\n".join([f"{type(error).__name__}: {errors.message(error)}", *texts])

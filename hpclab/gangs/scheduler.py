"""Scheduler: a ledger of who sits where, so that a gang is admitted whole or not at all; and the ranks' rendezvous.

It lives in the scheduler's event loop and admits without waiting, so no two admissions can interleave. What it has to
say to a gang's kernel goes out on the run's topic, as what the workers say does.

The rendezvous of a gang over several hosts goes over Dask's own connections, and so is encrypted and authenticated as
they are. (torch's TCPStore is neither: whoever reaches its port reads and writes.) The rank's side is `store`.
"""

import asyncio
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Scheduler, SchedulerPlugin, Status

from hpclab import _dask, machine
from hpclab.gangs import wire
from hpclab.gangs.process import ORDER, POOLS, Warmth

TOPIC_SECONDS = 5.0
"""How long the events of an ended run stay with the scheduler: what is still under way would bring its topic back."""
MOST_TURNS = 64
"""Ranks for each CPU, also of a gang that oversubscribes: seating millions would keep the scheduler from all else."""
ASK_SECONDS = 0.02
"""How often to ask again while workers haven't reported which CPUs they may use."""
TELL_SECONDS = 30.0
"""How long to wait for one that lives."""
SILENT_SECONDS = 10.0
"""How long for one that gives no sign of life; Dask's workers give one each half second, of hundreds less often."""


@dataclass(frozen=True)
class Seat:
    """Where a rank sits; known also when the worker has gone."""

    worker: str
    host: str
    """Address of the host, on which its ranks find each other."""
    pool: tuple[str, str]
    """The machine and which of its CPUs; workers that may use the same ones share them."""


@dataclass
class Booking:
    """What a gang asks of the ledger: seats, which are CPUs under workers."""

    run: str
    client: str
    """Id of the Dask client; the gang's seats are free when that is gone."""
    ranks: int
    threads: int
    oversubscribe: bool
    """Whether to be admitted beyond the CPUs that are free."""
    goes_on: bool = False
    """Whether it gets new seats if it loses workers; until then nobody else gets its CPUs."""
    seats: list[Seat] = field(default_factory=list)
    """By rank, once admitted."""

    def workers(self) -> list[str]:
        """Address of each rank's worker."""
        return [seat.worker for seat in self.seats]


def topic(run: str) -> str:
    """Name of the Dask event topic of a run: its rows and prints, and the news from this ledger."""
    return f"hpclab-{run}"


def consult(client: Client, question: Callable[..., Any], *args: Any) -> Any:
    """Put a question to the ledger of a client's cluster, one of its methods; the first question makes it.

    One about seats is answered once all workers, except those that hang, have reported which CPUs they may use.
    """
    warming: Future | None = None
    while True:
        known, answer = client.run_on_scheduler(_answer, question, args)
        if known:
            return answer
        # Aside, since Dask waits until each worker has it.
        warming = warming or aside(client.register_plugin, Warmth())
        if warming.done() and not isinstance(warming.exception(), OSError | TimeoutError):  # of one that has gone
            warming.result()
        time.sleep(ASK_SECONDS)


def _answer(question: Callable[..., Any], args: tuple, dask_scheduler: Scheduler) -> tuple[bool, Any]:
    """Whether all that the answer depends on is known, and the answer."""
    ledger: Any = dask_scheduler.plugins.get(Ledger.name)
    if ledger is None:
        ledger = Ledger(dask_scheduler)
        dask_scheduler.add_plugin(ledger)
        dask_scheduler.handlers["hpclab_rendezvous"] = ledger.rendezvous
        dask_scheduler.handlers["hpclab_clock"] = lambda: time.time()  # asked by workers on other machines
    known = question not in SEATING or not ledger.unknown()
    return known, question(ledger, *args) if known else None


def send(
    client: Client, workers: Collection[str], run: str, order: wire.Order, rank: int | None = None, attempt: int = 0
) -> None:
    """Have workers give ranks of a run an order, or one of them, after the orders that were sent before.

    It waits for the scheduler, and for no worker: one that has gone gets none, and of one that hangs nothing comes.
    """
    whom = {"run": run, "rank": rank, "attempt": attempt}
    client.run_on_scheduler(_send, workers, whom | {"op": ORDER, "encoded": wire.encode(order)})


def _send(workers: Collection[str], message: dict, dask_scheduler: Scheduler) -> None:
    ledger: Any = dask_scheduler.plugins[Ledger.name]
    for worker in workers:
        if worker in ledger.pools:  # it is there, and takes orders
            dask_scheduler.worker_send(worker, message)


def aside(call: Callable, *args: Any) -> Future:
    """Call in a thread that nobody has to wait for, not even this process at its end."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(call(*args))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="hpclab-aside", daemon=True).start()
    return outcome


class Ledger(SchedulerPlugin):
    """Who sits where, and who waits."""

    name = "hpclab-ledger"

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.gangs: dict[str, Booking] = {}
        """Those that are admitted, by run."""
        self.queue: list[Booking] = []
        self.pools: dict[str, machine.Introduction] = {}
        """By worker that has told: its machine, the name of the CPUs there that it may use, their number, and what the
        machine is."""
        self.asked: dict[str, float] = {}
        """Since when others have been to tell."""
        self.shunned: dict[str, float] = {}
        """Workers under which nobody is seated until they are heard after this time; of one that ends soon, never."""
        self.keys: defaultdict[tuple[str, int], _Keys] = defaultdict(_Keys)
        """By run and attempt: what its ranks tell each other."""

    def log_event(self, topic: str, msg: Any) -> None:
        """Take in which CPUs a worker may use; called by Dask for whatever anybody says."""
        if topic == POOLS and msg["worker"] in self.scheduler.workers:  # else it has gone meanwhile
            self.pools[msg["worker"]] = msg["pool"]
            self.advance()

    def unknown(self) -> list[str]:
        """Workers that haven't reported yet which CPUs they may use, and still may."""
        now = time.monotonic()
        return [
            address
            for address, worker in self.scheduler.workers.items()
            if address not in self.pools
            if now - self.asked.setdefault(address, now) < TELL_SECONDS
            if time.time() - worker.last_seen < SILENT_SECONDS
        ]

    def running(self) -> dict[Seat, int]:
        """Threads of each running worker that has reported which CPUs it may use."""
        return {
            Seat(address, worker.host, pool[:2]): worker.nthreads
            for address, worker in self.scheduler.workers.items()
            if worker.status == Status.running and worker.last_seen > self.shunned.get(address, 0)
            if (pool := self.pools.get(address)) is not None
        }

    def cpus(self) -> dict[tuple[str, str], int]:
        """CPUs of each pool."""
        return {pool[:2]: pool[2] for pool in self.pools.values()}

    def most(self, threads: int = 1, beside: Iterable[Booking] = ()) -> int:
        """Ranks that this cluster takes, beside other gangs: each takes a CPU and a thread of a worker per thread."""
        every = sum(self.running().values())
        return len(self._find(Booking("", "", every, threads, oversubscribe=False), beside))

    def admit(self, booking: Booking, wait: bool) -> wire.Seated | wire.Queued | Exception:
        """Seat a gang, or queue it if it may wait; or return the error that says why not."""
        if wrong := self.wrong(booking):
            return ValueError(wrong)
        if booking.oversubscribe:
            self.queue.insert(0, booking)  # it takes no CPU that others wait for
        else:
            self.queue.append(booking)
        self.advance()
        if booking.run in self.gangs or wait:
            # The gang's kernel hears its topic, of which no more than the last event is kept: up to a megabyte.
            self.scheduler.subscribe_topic(topic(booking.run), booking.client)
            _dask.keep_newest_event(self.scheduler, topic(booking.run))
            return self.seated(booking) if booking.run in self.gangs else wire.Queued(place=len(self.queue))
        self.queue.remove(booking)
        return RuntimeError(self.busy(booking))

    def room(self, booking: Booking) -> tuple[int, str]:
        """The most ranks that would fit if no other gang were there, and what forbids this one, or ""."""
        return max(1, self.most(booking.threads)), self.wrong(booking)

    def machines(self) -> dict:
        """The machines of all workers that run, as `machine.together` has them."""
        return machine.together(self.pools[seat.worker] for seat in self.running())

    def shun(self, workers: Iterable[str], for_good: bool) -> None:
        """Seat nobody under workers: for good, as their jobs end soon, or for as long as they hang."""
        for worker in self.scheduler.workers.keys() & set(workers):
            self.shunned[worker] = max(math.inf if for_good else time.time(), self.shunned.get(worker, 0))

    def reseat(self, run: str, sizes: tuple[int, ...], patient: bool) -> wire.Seated | None:
        """Seat an admitted gang again, with the first of these numbers of ranks for which there is room, if any.

        One that oversubscribes finds room anywhere; a `patient` one still waits for the number of workers it had.
        """
        booking = self.gangs.pop(run)
        workers = len(self.running())
        for ranks in sizes:
            again = replace(booking, ranks=ranks)
            if (not patient or workers >= len(set(booking.workers()))) and self.seat(again):
                return self.seated(again)
        self.gangs[run] = booking  # it keeps the seats that are left to it
        return None

    def advance(self) -> None:
        """Admit from the head of the queue for as long as there is room; also for workers that have come."""
        while self.queue and self.seat(self.queue[0]):
            booking = self.queue.pop(0)
            self._tell(booking, self.seated(booking))
        for number, booking in enumerate(self.queue, 1):
            self._tell(booking, wire.Queued(place=number))

    def seat(self, booking: Booking) -> bool:
        """Admit a gang if there is room for all of it."""
        seats = self._find(booking, self.gangs.values())
        if len(seats) < booking.ranks:
            return False
        booking.seats = seats
        self.gangs[booking.run] = booking
        for other in self.gangs.values():
            if self._crowded(other):
                self._tell(other, wire.Crowded())
        return True

    def seated(self, booking: Booking) -> wire.Seated:
        """What the kernel of an admitted gang hears."""
        workers = booking.workers()
        first = self.scheduler.workers[workers[0]]
        hosts = [seat.host for seat in booking.seats]
        machines = {seat.pool[0] for seat in booking.seats}
        return wire.Seated(
            workers=workers,
            hosts=hosts,
            memory=[self.scheduler.workers[worker].memory_limit // workers.count(worker) or None for worker in workers],
            # The folder of a worker is one that only this user can enter. Over several hosts `rendezvous` serves them.
            store=f"{first.local_directory}/{booking.run}" if len(set(hosts)) == 1 else "",
            emulated=self._crowded(booking) or len(set(hosts)) > len(machines),
            machine=machine.together(filter(None, map(self.pools.get, dict.fromkeys(workers)))),
            clock=machine.boot(),
        )

    def release(self, run: str) -> None:
        """Free a gang's seats, or its place in the queue."""
        self.gangs.pop(run, None)
        self.queue = [gang for gang in self.queue if gang.run != run]
        for attempt in [attempt for name, attempt in self.keys if name == run]:
            self.keys.pop((run, attempt)).close()
        _dask.forget_topic(self.scheduler, topic(run), TOPIC_SECONDS)
        self.advance()

    async def rendezvous(self, run: str, attempt: int, question: bytes) -> bytes:
        """Answer a rank that looks for the others of its gang; called by its worker."""
        if run not in self.gangs:
            raise LookupError(f"run {run} has ended")
        [asked] = wire.decode(question)
        assert isinstance(asked, wire.Ask)
        return wire.encode(await self.keys[run, attempt].answer(asked))

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Tell the gangs that have ranks there; called by Dask when a worker has gone."""
        for known in (self.pools, self.asked, self.shunned):
            known.pop(worker, None)
        for gang in self.gangs.values():
            if worker in gang.workers():
                self._tell(gang, wire.Lost(worker=worker))
        self.advance()

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Free what a client held; called by Dask when it has gone, however."""
        for gang in [*self.gangs.values(), *self.queue]:
            if gang.client == client:
                self.release(gang.run)

    def wrong(self, booking: Booking) -> str:
        """What forbids this gang, however long it waited; "" if nothing does."""
        workers, silent = self.running(), self._silent()
        if not workers:
            return silent or "client's cluster has no workers; wait for them with client.wait_for_workers(1)."
        cpus = sum(self.cpus().values())
        if booking.oversubscribe:
            limit = f"exceeds {MOST_TURNS} for each CPU of this cluster; use ranks<={MOST_TURNS * cpus}."
            return f"ranks (={booking.ranks}) {limit}" if booking.ranks > MOST_TURNS * cpus else ""
        most = self.most(booking.threads)
        if booking.ranks <= most:
            return ""
        need, hosts = booking.ranks * booking.threads, len({seat.host for seat in workers})
        ways = [f"ranks<={most}"] * (most > 0) + [f"connect(workers={need})"] * (need <= cpus)
        cluster = f"{len(workers)} workers" + f" on {hosts} hosts" * (hosts > 1)
        return (
            f"ranks (={booking.ranks}) with threads (={booking.threads}) take {need} CPUs; this cluster gives a gang"
            f" {self.most()} ({cluster}, {cpus} CPUs); use"
            f" {', '.join([*ways, 'or oversubscribe=True, which marks rows as emulated'])}.{' ' * bool(silent)}{silent}"
        )

    def _silent(self) -> str:
        """Which workers are here but have reported nothing; or nothing."""
        silent = [address for address in self.scheduler.workers if address not in self.pools]
        if not silent:
            return ""
        return (
            f"{len(silent)} of the workers, at {', '.join(silent[:3])}, have not answered the scheduler on"
            f" {machine.node()}: they hang, or a firewall closes their ports to it; restart them once that is mended."
        )

    def busy(self, booking: Booking) -> str:
        """Why this gang can't start now."""
        held = ", ".join(f"{run} holds {other.ranks * other.threads}" for run, other in self.gangs.items())
        held += f", and the queue has {len(self.queue) - 1} before it" * (len(self.queue) > 1)
        return (
            f"ranks (={booking.ranks}) with threads (={booking.threads}) take {booking.ranks * booking.threads} CPUs,"
            f" and {self.most(beside=self.gangs.values())} of {self.most()} are free now: {held}; stop or await that"
            " run, or launch with wait=True."
        )

    def _find(self, booking: Booking, beside: Iterable[Booking]) -> list[Seat]:
        """Seats for a gang beside others, or for as much of it as there is room for.

        All on the fullest host that takes it, else on as few hosts as do. One that oversubscribes takes the emptiest,
        and CPUs that others have.
        """
        workers = self.running()
        room = _Room(workers, {} if booking.oversubscribe else self.cpus(), booking.threads)
        for other in beside:
            for seat in other.seats:
                if seat.worker in self.scheduler.workers or other.goes_on:  # else it is free
                    room.take(seat, other.threads)
        names = {seat: str(self.scheduler.workers[seat.worker].name) for seat in workers}
        hosts = sorted(
            dict.fromkeys(seat.host for seat in sorted(workers, key=names.__getitem__)), key=room.on, reverse=True
        )
        fitting = [host for host in hosts if room.on(host) >= booking.ranks]
        if fitting and not booking.oversubscribe:
            hosts = fitting[-1:]
        seats: list[Seat] = []
        for host in hosts:
            for _ in range(min(room.on(host), booking.ranks - len(seats))):
                seats.append(room.least(host))
                room.take(seats[-1], booking.threads)
        while booking.oversubscribe and workers and len(seats) < booking.ranks:
            seats.append(room.least())
            room.take(seats[-1], booking.threads)
        return sorted(seats, key=lambda seat: (hosts.index(seat.host), names[seat]))

    def _crowded(self, booking: Booking) -> bool:
        """Whether the gang's CPUs have more ranks than they are."""
        load: Counter = Counter()
        for other in self.gangs.values():
            for seat in other.seats:
                load[seat.pool] += other.threads * (seat.worker in self.scheduler.workers or other.goes_on)
        return any(load[seat.pool] > self.cpus().get(seat.pool, 0) for seat in booking.seats)

    def _tell(self, booking: Booking, news: wire.News) -> None:
        self.scheduler.log_event(topic(booking.run), wire.encode(news))


SEATING = (Ledger.admit, Ledger.room, Ledger.reseat, Ledger.advance, Ledger.machines)
"""Questions whose answer depends on all workers that are there."""


class _Room:
    """What is free under some workers while gangs are seated.

    Parameters
    ----------
    workers : dict of Seat to int
        Threads of each.
    cpus : dict of pool to int
        CPUs of each pool; one that is missing has no bound.
    threads : int
        Of each rank that is to be seated.
    """

    def __init__(self, workers: dict[Seat, int], cpus: dict[tuple[str, str], int], threads: int):
        self.workers = workers
        self.cpus = cpus
        self.threads = threads
        self.ranks = Counter(dict.fromkeys((seat.worker for seat in workers), 0))
        """Of each worker."""
        self.taken: Counter = Counter()
        """Threads, of each host and each pool."""

    def take(self, seat: Seat, threads: int) -> None:
        """Seat one rank."""
        self.ranks[seat.worker] += 1
        self.taken[seat.host] += threads
        self.taken[seat.pool] += threads

    def on(self, host: str) -> int:
        """Ranks for which there is room on a host."""
        here = {seat: threads for seat, threads in self.workers.items() if seat.host == host}
        pools = {seat.pool for seat in here}
        cpus = sum(self.cpus[pool] - self.taken[pool] for pool in pools) if pools <= self.cpus.keys() else math.inf
        return max(0, int(min(sum(here.values()) - self.taken[host], cpus) // self.threads))

    def least(self, host: str | None = None) -> Seat:
        """The worker, of a host or of all, that has the fewest ranks for its threads."""
        here = [seat for seat in self.workers if host in (None, seat.host)]
        return min(here, key=lambda seat: self.ranks[seat.worker] / self.workers[seat])


class _Keys:
    """What the ranks of one attempt tell each other to meet: keys and values, which others wait for."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = asyncio.Event()
        self.closed = False

    def close(self) -> None:
        """Have those who wait give up."""
        self.closed = True
        self.changed.set()

    async def answer(self, asked: wire.Ask) -> wire.Answer:
        """Do what a rank asks, as `store.GangStore` has it."""
        key = next(iter(asked.keys), "")
        answer = wire.Answer(to=asked.number)
        match wire.Do(asked.do):
            case wire.Do.SET:
                self._set(key, asked.body)
            case wire.Do.ADD:
                self._set(key, b"%d" % (int(self.values.get(key, b"0")) + int(asked.body)))
            case wire.Do.COMPARE_SET:
                expected = asked.expected.encode("latin-1")
                if self.values.get(key, b"") == expected:
                    self._set(key, asked.body)
                answer.body = self.values.get(key, expected)
                return answer
            case wire.Do.DELETE:
                answer.result = self.values.pop(key, None) is not None
            case wire.Do.CHECK:
                answer.result = self.values.keys() >= set(asked.keys)
            case wire.Do.COUNT:
                answer.result = len(self.values)
            case wire.Do.WAIT:
                while not self.values.keys() >= set(asked.keys):
                    await self.changed.wait()
                    if self.closed:
                        raise LookupError("its run has ended")
        answer.body = self.values.get(key, b"")
        return answer

    def _set(self, key: str, value: bytes) -> None:
        self.values[key] = value
        self.changed.set()
        self.changed = asyncio.Event()

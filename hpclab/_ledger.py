"""The scheduler's side of gangs: a ledger of who sits where, so that a gang is admitted whole or not at all.

It lives in the scheduler's event loop and never waits, so no two admissions can interleave. What it has to say to a
gang's driver goes out on the run's topic, as what the workers say does.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Scheduler, SchedulerPlugin, Status

from hpclab import machine
from hpclab._agent import Warmth

TOPIC_SECONDS = 5.0
"""How long the events of an ended run stay with the scheduler: what is still under way would bring its topic back."""


@dataclass
class Gang:
    """A gang that asks for seats: CPUs, on one host, under workers that run there."""

    run: str
    client: str
    """Id of the Dask client; the gang's seats are free when that is gone."""
    ranks: int
    threads: int
    oversubscribe: bool
    """Whether to be admitted beyond the CPUs that are free."""
    goes_on: bool = False
    """Whether it is seated anew when workers of its go; until then nobody else gets its CPUs."""
    workers: list[str] = field(default_factory=list)
    """Address of each rank's worker, once admitted."""
    host: str = ""


def topic(run: str) -> str:
    """Name of the Dask event topic of a run: its rows and prints, and the news from this ledger."""
    return f"hpclab-{run}"


def consult(client: Client, question: Callable[..., dict], *args: Any) -> dict:
    """Put a question to the ledger of a client's cluster, one of the functions below; the first question makes it."""
    pools: dict[str, tuple[str, int] | None] = {}
    while True:
        answer = client.run_on_scheduler(_answer, question, args, pools)
        unknown = answer.get("unknown")
        if not unknown:
            return answer
        client.register_plugin(Warmth())  # does nothing on workers that have it
        pools = dict.fromkeys(unknown) | client.run(machine.cpu_pool, workers=unknown, on_error="ignore")


def prepare(ledger: "Ledger") -> dict:
    """Ask for nothing: what ranks start from is made ready in the background."""
    return {}


def admit(ledger: "Ledger", gang: Gang, wait: bool) -> dict:
    """Seat a gang and tell its `seats`, or else its ``place`` in the queue, what is ``wrong`` with it, or ``busy``."""
    if wrong := ledger.wrong(gang):
        return {"wrong": wrong}
    if gang.oversubscribe:
        ledger.queue.insert(0, gang)  # it takes no CPU that others wait for
    else:
        ledger.queue.append(gang)
    ledger.advance()
    if gang.run in ledger.gangs or wait:
        ledger.subscribe(gang)
        return ledger.seats(gang) if gang.run in ledger.gangs else {"place": len(ledger.queue)}
    ledger.queue.remove(gang)
    return {"busy": ledger.busy(gang)}


def room(ledger: "Ledger", gang: Gang) -> dict:
    """Whether a gang would fit if no other were there: ``ranks``, the most that do, and ``wrong``, or None."""
    most = max(1, max(ledger.slots().values(), default=0) // gang.threads)
    return {"ranks": most, "wrong": ledger.wrong(gang)}


def remind(ledger: "Ledger") -> dict:
    """Look whether there is room for those who wait, as workers may have come."""
    ledger.advance()
    return {}


def release(ledger: "Ledger", run: str) -> dict:
    """Free a gang's seats, or its place in the queue."""
    ledger.release(run)
    return {}


def reseat(ledger: "Ledger", run: str, sizes: tuple[int, ...], patient: bool) -> dict:
    """Seat an admitted gang anew, with the first of these numbers of ranks for which there is room; or nothing.

    One that oversubscribes finds room anywhere; a `patient` one waits all the same for as many workers as it had.
    """
    gang = ledger.gangs.pop(run)
    for ranks in sizes:
        again = replace(gang, ranks=ranks, workers=[])
        host = ledger._host_for(again)
        if host is not None and (not patient or ledger.workers(host) >= len(set(gang.workers))):
            ledger._seat(again, host)
            return ledger.seats(again)
    ledger.gangs[run] = gang  # it keeps the seats that are left to it
    return {}


def _answer(question: Callable[..., dict], args: tuple, pools: dict, dask_scheduler: Scheduler) -> dict:
    ledger: Any = dask_scheduler.plugins.get(Ledger.name)
    if ledger is None:
        ledger = Ledger(dask_scheduler)
        dask_scheduler.add_plugin(ledger)
    ledger.pools |= pools
    unknown = [address for address in dask_scheduler.workers if address not in ledger.pools]
    return {"unknown": unknown} if unknown else question(ledger, *args)


class Ledger(SchedulerPlugin):
    """Who sits where, and who waits."""

    name = "hpclab-ledger"

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.gangs: dict[str, Gang] = {}
        self.queue: list[Gang] = []
        self.pools: dict[str, tuple[str, int] | None] = {}
        """By worker: the name of the CPUs it may use, and their number; None if it didn't answer."""

    def subscribe(self, gang: Gang) -> None:
        """Send the gang's driver what is said on its topic, and keep no more than the last of it."""
        self.scheduler.subscribe_topic(topic(gang.run), gang.client)
        # Dask keeps the last thousand events of a topic, of up to a megabyte here, and has no public way to keep fewer.
        self.scheduler._broker._topics[topic(gang.run)].events = deque(maxlen=1)

    def cpus(self) -> dict[str, int]:
        """CPUs of each host; workers that may use the same ones share them."""
        pools: dict[str, dict[str, int]] = {}
        for address, worker in self._running().items():
            if (pool := self.pools.get(address)) is not None:
                pools.setdefault(worker.host, {})[pool[0]] = pool[1]
        return {host: sum(found.values()) for host, found in pools.items()}

    def slots(self) -> dict[str, int]:
        """Ranks of one thread that each host takes: a thread of a worker and a CPU for each."""
        threads: dict[str, int] = {}
        for worker in self._running().values():
            threads[worker.host] = threads.get(worker.host, 0) + worker.nthreads
        return {host: min(cpus, threads[host]) for host, cpus in self.cpus().items()}

    def load(self, host: str) -> int:
        """Seats that are taken on a host; those under a worker that has gone are free, unless the gang will go on."""
        there = self.scheduler.workers
        return sum(
            gang.threads
            for gang in self.gangs.values()
            if gang.host == host
            for address in gang.workers
            if address in there or gang.goes_on
        )

    def workers(self, host: str) -> int:
        """Workers that run on a host."""
        return sum(worker.host == host for worker in self._running().values())

    def advance(self) -> None:
        """Admit from the head of the queue for as long as there is room."""
        while self.queue and (host := self._host_for(self.queue[0])) is not None:
            gang = self.queue.pop(0)
            self._seat(gang, host)
            self._tell(gang, self.seats(gang))
        for number, gang in enumerate(self.queue, 1):
            self._tell(gang, {"place": number})

    def seats(self, gang: Gang) -> dict:
        """What an admitted gang is told."""
        first = self.scheduler.workers[gang.workers[0]]
        store = f"{first.local_directory}/{gang.run}"  # in a folder that only this user can enter
        memory = [
            self.scheduler.workers[worker].memory_limit // gang.workers.count(worker) or None for worker in gang.workers
        ]
        return {"workers": gang.workers, "emulated": self._crowded(gang.host), "store": store, "memory": memory}

    def release(self, run: str) -> None:
        """Free what a run holds."""
        self.gangs.pop(run, None)
        self.queue = [gang for gang in self.queue if gang.run != run]
        self.scheduler.loop.call_later(TOPIC_SECONDS, self.scheduler._broker._topics.pop, topic(run), None)
        self.advance()

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Tell the gangs that have ranks there; called by Dask when a worker has gone."""
        self.pools.pop(worker, None)
        for gang in self.gangs.values():
            if worker in gang.workers:
                self._tell(gang, {"lost": worker})
        self.advance()

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Free what a client held; called by Dask when it has gone, however."""
        for gang in [*self.gangs.values(), *self.queue]:
            if gang.client == client:
                self.release(gang.run)

    def wrong(self, gang: Gang) -> str | None:
        """What forbids this gang, however long it waited; None if nothing does."""
        slots = self.slots()
        if not slots:
            return "client has a cluster without workers; wait for them with client.wait_for_workers(1)."
        host = max(slots, key=lambda host: slots[host])
        need, most, cpus = gang.ranks * gang.threads, slots[host] // gang.threads, self.cpus()[host]
        if gang.oversubscribe or need <= slots[host]:
            return None
        here = [worker for worker in self._running().values() if worker.host == host]
        ways = [f"ranks<={most}"] * (most > 0) + [f"connect(workers={need})"] * (need <= cpus)
        return (
            f"ranks (={gang.ranks}) with threads (={gang.threads}) take {need} CPUs; this cluster gives a gang"
            f" {slots[host]} ({len(here)} workers, {cpus} CPUs); use"
            f" {', '.join([*ways, 'or oversubscribe=True, whose rows say emulated'])}."
        )

    def busy(self, gang: Gang) -> str:
        """What stands in this gang's way for now."""
        slots = self.slots()
        free = max(slots[host] - self.load(host) for host in slots)
        held = ", ".join(f"{run} holds {len(other.workers) * other.threads}" for run, other in self.gangs.items())
        held += f", and {len(self.queue) - 1} wait before it" * (len(self.queue) > 1)
        return (
            f"ranks (={gang.ranks}) with threads (={gang.threads}) take {gang.ranks * gang.threads} CPUs, and {free} of"
            f" {max(slots.values())} are free now: {held}; stop or await that run, or launch with wait=True."
        )

    def _host_for(self, gang: Gang) -> str | None:
        """The fullest host that still takes all of a gang; to one that oversubscribes, the emptiest."""
        free = {host: slots - self.load(host) for host, slots in self.slots().items()}
        if gang.oversubscribe:
            return max(free, key=lambda host: free[host], default=None)
        fitting = [host for host in free if free[host] >= gang.ranks * gang.threads]
        return min(fitting, key=lambda host: free[host], default=None)

    def _seat(self, gang: Gang, host: str) -> None:
        """Give each rank the worker that has the fewest ranks for its threads; then count ranks along the workers."""
        here = {address: worker for address, worker in self._running().items() if worker.host == host}
        ranks = dict.fromkeys(here, 0)
        for other in self.gangs.values():
            for address in other.workers:
                if address in ranks:
                    ranks[address] += 1
        for _ in range(gang.ranks):
            address = min(here, key=lambda address: ranks[address] / here[address].nthreads)
            ranks[address] += 1
            gang.workers.append(address)
        gang.workers.sort(key=lambda address: str(here[address].name))
        gang.host = host
        self.gangs[gang.run] = gang
        for other in self.gangs.values():
            if other.host == host and self._crowded(host):
                self._tell(other, {"crowded": True})

    def _crowded(self, host: str) -> bool:
        return self.load(host) > self.cpus().get(host, 0)

    def _running(self) -> dict:
        return {address: w for address, w in self.scheduler.workers.items() if w.status == Status.running}

    def _tell(self, gang: Gang, news: dict) -> None:
        self.scheduler.log_event(topic(gang.run), news)

"""A network that one can dial: what averaging gradients over it costs, and its emulation inside real training."""

import dataclasses
import math
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpclab._arguments import one_of
from hpclab.gangs.rank import emulate
from hpclab.pages import Said

Array = NDArray[np.float64]
Hook = Callable[[Any, Any], Any]
"""Given DDP's state and a bucket, returns a future."""

FLOOR = 2.0
"""How many times as slow as this machine's own all-reduce an emulated one must be: less would be the machine's time."""
SLOTS = 1024
"""All-reduces of which the ranks' times are kept; no rank is ever further ahead of another."""
WARM_ROUNDS = 3
"""Rounds of all-reduces that aren't counted when they are timed."""
SPIN_SECONDS = 2e-4
"""How long before its end a wait no longer sleeps: a sleep is some tenths of a millisecond too long."""


@dataclass(frozen=True)
class Network(Said):
    """A network between ranks, by the alpha-beta model: a message takes a latency, plus a time for its bytes.

    Parameters
    ----------
    latency : float, default 50e-6
        Seconds that every message takes, whatever its size (alpha).
    bandwidth : float, default 1e9
        Bits per second of each rank's link, each way (8 / beta); 1e9 is Gigabit Ethernet.
    topology : str, default "ring"
        How gradients are summed: "ring" (reduce-scatter and all-gather around a ring), "tree" (a binomial tree up and
        down), "halving-doubling", or "parameter-server" (all ranks send to `servers` links, and fetch from them).
    servers : int, default 1
        Number of parameter servers, which share the parameters evenly.
    ranks : int, optional
        When emulated, cost what this many ranks would pay. Default: the real number of ranks.

    Notes
    -----
    Costs are those of Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH
    (2005), without the time of the additions; the busiest server's link carries the bytes of all ranks, both ways
    at once.

    Examples
    --------
    >>> slow = Network(latency=1e-3, bandwidth=1e9)
    >>> float(slow.allreduce_s(1e6, ranks=2))
    0.01
    """

    latency: float = 50e-6
    bandwidth: float = 1e9
    topology: str = "ring"
    servers: int = 1
    ranks: int | None = None

    def __post_init__(self) -> None:
        if not self.latency >= 0:
            raise ValueError(f"latency (={self.latency!r}) must be seconds, at least 0.")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth (={self.bandwidth!r}) must be bits a second, above 0.")
        one_of("topology", self.topology, _COSTS)
        if not self.servers >= 1:
            raise ValueError(f"servers (={self.servers!r}) must be at least 1.")
        if self.ranks is not None and not self.ranks >= 1:
            raise ValueError(f"ranks (={self.ranks!r}) must be at least 1.")

    def __str__(self) -> str:
        servers = f" of {self.servers} servers" if self.servers > 1 else ""
        ranks = f" for {self.ranks} ranks" if self.ranks else ""
        return f"{self.topology}{servers}{ranks}, {1e3 * self.latency:.3g} ms, {self.bandwidth / 1e9:.3g} Gb/s"

    def allreduce_s(self, nbytes: ArrayLike, ranks: ArrayLike, largest: float = 0.0) -> Array:
        """Seconds that an all-reduce takes.

        Parameters
        ----------
        nbytes, ranks : array_like
            Bytes of the gradients, and number of ranks; broadcast against each other.
        largest : float, default 0
            Bytes of the largest tensor, which can't be split between parameter servers.

        Raises
        ------
        ValueError
            If `nbytes` is below 0, or `ranks` below 1.
        """
        ranks, nbytes = np.asarray(ranks, dtype=float), np.asarray(nbytes, dtype=float)
        for name, value, least in (("ranks", ranks, 1), ("nbytes", nbytes, 0), ("largest", np.asarray(largest), 0)):
            if value.size and not value.min() >= least:
                raise ValueError(f"{name} (={value.min():g}) must be >= {least}.")
        messages, load = _COSTS[self.topology](ranks, nbytes, self.servers, largest)
        return np.where(ranks > 1, messages * self.latency + load * 8 / self.bandwidth, 0.0)

    def allgather_s(self, nbytes: ArrayLike, ranks: ArrayLike) -> Array:
        """Seconds until every rank has the parts of all, of so many bytes together: half an all-reduce.

        Parameters
        ----------
        nbytes, ranks : array_like
            Bytes of all parts together, and number of ranks; broadcast against each other.

        Raises
        ------
        ValueError
            If the topology sums while it sends, so that no half of it gathers; see also `allreduce_s`.
        """
        if self.topology not in GATHERING:
            known = ", ".join(map(repr, GATHERING))
            raise ValueError(f"topology (={self.topology!r}) can't gather parts without a sum; use one of {known}.")
        return self.allreduce_s(nbytes, ranks) / 2

    def slower(self, factor: float) -> "Network":
        """The same with every message this many times as long."""
        return dataclasses.replace(self, latency=self.latency * factor, bandwidth=self.bandwidth / factor)

    def attach(self, model: Any) -> None:
        """Have a DistributedDataParallel model average its gradients over this network; call it on every rank.

        The real process group averages the gradients, but hands them over only when this network would have finished:
        after the last rank was ready, and the link was free of the bucket before. The run's rows then say *emulated*. A
        single rank averages nothing, so nothing changes for it.

        Parameters
        ----------
        model : torch.nn.parallel.DistributedDataParallel

        Raises
        ------
        ValueError
            If the network takes less than `FLOOR` times what this machine itself takes: emulation can only add time.
        """
        import torch.distributed as dist

        if (ranks := self.ranks or dist.get_world_size()) > 1:
            nbytes = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
            self._refuse_too_fast([nbytes], float(self.allreduce_s(nbytes, ranks)))
            link = _Link(_sum, lambda bucket: float(self.allreduce_s(bucket.buffer().nbytes, ranks)))
            model.register_comm_hook(None, link.average)

    def around(self, hook: Hook, messages: list[float], whole_s: float, seconds: Callable[[Any], float]) -> Hook:
        """A hook of DDP, as by `attach`, for one that sends other messages than one sum a bucket; call on every rank.

        Its own work, such as compressing, takes the time that it takes; what its messages take on this machine is
        replaced by what they would take on this network.

        Parameters
        ----------
        hook : callable
            Given DDP's state and a bucket, returns the future of the averaged bucket.
        messages : list of float
            Bytes of each of the messages, one after the other, of all gradients in one bucket.
        whole_s : float
            Seconds that these take on this network.
        seconds : callable
            Given a bucket, returns the seconds that its messages take on this network.

        Raises
        ------
        ValueError
            As for `attach`.
        """
        import torch.distributed as dist

        if (self.ranks or dist.get_world_size()) == 1:
            return hook
        own_s = self._refuse_too_fast(messages, whole_s, min)  # what is waited for a CPU isn't the messages'
        return _Link(hook, seconds, own_s).average

    def _refuse_too_fast(
        self, messages: list[float], asked: float, typical: Callable[[list[float]], float] = statistics.median
    ) -> float:
        """Seconds that messages of so many bytes take on this machine, if this network can be emulated here."""
        import torch
        import torch.distributed as dist

        rounds = [sum(allreduce_seconds(map(int, messages))) for _ in range(WARM_ROUNDS + 10)]
        floor = torch.tensor(typical(rounds[WARM_ROUNDS:]))
        dist.all_reduce(floor, dist.ReduceOp.MAX)
        least = FLOOR * floor.item()
        if asked < least:
            raise ValueError(
                f"{self} averages {sum(messages):,.0f} bytes on {self.ranks or dist.get_world_size()} ranks in"
                f" {asked * 1e3:.2f} ms; this machine itself takes {floor.item() * 1e3:.2f} ms, and can emulate nothing"
                f" below {least * 1e3:.2f} ms: raise latency, lower bandwidth, or take a larger model."
            )
        return floor.item()


@dataclass(frozen=True)
class Hierarchy:
    """Nodes of several ranks: gradients are summed inside each node first, then between the nodes.

    Parameters
    ----------
    inside, between : Network
        Links of the ranks of a node, and of the nodes.
    per_node : int
        Ranks of a node; a node's link to others is one for all of them.
    """

    inside: Network
    between: Network
    per_node: int

    def __post_init__(self) -> None:
        if not self.per_node >= 1:
            raise ValueError(f"per_node (={self.per_node!r}) must be at least 1.")

    def slower(self, factor: float) -> "Hierarchy":
        """The same with every message this many times as long."""
        return dataclasses.replace(self, inside=self.inside.slower(factor), between=self.between.slower(factor))

    def allreduce_s(self, nbytes: ArrayLike, ranks: ArrayLike, largest: float = 0.0) -> Array:
        """Seconds that an all-reduce takes; see `Network.allreduce_s`."""
        ranks = np.asarray(ranks, dtype=float)
        nodes = np.ceil(ranks / self.per_node)
        inside = self.inside.allreduce_s(nbytes, np.minimum(ranks, self.per_node), largest)
        return inside + self.between.allreduce_s(nbytes, nodes, largest)


def _depth(ranks: Array) -> Array:
    return np.ceil(np.log2(np.maximum(ranks, 1)))


GATHERING = ("ring", "halving-doubling")
"""Topologies whose all-reduce is a reduce-scatter and an all-gather."""
_COSTS: dict[str, Callable[[Array, Array, int, float], tuple[Any, Array]]] = {
    "ring": lambda p, m, servers, largest: (2 * (p - 1), 2 * (p - 1) / p * m),
    "tree": lambda p, m, servers, largest: (2 * _depth(p), 2 * _depth(p) * m),
    "halving-doubling": lambda p, m, servers, largest: (2 * _depth(p), 2 * (p - 1) / p * m),
    "parameter-server": lambda p, m, servers, largest: (2.0, np.maximum(m, p * np.maximum(m / servers, largest))),
}
"""Messages one after the other, and the bytes each way of the busiest link."""


class _Link:
    """This rank's end of an emulated network: a link that is busy until a time, served by a thread of its own.

    Parameters
    ----------
    hook : callable
        What really averages a bucket.
    seconds : callable
        Given a bucket, returns what the network takes for it.
    own_s : float, default inf
        Of the time until the hook is done, what its messages take, in seconds; the rest is its own work. The plain sum
        has none.
    """

    def __init__(self, hook: Hook, seconds: Callable[[Any], float], own_s: float = math.inf):
        import torch.distributed as dist

        self.hook, self.seconds, self.own_s = hook, seconds, own_s
        self.rank = dist.get_rank()
        self.count = 0
        self.free = 0.0
        """When the link has done all that it was given."""
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        self.ready = _shared(self.rank, (dist.get_world_size(), SLOTS))
        """When each rank was ready for each all-reduce, on the host's one monotonic clock."""
        emulate()
        self.handover = min(_handover_s() for _ in range(9))
        """Seconds from the end of a wait until DDP goes on, at least: on a busy machine it takes longer, never less."""
        threading.Thread(target=self._serve, daemon=True).start()

    def average(self, state, bucket):  # DDP refuses annotations that are not its own
        """DDP's communication hook: returns at once, so that the backward pass goes on."""
        import torch

        self.ready[self.rank, self.count % SLOTS] = time.perf_counter()
        seconds = self.seconds(bucket)
        future: torch.futures.Future = torch.futures.Future()
        self.queue.put((self.count, seconds, self.hook(state, bucket), future))
        self.count += 1
        return future

    def _serve(self) -> None:
        while True:
            number, seconds, work, future = self.queue.get()
            try:
                gradients = work.wait()  # from here on all ranks have told when they were ready
                worked = time.perf_counter() - self.own_s
                self.free = max(self.free, self.ready[:, number % SLOTS].max(), worked) + seconds
                _wait_until(self.free - self.handover)
                future.set_result(gradients)
            except Exception as error:
                future.set_exception(error)


def _sum(_state, bucket):
    """The plain hook: the mean of a bucket over the ranks."""
    import torch.distributed as dist

    size = dist.get_world_size()
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0].div_(size))


def allreduce_seconds(sizes: Iterable[int]) -> list[float]:
    """Seconds that this rank is in each all-reduce of so many bytes, one after the other, each begun together."""
    import torch
    import torch.distributed as dist

    seconds = []
    for size in sizes:
        tensor = torch.zeros(size // 4)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - start)
    return seconds


def _handover_s() -> float:
    """Seconds from the end of one thread's wait until another, which waits for its result as DDP does, goes on."""
    import torch

    future: torch.futures.Future = torch.futures.Future()
    end = time.perf_counter() + 2 * SPIN_SECONDS

    def serve() -> None:
        _wait_until(end)
        future.set_result(None)

    threading.Thread(target=serve).start()
    future.wait()
    return time.perf_counter() - end


def _wait_until(end: float) -> None:
    while (left := end - time.perf_counter()) > 0:
        time.sleep(max(0.0, left - SPIN_SECONDS))


def _shared(rank: int, shape: tuple[int, int]) -> Array:
    """An array that all ranks of this host share; it has no name, and goes with the last of them."""
    import torch.distributed as dist

    path = [""]
    if rank == 0:
        handle, path[0] = tempfile.mkstemp()
        os.close(handle)
    dist.broadcast_object_list(path, src=0)
    shared = np.memmap(path[0], np.float64, "r+", shape=shape)  # each rank makes the file as long as need be
    dist.barrier()
    if rank == 0:
        os.unlink(path[0])
    return shared

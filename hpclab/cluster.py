"""Start a cluster, or join one: `connect` gives a Dask client that closes what it opened."""

import signal
import sys
import threading

import dask
from dask.utils import format_bytes, parse_bytes
from distributed import Client, LocalCluster, Security, Worker, WorkerPlugin

from hpclab import machine
from hpclab._ledger import consult, prepare
from hpclab.runs import stop_all

# Dask samples the stacks of each worker 100 times a second and ticks 50 times: on a machine whose CPUs all train, every
# wake-up makes a rank late, and the others wait for it.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "200ms",
}


LEAST_MEMORY = 128 * 2**20
"""Bytes below which Dask would pause or restart a worker that does nothing."""


class ClusterClient(Client):
    """A `distributed.Client` whose `close` stops its runs, and ends the cluster that `connect` made for it, if any."""

    def close(self, *args, **kwargs):
        """Stop the runs, close the client, then its cluster; see `distributed.Client.close`."""
        cluster = self.cluster
        if sys.is_finalizing():  # no thread is left that could close anything; the workers see this process go
            return None
        try:
            stop_all(self)
            return super().close(*args, **kwargs)
        finally:
            if cluster is not None:
                _close(cluster)


def _close(cluster: LocalCluster) -> None:
    """Close a cluster, whole, also under Ctrl-C: what Dask's `close` left halfway could never be closed."""
    closing = threading.Thread(target=cluster.close, name="hpclab-close")
    closing.start()
    try:
        closing.join()
    except KeyboardInterrupt:
        closing.join()
        raise


def connect(
    where: str = "local",
    *,
    workers: int | None = None,
    memory: int | str | None = None,
    security: Security | bool = True,
) -> ClusterClient:
    """Start a cluster on this machine, or join a running one.

    Parameters
    ----------
    where : str, default "local"
        "local" starts one worker process for each CPU that this machine really gives (affinity and cgroups counted).
        An address such as "tls://head:8786" joins the scheduler there.
    workers : int, optional
        Number of workers, each with one thread and so with room for one rank. Default: what fits (`machine.fits`).
        More workers than CPUs are allowed; what they measure is then marked as emulated.
    memory : int or str, optional
        Memory of each worker, in bytes or as "2GB". Default: an equal share of what this machine gives.
    security : bool or distributed.Security, default True
        True encrypts and authenticates every connection with fresh certificates, as loopback isn't private on a shared
        host; False turns that off. For a "tls://" address, the Security object of that scheduler; for one that isn't
        encrypted, False.

    Returns
    -------
    ClusterClient
        A `distributed.Client`. Use it in a `with` block, or call its `close`: both end the cluster it started. In a
        script, call this under ``if __name__ == "__main__":``, since workers import the script (as Dask's own clusters
        do).

    Raises
    ------
    ValueError
        If an argument can't be met by this machine; the message says what can.
    OSError
        If no scheduler answers at the address.
    """
    if "://" in where:
        return _join(where, workers, memory, security)
    if where != "local":
        raise ValueError(f"where (={where!r}) must be 'local' or the address of a Dask scheduler, 'tls://host:port'.")
    workers, limit = _fit(workers, memory)
    with dask.config.set(QUIET):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=limit,
            security=security or None,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        )
    try:
        client = ClusterClient(cluster)
        client.register_plugin(IgnoreInterrupt())
        consult(client, prepare)
        return client
    except BaseException:
        _close(cluster)
        raise


class IgnoreInterrupt(WorkerPlugin):
    """Ctrl-C in a terminal reaches the workers too; only the client shall act on it, and then end them in order."""

    name = "hpclab-ignore-interrupt"

    def setup(self, worker: Worker) -> None:
        """Ignore SIGINT from now on; called in the main thread of each worker, also of one that is restarted."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _join(address: str, workers: int | None, memory: int | str | None, security: Security | bool) -> ClusterClient:
    for name, value in (("workers", workers), ("memory", memory)):
        if value is not None:
            raise ValueError(f"{name} (={value!r}) can't be chosen for a running cluster ({address}); leave it out.")
    if not address.startswith("tls://") and security is not False:
        raise ValueError(
            f"security (={security!r}) can't be had at {address}, which is not encrypted: who can listen can also run"
            " code. To join it all the same, use security=False."
        )
    if address.startswith("tls://") and not isinstance(security, Security):
        raise ValueError(f"security (={security!r}) must be the distributed.Security of the scheduler at {address}.")
    return ClusterClient(address, security=security if isinstance(security, Security) else None)


def _fit(workers: int | None, memory: int | str | None) -> tuple[int, int]:
    """Check the wish against the machine, and return workers and bytes a worker."""
    there = machine.memory()
    most = max(1, (there - machine.BASE_MEMORY) // machine.RANK_MEMORY)
    if workers is None:
        workers = machine.fits()
    elif not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers (={workers!r}) must be a whole number >= 1; this machine has {machine.cpus()} CPUs.")
    elif workers > most:
        raise ValueError(
            f"workers (={workers}) need {format_bytes(machine.RANK_MEMORY)} each, and the notebook"
            f" {format_bytes(machine.BASE_MEMORY)}: more than the {format_bytes(there)} of this machine;"
            f" use workers<={most}."
        )
    if memory is None:
        return workers, there // workers
    try:
        limit = parse_bytes(memory)
    except ValueError:
        raise ValueError(f"memory (={memory!r}) must be bytes or a size such as '2GB'.") from None
    if limit * workers > there or limit < LEAST_MEMORY:
        raise ValueError(
            f"memory (={memory!r}) for each of {workers} workers must be at least {format_bytes(LEAST_MEMORY)}, which a"
            f" worker takes idle, and at most {format_bytes(there // workers)}, a share of the {format_bytes(there)} of"
            " this machine."
        )
    return workers, limit

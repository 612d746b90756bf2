"""Clusters: on this machine, in a job queue, or a running one, behind one call. It imports Dask when that is called."""

import gc
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hpclab import later, loaded

if TYPE_CHECKING:
    from distributed import Security

    from hpclab.cluster.client import ClusterClient as ClusterClient
    from hpclab.cluster.interrupt import IgnoreInterrupt as IgnoreInterrupt
    from hpclab.gangs.host import KernelZygote
    from hpclab.slurm.private import Slurm

__getattr__ = later(__name__, dict.fromkeys(("ClusterClient", "IgnoreInterrupt"), "cluster.client"))


def connect(
    where: "str | Slurm" = "local",
    *,
    workers: int | None = None,
    memory: int | str | None = None,
    security: "Security | bool" = True,
    **options: Any,
) -> "ClusterClient":
    """Start a cluster on this machine or on a job queue, or join a running one.

    Parameters
    ----------
    where : str or hpclab.slurm.Slurm, default "local"
        "local" starts one worker process for each CPU that this machine really gives you (by affinity and cgroups).
        A job queue ("slurm", "pbs", "sge", "lsf", "oar", "htcondor" or "moab") or the name of a site's profile
        (`hpclab.sites`) starts each worker in its own job. So does a private Slurm; "slurm" uses one that is up
        if the site has none.
        An address such as "tls://head:8786" joins the scheduler there.
    workers : int, optional
        Number of workers. Default: what fits (`machine.fits`); on a queue, 2. On this machine, each has one thread and
        so room for one rank. You may start more workers than CPUs: what they measure is then marked as emulated.
    memory : int or str, optional
        Memory of each worker, in bytes or as "2GB". Default: an equal share of what this machine gives; on a queue,
        2 GB.
    security : bool or distributed.Security, default True
        True encrypts and authenticates every connection with fresh certificates, because loopback isn't private on a
        shared host; False turns that off. For a "tls://" address, pass the Security object of that scheduler; for an
        unencrypted address, False.
    **options
        For a queue: ``cores`` (1), ``walltime`` ("00:30:00"), ``queue``, ``account``, ``resources``, ``disk``,
        ``directives``, ``prologue``, ``env``, ``interface``, ``folder``, ``timeout`` (600), ``private`` (False). The
        fields of `hpclab.queues.Request` explain them; not every queue has all. They override a profile's, and both
        override Dask's own ``jobqueue.yaml``, which hpclab never writes. Workers find modules in the working folder;
        add other folders with ``env={"PYTHONPATH": ...}``.

    Returns
    -------
    ClusterClient
        A `distributed.Client`. Use it in a `with` block, or call its `close`: both end the cluster it started. In a
        script, call `connect` under ``if __name__ == "__main__":``, because workers import the script (as with Dask's
        own clusters). Lost workers are replaced, on a queue by a new job; ``client.cluster.scale`` and ``adapt`` change
        their number.

    Raises
    ------
    ValueError
        If this machine or this Slurm can't meet an argument; the message says what it can meet.
    OSError
        If no scheduler answers at the address, it refuses this client, or there is no such queue; the message says why.
    TimeoutError
        If not all workers come within `timeout` seconds; their jobs are cancelled.
    RuntimeError
        If a queue refuses a job, or a worker dies again and again; the message has the end of its log. If no worker on
        this machine starts.

    See Also
    --------
    hpclab.queues.script : Shows the job script, without starting anything.
    """
    zygote = _start_zygote() if where == "local" else None
    try:
        return _client().start(where, workers, memory, security, options, zygote)
    except BaseException:
        if zygote is not None:
            zygote.close()
        raise


def _start_zygote() -> "KernelZygote | None":
    """Have the zygote of a local cluster import torch while this process imports Dask; None where there is none."""
    from hpclab import machine
    from hpclab.gangs import host

    # A worker that imports an unguarded script comes here too; `start` tells it so, by the same sign.
    if not host.FORK or machine.imported_by_child():
        return None
    with suppress(OSError, RuntimeError):  # then the workers start it, or say what keeps them from it
        return host.KernelZygote()
    return None


def _client() -> Any:
    """The module with the rest, which imports Dask: sooner by a sixth without passes of the collector."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return loaded("cluster.client")
    finally:
        if collects:
            gc.enable()

"""What `connect` does once Dask is imported, and gives: a client that closes what it opened."""

import os
import sys
import threading
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import format_bytes
from distributed import Client, Security, SpecCluster

from hpclab import _namesakes, machine
from hpclab._arguments import size, whole_number
from hpclab.cluster import steady
from hpclab.cluster.healing import LocalCluster, root
from hpclab.cluster.interrupt import IgnoreInterrupt
from hpclab.cluster.tls import refusal
from hpclab.gangs.run import stop_all
from hpclab.gangs.scheduler import Ledger, aside, consult
from hpclab.queues import LEAST_MEMORY, QUIET

if TYPE_CHECKING:
    from hpclab.gangs.host import KernelZygote
    from hpclab.slurm.private import Slurm

REGISTER_SECONDS = 5.0
"""How long `connect` waits for workers to ignore Ctrl-C."""
GUARD = 'In a script, put what it does under `if __name__ == "__main__":`, since every worker imports the script.'


class ClusterClient(Client):
    """A `distributed.Client` whose `close` stops its runs, and ends the cluster that `connect` made for it, if any."""

    def __del__(self):
        """Close one that was forgotten, in a thread: the collector may run while this one holds a lock of Dask's."""
        if getattr(self, "status", "closed") not in ("closed", "newly-created") and not sys.is_finalizing():
            threading.Thread(target=self.close, name="hpclab-forgotten", daemon=True).start()

    def _ipython_display_(self) -> None:
        from hpclab.cluster import card

        card.show(self)

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


def _close(cluster: SpecCluster) -> None:
    """Close a cluster, whole, also under Ctrl-C: what Dask's `close` left halfway could never be closed."""
    closing = threading.Thread(target=cluster.close, name="hpclab-close")
    closing.start()
    try:
        closing.join()
    except KeyboardInterrupt:
        closing.join()
        raise


def start(
    where: "str | Slurm",
    workers: int | None,
    memory: int | str | None,
    security: Security | bool,
    options: dict[str, Any],
    zygote: "KernelZygote | None",
) -> ClusterClient:
    """Start a cluster or join one, as `hpclab.cluster.connect` tells, which has started the zygote of a local one."""
    sizing = {"workers": workers, "memory": memory}
    wishes = {name: value for name, value in sizing.items() if value is not None}
    if not isinstance(where, str) or (where != "local" and "://" not in where):
        return _submit(where, security, wishes | options)
    for name, value in options.items():
        raise ValueError(f"{name} (={value!r}) is an option of job queues; {where!r} has workers, memory, security.")
    if where != "local":
        return _join(where, wishes, security)
    workers, limit = _fit(workers, memory)
    if machine.imported_by_child():
        sys.exit(f"A worker that imports {sys.argv[0]} reached hpclab.connect(). {GUARD}")
    _spare_main()
    try:
        with dask.config.set(QUIET), machine.every_cpu():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=limit,
                security=steady.Security.temporary() if security is True else security or None,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                zygote=zygote,
            )
    except (OSError, RuntimeError) as error:
        cause = root(error)
        if "Nanny" not in str(cause):  # Dask's word for what watches a worker, and saw it end
            if remedy := machine.remedy(cause):
                error.add_note(remedy)
            raise
        why = _namesakes.blame() or (GUARD if _main_is_unguarded() else "")
        words = f"no worker could be started ({cause}); what they wrote is above. {why}"
        raise RuntimeError(words.rstrip()) from None
    return _client(cluster)


def _spare_main() -> None:
    """Have workers not import a `__main__` that is no module: what ``python -`` has read, or a notebook's names.

    The latter may hold a ``__file__``, by which multiprocessing takes them for a script; but it asks for the name in
    ``__spec__`` first, and one of this name is left alone, as that of a package is.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and script is not None:
        shell = sys.modules.get("IPython")  # where it runs, it is loaded
        # A program that %run runs there stays as it is: its own multiprocessing needs it.
        notebook = shell is not None and shell.get_ipython() is not None and not script.endswith(".py")
        if notebook or not os.path.isfile(script):
            main.__spec__ = ModuleSpec("__main__", getattr(main, "__loader__", None))


def _main_is_unguarded() -> bool:
    """Whether workers that start import the program which runs here, and it never asks whether it is imported."""
    main = sys.modules["__main__"]
    spec, script = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if script is None or (spec is not None and spec.name.rpartition(".")[2] == "__main__"):
        return False
    with suppress(OSError):
        return b"__main__" not in Path(script).read_bytes()
    return False


def _submit(where: "str | Slurm", security: Security | bool, options: dict[str, Any]) -> ClusterClient:
    # Here, as this import lets dask-jobqueue put a template into the user's configuration of Dask.
    from hpclab.cluster import jobs

    cluster = jobs.submit(where, security, options)
    try:
        cluster.wait()
    except BaseException:
        _close(cluster)
        raise
    return _client(cluster)


def _client(cluster: SpecCluster) -> ClusterClient:
    try:
        client = ClusterClient(cluster)
        ignoring = aside(client.register_plugin, IgnoreInterrupt())
        consult(client, Ledger.advance)  # nobody waits yet, but what ranks start from is made ready meanwhile
        with suppress(OSError, TimeoutError):  # of a worker that has just died, or hangs
            ignoring.result(REGISTER_SECONDS)
        return client
    except BaseException:
        _close(cluster)
        raise


def _join(address: str, wishes: dict[str, Any], security: Security | bool) -> ClusterClient:
    for name, value in wishes.items():
        raise ValueError(f"{name} (={value!r}) can't be chosen for a running cluster ({address}); leave it out.")
    if not address.startswith("tls://") and security is not False:
        raise ValueError(
            f"security (={security!r}) can't be had at {address}, which is not encrypted: anyone who can listen can"
            " also run code. To join it anyway, use security=False."
        )
    if address.startswith("tls://") and not isinstance(security, Security):
        raise ValueError(f"security (={security!r}) must be the distributed.Security of the scheduler at {address}.")
    certificates = security if isinstance(security, Security) else None
    if why := refusal(address, certificates):
        raise OSError(f"the scheduler at {address} doesn't let this client in: {why}.")
    return ClusterClient(address, security=certificates)


def _fit(workers: int | None, memory: int | str | None) -> tuple[int, int]:
    """Check the wish against the machine, and return workers and bytes a worker."""
    total = machine.memory()
    most = machine.most()
    try:
        workers = machine.fits() if workers is None else whole_number("workers", workers)
    except ValueError as error:
        raise ValueError(f"{str(error)[:-1]}; this machine has {machine.cpus()} CPUs.") from None
    if workers > most:
        raise ValueError(
            f"workers (={workers}) need {format_bytes(machine.RANK_MEMORY)} each, and the notebook"
            f" {format_bytes(machine.BASE_MEMORY)}: more than the {format_bytes(total)} of this machine;"
            f" use workers<={most}."
        )
    if memory is None:
        return workers, total // workers
    limit = size("memory", memory)
    if limit * workers > total or limit < LEAST_MEMORY:
        raise ValueError(
            f"memory (={memory!r}) for each of {workers} workers must be at least {format_bytes(LEAST_MEMORY)}, which a"
            f" worker takes idle, and at most {format_bytes(total // workers)}, a share of the {format_bytes(total)} of"
            " this machine."
        )
    return workers, limit

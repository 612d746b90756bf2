"""A cluster in a notebook: who is there, where its dashboard is, and a control to grow and shrink it."""

import os
import threading
from typing import Any
from urllib.parse import urlsplit

import dask
from distributed import Client

from hpclab import live, machine
from hpclab.language import translate as _
from hpclab.pages import html
from hpclab.tables import Table, markup

MOST_JOBS = 1000
"""Workers that the control asks a queue for at most, as a slip of the finger is not to fill a site's."""
PLAIN_LINK = "{scheme}://{host}:{port}/status"
"""Dask's own setting, if nobody has set another."""


def show(client: Client) -> None:
    """Show a client's cluster as the output of a cell, and keep it up to date; without a kernel, as text."""
    if client.status != "running":
        print(_("This client is {status}; hpclab.connect() opens a new one.", status=client.status))
        return
    if not live.in_notebook():
        print(f"{_word(client)}\n\n{workers(client)}")
        return
    size = None if client.cluster is None else _size(client)
    live.show(client.id, lambda: page(client), lambda: client.status in ("closing", "closed"), controls=size)


def page(client: Client) -> str:
    """A client's cluster as HTML.

    Raises
    ------
    OSError
        If the client is closed.
    """
    if client.status != "running":
        raise OSError(f"client is {client.status}")
    card = '<p><strong>{{ cluster }}</strong> <a href="{{ link }}" target="_blank">{{ title }}</a></p>{{ workers }}'
    table = markup(workers(client))
    return html(card, cluster=_word(client), link=dashboard(client), title=_("dashboard"), workers=table)


def workers(client: Client) -> Table:
    """One row a worker."""
    by_address = client.scheduler_info(n_workers=-1)["workers"]
    return Table(
        {
            _("worker"): str(worker["name"]),
            _("host"): worker["host"],
            _("threads"): worker["nthreads"],
            _("memory in use (GiB)"): _gib(worker["metrics"].get("memory", 0)),  # one that has just come tells none
            _("memory limit (GiB)"): _gib(worker["memory_limit"]) if worker["memory_limit"] else None,
            _("tasks"): worker["metrics"].get("executing", 0),
        }
        for worker in sorted(by_address.values(), key=lambda worker: (len(str(worker["name"])), str(worker["name"])))
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f}"


def dashboard(client: Client) -> str:
    """Address of the dashboard as this notebook's browser reaches it, behind a Hub by its proxy."""
    link, prefix = client.dashboard_link, os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    if prefix and dask.config.get("distributed.dashboard.link") == PLAIN_LINK:
        return f"{prefix}proxy/{urlsplit(link).port}/status"
    return link


def _word(client: Client) -> str:
    cluster = client.scheduler_info(n_workers=-1)
    hosts = {worker["host"] for worker in cluster["workers"].values()}
    request: Any = getattr(client.cluster, "request", None)
    where = cluster["address"] if client.cluster is None else request.kind if request else _("this machine")
    count = len(cluster["workers"])
    words = _("{count} workers ({where})", count=count, where=where)
    if len(hosts) > 1:
        words = _("{count} workers on {hosts} hosts ({where})", count=count, hosts=len(hosts), where=where)
    return words if cluster["address"].startswith("tls://") else f"{words}, {_('not encrypted')}"


def _size(client: Client) -> Any:
    import ipywidgets

    cluster: Any = client.cluster
    most = machine.most() if getattr(cluster, "request", None) is None else MOST_JOBS
    size = ipywidgets.BoundedIntText(len(cluster.worker_spec), min=0, max=most, description=_("workers"))
    size.continuous_update = False

    def scale(change: dict) -> None:
        threading.Thread(target=cluster.scale, args=[change["new"]], name="hpclab-scale", daemon=True).start()

    size.observe(scale, "value")
    live.answer_in_subshell(size)
    return size

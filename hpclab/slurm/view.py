"""A private Slurm as the output of a cell: its jobs in time, its nodes and jobs as tables."""

import time
from typing import Any

from hpclab import live, plots
from hpclab.figures import Figure
from hpclab.language import translate as _
from hpclab.pages import html
from hpclab.slurm.states import job_table, node_table
from hpclab.tables import markup


def follow(slurm: Any) -> None:
    """Show a private Slurm as the output of a cell, and keep it up to date while it is up; without a kernel, as text.

    What stays when it has ended is how it was then. Shown elsewhere, it is drawn there alone.
    """
    try:
        if live.in_notebook():
            live.show(slurm.folder, lambda: queue(slurm), lambda: not slurm.up)
        else:
            print(slurm.status())
    except RuntimeError as error:  # it has ended, and says so
        print(error)


def queue(slurm: Any) -> str:
    """A private Slurm as HTML; of one that has ended, how it was then.

    Raises
    ------
    RuntimeError
        If it has ended, and was never seen.
    """
    try:
        slurm.look()
        head = []
    except RuntimeError:
        if slurm.seen is None:
            raise
        moment = time.strftime("%H:%M:%S", time.localtime(slurm.seen[2]))
        text = _(
            "This Slurm has ended. This is how it was at {time}; whatever was running then ended with it.", time=moment
        )
        head = [html("<p>{{ text }}</p>", text=text)]
    nodes, jobs, now = slurm.seen
    shown = Figure(figsize=(8.5, 1.2 + 0.22 * min(len(jobs), plots.JOBS)))
    plots.gantt(jobs, shown.subplots(), now=now)
    shown.set_layout_engine("constrained")
    parts = [shown.picture()] * bool(jobs)
    return "\n".join([*head, *parts, markup(node_table(nodes)), markup(job_table(jobs))])

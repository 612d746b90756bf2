"""A private Slurm as the output of a cell: its jobs in time, its nodes and jobs as tables."""

from typing import Any

from hpclab import live, plots
from hpclab.figures import Figure
from hpclab.slurm.states import job_table, node_table
from hpclab.tables import markup


def follow(slurm: Any) -> None:
    """Show a private Slurm as the output of a cell, and keep it up to date while it is up; without a kernel, as text.

    When it has ended, or is shown elsewhere, the output stays as it was.
    """
    try:
        if live.in_notebook():
            live.show(slurm.folder, lambda: queue(slurm), lambda: not slurm.up)
        else:
            print(slurm.status())
    except RuntimeError as error:  # it has ended, and says so
        print(error)


def queue(slurm: Any) -> str:
    """A private Slurm as HTML."""
    jobs = slurm.jobs()
    shown = Figure(figsize=(8.5, 1.2 + 0.22 * min(len(jobs), plots.JOBS)))
    plots.gantt(jobs, shown.subplots())
    shown.set_layout_engine("constrained")
    parts = [shown.picture()] * bool(jobs)
    return "\n".join([*parts, markup(node_table(slurm.nodes())), markup(job_table(jobs))])

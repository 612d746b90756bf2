"""How long jobs waited in a queue, and how well it used its CPUs: one order of going beside another."""

from hpclab.language import translate as _
from hpclab.tables import Table


def compare(orders: dict[str, list[dict]], cpus: int, wide: int = 1) -> Table:
    """Compare what became of the same jobs in several orders.

    Parameters
    ----------
    orders : dict of str to list of dict
        Jobs that have ended, as from ``Slurm.jobs()``, by the name of the order.
    cpus : int
        Of the whole queue.
    wide : int, default 1
        Place of the job that waits for the whole machine.
    """
    table = Table()
    for name, jobs in orders.items():
        first, last = min(job["submitted_s"] for job in jobs), max(job["ended_s"] for job in jobs)
        used = sum(job["cpus"] * (job["ended_s"] - job["started_s"]) for job in jobs)
        waits = [job["started_s"] - job["submitted_s"] for job in jobs]
        table.append(
            {
                _("order"): name,
                _("mean wait (s)"): f"{sum(waits) / len(waits):.1f}",
                _("wait of the first wide job (s)"): waits[wide],
                _("all done after (s)"): last - first,
                _("CPUs in use"): f"{used / (cpus * (last - first)):.0%}",
            }
        )
    return table

"""What others measured on up to 128 nodes of Piz Daint, and what a forecast makes of its first points."""

import numpy as np

from hpclab.forecast import Forecast, Workload, calibrate
from hpclab.laws import LawFit
from hpclab.network import Network
from hpclab.tables import Table

NODES = np.array([1, 2, 4, 8, 16, 32, 64, 128])
RATES = np.array([138.23, 264.57, 523.38, 1018.18, 2001.00, 3840.35, 7118.31, 9219.70])
"""InceptionV3, images a second on nodes of one P100, batch 64 (Bugliarello, CSCS internship report, 2017, table 3)."""
SERVERS = (1, 1, 3, 2, 4, 12, 40, 116)
"""Parameter servers that summed the gradients, from the same table."""
SECONDS = 64 * NODES / RATES
"""Of a step."""
KNOWN = 6
"""Points that a law and a forecast are given; they are judged on the others."""
LARGEST_BYTES = 2048 * 1000 * 4
"""Of the last layer's weights, which no server can share with another."""

RECORDED = [
    {"kind": "trial", "ranks": nodes, "samples_per_s": rate, "source": "recorded"}
    for nodes, rate in zip(NODES.tolist(), RATES.tolist(), strict=True)
]
"""The measurements as rows."""


def calibrated(gigabits: float, link_error: float = 0.0) -> tuple[Forecast, list[Network]]:
    """A forecast that knows the first `KNOWN` points, the servers, and each server's link; and the links of all points.

    Parameters
    ----------
    gigabits : float
        Gb/s that a server's process, system and network together carry. Nobody recorded it. For an order of magnitude:
        in tensorflow/tensorflow#6116, August 2017, users of later versions saw gRPC carry 500 MB a second, which is
        4 Gb/s, and 800 MB, 6.4 Gb/s.
    link_error : float, default 0
        As for `forecast.calibrate`.
    """
    links = [Network(50e-6, gigabits * 1e9, "parameter-server", servers) for servers in SERVERS]
    work = Workload(SECONDS[0], 23.83e6 * 4, samples=64, overlap=1.0, largest_bytes=LARGEST_BYTES, buckets=1)
    points = links[:KNOWN], NODES[:KNOWN], SECONDS[:KNOWN], ("compute_s", "jitter_s")
    return calibrate(work, *points, link_error=link_error), links


def forecast(gigabits: float, link_error: float = 0.0) -> list[dict]:
    """What `calibrated` says of all points: one row a point."""
    known, links = calibrated(gigabits, link_error)
    return [known.rows([int(nodes)], network=link)[0] for nodes, link in zip(NODES, links, strict=True)]


def table(forecasts: dict[str, list[dict]], law: LawFit | None = None) -> Table:
    """Images a second: as recorded, by a law, and by forecasts, each with its band, a row a number of nodes."""
    names = ("samples_per_s", "samples_per_s_low", "samples_per_s_high")
    columns = {name: [[row[end] for end in names] for row in rows] for name, rows in forecasts.items()}
    if law is not None:
        columns = {law.law: np.transpose([law(NODES), *law.band(NODES, new=True)]).tolist()} | columns
    return Table(
        {"nodes": int(nodes), "recorded": f"{rate:,.0f}"}
        | {name: "{:,.0f} ({:,.0f} to {:,.0f})".format(*ends[place]) for name, ends in columns.items()}
        for place, (nodes, rate) in enumerate(zip(NODES, RATES, strict=True))
    )

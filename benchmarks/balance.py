"""Shares of a batch by measured speed against equal ones, on two ranks of which one runs for half of the time.

Run it with ``make bench``. What slows that rank stops it for 10 of every 20 milliseconds, as cpulimit does.
"""

import argparse
import os
import subprocess
import sys

import hpclab
from hpclab import scaling
from hpclab.models import CNN
from hpclab.ratios import told
from hpclab.tables import Table

HALF = """
import os, signal, sys, time
for turn in range(10**9):
    os.kill(int(sys.argv[1]), (signal.SIGSTOP, signal.SIGCONT)[turn % 2])
    time.sleep(0.01)
"""


class Slowed(CNN):
    """A CNN whose rank 1 is slowed."""

    def __init__(self) -> None:
        super().__init__()
        if os.environ["RANK"] == "1":
            subprocess.Popen([sys.executable, "-c", HALF, str(os.getpid())], stderr=subprocess.DEVNULL)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    with hpclab.connect(workers=2) as client:

        def job(client, **settings):
            return hpclab.train(client, Slowed, "fashion_mnist", batch_size=96, steps=100, progress=False, **settings)

        cases = [{"ranks": 2}, {"ranks": 2, "balance": "measured"}]
        rows = scaling.sweep(client, job, cases=cases, repeats=options.repeats)
        print(
            Table({"case": row["measure"], "times as fast as equal shares": told(row)} for row in scaling.paired(rows))
        )


if __name__ == "__main__":
    main()

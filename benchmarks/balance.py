"""Shares of a batch by measured speed against equal ones, on two ranks of which one runs for half of the time.

Run it with ``make bench``.
"""

import argparse
import functools

import hpclab
from hpclab import scaling
from hpclab.course.chaos import slowed
from hpclab.models import CNN
from hpclab.ratios import told
from hpclab.tables import Table


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    with hpclab.connect(workers=2) as client:

        def job(client, **settings):
            settings |= {"batch_size": 96, "steps": 100, "progress": False}
            return hpclab.train(client, functools.partial(slowed, CNN), "fashion_mnist", **settings)

        cases = [{"ranks": 2}, {"ranks": 2, "balance": "measured"}]
        rows = scaling.sweep(client, job, cases=cases, repeats=options.repeats)
        print(
            Table({"case": row["measure"], "times as fast as equal shares": told(row)} for row in scaling.paired(rows))
        )


if __name__ == "__main__":
    main()

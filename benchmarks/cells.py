"""How soon an interactive gang answers: a cell on all ranks, against what Dask needs for an empty task and call.

Run it with ``make bench``. Every round does all of them in a new order; the ratio divides the medians.
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import hpclab
from hpclab.tables import Table

RECEIVE = "if rank == 0: dist.recv(torch.ones(1), src=1)"


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def leave(gang: hpclab.Gang) -> float:
    """Seconds from Ctrl-C in a deadlock until the next cell may begin."""
    pressed = []

    def press() -> None:
        pressed.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.3, press).start()
    try:
        gang.run(RECEIVE)
    except KeyboardInterrupt:
        return time.perf_counter() - pressed[0]
    raise AssertionError("nothing was interrupted")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, hpclab.connect(workers=2) as client:
        os.chdir(folder)
        with hpclab.gang(client, ranks=options.ranks, oversubscribe=True) as gang:
            gang.run("x = torch.ones(1)\ndist.all_reduce(x)")
            cases: dict[str, Callable[[], object]] = {
                "an empty task of Dask": lambda: client.submit(int, pure=False).result(),
                "an empty call on its workers": lambda: client.run(int),
                "a cell": lambda: gang.run("rank"),
                "a cell with an all-reduce": lambda: gang.run("dist.all_reduce(x)"),
            }
            found: dict[str, list[float]] = {name: [] for name in cases}
            for turn in range(options.rounds):
                for name in random.Random(turn).sample(list(cases), len(cases)):
                    found[name].append(seconds(cases[name]))
            left = sorted(leave(gang) for _ in range(10))
        base = statistics.median(found["an empty task of Dask"])
        print(
            Table(
                {
                    "round trip": name,
                    "median (ms)": f"{1e3 * statistics.median(took):.1f}",
                    "slowest (ms)": f"{1e3 * max(took):.1f}",
                    "times an empty task": f"{statistics.median(took) / base:.2f}",
                }
                for name, took in found.items()
            )
        )
        print(f"{options.ranks} ranks; a deadlock is left {left[0]:.2f} to {left[-1]:.2f} s after Ctrl-C")
        os.chdir("/")


if __name__ == "__main__":
    main()

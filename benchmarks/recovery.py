"""What failures cost: the same training undisturbed, and with a rank killed every few seconds, in turn.

Run it with ``make bench``. The checkpoint interval is Daly's, from the measured seconds of a checkpoint.
"""

import argparse
import math
import os
import statistics
import tempfile

import torch

import hpclab
from hpclab import rows
from hpclab.course import chaos
from hpclab.tables import Table


def train(client, steps: int, **settings) -> hpclab.Run:
    """The course's CNN on 2 ranks."""
    job = (client, hpclab.models.CNN, "fashion_mnist")
    return hpclab.train(*job, ranks=2, batch_size=96, steps=steps, progress=False, **settings)


def plan(client, seconds: float, mtbf: float) -> tuple[int, int]:
    """Steps that take about so long, and steps between checkpoints: sqrt(2 save mtbf) - save (Daly 2006, eq. 20)."""
    run = train(client, 60, checkpoint_every=10)
    run.result()
    step_s = hpclab.scaling.trial(run.rows)["step_s"]
    save_s = statistics.median(row["save_s"] for row in run.rows if row["kind"] == "checkpoint")
    every = max(1, round((math.sqrt(2 * save_s * mtbf) - save_s) / step_s))
    print(f"a step takes {1e3 * step_s:.1f} ms, a checkpoint {1e3 * save_s:.1f} ms: one every {every} steps")
    return round(seconds / step_s), every


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--mtbf", type=float, default=5.0)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder, hpclab.connect(workers=2) as client:
        os.chdir(folder)
        steps, every = plan(client, options.seconds, options.mtbf)
        for number in range(options.rounds):
            quiet = train(client, steps)
            undisturbed = quiet.result()
            run = train(client, steps, checkpoint_every=every, max_restarts=1000)
            with chaos.Chaos(run, options.mtbf, seed=number):
                fit = run.result()
            alone = rows.attempts(quiet.rows)[0]
            attempts = rows.attempts(run.rows)
            sums = {name: sum(row[name] for row in attempts) for name in ("lost_s", "restart_s", "save_s")}
            total, base = attempts[-1]["end_s"] - attempts[0]["start_s"], alone["end_s"] - alone["start_s"]
            found.append(
                {
                    "undisturbed (s)": f"{base:.1f}",
                    "with failures (s)": f"{total:.1f}",
                    "ratio": f"{total / base:.2f}",
                    "of it by failures": f"{1 + sum(sums.values()) / (total - sum(sums.values())):.2f}",
                    "failures": len(attempts) - 1,
                }
                | {name.replace("_s", " (s)"): f"{value:.1f}" for name, value in sums.items()}
                | {"same bits": all(torch.equal(fit.weights[name], w) for name, w in undisturbed.weights.items())}
            )
        os.chdir("/")
    print(Table(found))


if __name__ == "__main__":
    main()

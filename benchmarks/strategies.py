"""Each strategy of `train` against a plain torch script started by torchrun, side by side: characters a second, memory.

Run it with ``make bench``. Both train the same GPT on two ranks of one thread; each ratio divides two runs of the same
round. Torch itself has no top-k and no DiLoCo to compare with.
"""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import hpclab
from hpclab import scaling
from hpclab.gangs.worker import MALLOC
from hpclab.models import GPT
from hpclab.tables import Table
from hpclab.training.strategies.kinds import NAMES

JOB = Path(__file__).with_name("strategy_job.py")
WITHOUT_PEER = ("topk", "diloco")
BATCH, WIDTH, LAYERS, LENGTH = 16, 256, 8, 128


def adam(parameters):
    """As the script has it."""
    return torch.optim.AdamW(parameters, 1e-3)


def plain(name: str, steps: int) -> tuple[float, float]:
    """Characters a second, and the most MB of a rank, by torchrun."""
    sizes = map(str, (steps, BATCH, WIDTH, LAYERS))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", JOB, name, *sizes]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | MALLOC
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    seconds = told["step_s"][scaling.warm_up(told["step_s"]) :]
    return BATCH * LENGTH * len(seconds) / sum(seconds), told["peak_mb"]


def gang(client, name: str, steps: int) -> tuple[float, float]:
    """The same by `train`."""
    model = functools.partial(GPT, width=WIDTH, layers=LAYERS)
    settings = {"ranks": 2, "batch_size": BATCH // 2, "steps": steps, "optimizer": adam, "progress": False}
    rows = hpclab.train(client, model, "kjv", strategy=name, **settings).result().rows
    return LENGTH * scaling.throughput(rows), max(row["peak_mb"] for row in rows if row["kind"] == "step")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="strategies; all by default")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    names = options.names or [name for name in NAMES if name not in WITHOUT_PEER]
    found: dict[str, list] = {name: [] for name in names}
    with hpclab.connect(workers=2) as client:
        for turn in range(options.rounds):
            dice = random.Random(turn)
            for name in dice.sample(names, len(names)):
                ways = {"hpclab": functools.partial(gang, client), "torchrun": plain}
                took = {way: ways[way](name, options.steps) for way in dice.sample(list(ways), 2)}
                found[name].append((*took["hpclab"], *took["torchrun"]))
                print(f"round {turn + 1} of {options.rounds}: {name}", file=sys.stderr)
    print(Table(row(name, found[name]) for name in names))


def row(name: str, rounds: list[tuple[float, float, float, float]]) -> dict:
    """One strategy: medians, and the ratio with its range."""
    speeds = [ours / theirs for ours, _, theirs, _ in rounds]
    ours, mine, theirs, peer = (statistics.median(part) for part in zip(*rounds, strict=True))
    return {
        "strategy": name,
        "characters a second": f"{ours:,.0f}",
        "torchrun": f"{theirs:,.0f}",
        "ratio": f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})",
        "peak (MB)": round(mine),
        "torchrun (MB)": round(peer),
    }


if __name__ == "__main__":
    main()

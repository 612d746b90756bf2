"""What each layer costs: training throughput of hpclab against a plain torch loop, side by side, as ratios.

Run it with ``make bench``. Every round runs all cases in a new order, each in processes of its own, and each ratio
divides two runs of the same round.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile

import hpclab
from hpclab import machine, racing, scaling
from hpclab.gangs.worker import MALLOC
from hpclab.tables import Table

PLAIN = """
import json, sys, time, torch
from hpclab import data, models
threads, steps, batch = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
images, model = data.load("fashion_mnist"), models.CNN()
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
order, spent = torch.randperm(len(images)), []
for chosen in order[: steps * batch].split(batch):
    start = time.perf_counter()
    inputs, labels = (torch.from_numpy(part) for part in images[chosen.numpy()])
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    spent.append(time.perf_counter() - start)
print(json.dumps(spent))
"""
BATCH = racing.BATCH


def plain(threads: int, steps: int, malloc: dict[str, str]) -> float:
    """Samples a second of a loop without hpclab's gang, DDP, rows and schedule."""
    command = [sys.executable, "-c", PLAIN, str(threads), str(steps), str(BATCH)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)} | malloc
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    spent = json.loads(done.stdout)
    spent = spent[scaling.warm_up(spent) :]
    return BATCH * len(spent) / sum(spent)


def gang(client, ranks: int, threads: int, steps: int) -> float:
    """Samples a second of `hpclab.train` on the same global batch."""
    run = hpclab.train(
        client,
        hpclab.models.CNN,
        "fashion_mnist",
        ranks=ranks,
        threads=threads,
        batch_size=BATCH // ranks,
        steps=steps,
        progress=False,
    )
    return scaling.throughput(run.result().rows)


def main() -> None:
    """Measure all cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=35)
    options = parser.parse_args()
    cpus = machine.cpus()
    with tempfile.TemporaryDirectory() as folder, hpclab.connect(workers=2) as client:
        os.chdir(folder)
        cases = {
            "plain loop, 1 thread": lambda: plain(1, options.steps, {}),
            "the same, malloc as in a rank": lambda: plain(1, options.steps, MALLOC),
            f"the same, {cpus} threads": lambda: plain(cpus, options.steps, MALLOC),
            "hpclab, 1 rank": lambda: gang(client, 1, 1, options.steps),
            f"hpclab, 1 rank x {cpus} threads": lambda: gang(client, 1, cpus, options.steps),
            "hpclab, 2 ranks": lambda: gang(client, 2, 1, options.steps),
        }
        found: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(options.rounds):
            for name in random.Random(turn).sample(list(cases), len(cases)):
                found[name].append(cases[name]())
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
        os.chdir("/")
    print(Table(row(name, speeds, found) for name, speeds in found.items()))


def row(name: str, speeds: list[float], found: dict[str, list[float]]) -> dict:
    """One case: the median of its throughput, and of its ratios to two others with their range."""
    first, rank = "plain loop, 1 thread", "hpclab, 1 rank"
    return {
        "case": name,
        "samples a second": f"{statistics.median(speeds):,.0f}",
        "over the plain loop": ratio(speeds, found[first]),
        "over 1 rank": ratio(speeds, found[rank]),
    }


def ratio(speeds: list[float], base: list[float]) -> str:
    """Median and range of the ratios, round by round."""
    ratios = [speed / other for speed, other in zip(speeds, base, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()

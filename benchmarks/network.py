"""What an emulated network adds, against its own line; and what forecasts of this machine are worth.

Run it with ``make bench``. Runs of one comparison follow each other in turn, and each ratio divides two of a round.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile

from torch import nn

import hpclab
from hpclab import scaling
from hpclab.forecast import Workload, calibrate, step_s
from hpclab.network import Network
from hpclab.tables import Table

ETHERNET = Network(latency=50e-6, bandwidth=1e9)


def perceptron() -> nn.Module:
    """A model of much communication for its computing: 669,706 parameters."""
    wide = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    return nn.Sequential(nn.Flatten(), *wide)


MODELS = {
    "CNN": (hpclab.models.CNN, 96),
    "narrow CNN": (functools.partial(hpclab.models.CNN, channels=(16, 32)), 128),
    "perceptron": (perceptron, 512),
}
"""Models, and samples a rank and step."""


def allreduce_s(network: Network, floats: int, steps: int) -> float:
    """What each rank runs: median seconds of a step that does nothing but average so many floats."""
    import time

    import torch
    import torch.distributed as dist

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(floats, 1, bias=False))
    network.attach(model)
    inputs, times = torch.zeros(1, floats), []
    for _ in range(steps):
        loss = model(inputs).sum()
        dist.barrier()
        start = time.perf_counter()
        loss.backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def line(client, steps: int) -> Table:
    """Emulated all-reduces over what the network's own line says."""
    rows = []
    for network in (Network(2e-3, 1e9), Network(10e-3, 1e9), Network(5e-3, 100e6), Network(10e-3, 1e9, "tree")):
        for floats in (1_000, 50_000, 250_000):
            want = float(network.allreduce_s(4 * floats, 2))
            found = statistics.median(hpclab.launch(client, allreduce_s, network, floats, steps, ranks=2).result())
            rows.append(
                {
                    "network": f"{network.latency * 1e3:g} ms, {network.bandwidth / 1e6:g} Mb/s, {network.topology}",
                    "bytes": f"{4 * floats:,}",
                    "its line (ms)": f"{want * 1e3:.2f}",
                    "emulated (ms)": f"{found * 1e3:.2f}",
                    "ratio": f"{found / want:.3f}",
                }
            )
    return Table(rows)


def forecasts(client, rounds: int, steps: int) -> Table:
    """Forecast over measured step times: 2 ranks from 1 and the measured network; 1 Gb/s from real 1 and 2 ranks."""
    own = scaling.network(scaling.allreduce(client) + scaling.allreduce(client))
    print(f"this machine's network between 2 ranks: {own.latency * 1e3:.2f} ms, {own.bandwidth / 1e9:.1f} Gb/s")
    rows = []
    for name, (model, batch) in MODELS.items():
        size = 4 * sum(weight.numel() for weight in model().parameters())
        two, slow = [], []
        for _ in range(rounds):

            def trial(ranks: int, network: Network | None = None, model=model, batch=batch) -> dict:
                settings = {"ranks": ranks, "batch_size": batch, "steps": steps, "network": network}
                run = hpclab.train(client, model, "fashion_mnist", progress=False, **settings)
                return scaling.trial(run.result().rows)

            alone, both = trial(1), trial(2)
            work = Workload(alone["step_s"], size, batch, jitter_s=alone["jitter_s"])
            two.append(step_s(work, own, [2])[0] / both["step_s"])
            measured = [alone["step_s"], both["step_s"]]
            known = calibrate(work, own, [1, 2], measured, ("compute_s", "jitter_s"), noise=0.03).workload
            try:
                slow.append(step_s(known, ETHERNET, [2])[0] / trial(2, ETHERNET)["step_s"])
            except ValueError as refusal:
                print(f"{name}: {refusal}", file=sys.stderr)
        told = spread(slow) if slow else "refused: this machine is no faster"
        rows.append({"model": name, "2 ranks from 1": spread(two), "1 Gb/s from 1 and 2 ranks": told})
    return Table(rows)


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, hpclab.connect(workers=2) as client:
        os.chdir(folder)
        print(line(client, options.steps))
        print(forecasts(client, options.rounds, options.steps))
        os.chdir("/")


if __name__ == "__main__":
    main()

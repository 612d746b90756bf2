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


def backward_s(network: Network, floats: int, steps: int) -> tuple[list[float], float]:
    """What each rank runs: seconds of backward passes that average so many floats, and of one that doesn't (median)."""
    import time

    import torch
    import torch.distributed as dist

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(floats, 1, bias=False))
    network.attach(model)
    inputs = torch.zeros(1, floats)

    def spent() -> float:
        loss = model(inputs).sum()
        dist.barrier()
        start = time.perf_counter()
        loss.backward()
        return time.perf_counter() - start

    times = [spent() for _ in range(steps)]
    with model.no_sync():
        alone = statistics.median(spent() for _ in range(steps))
    return times[5:], alone


def allreduce_s(client, network: Network, floats: int, steps: int) -> float:
    """Median seconds of an emulated all-reduce, by the rank that came last to it: the other also waits for that one."""
    (one, alone), (other, _) = hpclab.launch(client, backward_s, network, floats, steps, ranks=2).result()
    return statistics.median(map(min, one, other)) - alone


def line(client, steps: int) -> Table:
    """Emulated all-reduces over what the network's own line says."""
    rows = []
    for network in (Network(2e-3, 1e9), Network(10e-3, 1e9), Network(5e-3, 100e6), Network(10e-3, 1e9, "tree")):
        for floats in (1_000, 50_000, 250_000):
            want = float(network.allreduce_s(4 * floats, 2))
            try:
                found = allreduce_s(client, network, floats, steps)
            except ValueError as refusal:
                print(refusal, file=sys.stderr)
                continue
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
        two, slow = [], []
        for _ in range(rounds):

            def start(ranks: int, network: Network | None = None, model=model, batch=batch) -> hpclab.Run:
                settings = {"ranks": ranks, "batch_size": batch, "steps": steps, "network": network}
                return hpclab.train(client, model, "fashion_mnist", progress=False, **settings)

            neighbours = start(1), start(1)  # on a machine as busy as it will be
            alone, _ = (scaling.trial(run.result().rows) for run in neighbours)
            both = scaling.trial(start(2).result().rows)
            work = Workload.of(model(), alone["step_s"], samples=batch, jitter_s=alone["jitter_s"])
            two.append(step_s(work, own, [2])[0] / both["step_s"])
            measured = [alone["step_s"], both["step_s"]]
            known = calibrate(work, own, [1, 2], measured, ("compute_s", "jitter_s"), noise=0.03).workload
            try:
                emulated = scaling.trial(start(2, ETHERNET).result().rows)
                slow.append(step_s(known, ETHERNET, [2])[0] / emulated["step_s"])
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

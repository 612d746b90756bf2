"""Ranks that train by each strategy in a network of their own, and count its bytes. test_strategies.py runs it.

It prints one JSON line for each strategy and number of ranks: bytes a step of all ranks together, as counted on lo, and
by both formulas.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from hpclab.gangs import buckets
from hpclab.models.gpt import GPT
from hpclab.training.strategies.kinds import Compress, DiLoCo, LocalSGD, Pipeline, Tensor, Zero, named
from hpclab.training.strategies.wire import Sizes, wire

NBYTES = 21e6
"""To send at least, of all ranks together; PowerSGD sends less on 2 ranks."""
POSITIONS = 8


def cases(ranks):
    """Strategies, each with a model's layers and width, samples a step, and steps to count over."""
    for name in ("ddp", "accumulate", "bf16", "fp16"):
        yield named(name), 8, 256, 4 * ranks, 1
    yield Compress("powersgd", rank=24), 8, 256, 4 * ranks, 1
    yield Compress("topk", density=0.25), 8, 256, 4 * ranks, 1
    for strategy in (LocalSGD(every=2), DiLoCo(every=2)):
        yield strategy, 8, 256, 4 * ranks, 2
    for stage in (1, 2, 3):
        yield Zero(stage), 8, 256, 4 * ranks, 1
    for sequence in (False, True):
        for size in {2, ranks}:
            yield Tensor(size, sequence), 4, 64, 512, 1
    for schedule in ("gpipe", "1f1b", "interleaved"):
        for size in {2, ranks}:
            stages = size * (1 + (schedule == "interleaved"))
            sample = 2 * (stages - 1) * POSITIONS * 32 * 4
            yield Pipeline(size, schedule=schedule), stages, 32, 32 * (1 + int(NBYTES / sample / 32)), 1


def on_lo():
    """Bytes that have gone over lo so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.split()[0] == "lo:")


def loss(scores, labels):
    return cross_entropy(scores.flatten(0, 1), labels.flatten())


def counted(strategy, engine, batch, steps):
    """Bytes a step of all ranks, after steps in which they get to know each other: PowerSGD's first two are DDP's."""
    marks = []
    for count in (2, 2 * steps):
        for _ in range(count):
            engine.step(*batch)
        dist.barrier()
        marks.append(on_lo())
        dist.barrier()
    return (marks[1] - marks[0]) / (2 * steps)


def rank_main(rank, ranks, file):
    torch.set_num_threads(1)
    buckets.settle()  # as each rank of a gang does
    dist.init_process_group("gloo", store=dist.FileStore(file, ranks), rank=rank, world_size=ranks)
    for strategy, layers, width, samples, steps in cases(ranks):
        torch.manual_seed(0)
        model = GPT(context=POSITIONS, width=width, layers=layers)
        sizes = Sizes.of(model, samples, POSITIONS)
        replicas, replica = strategy.replicas(ranks)
        batch = torch.randint(0, 63, (2, samples, POSITIONS)).chunk(replicas, dim=1)[replica[rank]]
        engine = strategy.start(model, lambda parameters: torch.optim.SGD(parameters, 0.01), loss)
        row = {"strategy": repr(strategy), "ranks": ranks, "counted": counted(strategy, engine, batch, steps)}
        if rank == 0:
            formulas = {library: ranks * nbytes for library, nbytes in wire(strategy, ranks, sizes).items()}
            print(json.dumps(row | formulas), flush=True)
    dist.barrier()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    for ranks in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            processes = [fork.Process(target=rank_main, args=(rank, ranks, f"{folder}/store")) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)

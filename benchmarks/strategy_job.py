"""Training of a GPT by one strategy, in plain torch, for torchrun: what `strategies.py` compares hpclab with."""

import json
import os
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tp
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hpclab import data
from hpclab.models.gpt import GPT
from hpclab.training.memory import Peak

LR = 1e-3


def loss(scores, following):
    """Mean over the characters."""
    return cross_entropy(scores.flatten(0, 1), following.flatten())


def replicated(name, model):
    """DDP and what builds on it: returns a function that takes a step on this rank's samples."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=2.0**20 if name == "powersgd" else None)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    if name in ("bf16", "fp16"):
        hook = getattr(default_hooks, f"{name}_compress_hook")
        ddp.register_comm_hook(None, lambda group, bucket: hook(group, bucket))
    if name == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, 1, 2)
        ddp.register_comm_hook(state, lambda state, bucket: powerSGD_hook.powerSGD_hook(state, bucket))
    if name == "zero1":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR)
    parts = 4 if name == "accumulate" else 1

    def step(inputs, following):
        optimizer.zero_grad()
        for number, pair in enumerate(zip(inputs.chunk(parts), following.chunk(parts), strict=True), start=1):
            with ddp.no_sync() if number < parts else nullcontext():
                (loss(ddp(pair[0]), pair[1]) / parts).backward()
        optimizer.step()

    return step


def ordinary(model, after=lambda parameters: None):
    """As one process trains; with something to do after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), LR)

    def step(inputs, following):
        optimizer.zero_grad()
        loss(model(inputs), following).backward()
        optimizer.step()
        after(model.parameters())

    return step


def sharded(name, model):
    """ZeRO-2 and 3, tensor and sequence parallel: all in the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if name in ("zero2", "zero3"):
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=name == "zero3")
    else:
        split(model, mesh, Shard(1) if name == "sequence" else Replicate())
    return ordinary(model)


def split(model, mesh, between):
    """As torch's tutorial of tensor parallelism splits a Llama's blocks."""
    whole = tp.PrepareModuleInput(input_layouts=between, desired_input_layouts=Replicate())
    plan = {"attention": whole, "mlp": whole}
    plan |= {name: tp.ColwiseParallel() for name in model.columns}
    plan |= {name: tp.RowwiseParallel(output_layouts=between) for name in model.rows}
    if between != Replicate():
        plan |= {name: tp.SequenceParallel() for name in model.norms}
        first = tp.PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
        last = tp.PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
        tp.parallelize_module(model, mesh, {"blocks.0": first, f"blocks.{len(model.blocks) - 1}": last})
    for block in model.blocks:
        tp.parallelize_module(block, mesh, plan)


def pipelined(name, model):
    """Two ranks, 4 micro-batches; the embedding is the first and the last stage's, which add up its gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = ranks * (2 if name == "interleaved" else 1)
    mine = nn.ModuleList(model.stages(count)[rank::ranks])
    stages = [PipelineStage(part, rank + ranks * n, count, torch.device("cpu")) for n, part in enumerate(mine)]
    kinds = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
    schedule = kinds[name](stages if name == "interleaved" else stages[0], 4, loss_fn=loss)
    optimizer = torch.optim.AdamW(mine.parameters(), LR)

    def step(inputs, following):
        optimizer.zero_grad()
        schedule.step(*[inputs][: rank == 0], **({"target": following} if rank == ranks - 1 else {}))
        dist.all_reduce(model.tokens.weight.grad)
        optimizer.step()

    return step


def main():
    """Train; rank 0 prints the seconds of each step, and the most memory of a rank, as JSON."""
    name, steps, batch, width, layers = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text, peak = data.load("kjv", "train"), Peak()
    torch.manual_seed(0)
    model = GPT(width=width, layers=layers)
    group = name in ("tensor", "sequence", "gpipe", "1f1b", "interleaved")  # of ranks that share their samples
    if name == "local-sgd":
        step = ordinary(model, PeriodicModelAverager(8).average_parameters)
    elif name in ("gpipe", "1f1b", "interleaved"):
        step = pipelined(name, model)
    elif group or name in ("zero2", "zero3"):
        step = sharded(name, model)
    else:
        step = replicated(name, model)
    order, seconds = np.random.default_rng(0).permutation(len(text)), []
    for number in range(steps):
        chosen = order[number * batch : (number + 1) * batch]
        begun = time.perf_counter()
        inputs, following = (torch.as_tensor(part) for part in text[chosen if group else chosen[rank::ranks]])
        step(inputs, following)
        seconds.append(time.perf_counter() - begun)
    peaks = [None] * ranks
    dist.all_gather_object(peaks, peak.row()["peak_mb"])
    if rank == 0:
        print(json.dumps({"step_s": seconds, "peak_mb": max(peaks)}), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # once in some runs torch's threads kept the interpreter from ending


if __name__ == "__main__":
    main()

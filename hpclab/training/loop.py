"""The inside of training: one rank's part in a replica of the model, and its loop.

Imported by every rank, so it imports neither Dask nor anything else that a rank doesn't need.
"""

from __future__ import annotations

import copy
import functools
import io
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, default_convert

from hpclab import checkpoint, timeline
from hpclab import data as datasets
from hpclab.gangs.rank import report, should_stop
from hpclab.training import device, objectives
from hpclab.training.memory import Peak
from hpclab.training.strategies import shares
from hpclab.training.strategies.engine import gathered, output

if TYPE_CHECKING:
    from hpclab.training.job import Job
    from hpclab.training.strategies.ddp import Replicated

CLIP = 1.0
"""Largest norm of a step's gradient under `train`'s own optimiser; larger ones throw the loss up as the rate rises."""
WARM_UP = 5
"""Steps over which its learning rate rises, at most 3 in 10. With clipping it needs no more: where it reached
its peak after 15 to 50 steps, as by default of torch, the loss rose twice as far, and the score was no better."""
SPEED_SECONDS = 1.0
"""For which a rank's speed is measured."""
TEST_BATCH = 64
"""Least samples that a rank tests at once; else as many as in training, whose memory is there to be used again."""


def replicate(job: Job) -> tuple[bytes, dict[str, float]]:
    """What every rank runs; returns the weights, from rank 0, and the figures of the last test."""
    replica = _Replica(job)
    with timeline.profiler(job.trace) if job.trace else nullcontext() as traced:
        while replica.step < replica.steps and not replica.stopped:
            replica.train(traced)
    weights, written = replica.engine.full_weights(), io.BytesIO()
    if replica.rank == 0:
        torch.save({name: value.cpu() for name, value in weights.items()}, written)
    return written.getvalue(), replica.scores


class _Replica:
    """One rank's part: its replica of the model, or part of it, its share of the data, the step reached."""

    def __init__(self, job: Job):
        self.job = job
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.data = datasets.load(job.data, "train")
        self.peak = Peak()
        torch.manual_seed(job.seed)
        self.device, module = device.of_rank(job.device), job.module()
        self.objective = objectives.of(module, self.data)
        self.loss = job.loss or self.objective.loss
        job.strategy.check(module, self.ranks, job.batch, job.balance)
        self.replicas, replica_of = job.strategy.replicas(self.ranks)
        replica = replica_of[self.rank]
        torch.manual_seed(job.seed + replica)
        self.shape = _shape(module)
        module = module.to(self.device)
        share, weight = self._share(module) if job.balance else (slice(replica, None, self.replicas), 1.0)
        self.engine = job.strategy.start(
            module, job.optimizer or functools.partial(SGD, lr=job.lr, momentum=0.9), self.loss
        )
        if job.network is not None:
            cast("Replicated", self.engine).attach(job.network)
        self.engine.weight = weight
        self.sampler: DistributedSampler = DistributedSampler(cast(Dataset, self.data), 1, 0, seed=job.seed)
        self.batches = _Batches(self.sampler, job.batch, share)
        draws = torch.Generator()  # its own, since one that goes on in mid-epoch begins it twice
        self.loader = DataLoader(cast(Dataset, self.data), sampler=self.batches, batch_size=None, generator=draws)
        self.stopped = False
        self.scores: dict[str, float] = {}
        self.step, self.steps = 0, job.steps or job.epochs * len(self.batches)
        self.schedule: OneCycleLR | None = None
        if job.optimizer is None:
            self.engine.clip = CLIP
            rise = min(0.3, (WARM_UP + 1) / (self.steps + 1))
            self.schedule = OneCycleLR(
                self.engine.optimizer, job.lr, self.steps + 1, pct_start=rise, cycle_momentum=False
            )
        if (state := self.engine.restore()) is not None:
            self._restore(state)

    def _share(self, module: nn.Module) -> tuple[slice, float]:
        """Which samples of each step are this rank's, in proportion to its speed, and what their mean weighs."""
        speeds = gathered(self._speed(module))
        samples = shares.shares(speeds, self.job.batch)
        first = sum(samples[: self.rank])
        return slice(first, first + samples[self.rank]), shares.weights(samples)[self.rank]

    def _speed(self, module: nn.Module) -> float:
        """Samples a second of this rank, with nothing sent, while the others compute too; on a copy of the model."""
        module, size = copy.deepcopy(module), self.job.batch // self.ranks
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()  # one over all ranks would wait for their passes, of which there are not equally many
        inputs, labels = device.moved(default_convert(self.data[np.arange(size)]), self.device)
        target, passes, start = self.objective.target(inputs, labels), 0, time.perf_counter()
        with torch.random.fork_rng():
            dist.barrier()
            while passes < 3 or time.perf_counter() < start + SPEED_SECONDS:
                if passes == 1:  # what is loaded and allocated once is done
                    start = time.perf_counter()
                loss = self.loss(output(module, inputs), target)
                loss.backward()
                loss.item()  # a GPU has done it all by then
                passes += 1
        return size * (passes - 1) / (time.perf_counter() - start)

    def train(self, traced: Any = None) -> None:
        """Train an epoch, or what is left of it or of the steps, and test; a profiler is told of each step."""
        epoch, self.batches.done = divmod(self.step, len(self.batches))
        self.sampler.set_epoch(epoch)
        self.engine.model.train()
        start, cpu = time.perf_counter(), time.process_time()
        for inputs, labels in self.loader:  # images: (B, C, H, W), (B,)
            loaded, busy = time.perf_counter(), time.thread_time()
            inputs, labels = device.moved((inputs, labels), self.device)
            loss = self.engine.step(inputs, self.objective.target(inputs, labels))
            if self.schedule is not None:
                self.schedule.step()
            memory = self.peak.row() | device.peak(self.device)
            end, cpu_end = time.perf_counter(), time.process_time()
            times = {"step_s": end - start, "data_s": loaded - start, "compute_s": time.thread_time() - busy}
            times |= {"wait_s": max(0.0, end - loaded - times["compute_s"]), "cpu_s": cpu_end - cpu}
            samples = len(labels) * self.replicas // self.ranks  # the ranks of a replica share its own
            report(step=self.step, epoch=epoch, loss=loss, samples=samples, **times, **memory)
            if traced is not None:
                traced.step()
            self.step, start, cpu = self.step + 1, end, cpu_end
            if self._due():
                self.save()
                start, cpu = time.perf_counter(), time.process_time()
            self.stopped = should_stop()
            if self.stopped or self.step == self.steps:
                break
        if self._epoch_ends():
            self.scores = self.test(epoch + 1)
        if self._epoch_ends() or (self.stopped and self._keeps()):
            self.save()

    def _restore(self, state: dict) -> None:
        for name, value in self._recipe().items():
            if state[name] != value:
                raise ValueError(f"resume has {name} {state[name]}, this run {value}; they must be the same.")
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step, self.scores = state["step"], state.get("scores", {})  # 0.1.0 kept none

    @torch.no_grad()
    def test(self, epoch: int) -> dict[str, float]:
        """Test on all ranks, each on its share of the test samples; return the loss and figures on all of them."""
        module = _shape(self.shape)
        module.load_state_dict(self.engine.full_weights(), assign=True)
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)  # those of rank 0 are returned and saved, so they are the ones to test
        module.eval()
        data = datasets.load(self.job.data, "test")
        size = max(TEST_BATCH, self.job.batch // self.ranks)
        measures = {"test_loss": self.loss, **self.objective.figures}
        sums = torch.zeros(len(measures) + 1)  # the last: samples
        for share in torch.arange(len(data)).split(size)[self.rank :: self.ranks]:
            inputs, labels = device.moved(default_convert(data[share.numpy()]), self.device)
            made, target = output(module, inputs), self.objective.target(inputs, labels)
            means = [measure(made, target) for measure in measures.values()]
            sums += len(labels) * torch.tensor([*means, 1])
        dist.all_reduce(sums)
        samples = int(sums[-1])
        scores = dict(zip(measures, (sums[:-1] / samples).tolist(), strict=True))
        if self.rank == 0:
            report(kind="epoch", epoch=epoch, step=self.step, **scores, samples=samples)
        return scores

    def _keeps(self) -> bool:
        """Whether there are checkpoints."""
        return self.job.steps is None or self.job.checkpoint_every is not None

    def _epoch_ends(self) -> bool:
        return self.job.steps is None and self.step % len(self.batches) == 0

    def _due(self) -> bool:
        """Whether it is time for a checkpoint; the end of an epoch has its own, after the test."""
        interval = self.job.checkpoint_every
        return interval is not None and self.step % interval == 0 and not self._epoch_ends()

    def save(self) -> None:
        """Write a checkpoint."""
        state = self.engine.state()
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        checkpoint.save(state | {"step": self.step, "scores": self.scores} | self._recipe(), self.step)

    def _recipe(self) -> dict:
        """What must be the same in a run that goes on: samples a step of all ranks, steps in all, and the seed."""
        return {"batch": self.job.batch, "steps": self.steps, "seed": self.job.seed}


def _shape(module: nn.Module) -> nn.Module:
    """A copy without weights, to fill with those that are tested: the ranks may hold parts of the model only."""
    empty = {id(weight): nn.Parameter(weight.detach().to("meta")) for weight in module.parameters()}
    return copy.deepcopy(module, cast(dict, empty))


class _Batches(BatchSampler):
    """This rank's share of each step's samples, over an epoch, without the steps done before this attempt.

    A replica takes every so many-th sample, as DistributedSampler deals them: that keeps to the sampler's order, in
    steps whose samples of all ranks together are the same whatever the shares.
    """

    def __init__(self, sampler: DistributedSampler, batch: int, share: slice):
        super().__init__(sampler, batch, drop_last=True)
        self.share, self.done = share, 0

    def __iter__(self) -> Iterator[list[int]]:
        return (batch[self.share] for batch in islice(super().__iter__(), self.done, None))

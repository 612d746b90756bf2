"""The inside of data-parallel training: one rank's replica of the model, and its loop.

Imported by every rank, so it imports neither Dask nor anything else that a rank doesn't need.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, default_convert

from hpclab import checkpoint, timeline
from hpclab import data as datasets
from hpclab.gangs.rank import report, should_stop
from hpclab.training import objectives

if TYPE_CHECKING:
    from hpclab.training.job import Job

TEST_BATCH = 64
"""Least samples that a rank tests at once; else as many as in training, whose memory is there to be used again."""


def replicate(job: Job) -> tuple[bytes, dict[str, float]]:
    """What every rank runs; returns the weights, from rank 0, and the figures of the last test."""
    replica = _Replica(job)
    with timeline.profiler(job.trace) if job.trace else nullcontext() as traced:
        while replica.step < replica.steps and not replica.stopped:
            replica.train(traced)
    weights = io.BytesIO()
    if replica.rank == 0:
        torch.save(replica.module.state_dict(), weights)
    return weights.getvalue(), replica.scores


class _Replica:
    """One rank's part: its replica of the model, its share of the data, the optimiser, the step reached."""

    def __init__(self, job: Job):
        self.job = job
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(job.seed)
        self.module, self.data = job.module(), datasets.load(job.data, "train")
        self.objective = objectives.of(self.module, self.data)
        self.loss = job.loss or self.objective.loss
        torch.manual_seed(job.seed + self.rank)
        self.model = self._wrapped()
        self.sampler: DistributedSampler = DistributedSampler(
            cast(Dataset, self.data), self.ranks, self.rank, seed=job.seed, drop_last=True
        )
        self.batches = _Rest(self.sampler, job.batch // self.ranks, drop_last=True)
        draws = torch.Generator()  # its own, since one that goes on in mid-epoch begins it twice
        self.loader = DataLoader(cast(Dataset, self.data), sampler=self.batches, batch_size=None, generator=draws)
        self.stopped = False
        self.scores: dict[str, float] = {}
        self.step, self.steps = 0, job.steps or job.epochs * len(self.batches)
        self.optimizer, self.schedule = self._optimizer()
        if (state := checkpoint.restore()) is not None:
            self._restore(state)

    def _wrapped(self) -> nn.Module:
        """The module in what averages its gradients over the ranks."""
        job = self.job
        model = DistributedDataParallel(
            self.module, find_unused_parameters=job.find_unused_parameters, bucket_cap_mb=job.bucket_cap_mb
        )
        if job.network is not None:
            job.network.attach(model)
        return model

    def _optimizer(self) -> tuple[Optimizer, OneCycleLR | None]:
        """What moves the weights, and the learning rate's schedule, if it has one."""
        job = self.job
        if job.optimizer is not None:
            return job.optimizer(self.model.parameters()), None
        optimizer = SGD(self.model.parameters(), job.lr, momentum=0.9)
        return optimizer, OneCycleLR(optimizer, job.lr, self.steps + 1, cycle_momentum=False)

    def train(self, traced: Any = None) -> None:
        """Train an epoch, or what is left of it or of the steps, and test; a profiler is told of each step."""
        epoch, self.batches.done = divmod(self.step, len(self.batches))
        self.sampler.set_epoch(epoch)
        self.model.train()
        start, cpu = time.perf_counter(), time.process_time()
        for inputs, labels in self.loader:  # images: (B, C, H, W), (B,)
            loaded, busy = time.perf_counter(), time.thread_time()
            loss = self._backward(inputs, labels)
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            end, cpu_end = time.perf_counter(), time.process_time()
            times = {"step_s": end - start, "data_s": loaded - start, "compute_s": time.thread_time() - busy}
            times |= {"wait_s": max(0.0, end - loaded - times["compute_s"]), "cpu_s": cpu_end - cpu}
            report(step=self.step, epoch=epoch, loss=loss, samples=len(labels), **times)
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

    def _backward(self, inputs: Any, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(_output(self.model, inputs), self.objective.target(inputs, labels))
        loss.backward()  # averages the gradients over the ranks as they become ready
        return loss

    def _restore(self, state: dict) -> None:
        for name, value in self._recipe().items():
            if state[name] != value:
                raise ValueError(f"resume has {name} {state[name]}, this run {value}; they must be the same.")
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step, self.scores = state["step"], state["scores"]

    @torch.no_grad()
    def test(self, epoch: int) -> dict[str, float]:
        """Test on all ranks, each on its share of the test samples; return the loss and figures on all of them."""
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)  # those of rank 0 are returned and saved, so they are the ones to test
        self.module.eval()
        data = datasets.load(self.job.data, "test")
        size = max(TEST_BATCH, self.job.batch // self.ranks)
        measures = {"test_loss": self.loss, **self.objective.figures}
        sums = torch.zeros(len(measures) + 1)  # the last: samples
        for share in torch.arange(len(data)).split(size)[self.rank :: self.ranks]:
            inputs, labels = default_convert(data[share.numpy()])
            output, target = _output(self.module, inputs), self.objective.target(inputs, labels)
            means = [measure(output, target) for measure in measures.values()]
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
        state: dict = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        checkpoint.save(state | {"step": self.step, "scores": self.scores} | self._recipe(), self.step)

    def _recipe(self) -> dict:
        """What must be the same in a run that goes on: samples a step of all ranks, steps in all, and the seed."""
        return {"batch": self.job.batch, "steps": self.steps, "seed": self.job.seed}


def _output(model: nn.Module, inputs: Any) -> Tensor:
    """What a model makes of a batch; padded series come with their lengths."""
    return model(*inputs) if isinstance(inputs, list) else model(inputs)


class _Rest(BatchSampler):
    """Batches of an epoch, without those that were done before this attempt."""

    done = 0

    def __iter__(self) -> Iterator[list[int]]:
        return islice(super().__iter__(), self.done, None)

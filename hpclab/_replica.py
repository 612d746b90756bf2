"""The inside of data-parallel training: one rank's replica of the model, and its loop.

Imported by every rank, so it imports neither Dask nor anything else that a rank doesn't need.
"""

import io
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from hpclab import checkpoint, timeline
from hpclab import data as datasets
from hpclab._rank import report, run_folder, should_stop
from hpclab.network import Network

Model = nn.Module | Callable[[], nn.Module]


@dataclass
class Job:
    """All that a rank needs to know to train."""

    model: Model
    data: str
    """Folder of the data set."""
    epochs: int
    batch_size: int
    """Samples a rank and step."""
    lr: float
    seed: int
    steps: int | None
    """Steps after which to end; None trains all epochs, and tests after each."""
    optimizer: Callable[[Iterable], Optimizer] | None
    loss: Callable[[Tensor, Tensor], Tensor]
    network: Network | None
    trace: int
    """Steps to trace."""


def replicate(job: Job) -> tuple[bytes, float | None]:
    """What every rank runs; returns the weights, from rank 0, and the last test accuracy."""
    replica = _Replica(job)
    epoch, accuracy = 0, None
    with timeline.profiler(job.trace) if job.trace else nullcontext() as traced:
        while replica.step < replica.steps and not replica.stopped:
            replica.train(epoch, traced)
            epoch += 1
            if job.steps is None and not replica.stopped:
                accuracy = replica.test(epoch)
                replica.save(epoch)
    weights = io.BytesIO()
    if replica.rank == 0:
        torch.save(replica.module.state_dict(), weights)
    return weights.getvalue(), accuracy


class _Replica:
    """One rank's part: its replica of the model, its share of the data, the optimiser, the step reached."""

    def __init__(self, job: Job):
        self.job = job
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(job.seed)
        self.module = job.model if isinstance(job.model, nn.Module) else job.model()
        if not isinstance(self.module, nn.Module):
            raise TypeError(not_a_module(self.module))
        torch.manual_seed(job.seed + self.rank)
        self.model = DistributedDataParallel(self.module)
        if job.network is not None:
            job.network.attach(self.model)
        images = cast(Dataset, datasets.load(job.data, "train"))
        self.sampler: DistributedSampler = DistributedSampler(
            images, self.ranks, self.rank, seed=job.seed, drop_last=True
        )
        batches = BatchSampler(self.sampler, job.batch_size, drop_last=True)
        self.loader = DataLoader(images, sampler=batches, batch_size=None)
        self.stopped = False
        self.step, self.steps = 0, job.steps or job.epochs * len(batches)
        self.schedule: OneCycleLR | None = None
        if job.optimizer is not None:
            self.optimizer = job.optimizer(self.model.parameters())
        else:
            self.optimizer = SGD(self.model.parameters(), job.lr, momentum=0.9)
            self.schedule = OneCycleLR(self.optimizer, job.lr, self.steps + 1, cycle_momentum=False)

    def train(self, epoch: int, traced: Any = None) -> None:
        """Train one epoch, or what is left of the steps; a profiler is told of each."""
        self.sampler.set_epoch(epoch)
        self.model.train()
        start, cpu = time.perf_counter(), time.process_time()
        for inputs, labels in self.loader:  # (B, C, H, W), (B,)
            loaded, busy = time.perf_counter(), time.thread_time()
            self.optimizer.zero_grad()
            loss = self.job.loss(self.model(inputs), labels)
            loss.backward()  # averages the gradients over the ranks as they become ready
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
            self.stopped = should_stop()
            if self.stopped or self.step == self.steps:
                break

    @torch.no_grad()
    def test(self, epoch: int) -> float:
        """Test on all ranks, each on its share of the test images; return the accuracy on all of them."""
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)  # those of rank 0 are returned and saved, so they are the ones to test
        self.module.eval()
        images = datasets.load(self.job.data, "test")
        sums = torch.zeros(3)  # loss, right, samples
        for share in torch.arange(len(images)).split(256)[self.rank :: self.ranks]:
            inputs, labels = (torch.from_numpy(part) for part in images[share.numpy()])
            scores = self.module(inputs)
            right = (scores.argmax(1) == labels).sum()
            sums += torch.stack([self.job.loss(scores, labels) * len(labels), right, torch.tensor(len(labels))])
        dist.all_reduce(sums)
        loss, right, samples = sums.tolist()
        if self.rank == 0:
            found = {"test_loss": loss / samples, "test_accuracy": right / samples, "samples": int(samples)}
            report(kind="epoch", epoch=epoch, step=self.step, **found)
        return right / samples

    def save(self, epoch: int) -> None:
        """Write a checkpoint, from rank 0."""
        if self.rank == 0:
            state: dict = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            if self.schedule is not None:
                state["schedule"] = self.schedule.state_dict()
            checkpoint.save(run_folder() / "checkpoints", epoch, state | {"epoch": epoch, "step": self.step})
        dist.barrier()  # the others' next step shall not be charged with rank 0's writing


def not_a_module(model: object) -> str:
    """What to say of a model that is none."""
    return f"model (={model!r}) must be a torch.nn.Module, or a class or function that makes one."

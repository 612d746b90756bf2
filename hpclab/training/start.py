"""Training on the ranks of a gang, which share the work as a strategy says."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distributed import Client

from hpclab import data as datasets
from hpclab._arguments import one_of, whole_number
from hpclab.gangs.launch import check_pickles, gang_size, launch
from hpclab.gangs.run import Run
from hpclab.live import StepBar
from hpclab.network import Network
from hpclab.training.entry import replicate
from hpclab.training.job import DEVICES, MODELS, Job, Model, not_a_module
from hpclab.training.strategies.kinds import DDP, Strategy, named

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


@dataclass
class Fit:
    """A trained model and the rows of its training."""

    state: bytes
    """The model's state_dict, as `torch.save` wrote it."""
    rows: list[dict]
    scores: dict[str, float]
    """What the last test said, such as test_loss and test_accuracy, or test_bits a character of a text; empty if no
    epoch was finished."""
    folder: Path

    @property
    def accuracy(self) -> float | None:
        """Share of the test samples classified rightly after the last epoch; None if none was finished, or the model
        classifies nothing."""
        return self.scores.get("test_accuracy")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The model's state_dict, read when it is first asked for: that imports torch."""
        import torch

        return torch.load(io.BytesIO(self.state), weights_only=True)

    def __repr__(self) -> str:
        size = sum(weight.numel() for weight in self.weights.values())
        score = "untested"
        if self.scores:
            name, value = [*self.scores.items()][-1]  # the loss comes first
            score = f"{name.removeprefix('test_')} {value:.3f}"
        here = Path.cwd()
        folder = self.folder.relative_to(here) if self.folder.is_relative_to(here) else self.folder
        return f"<Fit {size:,} weights, {score}, {folder}>"


def train(
    client: Client,
    model: Model,
    data: str | os.PathLike,
    *,
    ranks: int | None = None,
    epochs: int = 1,
    batch_size: int = 64,
    lr: float = 0.05,
    threads: int = 1,
    oversubscribe: bool = False,
    wait: bool = False,
    seed: int = 0,
    steps: int | None = None,
    optimizer: Callable[[Iterable], Optimizer] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    network: Network | None = None,
    trace: int = 0,
    checkpoint_every: int | None = None,
    strategy: Strategy | str = "ddp",
    recompute: bool = False,
    autocast: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    balance: Literal["measured"] | None = None,
    find_unused_parameters: bool = False,
    bucket_cap_mb: float | None = None,
    max_restarts: int = 0,
    min_ranks: int | None = None,
    resume: str | os.PathLike | None = None,
    folder: str | os.PathLike | None = None,
    name: str = "train",
    progress: bool = True,
) -> Run:
    """Train a torch module on a gang of ranks, and return at once.

    Parameters
    ----------
    client : distributed.Client
        From `connect`.
    model : torch.nn.Module, callable without arguments that returns one, or str
        Such as the class `models.CNN`, or its name, "CNN": then the notebook's kernel needs no torch, which saves
        0.1 GB and a few seconds. All ranks start from rank 0's weights. A batch of series comes as two arguments,
        padded frames and lengths.
    data : str or path
        Name of a data set that comes with hpclab ("fashion_mnist", "japanese_vowels", "kjv"), or the folder of a data
        set: `hpclab.data.write` makes one from your own arrays.
    ranks : int, optional
        Number of ranks. Default: as many as the cluster has room for.
    epochs : int, default 1
        Passes over the training samples, each reshuffled; samples that don't fill a batch on every rank are left out.
    batch_size : int, default 64
        Samples per *rank* and step. 2 ranks with 64 take the same steps as 1 rank with 128, up to rounding.
    lr : float, default 0.05
        Highest learning rate of the one-cycle schedule (Smith and Topin 2018, arXiv:1708.07120), which rises for 5
        steps, at most 3 in 10, and then falls; for SGD with momentum 0.9 on gradients whose norm is clipped to 1
        (Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063).
    threads : int, default 1
        Threads that torch may use in each rank.
    oversubscribe, wait : bool, default False
        As for `launch`.
    seed : int, default 0
        Seed of the weights and the shuffling; dropout and the like use ``seed + rank``.
    steps : int, optional
        End after this many steps, without tests and, unless `checkpoint_every` is given, without checkpoints: for
        measuring speed.
    optimizer : callable, optional
        Given the model's parameters, returns the optimiser to use instead of SGD, its schedule and its clipping; `lr`
        is then unused.
    loss : callable, optional
        Given the model's output and its target, returns the mean loss, shape (). Default: cross-entropy of scores
        (B, classes) and labels (B,); of a text, of scores (B, T, characters) and the characters that follow, (B, T).
        A model whose attribute `objective` is "rebuild" has its inputs as the target; default: the mean squared error.
    network : Network, optional
        Emulate this network between the ranks, for the messages that "ddp" or a strategy that builds on it sends; see
        `Network.attach`. Default: the machine's own.
    trace : int, default 0
        Trace this many steps, after the first few, into the folder; see `timeline.spans` and `timeline.merge`. Traced
        steps are slower.
    checkpoint_every : int, optional
        Write a checkpoint every this many steps, and one after each epoch; the newest two are kept. See
        `checkpoint.save`.
    strategy : Strategy or str, default "ddp"
        How the ranks share the work: a class of `hpclab.training.strategies` with its settings, such as
        ``Tensor(ranks=2)``, or the name of one: "ddp", "accumulate", "bf16", "fp16", "powersgd", "topk", "local-sgd",
        "diloco", "zero1", "zero2", "zero3", and for models that say how they are split, such as "GPT", "tensor",
        "sequence", "gpipe", "1f1b" and "interleaved". On CPUs, "zero2" and "zero3" need a torch newer than 2.6.
    recompute : bool, default False
        Keep only the inputs of each block of the model, and compute the rest again in the backward pass: less memory,
        for up to a third more work.
    autocast : bool, default False
        Multiply matrices in bfloat16.
    device : {"cpu", "cuda"}, default "cpu"
        Where ranks compute. "cuda" gives each rank a GPU of its host, and averages by NCCL; step rows then have
        ``memory_mb``, the peak of its allocator. Written as is usual, and not yet run by anyone: see docs/gpu.md.
    balance : {"measured"}, optional
        Give each rank a share of a step's samples in proportion to its speed, measured for a second as each attempt
        begins, and weigh its gradient by that share: for ranks on unequal machines. Step rows tell the shares, in
        ``samples``. The result is that of equal shares up to rounding, if the model neither draws random numbers nor
        looks at its share of a batch as a whole. Default: all shares are equal.
    find_unused_parameters : bool, default False
        With "ddp" and the strategies that build on it, allow models whose steps may leave parameters unused
        (DistributedDataParallel's argument of the same name); without it such a model fails in its second step. It
        costs some time in each step.
    bucket_cap_mb : float, optional
        With the same strategies, MB (2**20 bytes) of gradients that are averaged together (DistributedDataParallel's
        argument of the same name). Smaller buckets are ready earlier, so more of the averaging hides behind the
        backward pass, but each bucket costs its own latency. Default: DDP's, 1 MB for the first bucket and 25 MB for
        the others.
    max_restarts : int, default 0
        How many times to continue from the newest checkpoint when a rank, a worker or a host is lost, or its job in a
        queue reaches its walltime. With as many ranks as before, the result is that of a run without losses, bit for
        bit.
    min_ranks : int, optional
        The fewest ranks to continue with if workers don't come back; see `launch`. Each rank then takes more samples a
        step, so that the total stays the same: only numbers of ranks that divide it are used. The result is that of a
        run without losses up to rounding, if the model neither draws random numbers (dropout) nor looks at its share
        of a batch as a whole (batch norm).
    resume : path, optional
        Folder of an earlier run whose newest checkpoint to continue from. Model, data, samples a step over all ranks,
        number of steps and seed must be the same.
    folder : path, optional
        Where ``rows.jsonl`` and ``checkpoints/`` go; must be new or empty. Default: ``results/<time>-<name>-<id>``.
    name : str, default "train"
        Name of the run.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Run
        Its ``result()`` is a `Fit`. If you stop it, all ranks end after the same step, and the `Fit` has the weights of
        that step. Its rows are of the kinds "step" (the loss is that of a rank's own samples) and "epoch"; see
        `hpclab.rows`.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError, PermissionError
        If an argument is wrong; the message names it. See also `launch` and `data.load`.
    """
    if not _makes_module(model):
        raise TypeError(not_a_module(model))
    one_of("device", device, DEVICES)
    one_of("balance", balance, (None, "measured"))
    if not lr > 0:
        raise ValueError(f"lr (={lr!r}) must be above 0.")
    ranks = gang_size(client, ranks, threads, oversubscribe)
    epochs, batch_size = whole_number("epochs", epochs), whole_number("batch_size", batch_size)
    source = datasets.find(data)
    samples = _samples(model, source, ranks, batch_size)
    trace, seed = whole_number("trace", trace, least=0), whole_number("seed", seed, least=None)
    steps, checkpoint_every = _optional("steps", steps), _optional("checkpoint_every", checkpoint_every)
    batch, switches = batch_size * ranks, {"recompute": bool(recompute), "autocast": bool(autocast)}
    ddp = {"find_unused_parameters": bool(find_unused_parameters), "bucket_cap_mb": bucket_cap_mb}
    strategy = _settled(strategy, network, switches, ddp)
    strategy.check(model, ranks, batch, balance is not None)
    job = Job(
        *(model, str(source.absolute()), epochs, batch, float(lr), seed, steps, optimizer, loss, network, trace),
        *(checkpoint_every, strategy, device, balance is not None),
    )
    placing: dict[str, Any] = {"ranks": ranks, "threads": threads, "oversubscribe": oversubscribe, "wait": wait}
    keeping: dict[str, Any] = {"max_restarts": max_restarts, "resume": resume, "folder": folder}
    run = _launch(client, job, name=name, min_ranks=_sizes(job, ranks, min_ranks), **placing, **keeping)
    if progress:
        run.watch(StepBar(_total(job, ranks, samples), f"{name}, {ranks} rank{'s' * (ranks > 1)}"))
    return run.then(lambda returned: Fit(returned[0][0], run.rows, returned[0][1], run.folder))


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(name, value)


def _launch(client: Client, job: Job, **settings: Any) -> Run:
    """Launch it; if it can't be sent, name the part of it that can't."""
    try:
        return launch(client, replicate, job, **settings)
    except TypeError:
        check_pickles({"model": job.model, "optimizer": job.optimizer, "loss": job.loss})
        raise


def _total(job: Job, ranks: int, samples: int) -> int:
    """Steps until a job on this many ranks and samples ends."""
    replicas, _of_ranks = job.strategy.replicas(ranks)
    return job.steps or job.epochs * (samples // replicas // (job.batch // replicas))


def _samples(model: Model, source: Path, ranks: int, batch_size: int) -> int:
    """Samples of the data set, if it suits the model and is whole, and a rank's shard fills a batch."""
    samples, _ = (datasets.load(source, split) for split in ("train", "test"))
    if isinstance(model, str) and MODELS[model] != samples.kind:
        fitting = ", ".join(repr(name) for name, kind in MODELS.items() if kind == samples.kind)
        raise ValueError(
            f"model (={model!r}) takes {MODELS[model]}, and {samples.name} holds {samples.kind}; use {fitting}, or"
            " other data."
        )
    size = len(samples)
    shard = size // ranks
    if batch_size > shard:
        raise ValueError(
            f"batch_size (={batch_size}) exceeds the {shard} samples of a rank's shard"
            f" ({size} over ranks (={ranks})); use batch_size<={shard}."
        )
    return size


def _settled(strategy: Strategy | str, network: Network | None, switches: dict, ddp: dict) -> Strategy:
    """The strategy with the switches and DDP's arguments that `train` was given."""
    strategy = named(strategy)
    if network is not None and not isinstance(strategy, DDP):
        raise ValueError(f"network emulates averages of DDP, which strategy (={strategy!r}) doesn't make; use 'ddp'.")
    changes = {name: value for name, value in switches.items() if value}
    for name, value in ddp.items():
        if value is None or value is False:
            continue
        if not isinstance(strategy, DDP):
            raise ValueError(f"{name} (={value!r}) is for DDP, which strategy (={strategy!r}) doesn't use.")
        changes[name] = value
    return replace(strategy, **changes)


def _sizes(job: Job, ranks: int, least: int | None) -> list[int] | None:
    """Numbers of ranks that can go on with a job, if fewer may."""
    if least is None:
        return None
    least = whole_number("min_ranks", least)
    if least > ranks:
        raise ValueError(f"min_ranks (={least}) exceeds ranks (={ranks}).")
    return [
        size
        for size in range(least, ranks + 1)
        if job.batch % size == 0 and not job.strategy.obstacle(job.model, size, job.batch, job.balance)
    ]


def _makes_module(model: object) -> bool:
    if isinstance(model, str):
        return model in MODELS
    from torch import nn  # loaded already, by whoever made a module

    return issubclass(model, nn.Module) if isinstance(model, type) else callable(model)

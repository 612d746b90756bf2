"""What *debugging* shows its programs with: samples of two sensors, and what becomes of a program on real ranks."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import Client
from torch.nn.functional import mse_loss

from hpclab.gangs.launch import launch
from hpclab.language import translate as _
from hpclab.tables import Table

HANG_SECONDS = 3.0
"""After how long a gang in which nobody gets on is ended."""


def samples(number: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples (N, 3) and targets (N, 1); every other one is of a second sensor, which is off by one, and noisy."""
    draws = torch.Generator().manual_seed(3)
    second = (torch.arange(number) % 2)[:, None]
    x = torch.randn(number, 3, generator=draws) + second
    noise = torch.randn(number, 1, generator=draws) * (0.1 + 0.7 * second)
    return x, x.sum(1, keepdim=True) + noise


def show(client: Client, program: Callable, *arguments: Any, ranks: int = 2) -> list | None:
    """What each rank of a gang returns from a program; if they fail or hang, prints hpclab's report.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster whose workers start the ranks, which take turns if there are fewer CPUs.
    program : callable
        Called as ``program(*arguments)`` on every rank.
    ranks : int
        Number of ranks.
    """
    run = launch(client, program, *arguments, ranks=ranks, oversubscribe=True, hang_after=HANG_SECONDS)
    try:
        return run.result()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return None


def losses(client: Client, program: Callable, *arguments: Any, cases: Iterable[tuple[int, int]]) -> Table:
    """The loss with the weights that a program ends with, on ranks and with pieces of each case.

    Its arguments are a linear model, samples x (N, features), targets y (N, 1), and what else comes before the pieces.
    """
    _model, x, y, *_others = arguments
    found = []
    for ranks, pieces in cases:
        returned = show(client, program, *arguments, pieces, ranks=ranks)
        row: dict[str, Any] = {_("ranks"): ranks, _("pieces on each"): pieces, _("loss"): None}
        if returned:
            row[_("loss")] = float(mse_loss(x @ returned[0][:-1, None] + returned[0][-1], y))
        found.append(row)
    return Table(found)


def differences(
    client: Client, program: Callable, model: Any, x: Any, y: Any, *others: Any, counts: Iterable[int]
) -> Table:
    """By how much 1 rank and 2 end with other weights, for the first so many samples."""
    return Table(
        {
            _("samples"): count,
            _("weights of 1 rank and of 2 differ by"): apart(client, program, model, x[:count], y[:count], *others),
        }
        for count in counts
    )


def apart(client: Client, program: Callable, *arguments: Any) -> float | None:
    """The largest difference between the weights that 1 rank ends with and those of 2, if both end."""
    one, two = (show(client, program, *arguments, ranks=ranks) for ranks in (1, 2))
    return None if one is None or two is None else float((one[0] - two[0]).abs().max())


def interrupted(client: Client, program: Callable, *arguments: Any, stops: Sequence[int]) -> Table:
    """The weights that a program ends with, if it is launched once, and if it is launched anew for each stop."""
    with tempfile.TemporaryDirectory() as folder:
        whole = show(client, program, *arguments, stops[-1], Path(folder, "whole"))
        parts = [show(client, program, *arguments, steps, Path(folder, "parts")) for steps in stops][-1]
    found = {_("at once"): whole, _("interrupted"): parts}
    return Table(
        {_("run"): name, _("weights"): "  ".join(f"{weight:.9f}" for weight in returned[0].tolist())}
        for name, returned in found.items()
        if returned
    )


class Watched(torch.nn.Linear):
    """A linear layer from 3 numbers to 1 that prints the first sample of each batch that it is given."""

    def __init__(self) -> None:
        super().__init__(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("sees", " ".join(f"{number:+.4f}" for number in x[0].tolist()))
        return super().forward(x)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Mean.forward(context, gradient)  # each rank's loss depends on what all ranks gave


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the ranks, of which autograd knows the gradient; all ranks must call it."""
    return _Mean.apply(tensor)

"""What a forward pass costs, by torch's own counters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Counts:
    """Of one forward pass over a batch; the models' `counts` give it by formula, `measure` by running it."""

    parameters: int
    """Numbers to train; one that is used twice counts once."""
    flops: int
    """Floating-point operations of matrix products and convolutions, 2 a multiply-add. A backward pass takes twice as
    many. Attention counts in full, though a causal kernel may skip half."""
    activation_bytes: int
    """What is kept for the backward pass, without parameters and buffers; a loss keeps some more."""


def word(model: nn.Module) -> int:
    """Bytes of a number in a model."""
    return next(model.parameters()).element_size()


def measure(model: nn.Module, *inputs: Tensor) -> Counts:
    """Run a model's forward pass, in the mode that it is in (train or eval), and let torch count.

    Parameters
    ----------
    model : torch.nn.Module
    *inputs : Tensor
        One batch, on the model's device.

    Notes
    -----
    The model runs twice, so running averages (batch norm) move. `FlopCounterMode` sees neither a CPU's fused attention
    nor oneDNN's LSTM, so it gets the plain ones; the bytes are those of fused attention, as in training. Each storage
    counts once and whole, even where only a part of it is kept.

    Examples
    --------
    >>> measure(nn.Linear(3, 5), torch.zeros(2, 3))
    Counts(parameters=20, flops=60, activation_bytes=24)
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here, since a rank that loads a model needs neither
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), _plain(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            kept[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with _plain(), saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(*inputs)  # as long as it lives, all that it keeps does, and no address is used twice
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del output
    return Counts(parameters, counter.get_total_flops(), sum(kept.values()))


@contextmanager
def _plain() -> Iterator[None]:
    """Without oneDNN, whose LSTM shows its inside to no counter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TF32 is for other machines, when oneDNN is switched on again
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

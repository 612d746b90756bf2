"""Rank: where it computes, and how batches get there. With GPUs conventional, and not run by our tests: docs/gpu.md."""

import os
from typing import Any

import torch
from torch import Tensor

from hpclab import machine


def of_rank(name: str) -> torch.device:
    """A rank's device: the CPU, or the GPU with its number among the ranks of its host.

    Raises
    ------
    ValueError
        If the host has fewer GPUs than ranks.
    """
    if name == "cpu":
        return torch.device("cpu")
    cards, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if cards < ranks:
        raise ValueError(
            f"device (={name!r}) gives each rank a GPU of its own; {machine.node()} has {cards} for {ranks} ranks. Use"
            " fewer ranks a host, or device='cpu'."
        )
    return torch.device(name, int(os.environ["LOCAL_RANK"]))


def moved(batch: Any, device: torch.device) -> Any:
    """A batch, a tensor or a tuple or list of such, on a device."""
    return batch.to(device) if isinstance(batch, Tensor) else type(batch)(moved(part, device) for part in batch)


def peak(device: torch.device) -> dict[str, float]:
    """For a row, once the device has done what it was given: ``memory_mb``, its allocator's peak; nothing of a CPU."""
    if device.type == "cpu":
        return {}
    torch.cuda.synchronize(device)
    return {"memory_mb": torch.cuda.max_memory_allocated(device) / 1e6}

"""Programs that are slow for a reason which is planted, and can be measured: the exercise of *one-process*."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("compute", "memory", "data")
"""What binds a program: arithmetic, the bytes that its operations move, or the wait for its next batch."""


@dataclass(frozen=True)
class Program:
    """A loop of two parts, as a training loop is: load a batch, work on it."""

    load: Callable[[], Tensor]
    work: Callable[[Tensor], Any]
    batches: int
    """How many batches a run takes."""

    def run(self) -> None:
        """Load and work, batch by batch."""
        for _batch in range(self.batches):
            self.work(self.load())


def planted(kind: str, dice: random.Random, batches: int | None = None, product: bool | None = None) -> Program:
    """Make a program of a kind, with sizes, operations and a length that are drawn.

    Neither its length nor the names of its operations give the kind away: a product of matrices may be bound by
    memory, and what a slow loader feeds is either.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    dice : random.Random
        Where draws come from; equally seeded dice make equal programs.
    batches : int, optional
        Default: drawn, 1 to 8.
    product : bool, optional
        Whether it multiplies matrices, where its kind leaves that open. Default: drawn.
    """
    if kind not in KINDS:
        raise ValueError(f"kind (={kind!r}) must be one of {', '.join(KINDS)}.")
    batches = batches or dice.randint(1, 8)
    product = dice.choice([True, False]) if product is None else product
    size = 64 * dice.randint(10, 13)
    if kind == "data":
        pictures = _packed(300 + 50 * dice.randint(0, 4), seed=dice.randint(0, 999))
        return Program(partial(_decode, pictures), partial(_layers, width=16, times=1) if product else _scaled, batches)
    if kind == "compute":
        return Program(torch.rand(size, 784).clone, partial(_layers, width=size, times=dice.randint(1, 2)), batches)
    large = torch.full((8 * dice.randint(5, 7), 250_000), 1e-3)  # 40 to 56 MB, more than most caches hold
    return Program(torch.rand(64, 784).clone, partial(_matrix_by_vector if product else _rescaled, large), batches)


def _packed(count: int, seed: int) -> list[bytes]:
    """Pictures, compressed one by one, as on a disk."""
    pixels = np.random.default_rng(seed).integers(0, 8, (count, 784), dtype=np.uint8)
    return [zlib.compress(picture.tobytes()) for picture in pixels]


def _decode(pictures: list[bytes]) -> Tensor:
    """Unpack pictures one by one, in Python, as many a loader does; shape (B, 784)."""
    decoded = []
    for packed in pictures:
        pixels = np.frombuffer(zlib.decompress(packed), np.uint8).astype(np.float32)
        decoded.append((pixels - pixels.mean()) / (pixels.std() + 1e-6))
    return torch.from_numpy(np.stack(decoded))


def _layers(batch: Tensor, width: int, times: int) -> Tensor:
    weights = torch.full((784, width), 1e-2)
    for _time in range(times):
        product = batch @ weights  # (B, width)
    return product


def _scaled(batch: Tensor) -> Tensor:
    return batch * 0.5


def _matrix_by_vector(large: Tensor, batch: Tensor) -> Tensor:
    vector = batch[0, :1].expand(large.shape[1]).contiguous()
    return large @ vector


def _rescaled(large: Tensor, batch: Tensor) -> Tensor:
    return large.mul_(0.999).add_(batch[0, 0])

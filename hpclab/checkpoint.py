"""Checkpoints: written whole or not at all, found again, read without running code."""

import os
import re
from pathlib import Path
from typing import Any

import torch


def save(folder: str | os.PathLike, epoch: int, state: dict[str, Any]) -> Path:
    """Write ``epoch-NNNN.pt`` atomically: under its name stands a whole checkpoint or none, also after a crash.

    Parameters
    ----------
    folder : path
        Made if it isn't there.
    epoch : int
        Epochs finished, >= 0.
    state : dict
        Tensors, numbers, strings, and dicts and lists of them (what ``torch.load(weights_only=True)`` reads).

    Raises
    ------
    OSError
        If it can't be written; an older checkpoint stays as it was.
    """
    path = Path(folder) / f"epoch-{epoch:04d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def newest(folder: str | os.PathLike) -> Path | None:
    """Path of the checkpoint with the most epochs; None if there is none."""
    found = [path for path in Path(folder).glob("epoch-*.pt") if re.fullmatch(r"epoch-\d+\.pt", path.name)]
    return max(found, key=lambda path: int(path.stem.removeprefix("epoch-")), default=None)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote, without running any code that it might hold."""
    return torch.load(path, weights_only=True)

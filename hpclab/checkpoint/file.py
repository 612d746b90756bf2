"""One checkpoint as a file: written whole or not at all, found again, read without running code."""

import io
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hpclab.checkpoint import shards
from hpclab.checkpoint.kinds import check_kinds, check_readable

KEPT = 2
"""Checkpoints that stay: the newest, and the one before it, should a disk lose the newest."""


def write(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-NNNNNNNN.pt`` atomically: a file of that name is a whole checkpoint, even after a crash.

    Keeps the newest `KEPT` checkpoints up to this step: later ones are from an attempt that was given up.

    Parameters
    ----------
    folder : path
        Created if it doesn't exist.
    step : int
        Steps done, >= 0.
    state : dict
        What `save` takes.

    Raises
    ------
    TypeError
        If the state has anything else, such as numpy's numbers; the message says where.
    OSError
        If it can't be written; earlier checkpoints stay as they were.
    """
    path = Path(folder).expanduser() / f"step-{step:08d}.pt"
    part = path.with_name("next.part")
    check_kinds(state, "state")
    memory = io.BytesIO()
    torch.save(state, memory)  # not to the file: of a full disk it would say "unexpected pos 704 vs 598"
    check_readable(memory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _keep_name(path)
    except OSError as error:
        before = newest(folder)
        kept = f"the newest one there is {before.name}" if before else "there is none yet"
        error.add_note(f"The checkpoint of step {step} could not be written to {folder}; {kept}.")
        raise
    finally:
        with suppress(OSError):  # it would hide the first error, and the next write takes the same name
            part.unlink(missing_ok=True)
    checkpoints = in_folder(folder)
    place = checkpoints.index(path)
    for other in checkpoints[:place] + checkpoints[place + KEPT :]:
        other.unlink(missing_ok=True)
    return path


def newest(folder: str | os.PathLike) -> Path | None:
    """Path of the checkpoint with the most steps; None if there is none."""
    return next(iter(in_folder(folder)), None)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint that `write` wrote, without running any code that it might hold.

    A checkpoint that `save` wrote is a dict of ``state``, ``step`` and ``random``; sharded tensors come back whole.

    Raises
    ------
    OSError
        If it is damaged: each file of a checkpoint has a checksum, or one of each of its parts.
    """
    path = Path(path).expanduser()
    saved = read(path)
    shards.check(path.parent, saved)
    return shards.join(path.parent, saved)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """As `load`, without what was saved in shards."""
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from error
    if damaged is not None:
        raise OSError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")
    return torch.load(path, weights_only=True)


def in_folder(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints of a folder, the newest first."""
    paths = [
        path for path in Path(folder).expanduser().glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", path.name)
    ]
    return sorted(paths, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)


def _keep_name(path: Path) -> None:
    """Have the disk know a file's new name, too; Windows opens no folder, and does it by itself."""
    with suppress(PermissionError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

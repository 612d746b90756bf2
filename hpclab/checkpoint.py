"""Checkpoints: written whole or not at all, found again, read without running code.

`save` and `restore` are what a function on a gang calls; `write`, `newest` and `load` do the same to a folder.
"""

import io
import os
import pickle
import random
import re
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpclab import _rank, machine

KEPT = 2
"""Checkpoints that stay: the newest, and the one before it, should a disk lose the newest."""


def save(state: dict[str, Any], step: int) -> None:
    """Write a checkpoint from inside a gang: every rank calls it after the same step, and waits for rank 0 to write.

    It goes to ``checkpoints/`` in the run's folder, where the newest `KEPT` stay, and holds rank 0's state, and every
    rank's random numbers: torch's (on the CPU), numpy's and Python's. Outside a gang nothing is written.

    Parameters
    ----------
    state : dict
        Tensors, numbers, strings, and dicts and lists of them (what ``torch.load(weights_only=True)`` reads), such as
        ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``. That of other ranks than 0 is unused.
    step : int
        Steps done, >= 0.

    Raises
    ------
    TypeError
        If the state holds what can't be read again, such as numpy's numbers.
    OSError
        If it can't be written, or the run's folder isn't on a disk that the nodes of a cluster share; those written
        before stay as they were.
    """
    if not _rank.in_gang():
        return
    started = time.perf_counter()
    draws = _gather(_random_state())
    if draws is not None:
        _check_shared()
        path = write(_rank.run_folder() / "checkpoints", step, {"state": state, "random": draws, "step": step})
        spent = time.perf_counter() - started
        _rank.report(kind="checkpoint", step=step, save_s=spent, nbytes=path.stat().st_size)
    if dist.is_initialized():
        dist.barrier()  # the others' next step shall not be charged with rank 0's writing


def restore() -> dict[str, Any] | None:
    """Give every rank the state that the newest checkpoint holds, or None if there is nothing to go on from.

    There is, in a run that was restarted (``max_restarts``) or resumes another (``resume``). If there are as many ranks
    as wrote it, each also goes on with its own random numbers. Called by every rank.

    Raises
    ------
    OSError
        If there are checkpoints, and none can be read, or the run's folder isn't on a disk that the nodes share.
    """
    folders = _rank.restore_folders()
    if not folders:
        return None
    _check_shared()
    found = [str(path) for folder in folders for path in _all(folder / "checkpoints")]
    if dist.is_initialized():
        dist.broadcast_object_list(listed := [found], src=0)
        found = listed[0]
    for path in found:
        try:
            held = load(path)
        except Exception as error:
            warnings.warn(f"checkpoint {path} can't be read ({error}); the one before it is tried.", stacklevel=2)
            continue
        rank, ranks = _place()
        if rank == 0:
            _rank.report(kind="resume", step=held["step"], checkpoint=path)
        if len(held["random"]) == ranks:
            _set_random_state(held["random"][rank])
        return held["state"]
    if found:
        raise OSError(f"none of the checkpoints {', '.join(found)} can be read; without `resume`, a run begins anew.")
    return None


def write(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-NNNNNNNN.pt`` atomically: under its name stands a whole checkpoint or none, also after a crash.

    Of those there, the newest `KEPT` up to this step stay: later ones are of an attempt that was given up.

    Parameters
    ----------
    folder : path
        Made if it isn't there.
    step : int
        Steps done, >= 0.
    state : dict
        What ``torch.load(weights_only=True)`` reads.

    Raises
    ------
    TypeError
        If the state holds something else, such as numpy's numbers.
    OSError
        If it can't be written; those written before stay as they were.
    """
    path = Path(folder).expanduser() / f"step-{step:08d}.pt"
    part = path.with_name("next.part")
    memory = io.BytesIO()
    torch.save(state, memory)  # not to the file: of a full disk it would say "unexpected pos 704 vs 598"
    _check_readable(memory)
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
        part.unlink(missing_ok=True)
    there = _all(folder)
    place = there.index(path)
    for other in there[:place] + there[place + KEPT :]:
        other.unlink(missing_ok=True)
    return path


def newest(folder: str | os.PathLike) -> Path | None:
    """Path of the checkpoint with the most steps; None if there is none."""
    return next(iter(_all(folder)), None)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint that `write` wrote, without running any code that it might hold.

    One that `save` wrote is a dict of ``state``, ``step`` and ``random``.

    Raises
    ------
    OSError
        If it is damaged: the file of a checkpoint has a checksum of each of its parts.
    """
    path = Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"checkpoint {path} is damaged: {error}") from error
    if damaged is not None:
        raise OSError(f"checkpoint {path} is damaged: {damaged} has another checksum")
    return torch.load(path, weights_only=True)


def _check_readable(written: io.BytesIO) -> None:
    """Raise a TypeError if `load` couldn't read this."""
    written.seek(0)
    try:
        torch.load(written, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            f"state holds {named[1] if named else 'an object'}, which can't be read again without running code; use"
            " tensors, plain numbers (float(x) for one of numpy's), strings, and dicts and lists of them."
        ) from None


def _all(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints of a folder, the newest first."""
    found = [
        path for path in Path(folder).expanduser().glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", path.name)
    ]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)


def _keep_name(path: Path) -> None:
    """Have the disk know a file's new name, too; Windows opens no folder, and does it by itself."""
    with suppress(PermissionError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _random_state() -> dict[str, Any]:
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  # torch's users draw from it
    version, words, second = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, gauss],
        "python": [version, list(words), second],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, second = state["python"]
    random.setstate((version, tuple(words), second))


def _gather(state: dict[str, Any]) -> list[dict] | None:
    """On rank 0 what every rank has, by rank; None on the others."""
    rank, ranks = _place()
    if not dist.is_initialized():
        return [state] if rank == 0 else None
    found: list[Any] | None = [None] * ranks if rank == 0 else None
    dist.gather_object(state, found)
    return found


def _check_shared() -> None:
    """Raise if this rank doesn't see the folder that the run's driver made."""
    folder = _rank.run_folder()
    if not (folder / "rows.jsonl").exists():
        raise FileNotFoundError(
            f"folder (={str(folder)!r}) isn't there on {machine.node()}; name one on a disk that all nodes share, as"
            " home directories of clusters are."
        )


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

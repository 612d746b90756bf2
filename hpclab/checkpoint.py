"""Checkpoints: written whole or not at all, found again, read without running code.

`save` and `restore` are what a function on a gang calls; `write`, `newest` and `load` do the same to a folder.
"""

import io
import itertools
import os
import pickle
import random
import re
import time
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpclab import machine
from hpclab._arguments import whole_number
from hpclab.gangs import rank as _rank

KEPT = 2
"""Checkpoints that stay: the newest, and the one before it, should a disk lose the newest."""
LAG_SECONDS = 20.0
"""How long a rank waits for a checkpoint that rank 0 has seen: a network's disk shows a new file late."""
DEEPEST = 100
"""How deep a state may be nested; pickle gives up at some hundreds."""
_exchanges = itertools.count()


def save(state: dict[str, Any], step: int) -> None:
    """Write a checkpoint from inside a gang: every rank calls it after the same step, and waits for rank 0 to write.

    It goes to ``checkpoints/`` in the run's folder, where the newest `KEPT` stay, and holds rank 0's state, and every
    rank's random numbers: torch's, numpy's and Python's. Outside a gang nothing is written.

    Parameters
    ----------
    state : dict
        Tensors, numbers, strings, None, and dicts, lists, tuples and sets of them (what
        ``torch.load(weights_only=True)`` reads), such as ``{"model": model.state_dict(), "optimizer":
        optimizer.state_dict(), "step": step}``. That of other ranks than 0 is unused.
    step : int
        Steps done, >= 0.

    Raises
    ------
    TypeError
        If the state holds something else, such as numpy's numbers or a tensor of which this rank has a shard; the
        message says where.
    ValueError
        If the ranks have done different numbers of steps.
    OSError
        If it can't be written, or the run's folder isn't on a disk that the nodes of a cluster share; those written
        before stay as they were.

    Notes
    -----
    An error of rank 0 is raised on every rank, so they can all go on after it.

    What differs by rank, such as a ``torch.Generator`` of one's own, is saved once it is gathered: after
    ``dist.all_gather_object(every, mine)`` save ``every``, and take ``every[rank]`` back.

    Under ``fully_shard`` save what ``get_state_dict`` of ``torch.distributed.checkpoint.state_dict`` gives with
    ``StateDictOptions(full_state_dict=True, cpu_offload=True)``, and put it back with ``set_state_dict`` and the same.
    """
    step = whole_number("step", step, least=0)
    if not _rank.in_gang():
        return
    started = time.perf_counter()
    every = _exchange({"step": step, "random": _random_state()})
    error: Exception | None = None
    if _place()[0] == 0:
        try:
            path = _write_for_all(state, every)
            spent = time.perf_counter() - started
            _rank.report(kind="checkpoint", step=step, save_s=spent, nbytes=path.stat().st_size)
        except Exception as caught:
            error = caught
    # All wait here, so that their next step isn't charged with rank 0's writing, and hear how it went: one that went on
    # alone after an error would wait for the others for ever.
    told = _exchange(_portable(error))[0]
    if told is not None:
        raise error or told


def restore() -> dict[str, Any] | None:
    """Give every rank the state that the newest checkpoint holds, or None if there is nothing to go on from.

    There is, in a run that was restarted (``max_restarts``) or resumes another (``resume``). If there are as many ranks
    as wrote it, each also goes on with its own random numbers: what draws some between this call and the loop makes the
    loop draw others, so call it when model and data are made. Called by every rank.

    If one rank can't read the newest checkpoint, all take the one before it.

    Raises
    ------
    OSError
        If there are checkpoints, and none can be read by all ranks, or the run's folder isn't on a disk that the nodes
        share.
    """
    folders = _rank.restore_folders()
    if not folders:
        return None
    _check_shared()
    rank, ranks = _place()
    paths = _exchange([str(path) for folder in folders for path in _all(folder / "checkpoints")])[0]
    for path in paths:
        held, told = _read_for_all(path)
        if wrong := _differences(_exchange(told)):
            warnings.warn(f"checkpoint {path} can't be read ({wrong}); the one before it is tried.", stacklevel=2)
            continue
        assert held is not None
        if rank == 0:
            _rank.report(kind="resume", step=held["step"], checkpoint=path)
        if len(held["random"]) == ranks:
            _set_random_state(held["random"][rank])
        return held["state"]
    if paths:
        raise OSError(f"none of the checkpoints {', '.join(paths)} can be read; without `resume`, a run begins anew.")
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
        What `save` takes.

    Raises
    ------
    TypeError
        If the state holds something else, such as numpy's numbers; the message says where.
    OSError
        If it can't be written; those written before stay as they were.
    """
    path = Path(folder).expanduser() / f"step-{step:08d}.pt"
    part = path.with_name("next.part")
    _check_kinds(state, "state")
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
        with suppress(OSError):  # it would hide the first error, and the next write takes the same name
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


def _write_for_all(state: dict[str, Any], every: list[dict]) -> Path:
    """Write rank 0's state, and what every rank told."""
    steps = [told["step"] for told in every]
    if wrong := [step for step in steps if not isinstance(step, int | np.integer) or step < 0]:
        raise ValueError(f"step (={wrong[0]!r}) must be a whole number >= 0.")
    if len(set(steps)) > 1:
        by_rank = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(steps))
        raise ValueError(f"step differs by rank ({by_rank}); every rank must call save after the same step.")
    step = int(steps[0])
    _check_shared()
    _check_kinds(state, "state")
    held = {"state": state, "random": [told["random"] for told in every], "step": step}
    return write(_rank.run_folder() / "checkpoints", step, held)


def _read_for_all(path: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What a checkpoint holds, if this rank can read it, and what to tell the others: sums of its parts, or why not."""
    ends = time.monotonic() + LAG_SECONDS
    while not os.path.exists(path) and time.monotonic() < ends:
        with suppress(OSError):
            os.listdir(os.path.dirname(path))  # has a network's disk ask its server anew
        time.sleep(0.1)
    try:
        held = load(path)
        with zipfile.ZipFile(path) as parts:
            sums = zlib.crc32(repr([(part.filename, part.CRC) for part in parts.infolist()]).encode())
        return held, {"sums": sums}
    except Exception as error:
        return None, {"error": str(error)}


def _differences(every: list[dict]) -> str:
    """Why the ranks can't all go on from a checkpoint, from what each told of it; empty if they can."""
    errors = {rank: told["error"] for rank, told in enumerate(every) if "error" in told}
    if len(errors) == len(every):
        return errors[0]
    if errors:
        return "; ".join(f"on rank {rank}: {error}" for rank, error in errors.items())
    other = [str(rank) for rank, told in enumerate(every) if told["sums"] != every[0]["sums"]]
    return f"on rank {', '.join(other)} another file has its name than on rank 0" if other else ""


def _exchange(value: Any) -> list[Any]:
    """What each rank gives, by rank, on every rank; also before the function has made its process group."""
    rank, ranks = _place()
    if ranks == 1:
        return [value]
    if dist.is_initialized():
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, value)
        return every
    store = dist.PrefixStore(f"checkpoint-{next(_exchanges)}", _rank.store())
    store.set(str(rank), pickle.dumps(value))  # type: ignore[arg-type]  # torch's stubs take only str
    return [pickle.loads(store.get(str(other))) for other in range(ranks)]


def _portable(error: Exception | None) -> Exception | None:
    """An error that other ranks can read."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.Size, torch.device, torch.dtype, torch.layout),
)
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _check_kinds(value: Any, place: str, depth: int = 0, key: bool = False) -> None:
    """Raise a TypeError if a value holds what `load` would not read, or not as it was; it says where.

    By the very type: a subclass, such as numpy.float64 is of float, is pickled as itself.
    """
    if depth > DEEPEST:
        raise TypeError(f"{place[:80]}... is nested more than {DEEPEST} deep, or holds itself; save it flat.")
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        for name, inner in value.items():
            _check_kinds(name, f"the key {name!r} of {place}", depth + 1, key=True)
            _check_kinds(inner, f"{place}[{name!r}]", depth + 1)
    elif kind in (list, tuple):
        for number, inner in enumerate(value):
            _check_kinds(inner, f"{place}[{number}]", depth + 1, key)
    elif kind is set:
        for inner in value:
            _check_kinds(inner, f"{inner!r} in {place}", depth + 1, key=True)
    elif not (_is_plain(value) or (not key and _is_whole_tensor(value))):
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"{place} is {name}, which can't be read again without running code; {_way_out(value)}")


def _is_plain(value: Any) -> bool:
    # torch.load doesn't read what pickle writes of no bytes, and of an int that is longer.
    if type(value) in (bytes, int):
        return value != b"" if type(value) is bytes else value.bit_length() < 2040
    return type(value) in _LEAVES


def _is_whole_tensor(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout in _LAYOUTS and not value.is_meta


def _way_out(value: Any) -> str:
    """How to save what is in something that can't be saved as it is."""
    if isinstance(value, np.generic):
        return "use its item()."
    if isinstance(value, np.ndarray):
        return "use torch.from_numpy(x)."
    if isinstance(value, torch.Generator):
        return "use its get_state()."
    if type(value) is int:
        return f"it has {value.bit_length():,} bits, and up to 2,039 are read: use str(x)."
    if type(value) is bytes:
        return "use bytearray() for no bytes."
    if type(value).__name__ == "DTensor":
        return (
            "each rank has a shard of it, and only rank 0's state is saved: use get_state_dict(model, optimizer,"
            " options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of"
            " torch.distributed.checkpoint.state_dict, on every rank, and set_state_dict with the same options."
        )
    if isinstance(value, torch.Tensor) and value.is_meta:
        return "it is on the meta device and has no values; make it on another first."
    if hasattr(value, "state_dict"):
        return "use its state_dict()."
    return "use tensors, plain numbers, strings, None, and dicts, lists, tuples and sets of them."


def _check_readable(written: io.BytesIO) -> None:
    """Raise a TypeError if `load` couldn't read this: some torch may read less than `_check_kinds` lets through."""
    written.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(written):
        raise TypeError(
            f"state holds {unsafe[0]}, which can't be read again without running code; use tensors, plain numbers,"
            " strings, None, and dicts, lists, tuples and sets of them."
        )


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
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, has_gauss, gauss],
        "python": [version, list(words), second],
    }
    if torch.cuda.is_initialized():  # conventional, and not run by our tests
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, second = state["python"]
    random.setstate((version, tuple(words), second))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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

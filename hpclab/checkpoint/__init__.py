"""Checkpoints: written whole or not at all, found again, read without running code.

`save` and `restore` are what a function on a gang calls; `write`, `newest` and `load` do the same to a folder. A state
is one file, ``step-NNNNNNNN.pt``. If it has tensors of which each rank holds a shard (DTensor, as under FSDP2), these
are in a folder beside it, ``step-NNNNNNNN-<id>.shards``, into which each rank writes its own.
"""

import itertools
import os
import pickle
import random
import shutil
import time
import uuid
import warnings
import zipfile
import zlib
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpclab import machine
from hpclab._arguments import whole_number
from hpclab.checkpoint import shards
from hpclab.checkpoint.file import KEPT as KEPT
from hpclab.checkpoint.file import in_folder, read
from hpclab.checkpoint.file import load as load
from hpclab.checkpoint.file import newest as newest
from hpclab.checkpoint.file import write as write
from hpclab.checkpoint.kinds import check_kinds
from hpclab.gangs import rank as _rank

__all__ = ["load", "newest", "restore", "save", "write"]
LAG_SECONDS = 20.0
"""How long a rank waits for a file that rank 0 has seen: a network's disk shows a new one late."""
_exchanges = itertools.count()


def save(state: dict[str, Any], step: int) -> None:
    """Write a checkpoint from inside a gang: every rank calls it after the same step, and waits until it is written.

    It goes to ``checkpoints/`` in the run's folder, where the newest `KEPT` are kept. It has rank 0's state, every
    rank's shards in it, and every rank's random number state (torch, numpy and Python). Outside a gang it writes
    nothing.

    Parameters
    ----------
    state : dict
        Tensors, numbers, strings, None, and dicts, lists, tuples and sets of them (what
        ``torch.load(weights_only=True)`` reads), such as ``{"model": model.state_dict(), "optimizer":
        optimizer.state_dict(), "step": step}``. The state of ranks other than 0 is unused, except for sharded tensors
        (DTensor); these may be in dicts, lists and tuples.
    step : int
        Steps done, >= 0.

    Raises
    ------
    TypeError
        If the state has anything else, such as numpy's numbers; the message says where.
    ValueError
        If the ranks have done different numbers of steps, or have shards of different tensors.
    OSError
        If it can't be written, or the run's folder isn't on a disk that the cluster's nodes share; earlier checkpoints
        stay as they were.

    Notes
    -----
    An error on one rank is raised on every rank, so they can all continue after it.

    To save what differs by rank, such as your own ``torch.Generator``, gather it first: after
    ``dist.all_gather_object(every, mine)`` save ``every``, and take ``every[rank]`` back.

    Under ``fully_shard``, save what ``torch.distributed.checkpoint.state_dict.get_state_dict`` returns. Later, pass
    what it returns then to `restore`, and the result to ``set_state_dict``. With
    ``StateDictOptions(full_state_dict=True, cpu_offload=True)`` for both, rank 0 gathers and writes it all.
    """
    if not _rank.in_gang():
        whole_number("step", step, least=0)
        return
    started = time.perf_counter()
    unsharded, sharded = shards.split(state)
    token = uuid.uuid4().hex[:8]
    gathered = _exchange({"step": step, "random": _random_state(), "sharded": [*sharded], "token": token})
    saved = {"state": unsharded, "random": [of_rank["random"] for of_rank in gathered], "step": _agreed_step(gathered)}
    if any(of_rank["sharded"] for of_rank in gathered):
        saved["shards"] = _write_shards(sharded, gathered, saved["step"])

    def write_file() -> None:
        if _place()[0] == 0:
            nbytes = _write_file(saved)
            _rank.report(kind="checkpoint", step=saved["step"], save_s=time.perf_counter() - started, nbytes=nbytes)

    # All wait here, so that their next step isn't charged with rank 0's writing, and hear how it went: one that went on
    # alone after an error would wait for the others for ever.
    _together(write_file)


def restore(state: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the newest checkpoint's state on every rank, or None if there is nothing to continue from.

    There is one in a run that was restarted (``max_restarts``) or resumes another (``resume``). Every rank calls this,
    after making model and data: if as many ranks wrote the checkpoint, each continues with its own random numbers, and
    drawing any between this call and the loop would change those of the loop.

    If one rank can't read the newest checkpoint, all ranks take the one before.

    Parameters
    ----------
    state : dict, optional
        What this run would save, if it has shards: they are filled, however many ranks wrote the checkpoint, and are in
        the returned state. Without it, tensors saved in shards come back whole on every rank.

    Raises
    ------
    OSError
        If there are checkpoints, but none that all ranks can read, or the run's folder isn't on a disk that the nodes
        share.
    ValueError
        If the tensors that have shards in `state`, or their shapes, aren't those that were saved in shards.
    """
    folders = _rank.restore_folders()
    if not folders:
        return None
    _check_shared()
    rank, ranks = _place()
    paths = _exchange([str(path) for folder in folders for path in in_folder(folder / "checkpoints")])[0]
    for path in paths:
        saved, reading = _read_for_all(path, rank, ranks)
        if why := _differences(_exchange(reading)):
            warnings.warn(f"checkpoint {path} can't be read ({why}); the one before it is tried.", stacklevel=2)
            continue
        assert saved is not None
        if rank == 0:
            _rank.report(kind="resume", step=saved["step"], checkpoint=path)
        if len(saved["random"]) == ranks:
            _set_random_state(saved["random"][rank])
        return shards.join(Path(path).parent, saved, like=shards.split(state)[1])["state"]
    if paths:
        raise OSError(
            f"none of the checkpoints {', '.join(paths)} can be read; without `resume`, a run starts from the"
            " beginning."
        )
    return None


def _agreed_step(gathered: list[dict]) -> int:
    """The step that all ranks have done."""
    steps = [whole_number("step", of_rank["step"], least=0) for of_rank in gathered]
    if len(set(steps)) > 1:
        by_rank = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(steps))
        raise ValueError(f"step differs by rank ({by_rank}); every rank must call save after the same step.")
    return steps[0]


def _write_shards(sharded: dict[shards.Keys, torch.Tensor], gathered: list[dict], step: int) -> dict[str, Any]:
    """Have all ranks write their shards; returns what the checkpoint's file says of them."""
    places = gathered[0]["sharded"]
    for rank, of_rank in enumerate(gathered):
        if other := set(places) ^ set(of_rank["sharded"]):
            raise ValueError(f"state{shards.where(other)} is sharded on rank 0 or on rank {rank}, not on both.")
    _together(_check_shared)
    folder = _rank.run_folder() / "checkpoints" / f"step-{step:08d}-{gathered[0]['token']}.shards"
    sums = _together(lambda: shards.write(folder, [sharded[keys] for keys in places], _place()[0]))
    return {"folder": folder.name, "places": places, "sums": dict(ChainMap(*sums))}


def _write_file(saved: dict[str, Any]) -> int:
    """Write rank 0's state, and what every rank reported; returns the bytes of the checkpoint."""
    _check_shared()
    check_kinds(saved["state"], "state")
    path = write(_rank.run_folder() / "checkpoints", saved["step"], saved)
    nbytes = path.stat().st_size
    named = saved["shards"]["folder"] if "shards" in saved else ""
    for folder in path.parent.glob("step-*.shards"):
        step = folder.name.rpartition("-")[0]
        if folder.name == named:
            nbytes += sum(file.stat().st_size for file in folder.iterdir())
        elif step == path.stem or not folder.with_name(f"{step}.pt").exists():  # written again, or left by a failure
            shutil.rmtree(folder, ignore_errors=True)
    return nbytes


def _read_for_all(path: str, rank: int, ranks: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What a checkpoint holds, if this rank can read it, and what to tell the others: sums of its parts, or why not."""
    ends = time.monotonic() + LAG_SECONDS
    _await_file(Path(path), ends)
    try:
        saved = read(path)
        for file in shards.files(Path(path).parent, saved):
            _await_file(file, ends)
        shards.check(Path(path).parent, saved, rank, ranks)
        with zipfile.ZipFile(path) as parts:
            sums = zlib.crc32(repr([(part.filename, part.CRC) for part in parts.infolist()]).encode())
        return saved, {"sums": sums}
    except Exception as error:
        return None, {"error": str(error)}


def _await_file(path: Path, ends: float) -> None:
    while not path.exists() and time.monotonic() < ends:
        with suppress(OSError):
            os.listdir(path.parent)  # makes a network's disk ask its server again
        time.sleep(0.1)


def _differences(gathered: list[dict]) -> str:
    """Why the ranks can't all go on from a checkpoint, from what each reported of it; empty if they can."""
    errors = {rank: reading["error"] for rank, reading in enumerate(gathered) if "error" in reading}
    if len(errors) == len(gathered):
        return errors[0]
    if errors:
        return "; ".join(f"on rank {rank}: {error}" for rank, error in errors.items())
    other = [str(rank) for rank, reading in enumerate(gathered) if reading["sums"] != gathered[0]["sums"]]
    return f"on rank {', '.join(other)} the file differs from that on rank 0" if other else ""


def _exchange(value: Any) -> list[Any]:
    """What each rank gives, by rank, on every rank; also before the function has made its process group."""
    rank, ranks = _place()
    if ranks == 1:
        return [value]
    if dist.is_initialized():
        gathered: list[Any] = [None] * ranks
        dist.all_gather_object(gathered, value)
        return gathered
    store = dist.PrefixStore(f"checkpoint-{next(_exchanges)}", _rank.store())
    store.set(str(rank), pickle.dumps(value))  # type: ignore[arg-type]  # torch's stubs take only str
    return [pickle.loads(store.get(str(other))) for other in range(ranks)]


def _together(work: Callable[[], Any]) -> list[Any]:
    """What the work of each rank gives, by rank; an error of one is raised on all."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    results = _exchange((result, _portable(error)))
    if errors := [error for _, error in results if error is not None]:
        raise error or errors[0]
    return [result for result, _ in results]


def _portable(error: Exception | None) -> Exception | None:
    """An error that other ranks can read."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


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
    """Raise if this rank doesn't see the folder that the run's kernel made."""
    folder = _rank.run_folder()
    if not (folder / "rows.jsonl").exists():
        raise FileNotFoundError(
            f"folder (={str(folder)!r}) isn't there on {machine.node()}; name one on a disk that all nodes share, as"
            " home directories of clusters are."
        )


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

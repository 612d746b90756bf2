"""Tensors of which each rank has a shard (DTensor, as under FSDP2): each rank writes its own, and reads what it needs.

`torch.distributed.checkpoint` writes and reads them, into a folder beside the checkpoint's file, which names it and is
written last: so the checkpoint is there whole or not at all. One part of torch's reader is replaced, since it
unpickles the list of what is where, which would run any code that it holds.
"""

import inspect
import pickle
import sys
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hpclab.checkpoint.kinds import DEEPEST

Keys = tuple[Any, ...]
"""Where in a state a tensor is: the keys and indices on the way to it."""
DESCRIPTION = {
    "torch": ["Size"],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.distributed.checkpoint.metadata": [
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ],
    "torch.serialization": ["_get_layout"],
    "pathlib": ["PosixPath", "WindowsPath"],
}
"""What torch's list of what is where may hold, beside dtypes: each by its very name, as a dot in it would lead on."""


def split(state: Any) -> tuple[Any, dict[Keys, torch.Tensor]]:
    """The state with None in place of each sharded tensor, and these; the very state if it has none."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none, and importing it takes long
    sharded: dict[Keys, torch.Tensor] = {}

    def take_out(keys: Keys, value: Any) -> Any:
        if module is None or not isinstance(value, module.DTensor):
            return value
        sharded[keys] = value
        return None

    try:
        unsharded = _mapped(state, take_out)
    except RecursionError:  # one that holds itself is refused when it is written, on all ranks
        return state, {}
    return (unsharded, sharded) if sharded else (state, sharded)


def write(folder: Path, tensors: list[torch.Tensor], rank: int) -> dict[str, int]:
    """Write this rank's shards, with all ranks; returns the checksum of each file that is this rank's.

    Raises
    ------
    OSError
        If one of the ranks can't.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(_numbered(tensors), storage_writer=dcp.FileSystemWriter(folder))
    except dcp.CheckpointException as error:
        raise OSError(f"the shards of checkpoint {folder} can't be written: {error}") from error
    paths = [*folder.glob(f"__{rank}_*"), *[folder / ".metadata"] * (rank == 0)]
    return {path.name: _sum(path) for path in paths}


def files(folder: Path, saved: dict[str, Any]) -> list[Path]:
    """Paths of the files of shards of a checkpoint, by what its own file holds."""
    listing = _description(saved)
    return [folder / Path(listing["folder"]).name / name for name in sorted(listing["sums"])] if listing else []


def check(folder: Path, saved: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
    """Raise an OSError if a file of shards is damaged or missing; of several ranks each looks at a part of them."""
    for path in files(folder, saved)[rank::ranks]:
        if _sum(path) != saved["shards"]["sums"][path.name]:
            raise OSError(f"checkpoint {path.parent} is damaged: the checksum of {path.name} is wrong")


def join(folder: Path, saved: dict[str, Any], like: dict[Keys, torch.Tensor] | None = None) -> dict[str, Any]:
    """What a checkpoint holds with its sharded tensors: filled into those of a state, if it has any, else whole.

    Raises
    ------
    ValueError
        If the state has other sharded tensors than were written, or of other shapes.
    """
    listing = _description(saved)
    if not listing:
        return saved
    import torch.distributed.checkpoint as dcp

    places = [tuple(keys) for keys in listing["places"]]
    reader = _reader(folder / Path(listing["folder"]).name)
    if not like:
        entries = reader.read_metadata().state_dict_metadata.items()
        tensors = {number: torch.empty(tensor.size, dtype=tensor.properties.dtype) for number, tensor in entries}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            alone = "no_dist" in inspect.signature(dcp.load).parameters
            load = dcp.load if alone else dcp.load_state_dict  # of torch 2.6, whose other one needs all ranks
            load(tensors, storage_reader=reader, no_dist=True)
        like = {keys: tensors[str(number)] for number, keys in enumerate(places)}
    elif other := like.keys() ^ set(places):
        raise ValueError(f"state{where(other)} is sharded in this state or in checkpoint {folder}, not in both.")
    else:
        try:
            dcp.load(_numbered([like[keys] for keys in places]), storage_reader=reader)
        except dcp.CheckpointException as error:
            raise ValueError(f"this state can't be filled from checkpoint {folder}: {error}") from error
    state = _mapped(saved["state"], lambda keys, value: like.get(keys, value))
    return {name: part for name, part in saved.items() if name != "shards"} | {"state": state}


def where(places: Iterable[Keys]) -> str:
    """The first of some places, as Python would write it behind the name of the state."""
    return "".join(f"[{key!r}]" for key in min(places, key=repr))


def _description(saved: Any) -> dict[str, Any] | None:
    """What a checkpoint's own file says of its shards, if `save` wrote it, and some."""
    written = isinstance(saved, dict) and saved.keys() == {"state", "random", "step", "shards"}
    return saved["shards"] if written else None


def _mapped(value: Any, change: Callable[[Keys, Any], Any], keys: Keys = ()) -> Any:
    """A state with each thing in it changed, from the outside in."""
    if len(keys) > DEEPEST:
        raise RecursionError
    changed = change(keys, value)
    if changed is not value:
        return changed
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _mapped(inner, change, (*keys, key))) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(_mapped(inner, change, (*keys, number)) for number, inner in enumerate(value))
    return value


def _numbered(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _sum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            total = zlib.crc32(chunk, total)
    return total


class _Unpickler(pickle.Unpickler):
    """Reads the list of what is where, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What has this name, if it belongs there."""
        module = module.removesuffix("._local")  # Python 3.13 alone calls it pathlib._local
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in DESCRIPTION.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} doesn't describe shards")


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        """Torch's, but for how it reads the list of what is where."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with open(folder / ".metadata", "rb") as file:
                return _Unpickler(file).load()

    return Reader(folder)

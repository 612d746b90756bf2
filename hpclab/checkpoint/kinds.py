"""What a state may hold: what can be read again without running code, and as it was."""

import io
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

DEEPEST = 100
"""How deep a state may be nested; pickle gives up at some hundreds."""
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.Size, torch.device, torch.dtype, torch.layout),
)
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def check_kinds(value: Any, place: str, depth: int = 0, key: bool = False) -> None:
    """Raise a TypeError if a value holds what `load` would not read, or not as it was; it says where.

    By the very type: a subclass, such as numpy.float64 is of float, is pickled as itself.
    """
    if depth > DEEPEST:
        raise TypeError(f"{place[:80]}... is nested more than {DEEPEST} deep, or holds itself; save it flat.")
    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        for name, inner in value.items():
            check_kinds(name, f"the key {name!r} of {place}", depth + 1, key=True)
            check_kinds(inner, f"{place}[{name!r}]", depth + 1)
    elif kind in (list, tuple):
        for number, inner in enumerate(value):
            check_kinds(inner, f"{place}[{number}]", depth + 1, key)
    elif kind is set:
        for inner in value:
            check_kinds(inner, f"{inner!r} in {place}", depth + 1, key=True)
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
        return "each rank has a shard of it, which hpclab.save takes in plain dicts, lists and tuples."
    if isinstance(value, torch.Tensor) and value.is_meta:
        return "it is on the meta device and has no values; make it on another first."
    if hasattr(value, "state_dict"):
        return "use its state_dict()."
    return "use tensors, plain numbers, strings, None, and dicts, lists, tuples and sets of them."


def check_readable(written: io.BytesIO) -> None:
    """Raise a TypeError if `load` couldn't read this: some torch may read less than `check_kinds` lets through."""
    written.seek(0)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(written):
        raise TypeError(
            f"state holds {unsafe[0]}, which can't be read again without running code; use tensors, plain numbers,"
            " strings, None, and dicts, lists, tuples and sets of them."
        )

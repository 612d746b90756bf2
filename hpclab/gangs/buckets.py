"""Rank: DDP's buckets of gradients, laid once, so that sums come in the same order in every step of every attempt.

By itself DistributedDataParallel reduces its first backward pass in one bucket, and rearranges the buckets after it, by
the order in which gradients came. Where a number lies in a bucket decides in which order gloo adds the ranks' shares of
it, so from 3 ranks on the first step of a run that goes on would differ in its last bits from that of one that never
stopped. In a rank the buckets are laid when the model is wrapped, from the last parameter to the first, which is the
order in which gradients usually come; the small first bucket is there too, so communication overlaps as before.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

_DECIDING = ("__init__", "__setstate__", "_set_static_graph", "_update_process_group", "register_comm_hook")
"""Methods of DDP that decide whether its reducer rearranges the buckets."""


def settle() -> None:
    """From now on have each model that this process wraps in DDP keep its buckets."""
    for name in _DECIDING:
        if hasattr(DistributedDataParallel, name):
            setattr(DistributedDataParallel, name, _then_lay(getattr(DistributedDataParallel, name)))


def _then_lay(method: Callable) -> Callable:
    @functools.wraps(method)
    def and_lay(model: Any, *args: Any, **kwargs: Any) -> Any:
        value = method(model, *args, **kwargs)
        try:
            _lay(model)
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            warnings.warn(  # of another torch, which has other names
                f"torch {torch.__version__} doesn't let hpclab arrange DDP's buckets ({error}): on 3 or more ranks, a"
                " run resumed from a checkpoint may differ in its last bits from one that never stopped.",
                stacklevel=2,
            )
        return value

    return and_lay


def _lay(model: Any) -> None:
    """Lay the buckets of a model for good; one that looks for unused parameters keeps those that it was made with.

    So does one of a static graph with a hook: in its first step torch (2.13) hands all buckets over as if they were the
    first one, which is right only if there is one.
    """
    if not hasattr(model, "reducer") or (model.find_unused_parameters and not model.static_graph):
        return
    if not (model.static_graph and model._comm_hooks):
        _dictate(model, _buckets(model, _limits(model)))
        model._has_rebuilt_buckets = True
    elif model._has_rebuilt_buckets:
        model.reducer._reset_state()
        _dictate(model, _buckets(model, [sys.maxsize]))
        model.reducer._reset_state()
        model._has_rebuilt_buckets = False


def _dictate(model: Any, buckets: list[list[int]]) -> None:
    """Have the reducer take these buckets, if it still waits for the gradients to tell it their order."""
    group = _Dictation(buckets)
    model.reducer._update_process_group(group)
    try:
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()
    finally:
        model.reducer._update_process_group(model.process_group)


def _limits(model: Any) -> list[int]:
    """Bytes at which buckets close: the first, the second, and so on; the last also holds for all others."""
    if limits := getattr(model, "bucket_bytes_cap_list", None):
        return list(limits)
    small = dist._DEFAULT_FIRST_BUCKET_BYTES if model.bucket_bytes_cap_default else model.bucket_bytes_cap
    return [small, model.bucket_bytes_cap]


def _buckets(model: Any, limits: list[int]) -> list[list[int]]:
    """Indices of the parameters in each bucket, in the order in which the buckets become full."""
    parameters, sparse = model._build_params_for_reducer()
    backwards = list(range(len(parameters)))[::-1]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters[::-1], limits, sparse, backwards)
    return sorted(buckets, key=min, reverse=True)  # those of a second dtype come in an order that may differ by rank


class _Dictation(dist.ProcessGroup):
    """A process group that answers a reducer with the buckets that it should have.

    It asks in two broadcasts, so that all ranks take those of rank 0: for the indices of all parameters and the number
    of buckets, then for how many parameters each has. Answered here, no rank waits for another: one may well copy a
    model by itself.
    """

    def __init__(self, buckets: list[list[int]]):
        super().__init__(0, 1)  # type: ignore[call-arg]  # torch's stubs lack this one
        numbers = [number for bucket in buckets for number in bucket]
        self.answers = [[*numbers, len(buckets)], [len(bucket) for bucket in buckets]]
        self.work = _Done()

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """Answer the next question."""
        tensors[0].copy_(torch.tensor(self.answers.pop(0)))
        return self.work


class _Done(dist.Work):
    """Work that needs no waiting for."""

    def wait(self, timeout: Any = None) -> bool:
        """Return at once."""
        return True

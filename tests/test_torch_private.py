"""Canaries: whether the torch and Python that run here still have what gangs use of them without a promise."""

import atexit
import importlib
import platform
import threading

import torch
from torch.nn.parallel import DistributedDataParallel

from hpclab.gangs import buckets


def test_torch_looks_its_rendezvous_up_where_ranks_put_theirs():
    handlers = getattr(importlib.import_module("torch.distributed.rendezvous"), "_rendezvous_handlers", {})
    assert callable(handlers.get("env")), f"torch {torch.__version__} keeps its ways to meet elsewhere"


def test_ddp_has_the_methods_after_which_buckets_are_laid():
    missing = [name for name in buckets._DECIDING if not hasattr(DistributedDataParallel, name)]
    assert not missing, f"DDP of torch {torch.__version__} has no {missing}"


def test_python_ends_by_the_calls_that_a_rank_makes():
    assert callable(threading._shutdown) and callable(atexit._run_exitfuncs), platform.python_version()

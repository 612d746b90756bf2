"""DDP's buckets in a rank: laid once, as torch lays them after the first step, and nothing else of DDP differs."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpclab
from hpclab.gangs import buckets

SMALL = 0.1
"""A bucket's size in MB: half the parameters below."""


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3))


class Mixed(nn.Module):
    """Two layers of float32 around one of float64."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(30, 200), nn.Linear(200, 200).double(), nn.Linear(200, 3)

    def forward(self, inputs):
        return self.last(self.middle(self.first(inputs).double()).float())


class Unused(nn.Module):
    """Of three layers only the last is used."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(30, 3) for _ in range(3))

    def forward(self, inputs):
        return self.layers[2](inputs)


def frozen():
    model = perceptron()
    model[0].requires_grad_(False)
    return model


def of_each_step(model):
    """Numbers of the parameters in each bucket, of each of three steps, as a communication hook sees them."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    numbers, seen = {id(weight): number for number, weight in enumerate(parameters)}, []

    def average(_state, bucket):
        seen[-1].append([numbers[id(weight)] for weight in bucket.parameters()])
        shared = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return shared.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, average)
    for _ in range(3):
        seen.append([])
        model(torch.ones(4, 30)).sum().backward()
    return seen


def buckets_of(kinds):
    """Buckets by kind of model: in hpclab's ranks, and as torch itself lays them."""
    laid = {name: of_each_step(DistributedDataParallel(make(), **settings)) for name, (make, settings) in kinds.items()}
    for name in buckets._DECIDING:
        method = getattr(DistributedDataParallel, name)
        setattr(DistributedDataParallel, name, method.__wrapped__)
    torchs = {
        name: of_each_step(DistributedDataParallel(make(), **settings)) for name, (make, settings) in kinds.items()
    }
    return laid, torchs


def test_they_are_from_the_first_step_what_torch_makes_them_after_it(client):
    kinds = {
        "default": (perceptron, {}),
        "small": (perceptron, {"bucket_cap_mb": SMALL}),
        "views": (perceptron, {"bucket_cap_mb": SMALL, "gradient_as_bucket_view": True}),
        "frozen": (frozen, {"bucket_cap_mb": SMALL}),
        "mixed": (Mixed, {"bucket_cap_mb": SMALL}),
        "unused": (perceptron, {"bucket_cap_mb": SMALL, "find_unused_parameters": True}),
        "static": (perceptron, {"bucket_cap_mb": SMALL, "static_graph": True}),
    }
    for laid, torchs in hpclab.launch(client, buckets_of, kinds, ranks=2, oversubscribe=True).result(60):
        assert laid["small"] == [[[5, 4, 3, 2], [1, 0]]] * 3
        for name in ("default", "small", "views", "frozen", "mixed"):
            assert laid[name] == [torchs[name][2]] * 3, name
        assert laid["unused"] == torchs["unused"], "these torch never lays anew"
        assert [len(step) for step in laid["static"]] == [len(step) for step in torchs["static"]] == [1, 1, 2]
        assert len(torchs["small"][0]) == 1, "else this test tests nothing"


def many_things():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    settings = {"bucket_cap_mb": SMALL}
    sizes = []
    for more in ({}, {"static_graph": True}):
        model = DistributedDataParallel(perceptron(), **settings, **more)
        inputs = torch.randn(4, 30, generator=torch.Generator().manual_seed(rank))
        for _ in range(2):
            model.zero_grad()
            model(inputs).sum().backward()
        sizes.append(model._get_ddp_logging_data()["rebuilt_bucket_sizes"])
        alone = perceptron()
        alone(
            torch.cat([torch.randn(4, 30, generator=torch.Generator().manual_seed(r)) for r in range(ranks)])
        ).sum().backward()
        for mine, single in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad * ranks, single.grad)
    if rank == 0:  # nobody waits for the others
        copy.deepcopy(model)(inputs)
    model(inputs).sum().backward()
    model = DistributedDataParallel(Unused())
    model(inputs).sum().backward()
    with pytest.raises(RuntimeError, match=f"did not receive grad for rank {rank}: 0 1 2 3"):
        model(inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method, dist.Reducer._rebuild_buckets = dist.Reducer._rebuild_buckets, None
        DistributedDataParallel(perceptron())
        dist.Reducer._rebuild_buckets = method
    return sizes, [str(warning.message) for warning in caught]


def test_sums_copies_and_errors_are_those_of_torch(client):
    for sizes, (warning,) in hpclab.launch(client, many_things, ranks=3, oversubscribe=True).result(60):
        assert sizes == ["163212, 24800"] * 2
        assert "doesn't let hpclab arrange DDP's buckets" in warning

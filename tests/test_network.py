"""An emulated network inside real training, against its own line; and the measured one."""

import json
import statistics

import pytest

import hpclab
from hpclab import forecast, scaling, timeline
from hpclab.network import Network


def spend(network, floats, steps):
    """Seconds from when the last rank is ready to the averaged gradients, by step; and whether these are right."""
    import time

    import torch
    import torch.distributed as dist

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(floats, 1, bias=False))
    network.attach(model)
    inputs, times = torch.full((1, floats), dist.get_rank() + 1.0), []
    for _ in range(steps):
        model.zero_grad()
        loss = model(inputs).sum()
        dist.barrier()
        start = time.perf_counter()
        loss.backward()
        times.append(time.perf_counter() - start)
    return times, bool((model.module.weight.grad == 1.5).all())


@pytest.mark.alone
@pytest.mark.parametrize("network", [Network(20e-3, 1e9), Network(10e-3, 50e6), Network(3e-3, 1e9, "tree", ranks=16)])
def test_it_adds_what_it_says(client, network):
    """Never less than its line, nor thrice as much. (How little more, `benchmarks/network.py` shows.)"""
    for floats in (1_000, 100_000):
        for times, right in hpclab.launch(client, spend, network, floats, 12, ranks=2).result(60):
            want = float(network.allreduce_s(4 * floats, network.ranks or 2))
            assert want <= min(times) + 1e-3
            assert min(times) < 3 * want
            assert right


def spend_by(strategy, network, floats, steps):
    """Seconds of each backward pass from when the last rank is ready, under a strategy."""
    import time

    import torch
    import torch.distributed as dist

    from hpclab.training.strategies.kinds import named

    model = torch.nn.Linear(floats, floats, bias=False)
    engine = named(strategy).start(model, lambda weights: torch.optim.SGD(weights, 0.1), torch.nn.functional.mse_loss)
    engine.attach(network)
    inputs, times = torch.randn(4, floats), []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        engine.step(inputs, inputs)
        times.append(time.perf_counter() - start)
    return times


@pytest.mark.alone
@pytest.mark.parametrize(
    ("strategy", "messages", "nbytes"),  # on two ranks: latencies one after the other, and bytes that each rank sends
    [
        ("ddp", 2, 4 * 300**2),
        ("bf16", 2, 2 * 300**2),
        ("powersgd", 6, 4 * (300 + 300)),
        ("topk", 1, 0.01 * 300**2 * (4 + 4)),
    ],
)
def test_what_is_sent_takes_the_time(client, strategy, messages, nbytes):
    """Of the gradients as they are compressed, not as they are: never less, nor much more."""
    network = Network(5e-3, 20e6)
    want = messages * network.latency + 8 * nbytes / network.bandwidth
    for times in hpclab.launch(client, spend_by, strategy, network, 300, 12, ranks=2).result(60):
        assert want <= min(times) + 1e-3
        assert min(times) < 1.3 * want + 30e-3


def test_half_of_a_ring_gathers():
    ring = Network(1e-3, 8e6)
    assert float(ring.allgather_s(4000, 4)) == pytest.approx(3 * (1e-3 + 1e-3))  # three messages of 1000 bytes
    with pytest.raises(ValueError, match=r"topology \(='tree'\) can't gather .* use one of 'ring', 'halving-doubling'"):
        Network(topology="tree").allgather_s(4000, 4)


def test_a_network_faster_than_the_machine_is_refused(client):
    with pytest.raises(ValueError, match=r"this machine itself takes .* can emulate nothing below .*: raise latency"):
        hpclab.launch(client, spend, Network(1e-9, 1e15), 100_000, 3, ranks=2).result(60)


@pytest.mark.alone
@pytest.mark.parametrize("network", [Network(20e-3, 1e9), Network(20e-3, 1e9, ranks=1)])
def test_a_network_of_one_rank_adds_nothing(client, network):
    ranks = 1 if network.ranks is None else 2
    run = hpclab.launch(client, spend, network, 1_000, 12, ranks=ranks)
    assert min(run.result(60)[0][0]) < 20e-3
    assert {row["source"] for row in run.rows if "source" in row} <= {"measured"}


def test_networks_that_differ_are_told_apart():
    told = {str(Network(1e-3, 1e9, "parameter-server", servers, ranks)) for servers in (1, 4) for ranks in (None, 8)}
    assert len(told) == 4
    assert "parameter-server of 4 servers for 8 ranks, 1 ms, 1 Gb/s" in told


def test_training_over_it_is_emulated_and_the_same(client):
    """The same weights as without it: it adds time and nothing else."""
    settings = {"ranks": 2, "batch_size": 32, "steps": 8, "progress": False}
    plain = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", **settings).result()
    slow = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", network=Network(20e-3, 1e9), **settings).result()
    assert {row["source"] for row in slow.rows if row["kind"] == "step"} == {"emulated"}
    assert {row["source"] for row in plain.rows if row["kind"] == "step"} == {"measured"}
    assert all((plain.weights[name] == slow.weights[name]).all() for name in plain.weights)
    steps = [row for row in slow.rows if row["kind"] == "step"]
    assert statistics.median(row["wait_s"] for row in steps) > 0.04
    assert scaling.split(slow.rows)[0]["comm_s"] > 0.04


def test_a_measured_network_forecasts(client):
    rows = scaling.allreduce(client, repeats=5, sizes=(1_000, 1_000_000))
    assert {(row["ranks"], row["nbytes"]) for row in rows} == {(2, 1_000), (2, 1_000_000)}
    assert len(rows) == 10
    assert {row["source"] for row in rows} == {"measured"}
    network = scaling.network(rows)
    for nbytes in (1_000, 1_000_000):
        seconds = [row["duration_s"] for row in rows if row["nbytes"] == nbytes]
        assert min(seconds) <= float(network.allreduce_s(nbytes, 2)) <= max(seconds)
    alone = forecast.Workload(0.05, 1e6, overlap=0.0, buckets=1)
    line = float(network.allreduce_s(1_000_000, 2))
    assert forecast.step_s(alone, network, [2])[0] == pytest.approx(0.05 + line)
    for sizes, says in (((), "sizes is empty"), ((-4,), r"sizes \(=-4\)"), ((1_002,), "multiple of 4 bytes")):
        with pytest.raises(ValueError, match=says):
            scaling.allreduce(client, sizes=sizes)
    with pytest.raises(ValueError, match="rows are of"):
        scaling.network([*rows, rows[0] | {"ranks": 4}])


def test_a_timeline_on_one_clock(client):
    """The all-reduces of a step overlap in time, since neither rank's ends before the other's has begun."""
    run = hpclab.train(
        client, hpclab.models.CNN, "fashion_mnist", ranks=2, batch_size=32, steps=12, trace=3, progress=False
    )
    run.result()
    assert run.logs() == "[rank 0]\n[rank 1]\n", "the profiler says nothing of its own"
    rows = timeline.spans(run.folder)
    assert min(row["start_s"] for row in rows) == 0
    by = {
        (rank, name): [row for row in rows if (row["rank"], row["name"]) == (rank, name)]
        for rank in (0, 1)
        for name in ("data", "forward", "backward", "all-reduce", "waiting", "optimizer")
    }
    assert {len(found) for found in by.values()} == {3}
    for one, other in zip(by[0, "all-reduce"], by[1, "all-reduce"], strict=True):
        assert one["start_s"] < other["start_s"] + other["duration_s"]
        assert other["start_s"] < one["start_s"] + one["duration_s"]
    for forward, backward in zip(by[0, "forward"], by[0, "backward"], strict=True):
        assert forward["start_s"] + forward["duration_s"] <= backward["start_s"]
    merged = json.loads(timeline.merge(run.folder).read_text("utf-8"))["traceEvents"]
    assert {event["pid"] for event in merged} == {0, 1}
    with pytest.raises(FileNotFoundError, match=r"holds no trace; run train\(..., trace=3\)"):
        timeline.spans(run.folder / "checkpoints")

"""Forecasts against other people's machines, and closed forms."""

import dataclasses

import numpy as np
import pytest
import torch

import hpclab
from hpclab import laws, models
from hpclab.course import daint
from hpclab.forecast import Workload, calibrate, parts, slowest, step_s
from hpclab.network import Hierarchy, Network

DLPERF = {
    "PyTorch DDP": (348.62, 2632.93, 5115.40, 10021.29),
    "NGC PyTorch with DALI": (367.29, 2887.65, 5716.79, 10917.09),
    "TF1 Horovod": (362.44, 2721.98, 5099.42, 9514.64),
    "OneFlow": (397.64, 3130.34, 6260.30, 12411.97),
}
"""ResNet-50, images a second on 1, 8, 16 and 32 V100 (Oneflow-Inc/DLPerf): 8 a node, batch 128 each; 25.557 M
parameters."""
V100 = np.array([1, 8, 16, 32.0])
NODES = Hierarchy(Network(5e-6, 600e9), Network(20e-6, 100e9), per_node=8)
"""From data sheets: NVLink inside, one 100 Gb/s link a node."""


def resnet(rates):
    seconds = 128 * V100 / np.array(rates)
    return Workload(compute_s=seconds[0], gradient_bytes=25.557e6 * 4, samples=128), seconds


def test_dlperf_beyond_what_it_was_calibrated_on():
    """At 32 GPUs closer than doubling the 16, and than the USL: in the mean and at worst."""
    ours, doubled, usl, bare, inside = [], [], [], [], {0.01: 0, 0.02: 0}
    for rates in DLPERF.values():
        workload, seconds = resnet(rates)
        found = calibrate(workload, NODES, V100[:3], seconds[:3], noise=0.01)
        ours.append(abs(found.score([32], seconds[3:])[0]))
        bare.append(abs(seconds[3] / step_s(workload, NODES, [32])[0] - 1))
        doubled.append(abs(2 * rates[2] / rates[3] - 1))
        exact = laws.fit_usl(np.repeat(V100[:3], 2), np.repeat(rates[:3], 2))
        usl.append(abs(exact([32])[0] / rates[3] - 1))
        assert found.rows([32])[0]["source"] == "forecast"
        for noise in inside:
            row = calibrate(workload, NODES, V100[:3], seconds[:3], noise=noise).rows([32])[0]
            inside[noise] += row["step_low_s"] <= seconds[3] <= row["step_high_s"]
    assert np.mean(ours) < min(np.mean(doubled), np.mean(usl)) < 0.04
    assert max(ours) < min(max(doubled), max(usl)) < 0.073
    assert inside == {0.01: 2, 0.02: 4}  # of four: each rate was published once, so its noise is a guess
    assert max(bare) < 0.25  # with the data sheet alone: no jitter, and all communication hidden


def test_parameter_servers_saturate_where_a_law_sees_nothing():
    found, networks = daint.calibrated(10)
    for place in (6, 7):
        (error,) = found.score(
            daint.NODES[place : place + 1], daint.SECONDS[place : place + 1], network=networks[place]
        )
        assert abs(error) < 0.1
    usl = laws.fit_usl(daint.NODES[:6], daint.RATES[:6])
    assert usl([128])[0] / daint.RATES[7] > 1.2
    assert not laws.choose(daint.NODES[:6], daint.RATES[:6]).identifiable


@pytest.mark.parametrize(
    ("gigabits", "link_error", "inside"),
    [(10, 0.0, [False, True]), (10, 0.2, [True, True]), (8, 0.2, [True, True]), (12, 0.2, [False, True])],
)
def test_a_forecast_is_as_good_as_the_link_it_is_told(gigabits, link_error, inside):
    """Whether the records of 64 and 128 nodes fall in the band: 64 are beyond what a faster link would explain."""
    found, networks = daint.calibrated(gigabits, link_error)
    rows = [found.rows([int(daint.NODES[place])], network=networks[place])[0] for place in (6, 7)]
    ends = [(row["step_low_s"], row["step_high_s"]) for row in rows]
    assert [low <= second <= high for (low, high), second in zip(ends, daint.SECONDS[6:], strict=True)] == inside


def test_it_is_not_scored_on_what_it_knows():
    found, _networks = daint.calibrated(10)
    with pytest.raises(ValueError, match=r"ranks \(=32\) was used to calibrate; score a forecast at other points"):
        found.score([32, 64], daint.SECONDS[5:7])


def test_calibration_finds_what_was_planted():
    network = Network(1e-4, 1e9)
    truth = Workload(compute_s=0.1, gradient_bytes=4e6, jitter_s=0.005, visible=0.6)
    ranks = np.array([1, 2, 4, 8, 16.0])
    found = calibrate(Workload(0.2, 4e6), network, ranks, step_s(truth, network, ranks)).workload
    assert (found.compute_s, found.jitter_s, found.visible) == pytest.approx((0.1, 0.005, 0.6), rel=1e-3)


def test_bands_cover_new_measurements():
    dice = np.random.default_rng(0)
    network, truth = Network(1e-4, 1e9), Workload(compute_s=0.1, gradient_bytes=4e6, visible=0.6)
    ranks, covered = np.array([1, 1, 2, 2, 4, 4, 8, 8.0]), 0
    for _ in range(200):
        measured = step_s(truth, network, ranks) * (1 + 0.03 * dice.standard_normal(8))
        row = calibrate(truth, network, ranks, measured, ("compute_s", "visible")).rows([64])[0]
        new = step_s(truth, network, [64])[0] * (1 + 0.03 * dice.standard_normal())
        covered += row["step_low_s"] <= new <= row["step_high_s"]
    assert 180 <= covered <= 199


def test_bands_cover_a_link_that_is_not_as_stated():
    dice = np.random.default_rng(0)
    stated, truth = Network(1e-4, 1e9), Workload(compute_s=0.1, gradient_bytes=4e6, overlap=0.0)
    ranks, covered = np.array([1, 1, 1, 2, 4.0]), {0.0: 0, 0.2: 0}
    for _ in range(200):
        real = stated.slower(np.exp(0.2 * dice.standard_normal()))
        measured = step_s(truth, real, ranks) * np.exp(0.01 * dice.standard_normal(5))
        new = step_s(truth, real, [64])[0] * np.exp(0.01 * dice.standard_normal())
        for link_error in covered:
            row = calibrate(truth, stated, ranks, measured, ["compute_s"], 0.01, link_error).rows([64])[0]
            covered[link_error] += row["step_low_s"] <= new <= row["step_high_s"]
    assert 180 <= covered[0.2] <= 199
    assert covered[0.0] < 150


def test_bands_of_the_efficiency_cover_too():
    """One measurement on 64 ranks over one on a rank; at one rank it is 1, whatever the noise."""
    dice = np.random.default_rng(0)
    network, truth = Network(1e-4, 1e9), Workload(compute_s=0.1, gradient_bytes=4e6, visible=0.6)
    ranks, covered = np.repeat([1, 2, 4, 8.0], 3), 0
    for _ in range(300):
        measured = step_s(truth, network, ranks) * np.exp(0.03 * dice.standard_normal(12))
        alone, row = calibrate(truth, network, ranks, measured, ("compute_s", "visible")).rows([1, 64])
        one, many = step_s(truth, network, [1, 64]) * np.exp(0.03 * dice.standard_normal(2))
        covered += row["efficiency_low"] <= one / many <= row["efficiency_high"]
    assert 275 <= covered <= 297
    assert alone["efficiency_low"] == alone["efficiency"] == alone["efficiency_high"] == 1


@pytest.mark.parametrize(
    ("name", "value"), [("data_s", 0.2), ("overlap", 0.5), ("visible", 0.3), ("jitter_s", 0.01), ("compute_s", 0.15)]
)
def test_each_field_can_be_fitted(name, value):
    base = Workload(0.1, 1e7, bucket_bytes=1e5)
    network, ranks = Network(1e-4, 1e9), [1, 2, 4, 8, 16]
    truth = dataclasses.replace(base, **{name: value})
    found = calibrate(base, network, ranks, step_s(truth, network, ranks), [name], noise=0.01)
    assert getattr(found.workload, name) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "fitted"),
    [
        ([1] * 6, ("compute_s", "jitter_s", "visible")),
        ([2] * 6, ("compute_s", "jitter_s", "visible")),
        ([1, 2] * 3, ("compute_s", "jitter_s", "visible")),
        ([1] * 6, ("visible",)),
        ([1, 2, 4] * 2, ("compute_s", "overlap")),  # which `visible` makes idle
    ],
)
def test_fields_that_the_points_cannot_tell_are_refused(ranks, fitted):
    """They had tight bands around whatever the solver began with."""
    network, truth = Network(1e-4, 1e9), Workload(0.1, 4e6, jitter_s=0.005, visible=0.6)
    measured = step_s(truth, network, ranks) * np.exp(0.01 * np.random.default_rng(0).standard_normal(6))
    with pytest.raises(ValueError, match=r"fitted \(=.*can't be told apart at ranks .*measure at more rank counts"):
        calibrate(truth, network, ranks, measured, fitted)


def test_what_scales_with_the_batch():
    base, network, ranks = Workload(0.1, 1e7, samples=32, bucket_bytes=1e5), Network(1e-4, 1e9), [1, 2, 4, 8, 16]
    measured = step_s(base, network, ranks) * [1, 1.01, 0.99, 1.02, 1]
    found = calibrate(base, network, ranks, measured, ["overlap", "compute_s"])
    assert found.scaled(320).covariance == pytest.approx(found.covariance * np.outer([1, 10], [1, 10]))


def test_slowest_of_many():
    dice = np.random.default_rng(0)
    for count in (2, 16, 256):
        drawn = dice.standard_normal((20_000, count)).max(axis=1).mean()
        assert slowest([count])[0] == pytest.approx(drawn, rel=0.06)


def test_parts_by_hand():
    """A ring of 4 at 1 Gb/s: 2 * 3 messages, and 1.5 times the bytes."""
    network = Network(latency=1e-3, bandwidth=1e9)
    found = parts(Workload(0.3, 10e6, bucket_bytes=2e6, buckets=5), network, [1, 4])
    assert found["comm_s"] == pytest.approx([0, 5 * 6e-3 + 1.5 * 10e6 * 8 / 1e9])  # each bucket pays the latency
    assert found["exposed_s"] == pytest.approx([0, 6e-3 + 1.5 * 2e6 * 8 / 1e9])  # the last bucket; the rest is hidden
    assert found["step_s"] == pytest.approx([0.3, 0.3 + 0.03])
    slow = parts(Workload(0.01, 10e6, bucket_bytes=2e6), network, [4])
    assert slow["exposed_s"] == pytest.approx(slow["comm_s"] - 2 / 3 * 0.01)
    assert step_s(Workload(0.3, 10e6, data_s=0.5), network, [2]) == pytest.approx([0.5])


def test_buckets_are_those_of_ddp(client):
    """As DDP's own log tells them after it has rebuilt them."""
    made = Workload.of(perceptron(), compute_s=1.0)
    logged = hpclab.launch(client, buckets_of, ranks=2).result(60)[0]
    assert made.gradient_bytes == sum(logged)
    assert made.bucket_bytes == logged[-1]
    assert made.buckets == len(logged) > 1
    network = Network(1e-3, 1e9)
    link = sum(float(network.allreduce_s(size, 8)) for size in logged)  # as it is emulated
    assert parts(made, network, [8])["comm_s"] == pytest.approx([link])
    assert made.bucket_bytes < made.gradient_bytes


def test_buckets_by_default():
    """100 tensors of 1 MB: the first bucket closes at 1 MiB, the others at 25 MiB."""
    latency = Network(latency=1.0, bandwidth=1e15)
    made = Workload.of(torch.nn.Sequential(*[torch.nn.Linear(250, 1000, bias=False) for _ in range(100)]), 1.0)
    assert parts(Workload(1.0, 100e6), latency, [2])["comm_s"] == pytest.approx([2 * made.buckets], rel=1e-3)
    assert parts(Workload(1.0, 1e6), latency, [2])["comm_s"] == pytest.approx([2], rel=1e-3)


def perceptron():
    import torch

    return torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.Linear(512, 512), torch.nn.Linear(512, 10))


def buckets_of():
    import torch

    model = torch.nn.parallel.DistributedDataParallel(perceptron())
    for _ in range(3):
        model(torch.zeros(2, 784)).sum().backward()
    told = model._get_ddp_logging_data()
    return [int(size) for size in told["rebuilt_bucket_sizes"].split(",")]


def test_costs_by_topology():
    size, latency, bandwidth = 1e6, 1e-4, 8e9

    def cost(topology, ranks, servers=1, largest=0.0):
        return float(Network(latency, bandwidth, topology, servers).allreduce_s(size, ranks, largest))

    assert cost("ring", 1) == 0
    assert cost("ring", 4) == pytest.approx(6 * 1e-4 + 1.5e-3)
    assert cost("tree", 5) == pytest.approx(6 * (1e-4 + 1e-3))
    assert cost("halving-doubling", 8) == pytest.approx(6 * 1e-4 + 1.75e-3)
    assert cost("parameter-server", 8, servers=4) == pytest.approx(2 * 1e-4 + 2e-3)
    assert cost("parameter-server", 8, servers=4, largest=5e5) == pytest.approx(2 * 1e-4 + 4e-3)
    fast = Network(0, 80e9)
    both = Hierarchy(fast, Network(latency, bandwidth), per_node=4)
    assert float(both.allreduce_s(size, 8)) == pytest.approx(1.5e-4 + 2e-4 + 1e-3)


def calibrate_two(fitted=("compute_s",), measured=(1, 1.01), network=None, **settings):
    return calibrate(Workload(1, 1), network or Network(), [1, 2], measured, fitted, **settings)


def test_one_name_and_one_number_do_too():
    found = calibrate_two("compute_s")
    assert found.columns(8)["step_s"] == found.columns([8])["step_s"]
    assert found.score(8, 1.0) == found.score([8], [1.0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Workload(0, 1), r"compute_s \(=0\) must be above 0"),
        (lambda: Workload(1, 1, jitter_s=-1), r"jitter_s \(=-1\) must be at least 0"),
        (lambda: Workload(1, 1, visible=-1), r"visible \(=-1\) must be a share, 0 to 1"),
        (lambda: Workload(1, 1, visible=float("nan")), r"visible \(=nan\) must be a share"),
        (lambda: Workload(1, 1, overlap=5), r"overlap \(=5\) must be a share"),
        (lambda: Workload(1, 1, buckets=0), r"buckets \(=0\) must be at least 1"),
        (lambda: Hierarchy(Network(), Network(), 0), r"per_node \(=0\) must be at least 1"),
        (lambda: Network().allreduce_s(1e6, 0), r"ranks \(=0\) must be >= 1"),
        (lambda: Network().allreduce_s(-1, 2), r"nbytes \(=-1\) must be >= 0"),
        (lambda: Network().allreduce_s(1, 2, -1), r"largest \(=-1\) must be >= 0"),
        (lambda: Network(latency=-1), r"latency \(=-1\) must be seconds"),
        (lambda: Network(bandwidth=0), r"bandwidth \(=0\) must be bits a second"),
        (lambda: Network(topology="star"), r"topology \(='star'\) must be one of 'ring', 'tree'"),
        (lambda: Network(servers=0), r"servers \(=0\) must be at least 1"),
        (lambda: Network(ranks=0), r"ranks \(=0\) must be at least 1"),
        (lambda: step_s(Workload(1, 1), Network(), [0]), r"ranks \(=0\) must be >= 1"),
        (lambda: calibrate(Workload(1, 1), Network(), [1, 2], [1, 2]), "2 points can't determine 3 fields"),
        (lambda: calibrate(Workload(1, 1), Network(), [1, 2, 4], [1, 2, 3]), "and the noise; .* state the noise"),
        (
            lambda: calibrate(Workload(1, 1), Network(), [1, 2], [1, -2], ("compute_s",)),
            "must be pairs of >= 1 and > 0",
        ),
        (
            lambda: calibrate_two(["bandwidth"]),
            r"fitted \(=\['bandwidth'\]\) must be different names out of compute_s, ",
        ),
        (lambda: calibrate_two("samples"), r"fitted \(='samples'\) must be different names"),
        (lambda: calibrate_two([]), r"fitted \(=\[\]\) must be different names"),
        (lambda: calibrate_two(["compute_s"] * 2), "must be different names"),
        (lambda: calibrate_two(noise=-1), r"noise \(=-1\) must be above 0"),
        (lambda: calibrate_two(noise=float("nan")), r"noise \(=nan\) must be above 0"),
        (lambda: calibrate_two(link_error=-1), r"link_error \(=-1\) must be at least 0"),
        (lambda: calibrate_two(measured=[1, np.inf]), "must be pairs of >= 1 and > 0"),
        (lambda: calibrate_two(network=[Network()]), "network holds 1 links for 2 points"),
        (lambda: calibrate_two().columns([2], level=95), r"level \(=95\) must be between 0 and 1"),
        (lambda: calibrate_two().rows([2], level=0), r"level \(=0\) must be between 0 and 1"),
        (lambda: calibrate_two().score([8], [0]), "must be pairs of >= 1 and > 0"),
        (lambda: calibrate_two().score([8], [float("nan")]), "must be pairs of >= 1 and > 0"),
        (lambda: calibrate_two().score([], []), "must be pairs of >= 1 and > 0"),
        (lambda: calibrate_two().scaled(0), r"samples \(=0\) must be above 0"),
    ],
)
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_memory_of_a_module_is_what_its_training_holds():
    """Weights, gradients and momentum, counted after a step; DDP's buckets are as large as the gradients."""
    model = models.CNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    weights = sum(weight.nbytes for weight in model.parameters())
    gradients = sum(weight.grad.nbytes for weight in model.parameters())
    momentum = sum(state["momentum_buffer"].nbytes for state in optimizer.state.values())
    work = Workload.of(model, 0.1)
    assert work.memory_bytes == weights + 2 * gradients + momentum
    assert work.fits(1e6) and not work.fits(5e5)
    for weight in model.parameters():
        weight.requires_grad_(weight.ndim > 1)
    assert weights < Workload.of(model, 0.1).memory_bytes < work.memory_bytes


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_a_calibration_depends_neither_on_the_unit_of_time_nor_on_the_order_of_points(unit):
    work, link = Workload(0.1, 1e8, jitter_s=0.004, visible=0.3), Network(latency=1e-4, bandwidth=1e10)
    ranks = np.array([1, 2, 4, 8, 16, 32] * 2)
    seconds = step_s(work, link, ranks) * (1 + 0.01 * np.random.default_rng(0).standard_normal(12))
    scaled = dataclasses.replace(work, compute_s=unit * work.compute_s, jitter_s=unit * work.jitter_s)
    order = np.random.default_rng(1).permutation(12)
    columns = calibrate(work, link, ranks, seconds).columns([1, 64])
    others = calibrate(scaled, link.slower(unit), ranks[order], unit * seconds[order]).columns([1, 64])
    for name, values in columns.items():
        scale = unit if name.endswith(("_s", "core_h")) and name != "samples_per_s" else 1.0
        scale = 1 / unit if name.startswith("samples_per_s") else scale
        assert others[name] / scale == pytest.approx(values, rel=1e-4), name

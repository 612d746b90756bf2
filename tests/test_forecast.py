"""Forecasts against other people's machines, and closed forms."""

import numpy as np
import pytest
import torch

import hpclab
from hpclab import laws, models
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

DAINT = np.array([1, 2, 4, 8, 16, 32, 64, 128.0])
DAINT_RATE = np.array([138.23, 264.57, 523.38, 1018.18, 2001.00, 3840.35, 7118.31, 9219.70])
"""InceptionV3, images a second on nodes of one P100, batch 64 (Bugliarello, CSCS internship report, 2017, table 3)."""
SERVERS = (1, 1, 3, 2, 4, 12, 40, 116)
"""Parameter servers, from the same table."""


def resnet(rates):
    seconds = 128 * V100 / np.array(rates)
    return Workload(compute_s=seconds[0], gradient_bytes=25.557e6 * 4, samples=128), seconds


def test_dlperf_beyond_what_it_was_calibrated_on():
    """At 32 GPUs closer than doubling the 16, and than the USL: in the mean and at worst."""
    ours, doubled, usl, bare = [], [], [], []
    for rates in DLPERF.values():
        workload, seconds = resnet(rates)
        found = calibrate(workload, NODES, V100[:3], seconds[:3], noise=0.01)
        ours.append(abs(found.score([32], seconds[3:])[0]))
        bare.append(abs(seconds[3] / step_s(workload, NODES, [32])[0] - 1))
        doubled.append(abs(2 * rates[2] / rates[3] - 1))
        exact = laws.fit_usl(np.repeat(V100[:3], 2), np.repeat(rates[:3], 2))
        usl.append(abs(exact([32])[0] / rates[3] - 1))
        row = found.rows([32])[0]
        assert row["step_low_s"] < row["step_s"] < row["step_high_s"]
        assert row["source"] == "forecast"
    assert np.mean(ours) < min(np.mean(doubled), np.mean(usl)) < 0.04
    assert max(ours) < min(max(doubled), max(usl)) < 0.073
    assert max(bare) < 0.25  # with the data sheet alone: no jitter, and all communication hidden


def daint():
    """One server's link is what gRPC was measured to reach then, 10 Gb/s (tensorflow/tensorflow#6116)."""
    networks = [Network(50e-6, 10e9, "parameter-server", servers) for servers in SERVERS]
    seconds = 64 * DAINT / DAINT_RATE
    largest = 2048 * 1000 * 4  # bytes of the last layer's weights, which no server can share
    workload = Workload(seconds[0], 23.83e6 * 4, samples=64, overlap=1.0, largest_bytes=largest)
    return calibrate(workload, networks[:6], DAINT[:6], seconds[:6], ("compute_s", "jitter_s")), networks, seconds


def test_parameter_servers_saturate_where_a_law_sees_nothing():
    found, networks, seconds = daint()
    for place in (6, 7):
        (error,) = found.score(DAINT[place : place + 1], seconds[place : place + 1], network=networks[place])
        assert abs(error) < 0.1
    usl = laws.fit_usl(DAINT[:6], DAINT_RATE[:6])
    assert usl([128])[0] / DAINT_RATE[7] > 1.3


def test_it_is_not_scored_on_what_it_knows():
    found, _networks, seconds = daint()
    with pytest.raises(ValueError, match=r"ranks \(=32\) was calibrated on; score a forecast on other points"):
        found.score([32, 64], seconds[5:7])


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


def test_slowest_of_many():
    dice = np.random.default_rng(0)
    for count in (2, 16, 256):
        drawn = dice.standard_normal((20_000, count)).max(axis=1).mean()
        assert slowest([count])[0] == pytest.approx(drawn, rel=0.06)


def test_parts_by_hand():
    """A ring of 4 at 1 Gb/s: 2 * 3 messages, and 1.5 times the bytes."""
    network = Network(latency=1e-3, bandwidth=1e9)
    found = parts(Workload(0.3, 10e6, bucket_bytes=2e6), network, [1, 4])
    assert found["comm_s"] == pytest.approx([0, 6e-3 + 1.5 * 10e6 * 8 / 1e9])
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
    assert made.bucket_bytes < made.gradient_bytes


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


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Workload(0, 1), r"compute_s \(=0\) must be above 0"),
        (lambda: Workload(1, 1, jitter_s=-1), r"jitter_s \(=-1\) must be at least 0"),
        (lambda: Network(latency=-1), r"latency \(=-1\) must be seconds"),
        (lambda: Network(bandwidth=0), r"bandwidth \(=0\) must be bits a second"),
        (lambda: Network(topology="star"), r"topology \(='star'\) must be one of 'ring', 'tree'"),
        (lambda: Network(servers=0), r"servers \(=0\) must be at least 1"),
        (lambda: Network(ranks=0), r"ranks \(=0\) must be at least 1"),
        (lambda: step_s(Workload(1, 1), Network(), [0]), r"ranks \(=0\) must be >= 1"),
        (lambda: calibrate(Workload(1, 1), Network(), [1, 2], [1, 2]), "2 points can't tell 3 fields"),
        (lambda: calibrate(Workload(1, 1), Network(), [1, 2, 4], [1, 2, 3]), "and their own noise; .* state the noise"),
        (
            lambda: calibrate(Workload(1, 1), Network(), [1, 2], [1, -2], ("compute_s",)),
            "must be pairs of >= 1 and > 0",
        ),
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

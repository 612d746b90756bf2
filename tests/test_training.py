"""Training against independent answers: a plain loop without DDP, one process against two, what is kept."""

import functools
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import no_rank_left
from torch import nn

import hpclab
from hpclab import checkpoint, data
from hpclab.course.chaos import slowed
from hpclab.models.resnet import SyncBatchNorm
from hpclab.training.job import MODELS
from hpclab.training.strategies.zero import SHARDS_ON_CPUS

STEPS = 24


class DoubleCNN(hpclab.models.CNN):
    """In double precision, so that two ways to the same sum differ by 1e-16, and a wrong way by far more."""

    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, images):
        return super().forward(images.double())


class DoubleResNet(hpclab.models.ResNet):
    """In double precision, with a batch norm over all ranks."""

    def __init__(self):
        super().__init__(widths=(4, 8), norm=SyncBatchNorm)
        self.double()

    def forward(self, images):
        return super().forward(images.double())


def fit(client, model=hpclab.models.CNN, **settings):
    settings = {"ranks": 1, "batch_size": 128, "epochs": 1, "seed": 3, "progress": False} | settings
    return hpclab.train(client, model, "fashion_mnist", **settings).result(600)


def losses(rows):
    """Mean loss over the ranks, by step."""
    steps = {}
    for row in rows:
        if row["kind"] == "step":
            steps.setdefault(row["step"], []).append(row["loss"])
    return np.array([np.mean(steps[step]) for step in sorted(steps)])


def plain_loop(seed, steps, batch):
    """The same training without hpclab's loop, DDP, samplers or data set: written from the definitions."""
    folder = data.find("fashion_mnist")
    shards = sorted(folder.glob("train-*-images.npy"))
    images = np.concatenate([np.load(shard) for shard in shards])
    labels = np.concatenate([np.load(str(shard).replace("images", "labels")) for shard in shards])
    torch.manual_seed(seed)
    model = DoubleCNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rise = min(0.3, 6 / (steps + 1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps + 1, pct_start=rise, cycle_momentum=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    found = []
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        inputs = torch.from_numpy(images[chosen].astype(np.float32) / 255)[:, None]
        loss = nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels[chosen].astype(np.int64)))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
        for weight in model.parameters():
            weight.grad *= min(1, 1 / (norm + 1e-6))  # as torch documents it
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    return np.array(found), model.state_dict()


@pytest.fixture(scope="module")
def one(client):
    return fit(client, DoubleCNN, steps=STEPS, lr=0.1)


@pytest.fixture(scope="module")
def two(client):
    return fit(client, DoubleCNN, ranks=2, batch_size=64, steps=STEPS, lr=0.1)


def assert_same(fit, expected_losses, expected_weights, tolerance):
    np.testing.assert_allclose(losses(fit.rows), expected_losses, rtol=0, atol=tolerance)
    for name, value in expected_weights.items():
        torch.testing.assert_close(fit.weights[name], value, rtol=0, atol=tolerance)


def test_one_rank_is_a_plain_loop(one):
    assert_same(one, *plain_loop(3, STEPS, 128), tolerance=1e-9)


def test_two_ranks_are_one_rank_with_twice_the_batch(one, two):
    """The mean of two half batches' gradients is the whole batch's gradient; only the order of the sums differs."""
    assert_same(two, losses(one.rows), one.weights, tolerance=1e-9)


BALANCED = {"ranks": 2, "batch_size": 64, "lr": 0.1, "balance": "measured"}


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_shares_by_speed_are_one_process_too(client, one, strategy):
    settings = BALANCED | {"steps": STEPS, "strategy": strategy}
    if strategy == "zero3" and not SHARDS_ON_CPUS:
        with pytest.raises(RuntimeError, match=r"strategy \(=Zero\(\)\) needs a newer torch than 2"):
            fit(client, DoubleCNN, **settings)
        return
    balanced = fit(client, functools.partial(slowed, DoubleCNN), **settings)
    means = np.zeros(STEPS)
    for row in balanced.rows:
        if row["kind"] == "step":
            assert row["samples"] < 64 if row["rank"] else row["samples"] > 64
            means[row["step"]] += row["loss"] * row["samples"] / 128
    np.testing.assert_allclose(means, losses(one.rows), rtol=0, atol=1e-9)
    for name, value in one.weights.items():
        torch.testing.assert_close(balanced.weights[name], value, rtol=0, atol=1e-9)


def test_shares_by_speed_with_a_batch_norm_over_all_ranks(client):
    balanced = fit(client, functools.partial(slowed, DoubleResNet), steps=12, **BALANCED)
    alone = fit(client, DoubleResNet, steps=12, lr=0.1)
    assert len({row["samples"] for row in balanced.rows if row["kind"] == "step"}) == 2
    for name, value in alone.weights.items():
        torch.testing.assert_close(balanced.weights[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"balance": True}, r"balance \(=True\) must be one of None, 'measured'"),
        (
            {"balance": "measured", "strategy": "local-sgd"},
            r"strategy \(=LocalSGD\(\)\) needs equal shares, without balance; these can: ddp, bf16, .*, zero3\.",
        ),
    ],
)
def test_balance_that_cannot_be(client, settings, says):
    with pytest.raises(ValueError, match=says):
        fit(client, ranks=2, **settings)


def test_two_ranks_are_one_in_single_precision_too(client):
    """Rounding differs by about 1e-7 a step; steps this small don't amplify it to 1e-5, large ones would."""
    one = fit(client, steps=60, lr=0.005)
    two = fit(client, ranks=2, batch_size=64, steps=60, lr=0.005)
    assert losses(one.rows)[-1] < losses(one.rows)[0] / 1.2, "it learns"
    assert_same(two, losses(one.rows), one.weights, tolerance=1e-5)


def test_the_ranks_share_each_batch(two):
    """Different samples on each rank: their losses differ, and their samples add up."""
    steps = [row for row in two.rows if row["kind"] == "step"]
    by_rank = [[row["loss"] for row in steps if row["rank"] == rank] for rank in (0, 1)]
    assert all(a != b for a, b in zip(*by_rank, strict=True))
    assert {row["samples"] for row in steps} == {64}
    assert all(0 < row["data_s"] < row["step_s"] and row["cpu_s"] > 0 for row in steps)


def test_epochs_test_checkpoints_and_weights(client, tmp_path):
    result = fit(client, ranks=2, batch_size=64, epochs=2, folder=tmp_path / "run")
    tests = [row for row in result.rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in tests] == [1, 2]
    assert {row["samples"] for row in tests} == {2000}
    assert result.accuracy == tests[-1]["test_accuracy"] > 0.7
    model = hpclab.models.CNN()
    model.load_state_dict(result.weights)
    with torch.no_grad():
        inputs, labels = (torch.from_numpy(part) for part in data.load("fashion_mnist", "test")[np.arange(2000)])
        right = (model(inputs).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(result.accuracy, abs=1e-6)
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest.name == f"step-{2 * (10_000 // 128):08d}.pt"
    held = checkpoint.load(newest)
    assert held["step"] == held["state"]["step"] == 2 * (10_000 // 128)
    assert held["state"]["scores"]["test_accuracy"] == result.accuracy
    assert [len(draws["torch"]) > 0 for draws in held["random"]] == [True, True]
    for name, value in result.weights.items():
        assert torch.equal(held["state"]["model"][name], value)
    written = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert written == result.rows
    assert no_rank_left()


def test_each_epoch_is_shuffled_anew(client):
    """With weights that stand still, a step's loss tells its batch."""
    small = functools.partial(hpclab.models.CNN, channels=(2, 4))
    first, second = (losses(fit(client, small, seed=1, steps=200, batch_size=100, lr=1e-9).rows) for _ in range(2))
    assert np.array_equal(first, second), "the same seed gives the same run"
    assert not np.isclose(first[:100], first[100:], atol=1e-6).all(), "the second epoch repeats the first one's batches"


def test_own_optimizer_loss_and_model(client):
    own = functools.partial(hpclab.models.CNN, channels=(4, 8))
    result = fit(
        client,
        own,
        ranks=2,
        batch_size=64,
        steps=8,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0),
        loss=lambda scores, labels: scores.sum() * 0 + 7,
    )
    torch.manual_seed(3)
    for name, value in own().state_dict().items():
        assert torch.equal(result.weights[name], value), "a learning rate of 0 moves nothing"
    assert set(losses(result.rows)) == {7}


class Half(torch.nn.Module):
    """A model of which no step uses one half."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(784, 10), torch.nn.Linear(784, 10)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_unused_parameters(client):
    settings = {"ranks": 2, "steps": 3, "progress": False}
    with pytest.raises(RuntimeError, match="not used in producing loss") as caught:
        hpclab.train(client, Half, "fashion_mnist", **settings).result()
    assert "train(..., find_unused_parameters=True)" in "".join(caught.value.__notes__)
    assert hpclab.train(client, Half, "fashion_mnist", find_unused_parameters=True, **settings).result().weights


def test_small_buckets_are_sent_during_the_backward_pass_and_change_no_weight(client):
    """The linear layer's gradients come first; both convolutions' follow."""
    settings = {"ranks": 2, "steps": 8, "trace": 2, "progress": False}
    weights = []
    for cap, order in ((None, "conv conv send"), (0.1, "send conv conv send")):
        run = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", bucket_cap_mb=cap, **settings)
        weights.append(run.result().weights)
        events = json.loads((run.folder / "trace-0.json").read_text())["traceEvents"]
        words = {"c10d::allreduce_": "send", "ConvolutionBackward0": "conv"}
        events = sorted((event for event in events if event["name"] in words), key=lambda event: event["ts"])
        assert " ".join(words[event["name"]] for event in events) == f"{order} {order}"
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight)
    with pytest.raises(ValueError, match=r"bucket_cap_mb \(=0\) must be above 0, such as 0.1"):
        hpclab.train(client, hpclab.models.CNN, "fashion_mnist", ranks=2, bucket_cap_mb=0)


def test_a_model_by_name_is_the_class_of_that_name(client):
    public = [getattr(hpclab.models, name) for name in dir(hpclab.models)]
    assert {made.__name__ for made in public if isinstance(made, type) and issubclass(made, nn.Module)} == set(MODELS)
    named, given = (fit(client, model, steps=3) for model in ("CNN", hpclab.models.CNN))
    for name, weight in given.weights.items():
        assert torch.equal(named.weights[name], weight)


LIGHT = """
import sys, hpclab
if __name__ == "__main__":
    hpclab.doctor.examine()
    with hpclab.connect(workers=2) as client:
        race = hpclab.race(client, "CNN", "few", epochs=1)
        fit = hpclab.train(client, "CNN", "few", ranks=2, steps=3).result()
    race.table(), race.verdict(), hpclab.racing.figure(race.runs).picture()
    print(sorted({"torch", "scipy.optimize", "scipy.stats"} & set(sys.modules)), fit)
"""


def test_who_names_a_model_needs_no_torch_in_the_notebook(tmp_path):
    """Which is what keeps the first notebook below 1 GB."""
    images = data.load("fashion_mnist")
    pixels, labels = images[:2560]
    few = ((255 * pixels).astype(np.uint8), labels)
    data.write(tmp_path / "few", {"train": few, "test": few}, classes=images.classes)
    (tmp_path / "light.py").write_text(LIGHT)
    done = subprocess.run([sys.executable, "light.py"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith("[] <Fit 50,186 weights, untested, ")


def test_running_statistics_are_tested_as_they_are_returned(client):
    """Each rank's batch norm sees other batches; rank 0's is the one that is kept, and so the one to test."""

    def normed():
        return nn.Sequential(nn.BatchNorm2d(1), hpclab.models.CNN())

    result = fit(client, normed, ranks=2, batch_size=64)
    model = normed()
    model.load_state_dict(result.weights)
    model.eval()
    inputs, labels = (torch.from_numpy(part) for part in data.load("fashion_mnist", "test")[np.arange(2000)])
    with torch.no_grad():
        right = (model(inputs).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(result.accuracy, abs=1e-6)
    assert result.weights["0.num_batches_tracked"] == 10_000 // 128


def test_progress_bar_reaches_its_end(client, capsys):
    run = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", ranks=2, steps=6, name="bar")
    run.result(60)
    assert "bar, 2 ranks: 100%" in capsys.readouterr().err


class Doubled(nn.Module):
    """A model by its name in double precision, and any floats that it is given."""

    def __init__(self, name, **settings):
        super().__init__()
        self.inner = getattr(hpclab.models, name)(**settings).double()
        self.objective = getattr(self.inner, "objective", None)
        if self.objective is None:
            del self.objective

    def forward(self, *inputs):
        return self.inner(*(part.double() if part.is_floating_point() else part for part in inputs))


@pytest.mark.parametrize(
    ("name", "source", "settings"),
    [
        ("ResNet", "fashion_mnist", {"widths": (4, 8), "norm": SyncBatchNorm}),
        ("RNN", "japanese_vowels", {"cell": "LSTM"}),
        ("RNN", "japanese_vowels", {"cell": "GRU"}),
        ("Autoencoder", "fashion_mnist", {"channels": (4, 8)}),
        ("GPT", "kjv", {"layers": 2, "width": 32}),
    ],
)
def test_two_ranks_are_one_for_each_model(client, name, source, settings):
    """In double precision, losses and weights after 12 steps, to 1e-10."""
    model = functools.partial(Doubled, name, **settings)
    shared = {"steps": 12, "seed": 3, "lr": 0.1, "progress": False}
    one, two = (
        hpclab.train(client, model, source, ranks=ranks, batch_size=16 // ranks, **shared).result(120)
        for ranks in (1, 2)
    )
    np.testing.assert_allclose(losses(two.rows), losses(one.rows), rtol=1e-10)
    assert losses(one.rows)[-1] < losses(one.rows)[0], "it learns"
    for part, value in one.weights.items():
        torch.testing.assert_close(two.weights[part], value, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def verses(tmp_path_factory):
    """A fortieth of the Bible."""
    bible = data.load("kjv")
    text = bible.decode(bible.tokens[:100_000])
    return data.write(tmp_path_factory.mktemp("verses"), {"train": text[10_000:], "test": text[:10_000]}, kind="text")


def adam(parameters):
    return torch.optim.AdamW(parameters, 2e-3)


@pytest.mark.parametrize(
    ("name", "source", "settings", "figure", "at_least", "at_most"),
    [
        ("ResNet", "fashion_mnist", {"lr": 0.2}, "test_accuracy", 0.7, 1),
        ("RNN", "japanese_vowels", {"lr": 0.2, "epochs": 20, "batch_size": 15}, "test_accuracy", 0.9, 1),
        ("Autoencoder", "fashion_mnist", {"optimizer": adam}, "test_loss", 0, 0.06),
        ("GPT", "verses", {"optimizer": adam, "batch_size": 2}, "test_bits", 0, 3.6),
    ],
)
def test_each_model_learns_by_its_name(
    client, verses, record_property, name, source, settings, figure, at_least, at_most
):
    """Stated scores of a short training; guesses that look at no input have 0.1, 0.24, 0.09 and 4.2."""
    source = verses if source == "verses" else source
    result = hpclab.train(client, name, source, ranks=2, progress=False, **settings).result(300)
    record_property("measured", f"{name}: {result.scores}")
    assert at_least <= result.scores[figure] <= at_most


def test_a_text_with_more_characters_than_the_model_knows(client):
    small = functools.partial(hpclab.models.GPT, vocabulary=50)
    with pytest.raises(ValueError, match=r"vocabulary \(=50\) of the model is below the 63 characters of kjv; use"):
        hpclab.train(client, small, "kjv", ranks=1, steps=1, progress=False).result(60)


class NotAModel:
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (
            {"model": 7},
            TypeError,
            r"model \(=7\) must be a torch.nn.Module, a class or function that makes one, or a name: .CNN., .ResNet., ",
        ),
        ({"model": NotAModel}, TypeError, r"model \(=<class .*NotAModel.*must be a torch.nn.Module"),
        ({"model": lambda: 3}, TypeError, r"model \(=3\) must be a torch.nn.Module"),
        (
            {"model": "GPT"},
            ValueError,
            r"model \(='GPT'\) takes text, and fashion_mnist holds images; use 'CNN', 'ResNet', 'Autoencoder', or",
        ),
        ({"ranks": 0}, ValueError, r"ranks \(=0\) must be a whole number >= 1"),
        ({"ranks": -1}, ValueError, r"ranks \(=-1\)"),
        ({"ranks": 2.5}, ValueError, r"ranks \(=2.5\)"),
        ({"ranks": 3}, ValueError, r"ranks \(=3\) with threads \(=1\) take 3 CPUs; this cluster gives a gang 2"),
        ({"batch_size": 0}, ValueError, r"batch_size \(=0\) must be a whole number >= 1"),
        (
            {"batch_size": 5001},
            ValueError,
            r"batch_size \(=5001\) exceeds the 5000 samples of a rank's shard .*\(=2\)\); use batch_size<=5000",
        ),
        ({"epochs": 0}, ValueError, r"epochs \(=0\)"),
        ({"steps": 0}, ValueError, r"steps \(=0\)"),
        ({"lr": 0}, ValueError, r"lr \(=0\) must be above 0"),
        ({"data": "no_such_data"}, FileNotFoundError, r"source \(='no_such_data'\)"),
        ({"optimizer": functools.partial(print, threading.Lock())}, TypeError, r"optimizer \(=.*can't be pickled"),
    ],
)
def test_bad_arguments(client, arguments, error, says):
    good = {"model": hpclab.models.CNN, "data": "fashion_mnist", "ranks": 2, "progress": False}
    with pytest.raises(error, match=says):
        hpclab.train(client, **(good | arguments)).result(60)

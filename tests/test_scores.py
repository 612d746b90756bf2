"""What the full recipes reach on full data, by three seeds each; for `make long`, which keeps the figures."""

import functools
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import require

import hpclab
from hpclab import data, models
from hpclab.data import download

pytestmark = pytest.mark.long
SEEDS = (0, 1, 2)
CODE = 16


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """All of Fashion-MNIST."""
    require(download.DEBIAN.is_dir(), "Debian's dataset-fashion-mnist")
    return data.fetch(to=tmp_path_factory.mktemp("full") / "fashion_mnist_full", progress=False)


def fits(client, model, source, seeds=SEEDS, **settings):
    """A training on two ranks for each seed, and the seconds that each took."""
    seconds, results = [], []
    for seed in seeds:
        start = time.monotonic()
        results.append(hpclab.train(client, model, source, ranks=2, seed=seed, progress=False, **settings).result())
        seconds.append(time.monotonic() - start)
    return results, seconds


@pytest.mark.parametrize(
    ("model", "epochs", "most", "target"),
    [
        (models.CNN, 10, 60_000, 0.915),
        (functools.partial(models.ResNet, flip=0.5), 15, 100_000, 0.92),
        (functools.partial(models.ResNet, widths=(24, 48, 96), flip=0.5), 15, 200_000, 0.93),
    ],
    ids=["CNN", "ResNet-under-100k", "ResNet"],
)
def test_accuracy_on_full_fashion_mnist(client, full, record_property, model, epochs, most, target):
    results, seconds = fits(client, model, full, epochs=epochs, batch_size=64, lr=0.1)
    found = [result.accuracy for result in results]
    weights = model().counts().parameters
    record_property(
        "measured",
        f"Fashion-MNIST, {weights:,} parameters, {epochs} epochs: accuracy {np.mean(found):.4f}, by seed"
        f" {np.round(found, 4).tolist()}; needed {target}; {max(seconds):.0f} s a seed",
    )
    assert weights < most and np.mean(found) >= target


@pytest.mark.parametrize(("cell", "target"), [("GRU", 0.97), ("LSTM", 0.95)])
def test_accuracy_on_japanese_vowels(client, record_property, cell, target):
    model = functools.partial(models.RNN, cell=cell)
    lr = {"GRU": 0.2, "LSTM": 0.5}[cell]
    results, seconds = fits(client, model, "japanese_vowels", epochs=40, batch_size=15, lr=lr)
    found = [result.accuracy for result in results]
    record_property(
        "measured",
        f"JapaneseVowels, {cell}: accuracy {np.mean(found):.4f}, by seed {np.round(found, 4).tolist()}; needed"
        f" {target}; {max(seconds):.0f} s a seed",
    )
    assert np.mean(found) >= target


def auroc(scores, odd):
    """Area under the ROC curve: how often an odd image has a higher score than a usual one (Mann and Whitney 1947)."""
    places = np.argsort(np.argsort(scores)) + 1
    count = odd.sum()
    return (places[odd].sum() - count * (count + 1) / 2) / (count * (len(odd) - count))


def pca_errors(known, images):
    """Mean squared error of each image rebuilt from `CODE` principal components of the known ones."""
    known, images = (part.reshape(len(part), -1).astype(np.float64) for part in (known, images))
    centre = known.mean(0)
    axes = np.linalg.eigh(np.cov(known.T))[1][:, -CODE:]
    codes = (images - centre) @ axes
    return ((images - centre - codes @ axes.T) ** 2).mean(1)


def denoiser():
    return models.Autoencoder(code=CODE, noise=0.3)


def adam(parameters):
    return torch.optim.AdamW(parameters, 1e-3)


def test_anomalies_of_ten_held_out_classes(client, full, tmp_path, record_property):
    """Train on nine classes, without labels; a test image of the tenth should score above those of the nine."""
    splits = {split: data.load(full, split) for split in ("train", "test")}
    tests, labels = splits["test"][:]
    of_pca, of_network, plain = [], np.zeros((10, len(SEEDS))), np.zeros((10, len(SEEDS)))
    for held in range(10):
        pixels, kept = splits["train"][splits["train"].labels != held]
        nine = {"train": ((pixels * 255).round().astype(np.uint8), kept)}
        nine["test"] = tuple(part[:100] for part in nine["train"])
        folder = data.write(tmp_path / "nine", nine, classes=splits["train"].classes)
        of_pca.append(auroc(pca_errors(pixels, tests), labels == held))
        results, _ = fits(client, denoiser, folder, epochs=4, batch_size=64, optimizer=adam)
        for seed, result in enumerate(results):
            model = denoiser().eval()
            model.load_state_dict(result.weights)
            images = torch.from_numpy(tests)
            scores = model.anomaly(torch.from_numpy(pixels[:20_000]), images).numpy()
            of_network[held, seed] = auroc(scores, labels == held)
            with torch.no_grad():
                errors = (model(images) - images).square().mean((1, 2, 3)).numpy()
            plain[held, seed] = auroc(errors, labels == held)
        shutil.rmtree(folder)
    means = of_network.mean(0)
    margin, spread = means.mean() - np.mean(of_pca), np.ptp(means)
    record_property(
        "measured",
        f"anomalies, code of {CODE}: mean AUROC {means.mean():.3f}, by seed {means.round(3).tolist()}, by class"
        f" {of_network.mean(1).round(3).tolist()}; by the error alone {plain.mean():.3f}; PCA's error"
        f" {np.mean(of_pca):.3f}, by class {np.round(of_pca, 3).tolist()}",
    )
    assert margin > spread


def test_bits_a_character_of_the_bible(client, record_property):
    """The last 10 %, in windows of 128: each character is predicted from those before it in its window alone."""
    (result,), (seconds,) = fits(client, "GPT", "kjv", seeds=SEEDS[:1], epochs=8, batch_size=16, optimizer=adam)
    curve = [round(row["test_bits"], 3) for row in result.rows if row["kind"] == "epoch"]
    record_property("measured", f"kjv: {curve[-1]} bits a character, after each epoch {curve}; {seconds:.0f} s")
    assert curve[-1] < 1.95

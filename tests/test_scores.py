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
CODE, KNOWN = 16, 10_000
"""Numbers in a code, and training images that anomalies are compared with."""


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


def pca_scores(known, images):
    """As `network_scores`, with the first `CODE` principal components as the code."""
    known, images = (part.reshape(len(part), -1).astype(np.float64) for part in (known, images))
    centre = known.mean(0)
    axes = np.linalg.eigh(np.cov(known.T))[1][:, -CODE:]
    codes = (images - centre) @ axes
    errors = ((images - centre - codes @ axes.T) ** 2).mean(1)
    known_codes = (known - centre) @ axes
    scale = torch.from_numpy(known_codes.std(0))
    distances = torch.cdist(torch.from_numpy(codes) / scale, torch.from_numpy(known_codes) / scale)
    nearest = distances.topk(10, largest=False).indices.numpy()
    return errors, ((np.stack([known[near].mean(0) for near in nearest]) - images) ** 2).mean(1)


@torch.no_grad()
def network_scores(weights, known, images):
    """Mean squared error of each image rebuilt from its own code, and `Autoencoder.anomaly`."""
    model = denoiser().eval()
    model.load_state_dict(weights)
    known, images = torch.from_numpy(known), torch.from_numpy(images)
    errors = (model(images) - images).square().mean((1, 2, 3))
    return errors.numpy(), model.anomaly(known, images).numpy()


def denoiser():
    return models.Autoencoder(code=CODE, noise=0.3)


def adam(parameters):
    return torch.optim.AdamW(parameters, 1e-3)


def test_anomalies_of_ten_held_out_classes(client, full, tmp_path, record_property):
    """Train on nine classes, without labels; a test image of the tenth should score above those of the nine."""
    train, test = (data.load(full, split) for split in ("train", "test"))
    tests, labels = test[:]
    of_pca, of_network = np.zeros((10, 2)), np.zeros((10, len(SEEDS), 2))  # by class: plain error, from known images
    for held in range(10):
        pixels, kept = train[train.labels != held]
        nine = ((pixels * 255).round().astype(np.uint8), kept)
        splits = {"train": nine, "test": tuple(part[:100] for part in nine)}
        folder = data.write(tmp_path / "nine", splits, classes=train.classes)
        known = pixels[:KNOWN]
        of_pca[held] = [auroc(scores, labels == held) for scores in pca_scores(known, tests)]
        results, _ = fits(client, denoiser, folder, epochs=4, batch_size=64, optimizer=adam)
        for seed, result in enumerate(results):
            for kind, scores in enumerate(network_scores(result.weights, known, tests)):
                of_network[held, seed, kind] = auroc(scores, labels == held)
        shutil.rmtree(folder)
    by_seed = of_network[..., 1].mean(0)
    (pca, pca_known), (error, found) = of_pca.mean(0), of_network.mean((0, 1))
    record_property(
        "measured",
        f"anomalies, code of {CODE}: mean AUROC {found:.3f}, by seed {by_seed.round(3).tolist()}, by class"
        f" {of_network[..., 1].mean(1).round(3).tolist()}; PCA's error {pca:.3f}, by class"
        f" {of_pca[:, 0].round(3).tolist()}; the network's error alone {error:.3f}; known images near in PCA's code"
        f" {pca_known:.3f}",
    )
    assert by_seed.mean() - pca > np.ptp(by_seed)


def test_bits_a_character_of_the_bible(client, record_property):
    """The last 10 %, in windows of 128: each character is predicted from those before it in its window alone."""
    (result,), (seconds,) = fits(client, "GPT", "kjv", seeds=SEEDS[:1], epochs=8, batch_size=16, optimizer=adam)
    curve = [round(row["test_bits"], 3) for row in result.rows if row["kind"] == "epoch"]
    record_property("measured", f"kjv: {curve[-1]} bits a character, after each epoch {curve}; {seconds:.0f} s")
    assert curve[-1] < 1.95

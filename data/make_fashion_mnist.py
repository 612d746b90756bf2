"""Make data/fashion_mnist: 1,000 training and 200 test images a class of Fashion-MNIST.

python data/make_fashion_mnist.py [folder]      (uses Debian's dataset-fashion-mnist, or downloads)
"""

import sys
from pathlib import Path

import numpy as np

from hpclab import data
from hpclab.data import download


def balanced(labels: np.ndarray, per_class: int, shards: int, seed: int) -> np.ndarray:
    """Random sample numbers, as many of each class, also in each shard; shuffled within the shards."""
    draw = np.random.RandomState(seed)  # unlike default_rng, its stream is frozen for all versions of numpy
    chosen = [draw.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    return np.concatenate([draw.permutation(part.ravel()) for part in np.split(np.stack(chosen), shards, axis=1)])


def main(folder: Path) -> None:
    splits = download.originals(mirror=None, progress=True)
    subset = {}
    for split, per_class, shards in (("train", 1_000, 2), ("test", 200, 1)):
        images, labels = splits[split]
        order = balanced(labels, per_class, shards, seed=2017)
        subset[split] = images[order], labels[order]
    data.write(folder, subset, name="fashion_mnist", **download.FACTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fashion_mnist")

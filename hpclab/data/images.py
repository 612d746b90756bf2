"""Images of one shape, read by memory map when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from hpclab.data import shards


class Images(shards.Split):
    """One split of a data set; a map-style dataset for `torch.utils.data.DataLoader`.

    An int gives one sample: float32 image (C, H, W) in [0, 1] and int64 label. Any other numpy index (list,
    array, slice, mask) gives a batch, (B, C, H, W) and (B,): much the faster way (`batch_size=None` with a
    `BatchSampler` as `sampler`). No pixel is read before. A pickle holds only the folder's name.

    Attributes
    ----------
    classes : list of str
    labels : ndarray of int64, shape (N,)
    shape : tuple of int
        (C, H, W) of an image.
    """

    kind = "images"

    def __init__(self, folder: str | PathLike[str], split: str):
        facts, pairs = self._open(folder, split)
        for stem, pair in zip(facts["splits"][split], pairs, strict=True):
            _check(*pair, *(f"{file} in {self.folder}" for file in shards.files(self.kind, stem)))
        images, labels = zip(*pairs, strict=True)
        if len(shapes := {shard.shape[1:] for shard in images}) > 1:
            raise ValueError(f"the shards of {self.folder} hold images of different shapes: {shapes}.")
        self.shape = (1, *images[0].shape[1:])[-3:]
        self.labels = shards.all_labels(labels, facts, split)
        self._shards = [shard.reshape(-1, *self.shape) for shard in images]
        self._ends = np.cumsum([len(shard) for shard in images])
        self._numbers = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[np.ndarray, Any]:
        numbers = self._numbers[index]  # whatever numpy takes as an index, with its bounds checked
        shard = np.searchsorted(self._ends, numbers, side="right")
        pixels = np.empty((*numbers.shape, *self.shape), np.uint8)  # (B, C, H, W)
        for s in np.unique(shard):
            inside = shard == s
            pixels[inside] = self._shards[s][numbers[inside] - self._ends[s]]  # negative: from the shard's end
        return np.divide(pixels, 255, dtype=np.float32), self.labels[numbers]

    def __repr__(self) -> str:
        size = f"{len(self):,} of {self.shape}, {len(self.classes)} classes"
        return f"Images({self.name!r}, {self.split!r}: {size})"


def pack(splits: Mapping[str, Any], classes: Sequence[str] | None) -> tuple[shards.Shards, list[str], dict[str, int]]:
    """Checked shards of (images, labels), the classes' names, and the samples of each split."""
    arrays = {split: (np.asarray(images), np.asarray(labels)) for split, (images, labels) in splits.items()}
    for split, pair in arrays.items():
        _check(*pair, f"images of split {split!r}", f"labels of split {split!r}")
    names = shards.class_names([labels for _, labels in arrays.values()], classes)
    cut = {
        split: [tuple(array[at : at + shards.SHARD] for array in pair) for at in range(0, len(pair[0]), shards.SHARD)]
        for split, pair in arrays.items()
    }
    return cut, names, {split: len(images) for split, (images, _) in arrays.items()}


def _check(images: np.ndarray, labels: np.ndarray, place: str, place_of_labels: str) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        needed = "uint8 (N, H, W) or (N, C, H, W)"
        raise ValueError(f"{place}: {images.dtype} {images.shape}; needed: {needed}.")
    shards.check_labels(labels, len(images), place_of_labels, "images")

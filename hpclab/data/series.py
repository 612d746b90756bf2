"""Series of different lengths: each some frames of as many numbers, with a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from hpclab.data import shards


class Series(shards.Split):
    """One split of a data set of series; a map-style dataset for `torch.utils.data.DataLoader`.

    An int gives one sample: float32 frames (T, C) and int64 label. Any other numpy index gives a batch:
    ((frames, lengths), labels), of shapes (B, T, C), (B,) and (B,), where T is the longest of the batch, and what is
    beyond a series' length is 0. All frames are read at once. A pickle holds only the folder's name.

    Attributes
    ----------
    classes : list of str
    labels : ndarray of int64, shape (N,)
    lengths : ndarray of int64, shape (N,)
        Frames of each.
    channels : int
        Numbers in a frame.
    """

    kind = "series"

    def __init__(self, folder: str | PathLike[str], split: str):
        facts, parts = self._open(folder, split)
        for stem, shard in zip(facts["splits"][split], parts, strict=True):
            _check(*shard, *(f"{file} in {self.folder}" for file in shards.files(self.kind, stem)))
        frames, lengths, labels = zip(*parts, strict=True)
        if len(channels := {shard.shape[1] for shard in frames}) > 1:
            raise ValueError(f"the shards of {self.folder} hold frames of different sizes: {channels}.")
        self.channels = frames[0].shape[1]
        self.labels = shards.all_labels(labels, facts, split)
        self.lengths = np.concatenate(lengths).astype(np.int64)
        self._frames = np.concatenate(frames)  # (F, C)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._numbers = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        numbers = self._numbers[index]
        starts, lengths = self._starts[numbers], self.lengths[numbers]
        if not numbers.ndim:
            return self._frames[starts : starts + lengths].copy(), self.labels[numbers]
        steps = np.arange(lengths.max(initial=0))
        there = steps < lengths[:, None]  # (B, T)
        frames = np.zeros((*there.shape, self.channels), np.float32)
        frames[there] = self._frames[(starts[:, None] + steps)[there]]
        return (frames, lengths), self.labels[numbers]

    def __repr__(self) -> str:
        size = f"{len(self):,} of {self.lengths.min()} to {self.lengths.max()} x {self.channels}"
        return f"Series({self.name!r}, {self.split!r}: {size}, {len(self.classes)} classes)"


def pack(splits: Mapping[str, Any], classes: Sequence[str] | None) -> tuple[shards.Shards, list[str], dict[str, int]]:
    """Checked shards of (series, labels), the classes' names, and the samples of each split."""
    cut: dict[str, list[tuple[shards.Part, ...]]] = {}
    labels = {split: np.asarray(numbers) for split, (_, numbers) in splits.items()}
    for split, (samples, _) in splits.items():
        series = [_frames(sample, f"series {number} of split {split!r}") for number, sample in enumerate(samples)]
        if not series:
            raise ValueError(f"split {split!r} holds no series.")
        shards.check_labels(labels[split], len(series), f"labels of split {split!r}", "series")
        if len(channels := {frames.shape[1] for frames in series}) > 1:
            raise ValueError(f"frames of split {split!r} have different sizes: {channels}.")
        cut[split] = []
        for at in range(0, len(series), shards.SHARD):
            some = series[at : at + shards.SHARD]
            lengths = np.array([len(frames) for frames in some])
            cut[split].append((np.concatenate(some), lengths, labels[split][at : at + shards.SHARD]))
    names = shards.class_names([*labels.values()], classes)
    return cut, names, {split: len(numbers) for split, numbers in labels.items()}


def _frames(values: Any, place: str) -> np.ndarray:
    """One series, float32, shape (T, C)."""
    frames = np.asarray(values)
    if frames.ndim != 2 or frames.dtype.kind not in "iuf":
        raise ValueError(f"{place}: {frames.dtype} {frames.shape}; needed: numbers (T, C).")
    if not frames.size:
        raise ValueError(f"{place} is empty: {frames.shape}; leave it out, with its label.")
    if not np.isfinite(frames).all():
        raise ValueError(f"{place} holds a number that is not finite; fill the gap, or leave the series out.")
    return frames.astype(np.float32)


def _check(frames: np.ndarray, lengths: np.ndarray, labels: np.ndarray, *places: str) -> None:
    if frames.dtype != np.float32 or frames.ndim != 2 or not frames.size:
        raise ValueError(f"{places[0]}: {frames.dtype} {frames.shape}; needed: float32 (F, C).")
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1:
        raise ValueError(f"{places[1]}: {lengths.dtype} {lengths.shape}; needed: integers (N,).")
    if (empty := np.flatnonzero(lengths < 1)).size:
        raise ValueError(f"{places[1]}: series {empty[0]} has length {lengths[empty[0]]}; needed: 1 or more.")
    if lengths.sum() != len(frames):
        raise ValueError(f"{places[0]}: {len(frames):,} frames, where the lengths add up to {lengths.sum():,}.")
    shards.check_labels(labels, len(lengths), places[2], "series")

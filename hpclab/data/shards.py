"""Shards on disk: pairs of `.npy` files with images and labels, described by a `dataset.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

Splits = Mapping[str, tuple[np.ndarray, np.ndarray]]  # images and labels of each

SHARD = 5_000  # samples in a shard: 4 MB of 28x28 images
_KEYS = {"name": str, "classes": list, "splits": dict, "sha256": dict}
_AGAIN = "copy or fetch the data set again."


def write(
    folder: str | PathLike[str],
    splits: Splits,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    **facts: Any,
) -> Path:
    """Write a data set: shards of at most 5,000 samples, in the order given, and `dataset.json`.

    Parameters
    ----------
    folder : str or path
        Made if need be.
    splits : mapping of str to (images, labels)
        Images uint8, shape (N, H, W) or (N, C, H, W); labels integer, shape (N,). `train` needs the splits "train" and
        "test".
    name : str, optional
        Default: the folder's.
    classes : sequence of str, optional
        Names of the labels 0, 1, 2, ... Default: these numbers, up to the largest label.
    **facts
        What else `dataset.json` should say, such as `licence` and `source`.

    Raises
    ------
    ValueError
        If there are no splits, arrays are empty or of another type or shape, there aren't as many labels as images, or
        a label is outside the classes. Nothing has been written then.
    """
    if not splits:
        raise ValueError("splits is empty; give images and labels, such as {'train': (images, labels)}.")
    folder = Path(folder).expanduser().resolve()
    arrays = {split: (np.asarray(images), np.asarray(labels)) for split, (images, labels) in splits.items()}
    for split, pair in arrays.items():
        _check(*pair, f"images of split {split!r}", f"labels of split {split!r}")
    all_labels = np.concatenate([labels for _, labels in arrays.values()])
    least, most = int(all_labels.min()), int(all_labels.max())
    names = [*map(str, range(most + 1) if classes is None else classes)]
    if least < 0 or most >= len(names):
        raise ValueError(f"labels go from {least} to {most}; needed: 0 to {len(names) - 1}, of classes {names}.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").unlink(missing_ok=True)  # of a set that was here, and is none any more
    stems: dict[str, list[str]] = {}
    for split, pair in arrays.items():
        starts = range(0, len(pair[0]), SHARD)
        stems[split] = [f"{split}-{s}" for s in range(len(starts))]
        for stem, start in zip(stems[split], starts, strict=True):
            for file, array in zip(_files(stem), pair, strict=True):
                (folder / file).unlink(missing_ok=True)  # a process that has mapped the old one keeps it
                np.save(folder / file, array[start : start + SHARD])
    facts = {"name": name or folder.name, "classes": names} | facts
    facts["samples"] = {split: len(images) for split, (images, _) in arrays.items()}
    facts["splits"] = stems
    facts["sha256"] = {file: _sha256(folder / file) for file in _listed(stems)}
    text = json.dumps(facts, indent=2) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8", newline="\n")
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """What `dataset.json` says, with the keys that we rely on."""
    path = folder / "dataset.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; {_AGAIN}") from None
    for key, kind in _KEYS.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(key), kind):
            raise ValueError(f"{path} has no {key!r} of type {kind.__name__}; {_AGAIN}")
    return facts


def shard(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a shard, mapped and checked."""
    images, labels = (_map(folder / file) for file in _files(stem))
    _check(images, labels, *(f"{file} in {folder}" for file in _files(stem)))
    return images, labels


def _check(images: np.ndarray, labels: np.ndarray, name: str, other: str) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        needed = "uint8 (N, H, W) or (N, C, H, W)"
        raise ValueError(f"{name}: {images.dtype} {images.shape}; needed: {needed}.")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{other}: {labels.dtype} {labels.shape}; needed: integers (N,).")
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images):,} images and {len(labels):,} labels; needed: a label for each image.")


def verify(folder: Path) -> None:
    """Compare every file with its recorded SHA-256; the error names the first that is missing or damaged."""
    facts = describe(folder)
    for file in _listed(facts["splits"]):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; {_AGAIN}")
        if _sha256(folder / file) != facts["sha256"].get(file):
            raise ValueError(f"{folder / file} is damaged: not the SHA-256 in dataset.json; {_AGAIN}")


def _files(stem: str) -> tuple[str, str]:
    return f"{stem}-images.npy", f"{stem}-labels.npy"


def _listed(splits: Mapping[str, list[str]]) -> list[str]:
    return [file for stems in splits.values() for stem in stems for file in _files(stem)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path) -> np.ndarray:
    """Memory map of a `.npy` file, whose size is checked first: reading past a file's end kills the process."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {_AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a whole .npy file: {error}; {_AGAIN}") from None

"""Shards on disk: files of a few kinds, described by a `dataset.json`."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Part: TypeAlias = "np.ndarray | str"
Shards = Mapping[str, Sequence[tuple[Part, ...]]]
"""For each split its shards, each of which has a part for each file."""

SHARD = 5_000  # samples in a shard: 4 MB of 28x28 images
FILES = {
    "images": ("-images.npy", "-labels.npy"),
    "series": ("-frames.npy", "-lengths.npy", "-labels.npy"),
    "text": (".txt.xz",),
}
"""Kinds of data sets, each with the ends of its shards' files."""
_KEYS = {"name": str, "kind": str, "classes": list, "splits": dict, "sha256": dict}
_AGAIN = "copy or fetch the data set again."


class Split:
    """What the splits of all kinds of data sets have; a map-style dataset. A pickle holds only the folder's name.

    Attributes
    ----------
    folder : Path
    split, name : str
        Of the split, and of the data set.
    classes : list of str
    """

    kind: str

    def _open(self, folder: str | PathLike[str], split: str) -> tuple[dict[str, Any], list[list[Any]]]:
        """Note what all have; returns what `dataset.json` says, and the shards, as `read` does."""
        self.folder, self.split = Path(folder).expanduser().resolve(), split
        facts, parts = read(self.folder, split, self.kind)
        self.name, self.classes = facts["name"], facts["classes"]
        return facts, parts

    def __reduce__(self) -> tuple[type[Split], tuple[Path, str]]:
        return type(self), (self.folder, self.split)


def save(folder: Path, shards: Shards, facts: Mapping[str, Any]) -> Path:
    """Write the files of all shards, and a `dataset.json` with these facts, the shards' names and checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").unlink(missing_ok=True)  # of a set that was here, and is none any more
    stems = {split: [f"{split}-{number}" for number in range(len(parts))] for split, parts in shards.items()}
    for split, names in stems.items():
        for stem, parts in zip(names, shards[split], strict=True):
            for file, part in zip(files(facts["kind"], stem), parts, strict=True):
                _save(folder / file, part)
    sums = {file: _sha256(folder / file) for file in _listed(facts["kind"], stems)}
    text = json.dumps({**facts, "splits": stems, "sha256": sums}, indent=2) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8", newline="\n")
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """What `dataset.json` says, with the keys that we rely on; one without a kind is from before there were others."""
    path = folder / "dataset.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; {_AGAIN}") from None
    if isinstance(facts, dict):
        facts.setdefault("kind", "images")
    for key, kind in _KEYS.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(key), kind):
            raise ValueError(f"{path} has no {key!r} of type {kind.__name__}; {_AGAIN}")
    if facts["kind"] not in FILES:
        raise ValueError(f"{path} says kind {facts['kind']!r}; this hpclab reads {', '.join(FILES)}.")
    return facts


def read(folder: Path, split: str, kind: str) -> tuple[dict[str, Any], list[list[Any]]]:
    """What `dataset.json` says, and a split's shards: an array, mapped, or a text for each file."""
    facts = describe(folder)
    if facts["kind"] != kind:
        raise ValueError(f"{folder} holds {facts['kind']}, not {kind}; open it by hpclab.data.load.")
    stems = facts["splits"].get(split)
    if not stems:
        raise ValueError(f"split (={split!r}) is not in {facts['name']}; use one of {[*facts['splits']]}.")
    return facts, [[_read(folder / file) for file in files(kind, stem)] for stem in stems]


def verify(folder: Path) -> None:
    """Compare every file with its recorded SHA-256; the error names the first that is missing or damaged."""
    facts = describe(folder)
    for file in _listed(facts["kind"], facts["splits"]):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; {_AGAIN}")
        if _sha256(folder / file) != facts["sha256"].get(file):
            raise ValueError(f"{folder / file} is damaged: not the SHA-256 in dataset.json; {_AGAIN}")


def files(kind: str, stem: str) -> list[str]:
    """Names of a shard's files."""
    return [stem + end for end in FILES[kind]]


def check_labels(labels: np.ndarray, samples: int, place: str, kind: str) -> None:
    """Raise a ValueError unless there is an integer for each sample."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{place}: {labels.dtype} {labels.shape}; needed: integers (N,).")
    if samples != len(labels):
        raise ValueError(f"{place}: {samples:,} {kind} and {len(labels):,} labels; needed: a label for each.")


def class_names(labels: Sequence[np.ndarray], classes: Sequence[str] | None) -> list[str]:
    """Names of the classes: those given, else the numbers up to the largest label."""
    together = np.concatenate(labels)
    least, most = int(together.min()), int(together.max())
    names = [*map(str, range(most + 1) if classes is None else classes)]
    if least < 0 or most >= len(names):
        raise ValueError(f"labels go from {least} to {most}; needed: 0 to {len(names) - 1}, of classes {names}.")
    return names


def all_labels(parts: Sequence[np.ndarray], facts: Mapping[str, Any], split: str) -> np.ndarray:
    """Labels of all shards, int64, shape (N,), each of which must be one of the classes."""
    labels, classes = np.concatenate(parts).astype(np.int64), len(facts["classes"])
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is outside the {classes} classes of {facts['name']}: {wrong.size} of "
            f"{len(labels)} labels of split {split!r} are not in 0 to {classes - 1}."
        )
    return labels


def _listed(kind: str, splits: Mapping[str, list[str]]) -> list[str]:
    return [file for stems in splits.values() for stem in stems for file in files(kind, stem)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save(path: Path, part: Part) -> None:
    path.unlink(missing_ok=True)  # a process that has mapped the old one keeps it
    if isinstance(part, str):
        path.write_bytes(lzma.compress(part.encode(), preset=9))
    else:
        np.save(path, part)


def _read(path: Path) -> Part:
    """Text of an `.xz` file, or memory map of an `.npy` file, which is checked first: past its end a process dies."""
    try:
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes()).decode()
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; {_AGAIN}") from None
    except (ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}; {_AGAIN}") from None

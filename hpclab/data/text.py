"""A text, cut into windows of characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from hpclab.data import shards

WINDOW = 128
"""Characters in a window, where a data set says nothing else."""


class Text(shards.Split):
    """One split of a text; a map-style dataset for `torch.utils.data.DataLoader`.

    An int gives one window: the numbers of its characters, and of those that come next, both int64 (S,). Any other
    numpy index gives a batch, both (B, S). Windows follow each other without a gap; what doesn't fill one at the end is
    left out. All of the text is read at once. A pickle holds only the folder's name.

    Attributes
    ----------
    classes : list of str
        The characters, in the order of their numbers.
    window : int
        Characters in a window, S.
    tokens : ndarray of unsigned int, shape (characters,)
        The whole split.
    """

    kind = "text"

    def __init__(self, folder: str | PathLike[str], split: str):
        facts, parts = self._open(folder, split)
        self.window = facts.get("window", WINDOW)
        self.tokens = self.encode("".join(part for (part,) in parts))
        _windows(len(self.tokens), self.window, split)
        self._starts = np.arange(0, len(self.tokens) - self.window, self.window)

    def encode(self, text: str) -> np.ndarray:
        """Numbers of a text's characters, shape (characters,); a ValueError names one that this data set hasn't got."""
        return encode(text, self.classes, self.name)

    def decode(self, tokens: Any) -> str:
        """The text of some numbers."""
        return "".join(self.classes[token] for token in tokens)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        places = self._starts[index][..., None] + np.arange(self.window + 1)
        characters = self.tokens[places].astype(np.int64)
        return characters[..., :-1], characters[..., 1:]

    def __repr__(self) -> str:
        size = f"{len(self):,} windows of {self.window}, {len(self.classes)} characters"
        return f"Text({self.name!r}, {self.split!r}: {size})"


def encode(text: str, characters: Sequence[str], name: str) -> np.ndarray:
    """Numbers of a text's characters in a sorted list of all that there may be."""
    known = np.array([ord(character) for character in characters], np.uint32)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    tokens = np.searchsorted(known, points).clip(max=len(known) - 1)
    if (wrong := np.flatnonzero(known[tokens] != points)).size:
        raise ValueError(
            f"text[{wrong[0]}] (={text[wrong[0]]!r}) is none of the {len(known)} characters of {name}:"
            f" {''.join(characters)!r}."
        )
    return tokens.astype(np.min_scalar_type(len(known) - 1))


def pack(
    splits: Mapping[str, str], classes: Sequence[str] | None, window: int
) -> tuple[shards.Shards, list[str], dict[str, int]]:
    """A shard for each split, the characters, and each split's windows."""
    for split, text in splits.items():
        if not isinstance(text, str):
            raise ValueError(f"split {split!r} is {type(text).__name__}; needed: a str.")
    characters = sorted({*"".join(splits.values() if classes is None else classes)})
    for split, text in splits.items():
        encode(text, characters, f"split {split!r}")
    cut = {split: [(text,)] for split, text in splits.items()}
    return cut, characters, {split: _windows(len(text), window, split) for split, text in splits.items()}


def _windows(characters: int, window: int, split: str) -> int:
    """How many windows there are; each needs one character more, which comes next."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window (={window!r}) must be a whole number >= 1.")
    if characters <= window:
        raise ValueError(f"split {split!r} of {characters:,} characters fills no window (={window}) and one more.")
    return (characters - 1) // window

"""Data sets of all kinds: find, open, write, verify, fetch."""

from __future__ import annotations

import os
import reprlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpclab._arguments import one_of
from hpclab.data import images, series, shards, text
from hpclab.data.images import Images
from hpclab.data.series import Series
from hpclab.data.text import Text

Source = str | os.PathLike[str]
_FULL = "fashion_mnist_full"
_OPEN: dict[str, type[Images | Series | Text]] = {kind.kind: kind for kind in (Images, Series, Text)}


def share() -> Path:
    """Folder that holds `data/` and `notebooks/`: the clone's root, or the installed package's `_share`."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_share"
    return bundled if bundled.is_dir() else package.parent


def cache() -> Path:
    """Folder of fetched data sets: `HPCLAB_CACHE`, or the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("HPCLAB_CACHE") or user_cache_dir("hpclab", appauthor=False)).expanduser()


def find(source: Source) -> Path:
    """Folder of a data set.

    Parameters
    ----------
    source : str or path
        A folder that holds a `dataset.json`, as `write` makes it of arrays; or the name of a bundled or fetched data
        set, also written `data/<name>`, from any working directory. An existing folder wins over a name.

    Raises
    ------
    FileNotFoundError
        If there is no such data set, or the folder holds no `dataset.json`.

    Examples
    --------
    >>> find("data/fashion_mnist").name
    'fashion_mnist'
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source (={reprlib.repr(source)}) must be a folder or the name of a data set; hpclab.data.write makes one"
            " of arrays."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "dataset.json").is_file():
            raise FileNotFoundError(f"source (={str(source)!r}) holds no dataset.json. {_known()}")
        return path.resolve()
    # Only a bare name: another data set must never stand in for a mistyped path.
    folder = _sets().get(path.name) if str(path.parent) in (".", "data") else None
    if folder is None:
        raise FileNotFoundError(f"source (={str(source)!r}) is neither a folder nor a known data set. {_known()}")
    return folder


def load(source: Source, split: str = "train") -> Any:
    """Open one split of a data set, and check it.

    Parameters
    ----------
    source : str or path
        As for `find`.
    split : str, default "train"

    Returns
    -------
    Images, Series or Text
        As the data set's kind is.

    Raises
    ------
    FileNotFoundError
        If the data set or one of its files is missing.
    ValueError
        If the split is unknown, a file is truncated or of another type or shape, or a label is outside the
        classes.

    Examples
    --------
    >>> images = load("fashion_mnist", "test")
    >>> images
    Images('fashion_mnist', 'test': 2,000 of (1, 28, 28), 10 classes)
    >>> x, y = images[[3, 1, 4]]
    >>> x.shape, x.dtype, y.shape
    ((3, 1, 28, 28), dtype('float32'), (3,))
    >>> (frames, lengths), labels = load("japanese_vowels")[[3, 1, 4]]
    >>> frames.shape, lengths, labels
    ((3, 26, 12), array([20, 26, 21]), array([0, 0, 0]))
    >>> kjv = load("kjv")
    >>> tokens, following = kjv[:2]
    >>> tokens.shape, kjv.decode(tokens[0, :16]), kjv.decode(following[0, :16])
    ((2, 128), 'In the beginning', 'n the beginning ')
    """
    folder = find(source)
    return _OPEN[shards.describe(folder)["kind"]](folder, split)


def write(
    folder: Source,
    splits: Mapping[str, Any],
    name: str | None = None,
    classes: Sequence[str] | None = None,
    kind: str = "images",
    window: int = text.WINDOW,
    **facts: Any,
) -> Path:
    """Write a data set: shards of at most 5,000 samples, in the order given, and `dataset.json`.

    Parameters
    ----------
    folder : str or path
        Made if need be.
    splits : mapping of str to (samples, labels) or str
        Images: uint8, shape (N, H, W) or (N, C, H, W). Series: a list of N arrays, each of shape (T, C) with its own T.
        Labels: integer, shape (N,). Text: a str. `train` needs the splits "train" and "test".
    name : str, optional
        Default: the folder's.
    classes : sequence of str, optional
        Names of the labels 0, 1, 2, ... Default: these numbers, up to the largest label. Of a text: all characters that
        there may be. Default: those that there are.
    kind : {"images", "series", "text"}, default "images"
    window : int, default 128
        Of a text: characters of a sample.
    **facts
        What else `dataset.json` should say, such as `licence` and `source`.

    Raises
    ------
    ValueError
        If the kind is unknown, there are no splits, arrays are empty or of another type or shape, there aren't as many
        labels as samples, a label is outside the classes, or a text has other characters or is shorter than a window.
        Nothing has been written then.
    """
    one_of("kind", kind, shards.FILES)
    if not splits:
        raise ValueError("splits is empty; give images and labels, such as {'train': (images, labels)}.")
    folder = Path(folder).expanduser().resolve()
    if kind == "text":
        cut, names, samples = text.pack(splits, classes, window)
        facts = {"window": window} | facts
    else:
        cut, names, samples = (images if kind == "images" else series).pack(splits, classes)
    facts = {"name": name or folder.name, "kind": kind, "classes": names} | facts
    return shards.save(folder, cut, facts | {"samples": samples})


def verify(source: Source) -> Path:
    """Compare every file of a data set with its recorded SHA-256; return its folder.

    Raises
    ------
    FileNotFoundError, ValueError
        Naming the file that is missing or damaged.
    """
    folder = find(source)
    shards.verify(folder)
    return folder


def fetch(
    name: str = "fashion-mnist", to: Source | None = None, mirror: str | None = None, progress: bool = True
) -> Path:
    """The full Fashion-MNIST: 60,000 + 10,000 images, 55 MB, in the publisher's order.

    Taken from Debian's package if that is installed, else downloaded. The data set appears under its final name, whole
    or not at all.

    Parameters
    ----------
    name : str, default "fashion-mnist"
    to : str or path, optional
        The data set's folder; default where `load("fashion_mnist_full")` finds it.
    mirror : str, optional
        Address or folder of the publisher's four `.gz` files, tried first; default `HPCLAB_DATA_MIRROR`.
    progress : bool, default True
        Show a progress bar.

    Raises
    ------
    FileExistsError
        If something else, or a damaged copy, is there.
    ConnectionError
        If no source works; lists each with its reason.
    OSError
        If the folder can't be written.
    """
    from hpclab.data import download

    if name != "fashion-mnist":
        raise ValueError(f"name (={name!r}) can't be fetched; use 'fashion-mnist'.")
    target = Path(to if to is not None else cache() / _FULL).expanduser().absolute()
    if not _present(target):
        _writable(target.parent)
        try:
            splits = download.originals(mirror or os.environ.get("HPCLAB_DATA_MIRROR"), progress)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as partial:
                write(Path(partial) / _FULL, splits, name=_FULL, **download.FACTS).rename(target)
        except OSError:  # right if another process was faster
            if not _present(target):
                raise
    return target


def _sets() -> dict[str, Path]:
    """Bundled and fetched data sets by name."""
    folders = [file.parent for root in (cache(), share() / "data") for file in root.glob("*/dataset.json")]
    return {folder.name: folder for folder in folders}


def _known() -> str:
    return f"Available here: {', '.join(sorted(_sets())) or 'none'}. For {_FULL}: hpclab data fetch fashion-mnist."


def _present(target: Path) -> bool:
    """Whether the full data set is there and whole; an error if something else is."""
    if not os.path.lexists(target):
        return False
    try:
        shards.verify(target)
        if shards.describe(target)["name"] == _FULL:
            return True
        reason = "another data set"
    except (OSError, ValueError) as error:
        reason = str(error)
    way_out = "give a folder that does not exist yet, or delete a damaged copy first."
    raise FileExistsError(f"to (={str(target)!r}) already exists and isn't {_FULL} ({reason}); {way_out}")


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{folder} can't be written ({error.strerror}); give another folder with to=, or set HPCLAB_CACHE"
        raise OSError(error.errno, reason) from None  # of the same kind: OSError chooses by number

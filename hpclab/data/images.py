"""Image data sets: find, open, verify, fetch. Images are read by memory map, when they are asked for."""

from __future__ import annotations

import os
import reprlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hpclab.data import shards

Source = str | os.PathLike[str]
_FULL = "fashion_mnist_full"


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
            " from arrays."
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


def load(source: Source, split: str = "train") -> Images:
    """Open one split of a data set, and check it.

    Parameters
    ----------
    source : str or path
        As for `find`.
    split : str, default "train"

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
    """
    return Images(find(source), split)


class Images:
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

    def __init__(self, folder: Source, split: str):
        self.folder, self.split = Path(folder).expanduser().resolve(), split
        facts = shards.describe(self.folder)
        stems = facts["splits"].get(split)
        if not stems:
            raise ValueError(f"split (={split!r}) is not in {facts['name']}; use one of {[*facts['splits']]}.")
        images, labels = zip(*(shards.shard(self.folder, stem) for stem in stems), strict=True)
        if len(shapes := {shard.shape[1:] for shard in images}) > 1:
            raise ValueError(f"the shards of {self.folder} hold images of different shapes: {shapes}.")
        self.name, self.classes = facts["name"], facts["classes"]
        self.shape = (1, *images[0].shape[1:])[-3:]
        self.labels = np.concatenate(labels).astype(np.int64)  # (N,)
        _check_labels(self)
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

    def __reduce__(self) -> tuple[type[Images], tuple[Path, str]]:
        return Images, (self.folder, self.split)


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
                shards.write(Path(partial) / _FULL, splits, name=_FULL, **download.FACTS).rename(target)
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


def _check_labels(images: Images) -> None:
    classes = len(images.classes)
    wrong = images.labels[(images.labels < 0) | (images.labels >= classes)]
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is outside the {classes} classes of {images.name}: {wrong.size} of "
            f"{len(images)} labels of split {images.split!r} are not in 0 to {classes - 1}."
        )


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
        text = f"{folder} can't be written ({error.strerror}); give another folder with to=, or set HPCLAB_CACHE"
        raise OSError(error.errno, text) from None  # of the same kind: OSError chooses by number

"""The publisher's four files of Fashion-MNIST: found or downloaded, checked, read."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
PUBLISHED = [
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
]
# Of the unpacked bytes: Debian's files lack the names and times in the gzip headers, so the published MD5s
# fit only the publisher's; put back, they fit (see data/fashion_mnist/README.md).
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FACTS: dict[str, Any] = {
    "classes": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
    "licence": "MIT, Copyright (c) 2017 Zalando SE",
    "source": "Fashion-MNIST, Zalando Research: Xiao, Rasul, Vollgraf (2017), arXiv:1708.07747",
}
TIMEOUT = 20  # seconds without a byte


def originals(mirror: str | None, progress: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, 28, 28) and labels (N,), uint8, of train and test, in the publisher's order.

    Parameters
    ----------
    mirror : str or None
        Address or folder that is tried first.
    progress : bool
        Show a progress bar a file.

    Raises
    ------
    ConnectionError
        If a file can't be had from any source; lists each with its reason.
    """
    sources = [*([mirror] if mirror else []), str(DEBIAN), *PUBLISHED]

    def get(kind: str) -> np.ndarray:
        return _original(f"{kind}-ubyte.gz", sources, progress)

    return {
        split: (get(f"{prefix}-images-idx3"), get(f"{prefix}-labels-idx1"))
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def read(packed: bytes, sha256: str) -> np.ndarray:
    """Array of a gzipped idx file; ValueError if its bytes are not those with this checksum."""
    try:
        raw = gzip.decompress(packed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"damaged gzip file ({error})") from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise ValueError("wrong checksum")
    dims = raw[3]  # the idx format: two zeros, type, number of dimensions, each dimension as >u4, data
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _original(file: str, sources: list[str], progress: bool) -> np.ndarray:
    reasons = []
    for source in sources:
        try:
            if source.startswith(("http://", "https://")):
                packed = _download(f"{source.rstrip('/')}/{file}", progress)
            else:
                packed = (Path(source).expanduser() / file).read_bytes()
            return read(packed, SHA256[file])
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{source}: {error}")
    way_out = "Install Debian's dataset-fashion-mnist, or give mirror=, an address or folder of the four .gz files."
    raise ConnectionError("\n  ".join([f"{file} can't be had from any source.", *reasons, way_out]))


def _download(url: str, progress: bool) -> bytes:
    from tqdm.auto import tqdm

    packed = bytearray()
    with urlopen(url, timeout=TIMEOUT) as response:
        look = {"desc": Path(url).name, "unit": "B", "unit_scale": True, "disable": not progress}
        with tqdm(total=response.length, **look) as bar:
            while chunk := response.read1(1 << 16):  # what has come, and not all that was asked for
                packed += chunk
                bar.update(len(chunk))
        if response.length:  # what http.client still waits for
            raise ConnectionError(
                f"the connection ended after {len(packed):,} of {len(packed) + response.length:,} bytes"
            )
    return bytes(packed)

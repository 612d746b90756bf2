"""The data layer against plain numpy, the publisher's own files, a real HTTP server and real signals."""

import contextlib
import gzip
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require

from hpclab import data
from hpclab.data import download

BUNDLED = data.share() / "data" / "fashion_mnist"
FULL = "fashion_mnist_full"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HPCLAB_DATA_MIRROR", raising=False)


def start(code, *args):
    """Python code in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *args], env=env, **pipes)


def plain(folder, split, kind):
    """All of a split, put together without hpclab.data."""
    stems = json.loads((folder / "dataset.json").read_text())["splits"][split]
    return np.concatenate([np.load(folder / f"{stem}-{kind}.npy") for stem in stems])


# --- the bundled images ---


@pytest.mark.parametrize(("split", "per_class"), [("train", 1_000), ("test", 200)])
def test_bundled_set_and_each_shard_are_balanced(split, per_class):
    assert np.bincount(data.load("fashion_mnist", split).labels).tolist() == [per_class] * 10
    for file in BUNDLED.glob(f"{split}-*-labels.npy"):
        assert len(set(np.bincount(np.load(file)))) == 1
        assert len(np.load(file)) <= 5_000


def test_bundled_files_readme_and_dataset_json_agree():
    recorded = json.loads((BUNDLED / "dataset.json").read_text())["sha256"]
    actual = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in BUNDLED.glob("*.npy")}
    assert recorded == actual
    readme = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert all(f"{digest}  {file}" in readme for file, digest in actual.items())
    assert data.verify("fashion_mnist") == BUNDLED


def test_bundled_set_is_remade_bit_for_bit(tmp_path):
    require(download.DEBIAN.is_dir(), "Debian's dataset-fashion-mnist")
    script = BUNDLED.parent / "make_fashion_mnist.py"
    start(script.read_text(), str(tmp_path)).communicate(timeout=60)
    assert (tmp_path / "dataset.json").read_bytes() == (BUNDLED / "dataset.json").read_bytes()
    data.verify(tmp_path)


# --- reading ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three shards of 40, 40 and 23 random colour images."""
    monkeypatch.setattr("hpclab.data.shards.SHARD", 40)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (103, 3, 5, 4), dtype=np.uint8)
    labels = draw.integers(0, 4, 103, dtype=np.uint8)
    return data.write(tmp_path / "colours", {"train": (images, labels)}, name="colours", classes=[*"abcd"])


def test_arrays_of_ones_own_need_no_names(tmp_path):
    pixels = np.arange(7 * 12, dtype=np.uint8).reshape(7, 3, 4)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    images = data.load(data.write(tmp_path / "mine", {"train": (torch.from_numpy(pixels), labels)}))
    assert repr(images) == "Images('mine', 'train': 7 of (1, 3, 4), 3 classes)" and images.classes == [*"012"]
    more = data.load(data.write(tmp_path / "mine", {"train": (pixels[:5], labels[:5])}, classes=np.array([*"abc"])))
    assert len(more) == 5 and more.classes == [*"abc"] and np.array_equal(images[6][0][0] * 255, pixels[6])
    with pytest.raises(TypeError, match=r"must be a folder or the name of a data set; hpclab\.data\.write makes"):
        data.load(pixels)


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({}, "splits is empty; give images and labels"),
        ({"train": (np.zeros((0, 2, 2), np.uint8), [])}, r"images of split 'train': uint8 \(0, 2, 2\); needed"),
        ({"train": (np.zeros((7, 2, 2)), [0] * 7)}, r"images of split 'train': float64 \(7, 2, 2\); needed: uint8"),
        (
            {"train": (np.zeros((7, 2, 2), np.uint8), [0.5] * 7)},
            r"labels of split 'train': float64 .* needed: integers",
        ),
        ({"train": (np.zeros((5000, 2, 2), np.uint8), [0] * 6000)}, "5,000 images and 6,000 labels; needed: a label"),
        ({"train": (np.zeros((2, 2, 2), np.uint8), [0, -1])}, "labels go from -1 to 0; needed: 0 to 1"),
        (
            {"train": (np.zeros((2, 2, 2), np.uint8), [0, 2])},
            r"labels go from 0 to 2; needed: 0 to 1, of classes \['a', 'b'\]",
        ),
    ],
)
def test_arrays_that_are_no_data_set_write_nothing(tmp_path, splits, says):
    with pytest.raises(ValueError, match=says):
        data.write(tmp_path / "none", splits, classes="ab")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "index",
    [0, -1, 40, np.int64(102), [102, 0, 41, 40, 39, 41], slice(30, 90, 7), np.arange(103) % 3 == 0, []],
)
def test_any_index_across_shards_equals_the_concatenated_arrays(folder, index):
    images = data.load(folder)
    x, y = images[index]
    expected = plain(folder, "train", "images")[index].astype(np.float32) / np.float32(255)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, expected)
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y, plain(folder, "train", "labels")[index])


def test_attributes(folder):
    images = data.load(folder)
    assert (len(images), images.shape, images.classes) == (103, (3, 5, 4), ["a", "b", "c", "d"])
    np.testing.assert_array_equal(images.labels, plain(folder, "train", "labels"))
    assert data.load("fashion_mnist").shape == (1, 28, 28)


def test_iteration_ends_and_an_index_out_of_range_is_an_error(folder):
    assert sum(1 for _ in data.load(folder)) == 103
    with pytest.raises(IndexError, match="103"):
        data.load(folder)[[5, 103]]


def _sum(images):
    return images[:][0].sum()


def test_pickle_is_small_and_opens_in_another_process(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    images = data.load("colours")
    assert len(pickle.dumps(images)) < 1_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sum, (images,)) == _sum(images)


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_gives_the_same_batches(folder, workers):
    torch = pytest.importorskip("torch")
    images = data.load(folder)
    order = np.random.default_rng(1).permutation(103)
    sampler = torch.utils.data.BatchSampler(order.tolist(), 16, drop_last=False)
    batches = torch.utils.data.DataLoader(images, batch_size=None, sampler=sampler, num_workers=workers)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(x.numpy(), plain(folder, "train", "images")[order] / np.float32(255))
    np.testing.assert_array_equal(y.numpy(), plain(folder, "train", "labels")[order])
    one_by_one = torch.utils.data.DataLoader(images, batch_size=16, sampler=order.tolist())
    assert torch.equal(torch.cat([x for x, _ in one_by_one]), x)
    assert torch.equal(torch.cat([y for _, y in one_by_one]), y)


# --- finding, and bad input ---


@pytest.mark.parametrize("source", ["fashion_mnist", "data/fashion_mnist", Path("data/fashion_mnist")])
def test_bundled_name_from_any_working_directory(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.find(source) == BUNDLED


def test_existing_folder_wins_over_the_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("fashion_mnist")
    assert data.load("fashion_mnist").name == "colours"


@pytest.mark.parametrize("source", ["nowhere", "data/nowhere", "elsewhere/fashion_mnist", "/no/data/fashion_mnist"])
def test_missing_data_set_lists_what_there_is(source):
    with pytest.raises(
        FileNotFoundError, match=rf"source \(='{source}'\).* fashion_mnist, .* kjv\..*hpclab data fetch"
    ):
        data.load(source)


def test_source_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"source \(=3\)"):
        data.load(3)


def test_folder_without_dataset_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no dataset\.json"):
        data.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "x", "classes": 3}', "\xff"])
def test_malformed_dataset_json(folder, text):
    (folder / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"dataset\.json"):
        data.load(folder)


@pytest.mark.parametrize("key", ["name", "classes", "splits", "sha256"])
def test_dataset_json_lacks_a_key(folder, key):
    facts = json.loads((folder / "dataset.json").read_text())
    del facts[key]
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=key):
        data.load(folder)


def test_unknown_split_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"split \(='val'\).*'train', 'test'"):
        data.load("fashion_mnist", "val")


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def header_only(file):
    file.write_bytes(file.read_bytes()[:128])


def empty(file):
    file.write_bytes(b"")


def other(file):
    file.write_bytes(b"GIF89a" * 99)


def pickled(file):
    np.save(file, np.array([{}, 1], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, header_only, empty, other, pickled, Path.unlink])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_damaged_file_is_named_at_load_and_by_verify(folder, damage, kind):
    damage(folder / f"train-1-{kind}.npy")
    for check in (data.load, data.verify):
        with pytest.raises((ValueError, FileNotFoundError), match=f"train-1-{kind}.npy"):
            check(folder)


def test_verify_finds_a_single_flipped_bit(folder):
    file = folder / "train-2-images.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    data.load(folder)
    with pytest.raises(ValueError, match=r"train-2-images\.npy is damaged"):
        data.verify(folder)


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("images", np.zeros((40, 3, 5, 4), np.float32), "float32"),
        ("images", np.zeros((40, 60), np.uint8), r"\(40, 60\)"),
        ("images", np.zeros((0, 3, 5, 4), np.uint8), r"\(0, 3, 5, 4\)"),
        ("images", np.zeros((40, 3, 5, 5), np.uint8), "different shapes"),
        ("images", np.zeros((39, 3, 5, 4), np.uint8), "39 images and 40 labels"),
        ("labels", np.zeros(40, np.float64), "float64"),
        ("labels", np.zeros((40, 1), np.uint8), r"\(40, 1\)"),
        ("labels", np.zeros(41, np.uint8), "40 images and 41 labels"),
        (
            "labels",
            np.array([4] + [0] * 38 + [9], np.uint8),
            "label 4 is outside the 4 classes.* 2 of 103 labels",
        ),
        ("labels", np.array([0] * 39 + [-1], np.int64), "label -1 is outside the 4 classes"),
    ],
)
def test_wrong_array_in_a_shard(folder, kind, array, message):
    np.save(folder / f"train-1-{kind}.npy", array)
    with pytest.raises(ValueError, match=message):
        data.load(folder)


# --- series and texts ---

RAGGED = [np.arange(12.0).reshape(4, 3), np.full((1, 3), 7.0), np.ones((2, 3)), np.arange(9).reshape(3, 3) - 5]


@pytest.fixture
def ragged(tmp_path, monkeypatch):
    """Two shards of 3 series and 1."""
    monkeypatch.setattr("hpclab.data.shards.SHARD", 3)
    return data.write(tmp_path / "ragged", {"train": (RAGGED, [1, 0, 2, 1])}, classes="abc", kind="series")


@pytest.mark.parametrize("number", [0, 1, -1, np.int64(2)])
def test_a_series_is_the_one_that_was_written(ragged, number):
    frames, label = data.load(ragged)[number]
    assert frames.dtype == np.float32 and label == [1, 0, 2, 1][number]
    np.testing.assert_array_equal(frames, RAGGED[number])


@pytest.mark.parametrize("index", [[3, 0, 1], slice(1, 3), np.array([True, False, True, True]), [1], []])
def test_a_batch_of_series_is_padded_to_its_longest(ragged, index):
    (frames, lengths), labels = data.load(ragged)[index]
    chosen = np.arange(4)[index]
    assert frames.dtype == np.float32 and lengths.dtype == labels.dtype == np.int64
    assert frames.shape == (len(chosen), max((len(RAGGED[number]) for number in chosen), default=0), 3)
    for number, padded, length in zip(chosen, frames, lengths, strict=True):
        np.testing.assert_array_equal(padded[:length], RAGGED[number])
        assert not padded[length:].any()
    assert labels.tolist() == [[1, 0, 2, 1][number] for number in chosen]


def test_a_loader_gives_tensors_of_series(ragged):
    loader = torch.utils.data.DataLoader(data.load(ragged), batch_size=None, sampler=[[0, 1], [2, 3]])
    shapes = [(tuple(frames.shape), lengths.tolist(), labels.tolist()) for (frames, lengths), labels in loader]
    assert shapes == [((2, 4, 3), [4, 1], [1, 0]), ((2, 3, 3), [2, 3], [2, 1])]


def test_the_bundled_series_are_the_publishers():
    """By the counts in UCI's description: utterances of each speaker, and 7 to 29 frames of 12 numbers."""
    per_speaker = {"train": [30] * 9, "test": [31, 35, 88, 44, 29, 24, 40, 50, 29]}
    for split, counts in per_speaker.items():
        series = data.load("japanese_vowels", split)
        assert np.bincount(series.labels).tolist() == counts
        assert (series.lengths.min(), series.lengths.max(), series.channels) == (7, 29 if split == "test" else 26, 12)
    first, _ = data.load("japanese_vowels")[0]
    assert first.shape == (20, 12)
    np.testing.assert_array_equal(first[:2, 0], np.float32([1.860936, 1.891651]))


PLAIN = "to be, or not to be\n"


def test_windows_of_a_text_follow_each_other(tmp_path):
    text = data.load(data.write(tmp_path / "plain", {"train": PLAIN}, kind="text", window=6))
    assert text.classes == sorted(set(PLAIN)) and len(text) == (len(PLAIN) - 1) // 6 == 3
    tokens, following = text[:]
    assert tokens.shape == following.shape == (3, 6) and tokens.dtype == np.int64
    assert text.decode(tokens.ravel()) == PLAIN[:18] and text.decode(following.ravel()) == PLAIN[1:19]
    for number in (1, -2):
        assert text.decode(text[number][0]) == PLAIN[6:12]
    assert text.decode(text.encode("not to\n")) == "not to\n"
    with pytest.raises(ValueError, match=r"text\[4\] \(='X'\) is none of the 9 characters of plain: "):
        text.encode("not X")


def test_a_text_may_be_any_that_unicode_has(tmp_path):
    written = "深度学习 🙂 ümlaut\r\n" * 3
    folder = data.write(tmp_path / "any", {"train": written, "test": written}, kind="text", window=5)
    text = data.load(folder, "test")
    assert text.decode(text.tokens) == written


def test_the_bundled_text_is_the_whole_bible():
    script = (data.share() / "data" / "make_kjv.py").read_text()
    train, test = data.load("kjv"), data.load("kjv", "test")
    text = train.decode(train.tokens) + test.decode(test.tokens)
    assert len(text) == 4_137_850 and len(train.tokens) == len(text) * 9 // 10 and len(train.classes) == 63
    assert len(text.splitlines()) == 31_102, "verses"
    assert text.startswith("In the beginning God created the heaven and the earth.\n")
    assert hashlib.sha256(text.encode()).hexdigest() in script


def test_the_bundled_text_is_remade(tmp_path):
    require(shutil.which("bible"), "Debian's bible-kjv")
    script = (data.share() / "data" / "make_kjv.py").read_text()
    assert start(script, str(tmp_path / "again")).communicate(timeout=60) == ("", "")
    for split in ("train", "test"):
        assert np.array_equal(data.load(tmp_path / "again", split).tokens, data.load("kjv", split).tokens)


@pytest.mark.parametrize("name", ["japanese_vowels", "kjv"])
def test_other_bundled_sets_are_whole_and_small(name):
    folder = data.verify(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    readme = (folder / "README.md").read_text(encoding="utf-8")
    sums = json.loads((folder / "dataset.json").read_text())["sha256"]
    assert all(f"{digest}  {file}" in readme for file, digest in sums.items())


@pytest.mark.parametrize("name", ["japanese_vowels", "kjv"])
def test_series_and_texts_open_in_another_process(name):
    opened = data.load(name, "test")
    assert len(pickle.dumps(opened)) < 1_000 and repr(pickle.loads(pickle.dumps(opened))) == repr(opened)


@pytest.mark.parametrize(
    ("kind", "splits", "says"),
    [
        ("video", {"train": ""}, r"kind \(='video'\) must be one of 'images', 'series', 'text'"),
        ("series", {"train": ([], [])}, "split 'train' holds no series"),
        ("series", {"train": ([*RAGGED, np.ones((0, 3))], [0] * 5)}, r"series 4 of split 'train' is empty: \(0, 3\)"),
        ("series", {"train": ([np.ones(3)], [0])}, r"series 0 of split 'train': float64 \(3,\); needed: numbers \(T"),
        ("series", {"train": ([np.full((2, 2), np.nan)], [0])}, "series 0 of split 'train' holds a number that is not"),
        ("series", {"train": ([*RAGGED, np.ones((1, 4))], [0] * 5)}, "frames of split 'train' have different sizes"),
        ("series", {"train": (RAGGED, [0, 1])}, "4 series and 2 labels; needed: a label for each"),
        ("series", {"train": (RAGGED, [0, 1, 2, 3])}, "labels go from 0 to 3; needed: 0 to 1"),
        ("text", {"train": b"aabb"}, "split 'train' is bytes; needed: a str"),
        ("text", {"train": "aabb"}, r"split 'train' of 4 characters fills no window \(=4\) and one more"),
        ("text", {"train": "aabbXab"}, r"text\[4\] \(='X'\) is none of the 2 characters of split 'train': 'ab'"),
    ],
)
def test_series_and_texts_that_are_no_data_set_write_nothing(tmp_path, kind, splits, says):
    with pytest.raises(ValueError, match=says):
        data.write(tmp_path / "none", splits, classes="ab", kind=kind, window=4)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("damage", [cut, empty, other, Path.unlink])
@pytest.mark.parametrize("file", ["train-0.txt.xz", "train-1-frames.npy", "train-1-lengths.npy"])
def test_a_damaged_series_or_text_is_named(ragged, damage, file, tmp_path):
    folder = data.write(tmp_path / "t", {"train": PLAIN * 99}, kind="text") if "txt" in file else ragged
    damage(folder / file)
    for check in (data.load, data.verify):
        with pytest.raises((ValueError, FileNotFoundError), match=file):
            check(folder)


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("frames", np.zeros((3, 3)), "frames.npy in .*: float64"),
        ("frames", np.zeros((2, 3), np.float32), "2 frames, where the lengths add up to 3"),
        ("frames", np.zeros((3, 4), np.float32), "frames of different sizes"),
        ("lengths", np.array([3.0]), "lengths.npy in .*: float64"),
        ("lengths", np.array([3, 0]), "lengths.npy in .*: series 1 has length 0; needed: 1 or more"),
        ("labels", np.array([3]), "label 3 is outside the 3 classes"),
    ],
)
def test_wrong_array_in_a_shard_of_series(ragged, part, array, message):
    np.save(ragged / f"train-1-{part}.npy", array)
    with pytest.raises(ValueError, match=message):
        data.load(ragged)


def test_dataset_json_of_another_kind(ragged):
    with pytest.raises(ValueError, match=r"ragged holds series, not images; open it by hpclab\.data\.load"):
        data.Images(ragged, "train")
    text = (ragged / "dataset.json").read_text()
    (ragged / "dataset.json").write_text(text.replace('"series"', '"video"'))
    with pytest.raises(ValueError, match="says kind 'video'; this hpclab reads images, series, text"):
        data.load(ragged)


def test_a_data_set_from_before_there_were_kinds_holds_images(folder):
    text = (folder / "dataset.json").read_text()
    assert '"kind": "images"' in text
    (folder / "dataset.json").write_text(text.replace('"kind": "images",', ""))
    assert len(data.load(folder)) == 103


# --- fetching ---


def test_debian_files_as_published_and_fetched(tmp_path):
    """Against the publisher's MD5 sums (with the gzip headers that Debian stripped) and plain idx bytes."""
    require(download.DEBIAN.is_dir(), "Debian's dataset-fashion-mnist")
    published = {  # time in the gzip header, MD5 of images and of labels (README of fashion-mnist)
        "train": (1504176606, "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
        "t10k": (1504176627, "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
    }
    folder = data.fetch(progress=False)
    assert folder == tmp_path / "cache" / FULL == data.find(FULL)
    for prefix, (packed_at, *sums) in published.items():
        for kind, idx, header, md5 in zip(("images", "labels"), (3, 1), (16, 8), sums, strict=True):
            stem = f"{prefix}-{kind}-idx{idx}-ubyte"
            packed = (download.DEBIAN / f"{stem}.gz").read_bytes()
            gzip_header = b"\x1f\x8b\x08\x08" + struct.pack("<I", packed_at) + packed[8:10] + stem.encode() + b"\0"
            assert hashlib.md5(gzip_header + packed[10:]).hexdigest() == md5
            split = "train" if prefix == "train" else "test"
            assert plain(folder, split, kind).tobytes() == gzip.decompress(packed)[header:]
    assert max(len(np.load(file)) for file in folder.glob("*-labels.npy")) == 5_000


def test_fetched_images_are_those_of_the_bundled_set():
    require(download.DEBIAN.is_dir(), "Debian's dataset-fashion-mnist")
    data.fetch(progress=False)
    full = {(x.tobytes(), y) for x, y in zip(*data.load(FULL, "test")[:], strict=True)}
    subset = {(x.tobytes(), y) for x, y in zip(*data.load("fashion_mnist", "test")[:], strict=True)}
    assert subset < full


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with four small files like the publisher's, which nothing but a server of the test offers."""
    draw, folder = np.random.default_rng(0), tmp_path / "published"
    folder.mkdir()
    for prefix, n in (("train", 300), ("t10k", 100)):
        for kind, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            raw = struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape)
            raw += draw.integers(0, 10, shape, dtype=np.uint8).tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(raw))
            monkeypatch.setitem(download.SHA256, f"{prefix}-{kind}-ubyte.gz", hashlib.sha256(raw).hexdigest())
    monkeypatch.setattr(download, "DEBIAN", tmp_path / "not-installed")
    monkeypatch.setattr(download, "PUBLISHED", [])
    return folder


IMAGES = "train-images-idx3-ubyte.gz"


class Files(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which tells what was asked."""

    def do_GET(self):
        self.server.asked.append(Path(self.path).name)
        super().do_GET()

    def log_message(self, *args):
        pass


class Breaks(Files):
    """Announces the whole file, and hangs up after 20,000 bytes."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read(20_000))


class Stalls(Files):
    """Sends 20,000 bytes and then nothing until the test ends."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read(20_000))
        outputfile.flush()
        self.server.stalls.set()
        self.server.end.wait(60)


@contextlib.contextmanager
def serve(folder, handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder)))
    server.asked, server.end, server.stalls = [], threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever).start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        server.server_close()


def check_fetched(folder, published):
    raw = gzip.decompress((published / IMAGES).read_bytes())
    assert plain(folder, "train", "images").tobytes() == raw[16:]
    assert data.load(folder, "test").shape == (1, 28, 28)
    data.verify(folder)
    assert [entry.name for entry in folder.parent.iterdir() if "fashion" in entry.name] == [folder.name]


def test_download(published):
    with serve(published, Files) as server:
        check_fetched(data.fetch(mirror=server.url + "/", progress=False), published)
    assert sorted(server.asked) == sorted(download.SHA256)


def test_bad_sources_are_passed_over(published, tmp_path, monkeypatch):
    corrupt = tmp_path / "corrupt"
    shutil.copytree(published, corrupt)
    raw = bytearray((published / IMAGES).read_bytes())
    raw[len(raw) // 2] ^= 255
    (corrupt / IMAGES).write_bytes(raw)
    with serve(corrupt, Files) as bad, serve(published, Files) as good:
        monkeypatch.setattr(download, "PUBLISHED", [bad.url, good.url])
        check_fetched(data.fetch(mirror="http://127.0.0.1:9", progress=False), published)
    assert bad.asked.count(IMAGES) == 1
    assert good.asked == [IMAGES]


def test_mirror_from_the_environment_may_be_a_folder(published, monkeypatch):
    monkeypatch.setenv("HPCLAB_DATA_MIRROR", str(published))
    folder = data.fetch(progress=False)
    check_fetched(folder, published)
    assert folder.is_relative_to(data.cache())


def test_every_source_is_listed_with_its_reason(published, monkeypatch):
    (published / IMAGES).write_bytes((published / IMAGES).read_bytes()[:-20])
    with serve(published, Files) as short, serve(published / "nothing", Files) as absent:
        monkeypatch.setattr(download, "PUBLISHED", [short.url, absent.url])
        with pytest.raises(ConnectionError) as caught:
            data.fetch(mirror="http://127.0.0.1:9", progress=False)
    lines = str(caught.value).splitlines()
    for line, source, reason in zip(
        lines[1:5],
        ["http://127.0.0.1:9", str(download.DEBIAN), short.url, absent.url],
        ["refused", "No such file", "damaged gzip", "404"],
        strict=True,
    ):
        assert source in line
        assert reason in line
    assert "mirror=" in lines[5]
    assert not (data.cache() / FULL).exists()


def test_a_broken_connection_is_told_and_another_source_is_asked(published, monkeypatch):
    size = (published / IMAGES).stat().st_size
    with serve(published, Breaks) as broken, serve(published, Files) as whole:
        with pytest.raises(ConnectionError, match=f"ended after 20,000 of {size:,} bytes"):
            data.fetch(mirror=broken.url, progress=False)
        monkeypatch.setattr(download, "PUBLISHED", [whole.url])
        check_fetched(data.fetch(mirror=broken.url, progress=False), published)


def test_a_valid_copy_is_returned_without_asking_anyone(published, tmp_path):
    to = tmp_path / "here"
    assert data.fetch(to=to, mirror=str(published), progress=False) == to
    assert data.fetch(to=to, mirror="http://127.0.0.1:9", progress=False) == to


def test_another_folder_under_the_name_is_left_alone(published, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    damaged = data.fetch(to=tmp_path / "damaged", mirror=str(published), progress=False)
    cut(damaged / "train-0-images.npy")
    for to in (tmp_path, folder, tmp_path / "file", damaged):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match=r"to \(=.*give a folder that does not exist yet"):
            data.fetch(to=to, mirror=str(published), progress=False)
        assert sorted(tmp_path.rglob("*")) == before


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name \(='mnist'\).*'fashion-mnist'"):
        data.fetch("mnist")


def test_under_a_regular_file(published, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file.*can't be written.*to="):
        data.fetch(to=tmp_path / "file" / "below", mirror=str(published), progress=False)


PERMISSION = """
import os, sys, urllib.request
from hpclab import data
from hpclab.data import download
if os.getuid() == 0:
    os.setuid(65534)
try:
    data.fetch(to=sys.argv[1] + "/full", progress=False)
except PermissionError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX users")
def test_no_write_permission():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        said, _ = start(PERMISSION, folder).communicate(timeout=60)
        assert "can't be written (Permission denied); give another folder" in said
        assert not os.listdir(folder)


FETCH = """
import json, os, signal, sys
import numpy as np
from hpclab import data
from hpclab.data import download

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
download.DEBIAN, download.SHA256, download.PUBLISHED = download.Path("/none"), json.loads(sys.argv[2]), []
"""
KILL_IN_SHARD = """
save = np.save
def kill(file, array):
    save(file, array)
    if "test-0-images" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
np.save = kill
"""
GO = "data.fetch(mirror=sys.argv[1], progress=False)"


def test_killed_while_writing_shards_leaves_nothing_under_the_name(published):
    child = start(FETCH + KILL_IN_SHARD + GO, str(published), json.dumps(download.SHA256))
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not (data.cache() / FULL).exists()
    with pytest.raises(FileNotFoundError):
        data.load(FULL)
    data.verify(data.fetch(mirror=str(published), progress=False))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_downloading_leaves_nothing(number, published):
    with serve(published, Stalls) as server:
        child = start(FETCH + GO, server.url, json.dumps(download.SHA256))
        assert server.stalls.wait(60)
        child.send_signal(number)
        child.communicate(timeout=60)
    assert child.returncode == -number
    assert not list(data.cache().iterdir())
    with serve(published, Files) as server:
        check_fetched(data.fetch(mirror=server.url, progress=False), published)


def test_interrupt_while_writing_shards_leaves_nothing(published, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hpclab.data.shards.np.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.fetch(mirror=str(published), progress=False)
    assert not list(data.cache().iterdir())


def test_two_at_once_both_end_well(published):
    with serve(published, Files) as server:
        both = [start(FETCH + GO, server.url, json.dumps(download.SHA256)) for _ in range(2)]
        assert [child.communicate(timeout=60) for child in both] == [("", ""), ("", "")]
    data.verify(FULL)


def test_torch_is_not_imported():
    code = "import sys, hpclab.data; hpclab.data.load('fashion_mnist')[0]; print('torch' in sys.modules)"
    assert start(code).communicate(timeout=60) == ("False\n", "")

"""The built wheel, installed as a user would have it: in an environment and a folder that know nothing of the clone."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import no_rank_left

from hpclab import machine

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the sdist, and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation: hatchling is installed with the tests, and no network is needed.
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("hpclab-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; all that it depends on comes from ours."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    # A folder named in a .pth file comes after the environment's own, and the .pth files in it are not read: our
    # editable
    # hpclab stays out.
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.fixture
def user(environment, tmp_path):
    """Runs a command of the environment in an empty folder, and returns what it prints."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HPCLAB"))}
    settings["HPCLAB_TESTS"] = os.environ["HPCLAB_TESTS"]  # by which tests know their processes

    def run(program: str, *arguments: str) -> str:
        command = [environment / "bin" / program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=settings, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    return run


def test_the_wheel_carries_the_data_and_the_course_and_no_sources_of_theirs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shared = {name.removeprefix("hpclab/_share/") for name in names if name.startswith("hpclab/_share/")}
    notebooks = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks" / "zh").glob("*.ipynb")]
    data = [path for folder in ("fashion_mnist", "tables") for path in (ROOT / "data" / folder).iterdir()]
    assert notebooks
    assert {path.relative_to(ROOT).as_posix() for path in notebooks + data} <= shared
    others = {name for name in shared if name.startswith("notebooks/") and not name.endswith(".ipynb")}
    assert others == {"notebooks/glossary.md", "notebooks/scripts/train_ddp.py", "notebooks/scripts/train_ddp.sh"}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hpclab"}
    assert wheel.stat().st_size < 12e6


def test_the_sdist_is_the_tree_and_nothing_that_was_made_in_it(built):
    (path,) = built.glob("hpclab-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"Makefile", "LICENSE", "constraints.txt", "notebooks/build.py", "tests/test_wheel.py"} <= names
    made = (".venv/", "results/", "dist/", ".git/", ".ruff_cache/")
    assert not [name for name in names if name.startswith(made) or "__pycache__" in name]


def test_everything_comes_from_the_wheel(user, environment, tmp_path):
    code = """
import hpclab
from hpclab.course import copy_course
images = hpclab.data.load("fashion_mnist")
x, y = images[:2]
print(hpclab.__file__, images.folder, x.shape, len(copy_course("mine").added), sep="\\n")
"""
    module, data, shape, copied = user("python", "-c", code).splitlines()
    assert Path(module).is_relative_to(environment)
    assert Path(data) == Path(module).parent / "_share" / "data" / "fashion_mnist"
    assert shape == "(2, 1, 28, 28)"
    assert (tmp_path / "mine" / "glossary.md").is_file()
    assert sorted(path.name for path in (tmp_path / "mine" / "scripts").iterdir()) == ["train_ddp.py", "train_ddp.sh"]
    assert int(copied) == len(list((tmp_path / "mine").rglob("*.ipynb"))) + 3 > 3


def test_doctor(user):
    assert "torch" in user("hpclab", "doctor")


def test_demo_leaves_rows_a_figure_and_a_page(user, tmp_path):
    """In an empty folder, and no process."""
    said = user("hpclab", "demo", "--epochs", "1", "--repeats", "2")
    (results,) = (tmp_path / "results").iterdir()
    rows = [json.loads(line) for line in (results / "rows.jsonl").read_text("utf-8").splitlines()]
    racers = 3 if machine.cpus() > 1 else 2
    assert len(rows) == racers + 2 * racers
    assert {1, 2} <= {row["ranks"] for row in rows}
    assert min(row["accuracy"] for row in rows if row["accuracy"] is not None) > 0.75
    assert (results / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (results / "index.html").read_text("utf-8")
    assert "data:image/png;base64," in page
    assert "speed-up" in page
    assert "2 ranks" in page
    [headline] = re.findall(r"<p><strong>(2 ranks: .* times as fast as 1 rank, .* The race says .*)</strong></p>", page)
    assert headline in said and page.index(headline) < page.index("data:image/png")
    assert str(results / "index.html") in said
    assert no_rank_left()

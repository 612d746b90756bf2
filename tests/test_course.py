"""The reader's copy of the course: nothing that they changed is overwritten, whatever happens."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hpclab import cli
from hpclab import course as course_module
from hpclab.course import copy_course, open_lab

AS_ROOT = ["--allow-root"] if getattr(os, "getuid", lambda: 1)() == 0 else []

START = "00_start.ipynb"


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "")  # which `open_lab` adds to


@pytest.fixture
def course(tmp_path):
    folder = tmp_path / "course"
    for name, text in {START: "start 1", "03_cnn.ipynb": "cnn 1", "zh/00_start.ipynb": "开始 1"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    (folder / "source").mkdir()
    (folder / "source" / "00_start.py").write_text("solution")
    (folder / "build.py").write_text("")
    return folder


@pytest.fixture
def mine(tmp_path, course):
    folder = tmp_path / "mine"
    copy_course(folder, course)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in folder.rglob("*")
        if path.is_file() and path.name != course_module.MANIFEST
    }


def test_only_the_notebooks_are_copied(mine):
    assert files(mine) == {START: "start 1", "03_cnn.ipynb": "cnn 1", "zh/00_start.ipynb": "开始 1"}


def test_a_second_call_does_nothing(course, mine):
    before = files(mine)
    summary = copy_course(mine, course)
    assert (summary.added, summary.updated, summary.beside, summary.kept) == ([], [], [], [])
    assert files(mine) == before


def test_an_unchanged_file_is_updated_in_place(course, mine):
    (course / START).write_text("start 2")
    assert copy_course(mine, course).updated == [START]
    assert files(mine)[START] == "start 2"
    assert len(files(mine)) == 3


def test_a_changed_file_stays_when_the_course_has_not_changed(course, mine):
    (mine / START).write_text("my work")
    assert copy_course(mine, course).kept == [START]
    assert files(mine)[START] == "my work"


def test_both_changed_lays_the_new_one_beside_once(course, mine):
    (mine / START).write_text("my work")
    (course / START).write_text("start 2")
    assert copy_course(mine, course).beside == ["00_start.new.ipynb"]
    assert files(mine) | {} == {**files(mine), START: "my work", "00_start.new.ipynb": "start 2"}
    (mine / "00_start.new.ipynb").unlink()
    assert copy_course(mine, course).kept == [START]
    assert "00_start.new.ipynb" not in files(mine)


def test_work_in_the_file_beside_stays_too(course, mine):
    (mine / START).write_text("my work")
    (course / START).write_text("start 2")
    copy_course(mine, course)
    (mine / "00_start.new.ipynb").write_text("my second work")
    (course / START).write_text("start 3")
    assert copy_course(mine, course).beside == ["00_start.new-2.ipynb"]
    now = files(mine)
    assert (now[START], now["00_start.new.ipynb"], now["00_start.new-2.ipynb"]) == (
        "my work",
        "my second work",
        "start 3",
    )


def test_an_untouched_file_beside_is_replaced_by_the_next_version(course, mine):
    (mine / START).write_text("my work")
    for version in ("start 2", "start 3"):
        (course / START).write_text(version)
        assert copy_course(mine, course).beside == ["00_start.new.ipynb"]
    assert files(mine)["00_start.new.ipynb"] == "start 3"


def test_the_glossary_comes_along_and_keeps_its_ending(course, mine):
    (course / "glossary.md").write_text("words")
    assert copy_course(mine, course).added == ["glossary.md"]
    (mine / "glossary.md").write_text("my words")
    (course / "glossary.md").write_text("more words")
    assert copy_course(mine, course).beside == ["glossary.new.md"]
    assert (files(mine)["glossary.md"], files(mine)["glossary.new.md"]) == ("my words", "more words")


def test_a_deleted_file_is_delivered_anew(course, mine):
    (mine / START).unlink()
    assert copy_course(mine, course).added == [START]
    assert files(mine)[START] == "start 1"


def test_a_file_of_theirs_that_was_never_delivered_stays(course, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / START).write_text("mine from elsewhere")
    assert copy_course(tmp_path / "own", course).beside == ["00_start.new.ipynb"]
    assert files(tmp_path / "own")[START] == "mine from elsewhere"


@pytest.mark.parametrize("survived", range(3))
def test_an_interrupted_copy_is_mended_by_the_next(course, mine, monkeypatch, survived):
    """It stops before one of the first writes of an update: no file is torn, the next call completes it."""
    for name in (START, "03_cnn.ipynb"):
        (course / name).write_text(name + " 2")
    (mine / "03_cnn.ipynb").write_text("my work")
    replace, done = os.replace, []

    def stop(part, path):
        if len(done) == survived:
            raise KeyboardInterrupt
        done.append(path)
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            copy_course(mine, course)
    copy_course(mine, course)
    now = files(mine)
    assert now.pop("03_cnn.new.ipynb") == "03_cnn.ipynb 2"
    assert now == {START: START + " 2", "03_cnn.ipynb": "my work", "zh/00_start.ipynb": "开始 1"}


@pytest.mark.parametrize("broken", ["", "{", "[1]", "3"])
def test_a_broken_manifest_costs_no_work(course, mine, broken):
    (mine / START).write_text("my work")
    (mine / course_module.MANIFEST).write_text(broken)
    copy_course(mine, course)
    assert files(mine)[START] == "my work"
    assert set(json.loads((mine / course_module.MANIFEST).read_text())) >= {START, "03_cnn.ipynb"}


def test_the_summary_tells_what_was_done(course, mine):
    (mine / START).write_text("my work")
    (course / START).write_text("start 2")
    text = str(copy_course(mine, course))
    assert str(mine) in text and "beside the one you changed: 00_start.new.ipynb" in text


def test_a_folder_that_cannot_be_used_is_refused(course, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            OSError,
            match=r"folder \(=.*file.*can't be written .*(File exists|Not a directory).*; name a folder",
        ):
            copy_course(folder, course)
    with pytest.raises(ValueError, match="is the course itself"):
        copy_course(course, course)


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX users")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code = (
        "import os; from hpclab.course import copy_course; os.getuid() or os.setuid(65534)\n"
        f"copy_course({str(tmp_path / 'locked')!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search("OSError: .*can't be written .*Permission denied.*; name a folder", run.stderr)


def test_open_lab_without_jupyterlab_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", None)
    with pytest.raises(ModuleNotFoundError, match="pip install jupyterlab"):
        open_lab(tmp_path / "mine", [])
    assert not (tmp_path / "mine").exists()


def test_the_readers_own_settings_of_jupyterlab_win(monkeypatch, tmp_path):
    """Jupyter refuses to be given a setting twice."""
    labapp = pytest.importorskip("jupyterlab.labapp")
    launched = []
    monkeypatch.setattr(labapp.LabApp, "launch_instance", launched.append)
    own = ["--LabApp.default_url=/lab", "--port", "8899", *AS_ROOT]
    open_lab(tmp_path / "mine", own)
    assert launched == [[f"--ServerApp.root_dir={tmp_path / 'mine'}", *own]]


@pytest.mark.parametrize(
    ("notebook", "language", "opened"),
    [
        ("index", "en", "00_index.ipynb"),
        ("index", "zh", "zh/00_index.ipynb"),
        ("ddp-from-scratch", "en", "02_ddp_from_scratch.ipynb"),
        ("04_scaling.ipynb", "zh", "04_scaling.ipynb"),  # it has no Chinese edition
    ],
)
def test_the_index_opens_or_the_notebook_that_was_asked_for(monkeypatch, tmp_path, notebook, language, opened):
    labapp = pytest.importorskip("jupyterlab.labapp")
    launched = []
    monkeypatch.setattr(labapp.LabApp, "launch_instance", launched.append)
    monkeypatch.setenv("HPCLAB_LANG", language)
    cli.main(["lab", "--folder", str(tmp_path / "mine"), "--notebook", notebook, "--no-browser", *AS_ROOT])
    root, url = f"--ServerApp.root_dir={tmp_path / 'mine'}", f"--LabApp.default_url=/lab/tree/{opened}"
    assert launched == [[root, url, "--no-browser", *AS_ROOT]]


def test_a_notebook_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    pytest.importorskip("jupyterlab")
    with pytest.raises(
        ValueError, match=r"notebook \(='scailing'\) isn't in .*; use one of autoencoder, capstone, cnn, .*scaling"
    ):
        open_lab(tmp_path / "mine", AS_ROOT, "scailing")


@pytest.mark.skipif(not AS_ROOT, reason="needs root, whom Jupyter refuses")
def test_root_is_refused_before_anything_is_copied(tmp_path, monkeypatch, capsys):
    """Unless Jupyter's own configuration lets root in."""
    labapp = pytest.importorskip("jupyterlab.labapp")
    launched = []
    monkeypatch.setattr(labapp.LabApp, "launch_instance", launched.append)
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    assert cli.main(["lab", "--folder", str(tmp_path / "mine")]) == 1
    assert (
        "you are root, which Jupyter refuses; in a container of your own, add --allow-root" in capsys.readouterr().err
    )
    assert not (tmp_path / "mine").exists() and not launched
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    assert cli.main(["lab", "--folder", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine").exists() and launched


def eventually(attempt, *errors):
    """What attempt returns, once a server that is still starting lets it."""
    for _ in range(300):
        try:
            return attempt()
        except errors:
            time.sleep(0.1)
    return attempt()


def test_open_lab_serves_the_copy_behind_a_token(tmp_path):
    pytest.importorskip("jupyterlab")
    from jupyter_server.serverapp import list_running_servers

    settings = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    arguments = ["--no-browser", *AS_ROOT]
    code = f"from hpclab.course import open_lab; open_lab({str(tmp_path / 'mine')!r}, {arguments!r})"
    log = tmp_path / "log"
    with log.open("w") as sink:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=sink, stderr=sink, env=os.environ | settings)
    try:
        running = eventually(lambda: next(list_running_servers(tmp_path / "RUNTIME")), StopIteration)
        contents = running["url"] + "api/contents/"
        query = f"{contents}?token={running['token']}"
        with eventually(lambda: urllib.request.urlopen(query, timeout=30), urllib.error.URLError) as answer:
            served = {item["name"] for item in json.load(answer)["content"]}
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(contents, timeout=30)
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert served == {path.name for path in (tmp_path / "mine").iterdir() if not path.name.startswith(".")}
    assert f"The course is in {tmp_path / 'mine'}" in log.read_text()
    assert re.search(r"http://127.0.0.1:\d+/lab/tree/00_index.ipynb\?token=\w+", log.read_text())

"""What is done of the course: remembered in a working copy, nowhere else, and never at a check's cost."""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

import hpclab
from hpclab import machine
from hpclab.course import MANIFEST, checks, copy_course, logbook

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A working copy of the course, in which this process is."""
    copy_course(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.setattr(logbook, "_warned", set())
    return tmp_path / "mine"


def largest_gang(cpus: int, memory: int) -> int:
    return max(0, min(cpus, (memory - machine.BASE_MEMORY) // machine.RANK_MEMORY))


def log(copy) -> list[dict]:
    return [json.loads(line) for line in (copy / logbook.LOG).read_text().splitlines()]


def test_a_pass_is_remembered_once_and_what_does_not_pass_is_not(copy):
    assert not hpclab.check("start.gang", len)
    assert not (copy / logbook.LOG).exists()
    for _ in range(2):
        assert hpclab.check("start.gang", largest_gang)
    (row,) = log(copy)
    assert row["exercise"] == "start.gang" and row["day"].count("-") == 2
    assert stat.S_IMODE((copy / logbook.LOG).stat().st_mode) == 0o600


def test_the_chinese_edition_writes_into_the_same_log(copy, monkeypatch):
    monkeypatch.chdir(copy / "zh")
    logbook.remember("start.gang")
    assert [row["exercise"] for row in log(copy)] == ["start.gang"]
    assert "已完成 1 个" in repr(hpclab.progress())
    assert "从这里开始：赛跑" in repr(hpclab.progress())


def test_outside_of_a_working_copy_nothing_is_written(tmp_path):
    assert hpclab.check("start.gang", largest_gang)
    assert list(tmp_path.rglob("*")) == []
    found = hpclab.progress()
    assert found.folder is None and found.done == 0 < found.exercises
    assert "isn't a working copy" in repr(found)


def test_who_grades_leaves_no_trace(copy, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert hpclab.check("start.gang", largest_gang)
    assert not (copy / logbook.LOG).exists()


def test_progress_counts_what_the_notebooks_declare(copy):
    for exercise in ("start.gang", "cnn.order", "no.longer"):
        logbook.remember(exercise)
    found = hpclab.progress()
    declared = {
        cell["metadata"]["nbgrader"]["grade_id"]: "".join(cell["source"])
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        if cell["metadata"].get("nbgrader", {}).get("grade")
    }
    assert found.exercises == len(declared)
    assert {exercise for row in found.rows for exercise in row["exercises"]} == set(checks.ids())
    assert found.done == 2
    rows = {row["slug"]: row for row in found.rows}
    assert rows["cnn"]["done"] == ["cnn.order"] and rows["cnn"]["minutes"] == 30
    assert rows["start"]["title"] == "Start here: the race" and rows["start"]["day"]


def test_each_path_says_what_comes_next(copy):
    of_start = [exercise for exercise in checks.ids() if exercise.startswith("start.")]
    for exercise in of_start:
        logbook.remember(exercise)
    paths = hpclab.progress().paths()
    assert [row["slug"] for row in paths["90 minutes"]] == ["start", "cnn", "scaling"]
    assert {row["slug"] for row in paths["90 minutes"]} < {row["slug"] for row in paths["one day"]}
    assert paths["a term"] == hpclab.progress().rows
    shown = hpclab.progress()._repr_html_()
    short = next(row for row in shown.split("<tr>") if "90 minutes" in row)
    assert re.search(
        rf'>{len(of_start)} of \d+</td><td[^>]*><a href="03_cnn.ipynb">CNN: the same loss, sooner</a>', short
    )


def test_when_all_is_done_it_says_so(copy):
    for exercise in checks.ids():
        logbook.remember(exercise)
    assert repr(hpclab.progress()).count("all done") == 3


@pytest.mark.parametrize("broken", [b'{"exercise": "cnn.or', b"\xff\xfe\x00", b"[1]\n", b"7\n", b'{"exercise": 1}\n'])
def test_a_broken_line_is_told_once_stays_and_costs_no_other(copy, broken):
    logbook.remember("cnn.order")
    whole = (copy / logbook.LOG).read_bytes()
    (copy / logbook.LOG).write_bytes(whole + broken)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert hpclab.check("start.gang", largest_gang)
        assert (copy / logbook.LOG).read_bytes().startswith(whole + broken)
        assert hpclab.progress().done == 2
    whole_line = broken.endswith(b"\n")  # else its writer was killed, which is nobody's concern
    says = f"Line 2 of {copy / logbook.LOG} can't be read; it is left as it is, and the other lines count."
    assert [str(one.message) for one in told] == [says] * whole_line


def test_a_log_that_cannot_be_written_is_told_once_and_fails_no_check(copy):
    (copy / logbook.LOG).mkdir()
    with pytest.warns(UserWarning, match="Your progress can't be saved: .*Is a directory"):
        assert hpclab.check("start.gang", largest_gang)
    assert hpclab.check("start.gang", largest_gang)


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX users")
def test_a_folder_that_is_not_the_readers_fails_no_check():
    code = """
import os, hpclab.exercises
from hpclab.machine import BASE_MEMORY, RANK_MEMORY
os.getuid() or os.setuid(65534)
largest_gang = lambda cpus, memory: max(0, min(cpus, (memory - BASE_MEMORY) // RANK_MEMORY))
print(hpclab.exercises.check("start.gang", largest_gang))
"""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own, which others can't enter
        copy_course(folder)
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "pass" in done.stdout, done.stderr
    assert "can't be saved" in done.stderr and "Permission denied" in done.stderr


def test_many_at_once_lose_nothing(copy):
    """Processes, as notebooks are, that all begin at the same moment."""
    code = "import sys, pathlib; from hpclab import logbook\nwhile not pathlib.Path('go').exists(): pass\n"
    code += "for place in range(50): logbook.remember(f'{sys.argv[1]}.{place}')"
    writers = [subprocess.Popen([sys.executable, "-c", code, f"n{number}"]) for number in range(4)]
    (copy / "go").touch()
    assert [writer.wait(120) for writer in writers] == [0] * 4
    assert {row["exercise"] for row in log(copy)} == {
        f"n{number}.{place}" for number in range(4) for place in range(50)
    }


def test_a_copy_that_is_moved_or_brought_up_to_date_keeps_its_log(copy, monkeypatch, tmp_path):
    logbook.remember("start.gang")
    copy.rename(tmp_path / "moved")
    copy_course(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert hpclab.progress().done == 1
    assert hpclab.progress(tmp_path / "moved").folder == tmp_path / "moved"
    assert (tmp_path / "moved" / MANIFEST).exists()

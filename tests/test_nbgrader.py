"""nbgrader itself releases every notebook of the course, and grades one: as a site that has it would."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from pipeline import build

SOURCES = [path for path in sorted((build.HERE / "source").glob("*.py")) if path.stem != "00_index"]  # no exercise
GRADED = build.HERE / "source" / "19_puzzles.py"  # one that needs no cluster


@pytest.fixture(scope="module")
def nbgrader(tmp_path_factory):
    """A class's folder, and nbgrader's command in it, with this environment's kernel."""
    folder = tmp_path_factory.mktemp("class")
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HPCLAB_SIZE": "small"}
    own |= {"PYTHONPATH": str(build.HERE.parent), "JUPYTER_DATA_DIR": str(folder / "data")}

    def run(*arguments):
        command = [sys.executable, "-m", "nbgrader", *arguments, "--ExecutePreprocessor.timeout=600"]
        done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder

    (folder / "source" / "course").mkdir(parents=True)
    (folder / "source" / "graded").mkdir()
    for path in SOURCES:
        nbformat.write(build.solution(path), folder / "source" / "course" / f"{path.stem}.ipynb")
    nbformat.write(build.solution(GRADED), folder / "source" / "graded" / "graded.ipynb")
    return run


def test_what_it_releases_is_what_students_get(nbgrader):
    folder = nbgrader("generate_assignment", "course", "--create")
    for path in SOURCES:
        released = nbformat.read(folder / "release" / "course" / f"{path.stem}.ipynb", 4)
        assert [cell.id for cell in released.cells] == [cell.id for cell in build.student(path).cells]
        solved = [cell.source for cell in released.cells if cell.metadata.get("nbgrader", {}).get("solution")]
        assert len(solved) >= 1 and not [source for source in solved if "SOLUTION" in source]


def test_it_gives_the_solution_all_points_and_the_stub_none(nbgrader):
    folder = nbgrader("generate_assignment", "graded", "--create")
    for student, made in ("solved", build.solution), ("stub", build.student):
        (folder / "submitted" / student / "graded").mkdir(parents=True)
        nbformat.write(made(GRADED), folder / "submitted" / student / "graded" / "graded.ipynb")
    nbgrader("autograde", "graded")
    nbgrader("export", "--to", "grades.csv")
    with open(folder / "grades.csv") as table:
        rows = [row for row in csv.DictReader(table) if row["assignment"] == "graded"]
    most = sum(cell.metadata.get("nbgrader", {}).get("points", 0) for cell in build.student(GRADED).cells)
    assert most > 10
    assert {(row["student_id"], float(row["score"]), float(row["max_score"])) for row in rows} == {
        ("solved", most, most),
        ("stub", 0, most),
    }

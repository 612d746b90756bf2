"""What a class has handed in: which file is whose, of which notebook, and what of it is run and judged."""

import ast
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 50 * 2**20
"""Bytes of a file beyond which it isn't even read."""


class Unreadable(ValueError):
    """A file that is no notebook; says why, without a word of what is in it."""


@dataclass
class Step:
    """A cell to run; then, if it was a check, the exercise, and the expression whose value is the answer."""

    code: str
    exercise: str = ""
    answer: str = ""


@dataclass
class Assignment:
    """A notebook of the course: its file's stem, ids of its cells, and each check cell by its id, in order."""

    stem: str
    ids: list[str]
    checks: dict[str, Step] = field(default_factory=dict)


def found(folder: Path, course: list[Assignment]) -> Iterator[tuple[str, Path]]:
    """Name and file of each submission: of students in the folder itself, in folders of theirs, or as nbgrader has it.

    A file beside them that is no notebook is one too, as somebody has handed it in; in a student's own folder only if
    there is no notebook.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            files = [file for file in sorted(path.rglob("*")) if not _hidden(file, path) and not file.is_dir()]
            notebooks = [file for file in files if file.suffix == ".ipynb"]
            for file in sorted(notebooks or files, key=lambda file: _order(file, course)):
                yield str(file.relative_to(folder)), file
        else:
            yield path.name, path


def _hidden(file: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _order(file: Path, course: list[Assignment]) -> tuple[int, str]:
    stems = [one.stem for one in course]
    return (stems.index(file.stem) if file.stem in stems else len(stems), str(file))


def assignments(folder: Path) -> list[Assignment]:
    """The course's notebooks that have checks, in their order.

    Raises
    ------
    ValueError
        If a notebook can't be read, or there is none with a check.
    """
    course = []
    for path in sorted(folder.glob("*.ipynb")):
        cells = _cells(read(path))
        checks = {_id(cell): step for cell in cells if (step := _check(_text(cell))) is not None}
        if checks:
            course.append(Assignment(path.stem, [_id(cell) for cell in cells], checks))
    if not course:
        raise ValueError(f"course (={folder}) has no notebook with a cell that calls hpclab.check(...).")
    return course


def read(path: Path) -> dict:
    """A notebook as its file has it.

    Raises
    ------
    Unreadable
        If it is none.
    """
    import nbformat

    if path.is_symlink():
        raise Unreadable("it is a link, and leads elsewhere")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("it is no file")
        if status.st_size > LARGEST:
            raise Unreadable(f"it has {status.st_size / 2**20:.0f} MB, more than {LARGEST / 2**20:.0f}")
        if path.suffix != ".ipynb":
            raise Unreadable("its name doesn't end in .ipynb")
        notebook = nbformat.reads(path.read_text("utf-8"), as_version=4)
        nbformat.validate(notebook)
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(f"it can't be read ({os.strerror(error.errno or 0)})") from None
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except Exception as error:  # whatever nbformat finds wrong with what somebody wrote
        raise Unreadable(f"it is no notebook, or a broken one ({type(error).__name__})") from None
    return notebook


def of(path: Path, notebook: dict, course: list[Assignment]) -> Assignment:
    """The notebook of the course that this one began as: by its file's name, else by its cells' ids.

    Raises
    ------
    Unreadable
        If it is none of them.
    """
    for one in course:
        if path.stem == one.stem:
            return one
    ids = {_id(cell) for cell in _cells(notebook)}
    best = max(course, key=lambda one: len(ids & set(one.checks)) * 1000 + len(ids & set(one.ids)))
    if not ids & set(best.checks) and 2 * len(ids & set(best.ids)) < len(best.ids):
        raise Unreadable("it is none of the course's notebooks")
    return best


def steps(notebook: dict, assignment: Assignment) -> list[Step]:
    """What is run: the student's cells, with the course's checks in place of theirs, and of those that are gone."""
    planned, left = [], dict(assignment.checks)
    for cell in _cells(notebook):
        if _id(cell) in assignment.checks:
            if step := left.pop(_id(cell), None):
                planned.append(step)
        elif cell["cell_type"] == "code":
            planned.append(Step(_text(cell)))
    return planned + list(left.values())


def _cells(notebook: dict) -> list[Any]:
    return list(notebook["cells"])


def _text(cell: Any) -> str:
    return str(cell["source"]) if cell["cell_type"] == "code" else ""


def _id(cell: Any) -> str:
    """The id that nbgrader, or else the notebook's format, knows a cell by."""
    return str(cell["metadata"].get("nbgrader", {}).get("grade_id") or cell.get("id", ""))


def _check(code: str) -> Step | None:
    """A check cell, cut into what stands before `hpclab.check(...)` and the answer; None if it is no such cell."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a cell with magics
        return None
    match tree.body[-1:]:
        case [
            ast.Expr(
                ast.Call(
                    func=ast.Attribute(ast.Name("hpclab"), "check") | ast.Name("check"),
                    args=[ast.Constant(str(exercise)), answer],
                )
            )
        ]:
            return Step(ast.unparse(ast.Module(tree.body[:-1], [])), exercise, ast.unparse(answer))
    return None

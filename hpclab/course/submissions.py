"""What a class has handed in: which file is whose, of which notebook, and what of it is run and judged."""

import ast
import contextlib
import errno
import importlib.machinery
import io
import json
import logging
import os
import stat
import sys
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

LARGEST = 50 * 2**20
"""Bytes of a file beyond which it isn't even read."""
MOST_FILES = 100_000
"""Files in a student's folder beyond which none is looked at."""
MOST_BESIDE = (2_000, 200 * 2**20)
"""Files, and bytes of them all, that are put beside a notebook; the nearest go first."""
LONGEST_CHECK = 20_000
"""Characters of a cell beyond which it is no copy of a check."""
OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT}
"""Errors for which no student is to blame: the grader's machine has too little of something."""


class Unreadable(ValueError):
    """A file that is no notebook; says why, without a word of what is in it."""


@dataclass
class Step:
    """A cell to run; then, if it was a check, the exercise, and the expression whose value is the answer."""

    code: str
    exercise: str = ""
    answer: str = ""
    cell: int = 0
    """Its number among the notebook's cells of code, from 1, as *Run All* counts them."""
    copies: int = 1
    """How many copies of the check the notebook has; this is the last."""
    changed: bool = False
    """Whether the student's own cell asked for something else than the course's, which counts."""
    points: float = field(default=1.0, compare=False)
    """What a pass of the course's check is worth; a student's cell that says otherwise is the same check."""


@dataclass
class Assignment:
    """A notebook of the course: its file's stem, ids of its cells, and each check cell by its id, in order."""

    stem: str
    ids: list[str]
    checks: dict[str, Step] = field(default_factory=dict)


def _unreadable(what: str, error: OSError) -> Unreadable:
    """What to raise of a student's file or folder; an error for which no student is to blame is raised as it is."""
    if error.errno in OURS:
        raise error
    return Unreadable(f"{what} can't be read ({os.strerror(error.errno or 0)})")


def handed_in(folder: Path, course: list[Assignment]) -> Iterator[tuple[str, Path]]:
    """Name and file of each submission: of students in the folder itself, in folders of theirs, or as nbgrader has it.

    A file beside them that is no notebook is one too, as somebody has handed it in; in a student's own folder only if
    there is no notebook.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            try:
                files = [path / name for name in _files(path)]
            except Unreadable:  # `read` says why
                files = []
            notebooks = [file for file in files if file.suffix == ".ipynb"]
            for file in sorted(notebooks or files or [path], key=lambda file: _order(file, course)):
                yield str(file.relative_to(folder)), file
        else:
            yield path.name, path


def _files(top: Path) -> list[Path]:
    """Files in a folder and the folders in it, as paths from there; nothing hidden, and through no link to a folder.

    A folder in it that can't be read stands for what it holds.

    Raises
    ------
    Unreadable
        If it can't be read itself, or there is more in it than anybody hands in.
    """
    named: list[Path] = []
    left = [Path()]
    while left:  # and no recursion: folders can be nested deeper than Python's stack
        inner = left.pop()
        try:
            with os.scandir(top / inner) as listing:
                entries = list(listing)
        except OSError as error:
            unreadable = _unreadable("its folder", error)
            if inner == Path():
                raise unreadable from None
            named.append(inner)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_dir(follow_symlinks=False):
                left.append(inner / entry.name)
            elif not os.path.isdir(entry.path):
                named.append(inner / entry.name)
        if len(named) + len(left) > MOST_FILES:
            raise Unreadable(f"its folder holds more than {MOST_FILES} files")
    return sorted(named)


def beside(path: Path, folder: Path, archive: IO[bytes]) -> list[str]:
    """Write what a student has handed in with a notebook as a tar archive; empty if it lies in no folder of theirs.

    That is the widest folder around the notebook in which none lies elsewhere: FOLDER/week/ann isn't for bob's.
    Returns names of what isn't in it, as it would be too much, or can't be read. No link is followed, wherever a
    student puts one meanwhile.
    """
    inner = path.relative_to(folder)
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        left = _pack(tar, folder / inner.parts[0], Path(*inner.parts[1:-1])) if len(inner.parts) > 1 else []
    archive.seek(0)
    return left


def _pack(tar: tarfile.TarFile, top: Path, first: Path) -> list[str]:
    (many, room), left = MOST_BESIDE, []
    names = _files(top)
    mine = _widest(names, first)
    names = [name for name in names if mine in name.parents]
    for name in sorted(names, key=lambda name: (first not in name.parents, len(name.parts))):
        try:
            with _opened(top, name) as file:
                status = os.fstat(file.fileno())
                if not many or status.st_size > min(room, LARGEST):
                    raise Unreadable("too much")
                member = tarfile.TarInfo(str(name))
                member.size, member.mtime, member.mode = status.st_size, status.st_mtime, status.st_mode & 0o100 | 0o644
                # Exactly as many bytes as the header says, even if the student changes the file meanwhile.
                content = io.BytesIO(file.read(member.size).ljust(member.size, b"\0"))
        except (OSError, Unreadable) as error:
            if getattr(error, "errno", None) in OURS:
                raise
            left.append(str(name))
            continue
        tar.addfile(member, content)
        many, room = many - 1, room - member.size
    return left


def _widest(names: list[Path], own: Path) -> Path:
    """The widest folder around a notebook's own outside which, but within this one, there is no other notebook."""
    notebooks = [name for name in names if name.suffix == ".ipynb" and own not in name.parents]
    widest = own
    for wider in own.parents:
        if any(wider in name.parents for name in notebooks):
            break
        widest = wider
    return widest


def _opened(top: Path, name: Path) -> IO[bytes]:
    """A file of a student's, opened step by step through no link; a pipe doesn't hold it up.

    Raises
    ------
    OSError
        If it can't be opened so.
    Unreadable
        If it is no file.
    """
    with _entered(top, name.parent) as handle:
        file = os.open(name.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handle)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise Unreadable("it isn't a file")
    return open(file, "rb")


@contextlib.contextmanager
def _entered(top: Path, inner: Path) -> Iterator[int]:
    """A descriptor of a folder in another, opened step by step through no link."""
    handle = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for part in inner.parts:
            wider, handle = handle, os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(wider)
        yield handle
    finally:
        os.close(handle)


def hiding(path: Path, folder: Path) -> list[str]:
    """Names of files beside a notebook that Python finds before its own, or installed, modules of the same name."""
    if path.parent == folder:
        return []
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    places.append(str(Path(__file__).parents[2]))
    try:
        with _entered(folder, path.parent.relative_to(folder)) as handle, os.scandir(handle) as listing:
            modules = [entry.name for entry in listing if entry.name.endswith(".py") or _package(handle, entry)]
    except OSError as error:
        raise _unreadable("its folder", error) from None

    def hides(file: str) -> bool:
        name = os.path.splitext(file)[0]
        other = name.isidentifier() and importlib.machinery.PathFinder.find_spec(name, places)
        return name in sys.stdlib_module_names or bool(other and other.loader)

    return sorted(filter(hides, modules))


def _package(handle: int, entry: os.DirEntry) -> bool:
    with contextlib.suppress(OSError):
        return entry.is_dir(follow_symlinks=False) and stat.S_ISREG(
            os.stat(f"{entry.name}/__init__.py", dir_fd=handle, follow_symlinks=False).st_mode
        )
    return False


def _order(file: Path, course: list[Assignment]) -> tuple[int, str]:
    stems = [assignment.stem for assignment in course]
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
        checks = {_id(cell): step for cell in cells if (step := check_cell(_text(cell))) is not None}
        for cell in cells:
            if _id(cell) in checks:
                checks[_id(cell)].points = float(cell["metadata"].get("nbgrader", {}).get("points", 1))
        if checks:
            course.append(Assignment(path.stem, [_id(cell) for cell in cells], checks))
    if not course:
        raise ValueError(f"course (={folder}) has no notebook with a cell that calls hpclab.check(...).")
    return course


def read(path: Path, folder: Path | None = None) -> dict:
    """A notebook as its file has it; through no link below `folder`, by default its own.

    Raises
    ------
    Unreadable
        If it is none.
    """
    import nbformat

    try:
        if path.is_symlink():
            raise Unreadable("it is a link that leads elsewhere")
        if path.is_dir():
            _files(path)
            raise Unreadable("its folder holds no file")
        folder = folder or path.parent
        with _opened(folder, path.relative_to(folder)) as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST:
                raise Unreadable(f"it has {size / 2**20:.0f} MB, more than {LARGEST / 2**20:.0f}")
            if path.suffix != ".ipynb":
                raise Unreadable("its name doesn't end in .ipynb")
            raw = file.read(LARGEST)
        if not raw.strip():
            raise Unreadable("it is empty")
        with _quiet():
            text = raw.decode(json.detect_encoding(raw), "surrogatepass")
            notebook = nbformat.reads(text, as_version=4, capture_validation_error={})
        for cell in notebook["cells"]:
            _sound(cell)
    except Unreadable:
        raise
    except OSError as error:
        raise _unreadable("it", error) from None
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except Exception as error:  # whatever nbformat finds wrong with what somebody wrote
        raise Unreadable(f"it isn't a notebook, or is a broken one ({type(error).__name__})") from None
    return notebook


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from a terminal what Python and nbformat find odd about a notebook: they quote what is in it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _sound(cell: Any) -> None:
    """Bring a cell into the form that is read here; Jupyter opens notebooks that lack more than this."""
    source, metadata = cell.setdefault("source", ""), cell.setdefault("metadata", {})
    # No kernel takes half of a surrogate pair, which JSON can hold.
    cell["source"] = "".join(source).encode("utf-8", "replace").decode()
    if not isinstance(cell["cell_type"], str) or not isinstance(metadata.get("nbgrader", {}), dict):
        raise TypeError


def began_as(path: Path, notebook: dict, course: list[Assignment]) -> Assignment:
    """The notebook of the course that this one began as: by its file's name, unless its checks are another's; else by
    its cells' ids.

    Raises
    ------
    Unreadable
        If it is none of them.
    """
    ids = {_id(cell) for cell in _cells(notebook)}
    has_checks = any(ids & set(assignment.checks) for assignment in course)
    for assignment in course:
        if path.stem == assignment.stem and (ids & set(assignment.checks) or not has_checks):
            return assignment
    best = max(course, key=lambda each: len(ids & set(each.checks)) * 1000 + len(ids & set(each.ids)))
    if not ids & set(best.checks) and 2 * len(ids & set(best.ids)) < len(best.ids):
        raise Unreadable("it isn't one of the course's notebooks")
    return best


def steps(notebook: dict, assignment: Assignment) -> list[Step]:
    """What is run: the student's cells, with the course's checks in place of theirs, and of those that are gone.

    Of several copies of a check the last one counts. A copy is a cell that has the check's id, or asks for the same
    exercise. What the student wrote into one, before its last line, is run as any other cell of theirs.
    """
    planned: list[Step] = []
    last: dict[str, int] = {}  # where in the plan an exercise's check is
    copies: dict[str, int] = {}
    named = {step.exercise: step for step in assignment.checks.values()}
    codes = [cell for cell in _cells(notebook) if cell["cell_type"] == "code"]
    for number, cell in enumerate(codes, start=1):
        text = _text(cell)
        theirs = check_cell(text)
        check = named.get(theirs.exercise) if theirs else None
        check = check or assignment.checks.get(_id(cell))
        if check is None:
            planned.append(Step(text, cell=number))
            continue
        changed = theirs != check
        own = theirs.code if theirs and theirs.exercise == check.exercise else text
        if changed and own:
            planned.append(Step(own, cell=number))
        if check.exercise in last:
            earlier = planned[last[check.exercise]]
            planned[last[check.exercise]] = Step(earlier.code, cell=earlier.cell)
        copies[check.exercise] = copies.get(check.exercise, 0) + 1
        last[check.exercise] = len(planned)
        planned.append(replace(check, cell=number, copies=copies[check.exercise], changed=changed))
    gone = [step for step in assignment.checks.values() if step.exercise not in last]
    return planned + [replace(step, cell=len(codes) + more) for more, step in enumerate(gone, start=1)]


def _cells(notebook: dict) -> list[Any]:
    return list(notebook["cells"])


def _text(cell: Any) -> str:
    return str(cell["source"]) if cell["cell_type"] == "code" else ""


def _id(cell: Any) -> str:
    """The id that nbgrader, or else the notebook's format, knows a cell by."""
    return str(cell["metadata"].get("nbgrader", {}).get("grade_id") or cell.get("id", ""))


def check_cell(code: str) -> Step | None:
    """A check cell, cut into the code before `hpclab.check(...)` and the answer; None if it is no such cell."""
    if "check" not in code or len(code) > LONGEST_CHECK:
        return None
    try:
        with _quiet():
            return _parsed(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a cell with magics, or one that is no Python
        return None


def _parsed(tree: ast.Module) -> Step | None:
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

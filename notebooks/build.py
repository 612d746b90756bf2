"""Generate the course's notebooks from `source/NN_slug.py`: `python notebooks/build.py [--check | --stale]`.

A source is a jupytext percent script with solutions. Each cell has an id: `# %% [markdown] id="objectives"`.
An exercise's cell, `# %% id="gang" exercise=true`, holds its solution between `### BEGIN SOLUTION` and
`### END SOLUTION`; the students' notebook loses both markers and what lies between. The cell that checks it,
`# %% id="gang-check" points=1`, calls `hpclab.check(...)`. Both carry nbgrader's metadata.
Each notebook but the index gets a last cell with links to the index and to the next notebook, in the files' order.

A Chinese edition is `source/zh/NN_slug.md`: the Chinese of each markdown cell under a line
`<!-- cell: objectives  english: 1a2b3c4d -->`, where the number is the start of the sha256 of the English.
To begin one, create it empty: `--stale` then prints every cell to translate.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
OPTIONS = {"id", "exercise", "points", "tags"}
INDEX = "00_index"
ONWARD = {"en": ("All notebooks", "Next in order"), "zh": ("全部 Notebook", "按顺序的下一个")}
"""What the links of the last cell say: to the index, and before the next notebook's title."""
KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class SourceError(ValueError):
    """A source or a translation breaks a rule of this file's first lines."""


def solution(path: Path, language: str = "en") -> NotebookNode:
    """Notebook of a source with its solutions kept, to be executed by the tests.

    Parameters
    ----------
    path : Path
        The source, `.../source/NN_slug.py`.
    language : str
        "en", or "zh" if it has a translation.

    Raises
    ------
    SourceError
        If the source or the translation breaks a rule; the message names the file and the cell.
    """
    cells = _cells(path)
    chinese = _chinese(path) if language == "zh" else {}
    notebook = nbformat.v4.new_notebook(metadata=KERNEL)
    notebook.cells = [_cell(cell, chinese.get(cell.metadata["id"], cell.source)) for cell in cells]
    if links := _onward(path, language):
        notebook.cells.append(nbformat.v4.new_markdown_cell(links, id="onward"))
    nbformat.validate(notebook)
    return notebook


def student(path: Path, language: str = "en") -> NotebookNode:
    """Notebook of a source with its solutions cut. Parameters and errors as for `solution`."""
    notebook = solution(path, language)
    for cell in notebook.cells:
        cell.source = _cut(cell.source)
    return notebook


def build(folder: Path = HERE) -> dict[Path, str]:
    """Notebooks that folder/source gives, as text by path; the same sources give the same bytes."""
    notebooks = {}
    for path in sorted((folder / "source").glob("*.py")):
        notebooks[folder / f"{path.stem}.ipynb"] = nbformat.writes(student(path)) + "\n"
        if _translation(path).exists():
            notebooks[folder / "zh" / f"{path.stem}.ipynb"] = nbformat.writes(student(path, "zh")) + "\n"
    return notebooks


def drift(folder: Path = HERE) -> list[Path]:
    """Notebooks in folder that differ from what `build` gives: edited, missing or without a source."""
    notebooks = build(folder)
    present = {*folder.glob("*.ipynb"), *folder.glob("zh/*.ipynb")}
    changed = {path for path in present & notebooks.keys() if path.read_text("utf-8") != notebooks[path]}
    return sorted(present ^ notebooks.keys() | changed)


def stale(path: Path) -> dict[str, list[str]]:
    """Ids of the cells that a source's translation has "stale" (other English), "missing" or "unknown"."""
    english = {cell.metadata["id"]: _digest(cell) for cell in _cells(path) if cell.cell_type == "markdown"}
    chinese = {cell_id: digest for cell_id, (digest, _) in _translated(_translation(path)).items()}
    return {
        "stale": [cell_id for cell_id in english if chinese.get(cell_id, english[cell_id]) != english[cell_id]],
        "missing": [cell_id for cell_id in english if cell_id not in chinese],
        "unknown": [cell_id for cell_id in chinese if cell_id not in english],
    }


def _cells(path: Path) -> list[NotebookNode]:
    cells = jupytext.reads(path.read_text("utf-8"), fmt="py:percent").cells
    seen: set[str] = set()
    for number, cell in enumerate(cells, start=1):
        for hint in ("lines_to_next_cell", "cell_marker"):  # jupytext's own, about the script's layout
            cell.metadata.pop(hint, None)
        if fault := _fault(cell, seen):
            start = cell.source.split("\n")[0]
            raise SourceError(f"{path.name}, cell {number} ({start!r}): {fault}")
        seen.add(cell.metadata["id"])
    return cells


def _fault(cell: NotebookNode, seen: set[str]) -> str | None:
    """Which rule a cell breaks, if any."""
    options, source = cell.metadata, cell.source
    cell_id = options.get("id")
    markers = [line.strip() for line in source.split("\n") if re.search("(BEGIN|END) SOLUTION", line)]
    if cell_id is None:
        return 'it has no id; write # %% id="name" or # %% [markdown] id="name".'
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", str(cell_id)):
        return f"its id (={cell_id!r}) must be 1 to 64 of letters, digits, - and _."
    if cell_id in seen:
        return f"its id (={cell_id!r}) is there twice."
    if unknown := options.keys() - OPTIONS:
        return f"it has unknown options ({', '.join(sorted(unknown))}); use {', '.join(sorted(OPTIONS))}."
    if cell.cell_type == "raw" or (cell.cell_type == "markdown" and options.keys() & {"exercise", "points"}):
        return "a cell is markdown or code, and exercises and checks are code."
    if markers != [BEGIN, END] * (len(markers) // 2) or bool(markers) != bool(options.get("exercise")):
        return f"a cell with exercise=true, and no other, has lines {BEGIN!r} and {END!r} in turn."
    if cell.cell_type == "code" and ("hpclab.check(" in source) != ("points" in options):
        return "a cell with points=..., and no other, calls hpclab.check(...)."
    return None


def _cell(cell: NotebookNode, source: str) -> NotebookNode:
    """Notebook cell of a source's cell, with nbgrader's metadata and `source` as its text."""
    options = dict(cell.metadata)
    metadata: dict[str, Any] = {"tags": options["tags"]} if "tags" in options else {}
    if options.get("exercise"):
        metadata["nbgrader"] = _nbgrader(options["id"], solution=True)
    if "points" in options:
        metadata["nbgrader"] = _nbgrader(options["id"], grade=True, locked=True, points=options["points"])
    new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
    return new(source, id=options["id"], metadata=metadata)


def _onward(path: Path, language: str) -> str:
    """Links from a notebook to the index and to the next one: in its own language, where they have it."""
    index = path.with_stem(INDEX)
    if path == index:
        return ""
    notebooks = sorted({*path.parent.glob("*.py")} - {index})
    back, on = ONWARD[language]
    links = [f"[{back}]({_link(index, language)})"] if index.exists() else []
    for following in notebooks[notebooks.index(path) + 1 :][:1]:
        links.append(f"{on}: [{_title(following, language)}]({_link(following, language)})")
    return " · ".join(links)


def _link(path: Path, language: str) -> str:
    """Address of a notebook, from one in this language."""
    return f"{'' if language == 'en' or _translation(path).exists() else '../'}{path.stem}.ipynb"


def _title(path: Path, language: str) -> str:
    """A notebook's title: its first heading."""
    translated = language == "zh" and _translation(path).exists()
    text = (_translation(path) if translated else path).read_text("utf-8")
    heading = re.search(r"^# (.*)" if translated else r"^# # (.*)", text, re.MULTILINE)
    return heading[1] if heading else path.stem


def _nbgrader(grade_id: str, **flags: bool | float) -> dict[str, Any]:
    kinds = {"grade": False, "locked": False, "solution": False, "task": False}
    return {"schema_version": 3, "grade_id": grade_id, **kinds, **flags}


def _cut(source: str) -> str:
    kept, inside = [], False
    for line in source.split("\n"):
        inside = inside or line.strip() == BEGIN
        if not inside:
            kept.append(line)
        inside = inside and line.strip() != END
    return "\n".join(kept).rstrip()


def _translation(path: Path) -> Path:
    return path.parent / "zh" / f"{path.stem}.md"


def _translated(path: Path) -> dict[str, tuple[str, str]]:
    """Hash of the English, and the Chinese, by id, of a translation file."""
    head, *parts = re.split(r"^<!-- cell:(.*)-->[ \t]*$", path.read_text("utf-8"), flags=re.MULTILINE)
    if head.strip():
        raise SourceError(f"{path.name}: the text before the first <!-- cell: ... --> belongs to no cell.")
    cells: dict[str, tuple[str, str]] = {}
    for header, text in zip(parts[::2], parts[1::2], strict=True):
        match header.split():
            case [cell_id, "english:", digest] if cell_id not in cells:
                cells[cell_id] = (digest, text.strip())
            case _:
                raise SourceError(
                    f"{path.name}: <!-- cell:{header}--> must read 'ID english: HASH', with each id once."
                )
    return cells


def _chinese(path: Path) -> dict[str, str]:
    """Chinese of every markdown cell, by id."""
    faults = [f"{kind}: {', '.join(ids)}" for kind, ids in stale(path).items() if ids]
    if faults:
        raise SourceError(f"{path.parent.name}/zh/{path.stem}.md has cells {'; '.join(faults)} (see --stale).")
    return {cell_id: text for cell_id, (_, text) in _translated(_translation(path)).items()}


def _digest(cell: NotebookNode) -> str:
    return hashlib.sha256(cell.source.encode()).hexdigest()[:8]


def _skeletons(path: Path) -> str:
    """What a translator has to do in one notebook: the ids, and the cells to translate, ready to paste."""
    ids = stale(path)
    lines = [f"{_translation(path).name}: {kind}: {cell_id}" for kind in ids for cell_id in ids[kind]]
    for cell in _cells(path):
        if cell.metadata["id"] in ids["stale"] + ids["missing"]:
            lines.append(f"\n<!-- cell: {cell.metadata['id']}  english: {_digest(cell)} -->\n\n{cell.source}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, folder: Path = HERE) -> int:
    """Build, check or list, as the arguments say; the exit code is 1 if there is something to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--check", action="store_true", help="write nothing; fail if a notebook differs from its source"
    )
    choice.add_argument("--stale", action="store_true", help="list what the translations lack, with the English")
    options = parser.parse_args(arguments)
    if options.stale:
        report = [
            text
            for path in sorted((folder / "source").glob("*.py"))
            if _translation(path).exists()
            if (text := _skeletons(path))
        ]
        print("\n".join(report) or "Every translation is up to date.")
        return bool(report)
    if options.check:
        for path in (paths := drift(folder)):
            print(f"{path.relative_to(folder)} differs from what its source gives: build, or delete it.")
        return bool(paths)
    for path, text in build(folder).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8", newline="\n")
        print(path.relative_to(folder))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SourceError as error:
        sys.exit(str(error))

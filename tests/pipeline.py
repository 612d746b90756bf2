"""The notebooks' pipeline, and what tests run of it. Apart from conftest, which ranks import with a test's function."""

import importlib.util
from pathlib import Path

import nbformat

_spec = importlib.util.spec_from_file_location("build", Path(__file__).parents[1] / "notebooks" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

IN_BROWSER = ["00_start.ipynb", "zh/00_start.ipynb", "03_cnn.ipynb", "04_scaling.ipynb", "13_faults.ipynb"]
"""The course's notebooks that test_browser runs whole; test_notebooks runs the others."""


def with_stubs(path, language="en"):
    """The notebook with its solutions; before each one, what students find in its place, and the same check."""
    cells = build.solution(path, language).cells
    notebook, stubs = build.solution(path, language), {cell.id: cell for cell in build.student(path, language).cells}
    notebook.cells = []
    for number, cell in enumerate(cells):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            check = next(later for later in cells[number:] if later.metadata.get("nbgrader", {}).get("grade"))
            notebook.cells += [{**stubs[cell.id], "id": f"stub-{cell.id}"}, {**check, "id": f"stub-{check.id}"}]
        notebook.cells.append(cell)
    return nbformat.from_dict(notebook)

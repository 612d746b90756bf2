"""Run the course's notebooks with their solutions, and keep the pictures that answers.md shows: docs/expected/*.png.

.venv/bin/python docs/make_expected.py [a notebook's file name without .py ...]
"""

import base64
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
PICTURES = {
    "00_start": ["race-do"],
    "01_one_process": ["roof-do", "levers-look"],
    "02_ddp_from_scratch": ["time-fit"],
    "03_cnn": ["measure-do"],
    "04_scaling": ["network-show-do", "beyond-do"],
    "05_dask": ["stream-run", "grain-do"],
    "06_queues": ["fifo-do", "backfill-do"],
    "13_faults": ["went-on-do", "measure-show-do"],
    "14_security": ["cost-do"],
    "17_capstone": ["judge-do"],
}
"""Cells whose last picture is kept, by notebook."""


def build():
    """The notebooks' pipeline, which is no package."""
    spec = importlib.util.spec_from_file_location("build", HERE.parent / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(cell) -> bytes:
    """The last picture that a cell shows, as PNG."""
    shown = [output.get("data", {}) for output in cell.outputs]
    pages = "".join(data.get("text/html", "") for data in shown)
    inside = re.findall(r"data:image/png;base64,([^\"']+)", pages)
    return base64.b64decode([*inside, *(data["image/png"] for data in shown if "image/png" in data)][-1])


def main(stems):
    pipeline = build()
    (HERE / "expected").mkdir(exist_ok=True)
    for stem in stems or PICTURES:
        notebook = pipeline.solution(HERE.parent / "notebooks" / "source" / f"{stem}.py")
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}}).execute()
        cells = {cell.id: cell for cell in notebook.cells}
        for name in PICTURES[stem]:
            (HERE / "expected" / f"{stem}-{name}.png").write_bytes(picture(cells[name]))
            print(stem, name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run the course once, with its solutions, and keep the pictures that docs/answers.md shows; on a quiet machine.

    python docs/make_expected.py [SLUG ...]

Prints what the cells of each notebook print, for the numbers on that page.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
from pathlib import Path

from nbclient import NotebookClient

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "notebooks")]
import build  # noqa: E402

SHOWN = {
    "00_start": ["race-do"],
    "01_one_process": ["roof-do", "levers-look"],
    "02_ddp_from_scratch": ["time-fit"],
    "03_cnn": ["measure-do"],
    "04_scaling": ["look-do", "beyond-do"],
    "05_dask": ["stream-run", "grain-do"],
    "06_queues": ["fifo-do", "backfill-do"],
    "08_rnn": ["yours-do"],
    "09_autoencoder": ["links-do"],
    "10_too_big": ["all-do", "bubble-do", "plan-do"],
    "13_faults": ["went-on-do", "measure-show-do"],
    "14_security": ["cost-do"],
    "17_capstone": ["judge-do"],
}
"""Cells whose last picture is kept, by notebook."""


def pictures(cell):
    """The pictures in a cell's outputs, PNG, in their order."""
    found = []
    for output in cell.outputs:
        data = output.get("data", {})
        inside = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", data.get("text/html", ""))
        found += map(base64.b64decode, inside or filter(None, [data.get("image/png")]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slugs", nargs="*", help="notebooks, all by default")
    (HERE / "expected").mkdir(exist_ok=True)
    for slug in parser.parse_args().slugs or SHOWN:
        notebook = build.solution(HERE.parent / "notebooks" / "source" / f"{slug}.py", "en")
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
            client.execute(env=os.environ | {"PYTHONPATH": str(HERE.parent)})
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                said = output.get("text") or output.get("data", {}).get("text/plain", "")
                print(f"{slug} {cell.id}: {said.strip()}")
            if cell.id in SHOWN[slug]:
                Path(HERE, "expected", f"{slug}-{cell.id}.png").write_bytes(pictures(cell)[-1])


if __name__ == "__main__":
    main()

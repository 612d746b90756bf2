"""The house's order: who may import whom, and that importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hpclab"
LAYERS = {
    "__init__": set(),
    "__main__": {"cli"},
    "_cells": {"_rank"},
    "_fetch": {"_shards"},
    "_agent": {"_zygote"},
    "_ledger": {"_agent", "machine"},
    "_progress": {"_rank"},
    "_rank": set(),
    "_replica": {"_rank", "checkpoint", "data", "network", "timeline"},
    "_shards": set(),
    "_supervisor": {"_agent", "_ledger", "_progress", "_rank"},
    "_zygote": {"_rank"},
    "_attempt": {"_ledger", "_progress", "_supervisor"},
    "chaos": {"runs"},
    "checkpoint": {"_rank"},
    "cli": {"course", "data", "demo", "doctor", "machine", "study"},
    "cluster": {"_ledger", "machine", "runs"},
    "course": {"data", "language"},
    "data": {"_fetch", "_shards"},
    "demo": {
        *("cluster", "doctor", "figures", "language", "launcher", "machine", "models", "runs"),
        *("plots", "racing", "scaling", "study", "tables", "training"),
    },
    "doctor": {"language", "machine", "tables"},
    "exercises": {"language", "laws", "machine"},
    "figures": {"language", "rows"},
    "gangs": {"_cells", "_progress", "_rank", "_supervisor", "launcher", "runs"},
    "forecast": {"laws", "network"},
    "language": set(),
    "laws": set(),
    "launcher": {"_attempt", "_ledger", "runs"},
    "machine": set(),
    "models": set(),
    "network": {"_rank"},
    "plots": {"figures", "language", "rows"},
    "racing": {"figures", "language", "launcher", "machine", "plots", "rows", "runs", "scaling", "tables", "training"},
    "study": {
        "figures",
        "forecast",
        "language",
        "laws",
        "models",
        "plots",
        "rows",
        "runs",
        "scaling",
        "tables",
        "training",
    },
    "rows": set(),
    "runs": {"_attempt", "_ledger", "_supervisor", "machine", "rows", "views"},
    "scaling": {"_rank", "launcher", "laws", "network", "rows", "runs"},
    "tables": set(),
    "timeline": {"_rank", "rows"},
    "training": {"_replica", "data", "launcher", "network", "runs"},
    "views": {"figures", "language", "plots", "rows", "tables"},
    "widgets": {"figures", "forecast", "language", "network", "plots", "racing", "runs", "tables", "training", "views"},
}


def imports(file: Path) -> set[str]:
    """Modules of hpclab that a file imports, at its top or inside functions; not what only type checkers read."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {id(n) for block in ast.walk(tree) if isinstance(block, ast.If) for n in ast.walk(block)}
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        if isinstance(node, ast.ImportFrom) and node.module == "hpclab":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").is_file()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hpclab."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_imports_what_its_layer_allows():
    there = {file.stem: imports(file) for file in PACKAGE.glob("*.py")}
    assert there.keys() == LAYERS.keys()
    for name, found in there.items():
        assert found <= LAYERS[name], f"{name} imports {sorted(found - LAYERS[name])}"


def test_the_layers_have_no_cycle():
    left = {name: set(below) for name, below in LAYERS.items()}
    while free := {name for name, below in left.items() if not below}:
        left = {name: below - free for name, below in left.items() if name not in free}
    assert not left


def test_import_loads_neither_torch_nor_dask():
    light = "machine, hpclab.exercises, hpclab.language, hpclab.laws, hpclab.forecast"
    code = f"import sys, hpclab, hpclab.{light}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "hpclab.machine" in loaded
    assert not {"torch", "dask", "distributed", "matplotlib", "IPython"} & set(loaded)


def test_every_public_name_resolves():
    """In a fresh process, where importing one name's module must not hide another name."""
    odd = "[n for n in h.__all__ if not getattr(h, n)], [n for n in h._HOME if not callable(getattr(h, n))]"
    code = f"import hpclab as h; print({odd})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"

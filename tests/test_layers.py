"""The house's order: who may import whom, and that importing the package costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hpclab"
LAYERS = {
    "__init__": {"_namesakes"},
    "_namesakes": set(),
    "__main__": {"cli"},
    "_buckets": set(),
    "_cells": {"_magics", "_rank"},
    "_fetch": {"_shards"},
    "_agent": {"_namesakes", "_private", "_zygote", "machine"},
    "_healing": set(),
    "_jobs": {"_healing", "_namesakes", "_private", "_slurm_site", "_tls", "machine", "queues", "slurm"},
    "_ledger": {"_agent", "_rendezvous", "machine"},
    "_magics": set(),
    "_private": set(),
    "_progress": {"_rank"},
    "_rank": {"_buckets", "_namesakes", "_store"},
    "_rendezvous": set(),
    "_replica": {"_rank", "checkpoint", "data", "timeline"},
    "_shards": set(),
    "_slurm_conf": {"_whole"},
    "_whole": set(),
    "_slurm_folder": {"_private", "_slurm_conf"},
    "_slurm_keeper": set(),
    "_slurm_programs": set(),
    "_slurm_rows": {"language", "tables"},
    "_slurm_site": {"_slurm_rows", "queues"},
    "_store": {"machine"},
    "_supervisor": {"_agent", "_ledger", "_private", "_progress", "_rank", "machine"},
    "_zygote": {"_namesakes", "_rank"},
    "_attempt": {"_ledger", "_progress", "_rank", "_supervisor"},
    "chaos": {"_whole", "runs"},
    "checkpoint": {"_whole", "_rank", "machine"},
    "_apart": {"machine"},
    "_sandbox": {"data"},
    "_submissions": set(),
    "grading": {"_apart", "_sandbox", "_submissions", "data", "exercises", "language", "tables"},
    "cli": {"_namesakes", "course", "data", "demo", "doctor", "grading", "machine", "slurm", "study"},
    "_tls": set(),
    "_training_job": {"_replica", "models", "network"},
    "bottlenecks": set(),
    "cards": {"language", "machine", "tables", "views"},
    "cluster": {
        *("_healing", "_jobs", "_ledger", "_namesakes", "_tls", "_whole", "cards", "machine", "queues", "runs"),
    },
    "compiler": {"_namesakes", "language"},
    "course": {"data", "language"},
    "data": {"_fetch", "_shards"},
    "demo": {
        *("cluster", "doctor", "figures", "language", "launcher", "machine", "models", "rows", "runs"),
        *("plots", "racing", "scaling", "study", "tables", "training"),
    },
    "doctor": {"_sandbox", "language", "machine", "slurm", "tables"},
    "_verdicts": {"_apart", "language"},
    "_exercises_capstone": {"_verdicts", "language", "predictions"},
    "_exercises_security": {"_verdicts", "language"},
    "_exercises_dask": {"_verdicts", "language", "laws"},
    "_exercises_one_process": {"_verdicts", "bottlenecks", "language", "roofline"},
    "_exercises_queues": {"_verdicts", "language", "slurm"},
    "exercises": {
        "_exercises_capstone",
        "_exercises_dask",
        "_exercises_one_process",
        "_exercises_queues",
        "_exercises_security",
        "_verdicts",
        "language",
        "laws",
        "logbook",
        "machine",
    },
    "figures": {"language", "rows"},
    "gangs": {"_attempt", "_cells", "_ledger", "_progress", "_rank", "_supervisor", "_whole", "launcher", "runs"},
    "forecast": {"laws", "network"},
    "language": set(),
    "laws": set(),
    "launcher": {"_attempt", "_ledger", "_whole", "runs"},
    "logbook": {"course", "data", "language", "rows", "tables"},
    "machine": set(),
    "models": set(),
    "network": {"_rank"},
    "playground": {
        *("figures", "language", "launcher", "network", "plots", "runs", "tables", "training", "views"),
    },
    "plots": {"figures", "language", "rows"},
    "racing": {
        *("figures", "language", "launcher", "machine", "plots", "rows", "runs"),
        *("scaling", "tables", "training", "views"),
    },
    "ratios": {"language", "laws"},
    "roofline": {"machine"},
    "slurm": {"_private", "_slurm_conf", "_slurm_folder", "_slurm_programs", "_slurm_rows", "language", "views"},
    "tasks": {"_ledger", "laws", "machine"},
    "study": {
        "_whole",
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
    "predictions": {"figures", "language", "rows", "study", "tables"},
    "queues": {"_supervisor", "_whole", "sites"},
    "rows": set(),
    "sites": set(),
    "runs": {"_attempt", "_ledger", "_rank", "_supervisor", "machine", "rows", "views"},
    "security": {"cluster", "ratios", "tables", "tasks"},
    "scaling": {"_whole", "_rank", "launcher", "laws", "network", "rows", "runs"},
    "tables": set(),
    "timeline": {"_rank", "rows"},
    "training": {"_training_job", "data", "launcher", "network", "runs"},
    "views": {"_slurm_rows", "figures", "language", "plots", "rows", "tables"},
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
    light = "machine, hpclab.slurm, hpclab.exercises, hpclab.language, hpclab.laws, hpclab.forecast"
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

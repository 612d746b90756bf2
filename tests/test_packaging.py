"""The files around the package: what installs it, what Binder reads, and what no file may hold."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {
    "jupyter-client": "jupyter_client",
    "dask": "dask-core",
    "matplotlib": "matplotlib-base",
    "torch": "pytorch-cpu",
}
SCRIPTS = ["binder/postBuild", "binder/start", ".ci/run"]
FORBIDDEN = {
    "a registry's host": r"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian\.org|conda\.anaconda\.org",
    "a path of one machine": r"(?<![\w.$}-])/(root|work|home/[a-z]\w*|Users/[a-z]\w*)/",
}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def lines(name: str) -> list[str]:
    """Lines of a file that hold more than a comment."""
    stripped = (line.split("#")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines())
    return [line for line in stripped if line]


def files_of_the_project() -> list[Path]:
    """All that git tracks, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def conda() -> dict[str, str | None]:
    """Names in environment.yml, each with its pin."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    return {name: pin or None for name, _, pin in (entry.partition("=") for entry in dependencies)}


def test_every_import_of_the_package_is_a_core_dependency():
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "hpclab").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"hpclab"}
    known = packages_distributions()
    # Of a package of Debian it is not known which modules it has.
    needed = {canonicalize_name(known.get(name, [name])[0]) for name in imported}
    assert {"dask", "numpy", "torch"} <= needed
    assert needed <= requirements(PROJECT["dependencies"]).keys()


def test_constraints_pin_each_dependency_within_its_range():
    asked = requirements([*PROJECT["dependencies"], *EXTRAS["dashboard"], *EXTRAS["dev"], *EXTRAS["docs"]])
    pinned = requirements(lines("constraints.txt"))
    assert pinned.keys() == asked.keys()
    for name, pin in pinned.items():
        ((operator, version),) = ((only.operator, only.version) for only in pin.specifier)
        assert operator == "=="
        assert version in asked[name].specifier, f"{pin} is outside of {asked[name]}"


def test_binder_reads_the_same_environment():
    assert (ROOT / "binder/environment.yml").read_bytes() == (ROOT / "environment.yml").read_bytes()
    assert not (ROOT / "binder/environment.yml").is_symlink()


def test_the_environment_has_every_dependency_and_nothing_else():
    asked = requirements([*PROJECT["dependencies"], *EXTRAS["dashboard"]])
    assert conda().keys() == {CONDA_NAMES.get(name, name) for name in asked} | {"python", "pip"}


def test_the_environment_pins_python_and_three_minors():
    pins = {name: pin for name, pin in conda().items() if pin}
    assert pins.keys() == {"python", "pytorch-cpu", "dask-core", "distributed"}
    assert all(re.fullmatch(r"\d+\.\d+", pin) for pin in pins.values())
    assert pins["dask-core"] == pins["distributed"]
    asked = requirements(PROJECT["dependencies"])
    assert f"{pins['python']}.0" in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert f"{pins['pytorch-cpu']}.0" in asked["torch"].specifier
    assert f"{pins['dask-core']}.0" in asked["dask"].specifier


def test_the_environment_names_no_path_and_one_channel():
    assert yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["channels"] == ["conda-forge"]
    assert not [line for line in lines("environment.yml") if re.search(r"/|\\|file:|prefix:|\s-e\s", line)]


def test_binder_holds_no_file_that_would_disable_the_others():
    assert {path.name for path in (ROOT / "binder").iterdir()} == {"apt.txt", "environment.yml", "postBuild", "start"}


def test_apt_packages_are_names_without_versions():
    packages = lines("binder/apt.txt")
    assert {"slurm-wlm", "munge", "graphviz"} <= set(packages)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package) for package in packages)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_bytes().startswith((b"#!/bin/bash\n", b"#!/usr/bin/env bash\n"))
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_post_build_stops_at_the_first_error_and_installs_only_the_package():
    script = lines("binder/postBuild")
    assert script[0] == "set -e"
    assert "pip install --no-deps --no-cache-dir -e ." in script


def test_start_hands_over_with_the_environment_set():
    """Run as Binder does, with a command that shows what Jupyter would get."""
    names = ("HPCLAB_SIZE", "DASK_DISTRIBUTED__DASHBOARD__LINK")
    code = f"import os, sys; print(os.getppid(), sys.argv[1], *map(os.environ.get, {names}), sep='\\n')"
    environment = os.environ | {"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/"}
    command = [ROOT / "binder/start", sys.executable, "-c", code, "a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # The parent is this very process: bash was replaced (exec), so that signals reach Jupyter.
    assert done.stdout.splitlines() == [str(os.getpid()), "a b", "small", "/user/ann/proxy/{port}/status"]


def test_every_chore_of_make_parses_and_is_listed():
    chores = {"run", "lab", "test", "test-quick", "long", "lint", "notebooks", "docs", "bench", "clean", "help"}
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([\w-]+) ", shown, re.MULTILINE)) == chores
    for chore in chores:
        subprocess.run(["make", "--dry-run", chore], cwd=ROOT, capture_output=True, check=True)


def test_make_runs_no_program_that_is_missing():
    programs = re.findall(r"\$\(BIN\)/python (\S+\.py)", (ROOT / "Makefile").read_text("utf-8"))
    quick = subprocess.run(["make", "-n", "test-quick"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    programs += re.findall(r"tests/\S+\.py", quick)
    assert [name for name in programs if not (ROOT / name).is_file()] == []


def test_make_refuses_an_old_python(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "run", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PYTHON (=false) must be Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    found = []
    for path in files_of_the_project():
        if path.suffix not in {".npy", ".png", ".xz"}:
            text = path.read_text("utf-8", errors="replace")
            found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in re.finditer(FORBIDDEN[what], text)]
    assert found == []


def test_contributing_stays_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 45


def test_the_changelog_knows_this_version():
    import hpclab

    assert f"## {hpclab.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")

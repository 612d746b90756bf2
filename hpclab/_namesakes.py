"""A user's files with the name of a module, such as a `random.py` beside the notebook, which others then import."""

import os
import re
import sys
from collections.abc import Iterable
from importlib.machinery import FrozenImporter

OURS = (
    *("IPython", "ipykernel", "ipywidgets", "jupyterlab", "matplotlib", "numpy", "torch"),
    *("click", "cloudpickle", "cryptography", "dask", "dask_jobqueue", "distributed", "msgpack", "platformdirs"),
    *("psutil", "toolz", "tornado", "tqdm", "traitlets", "yaml", "zict"),
)
"""Modules beside Python's own that a worker, a rank or a notebook needs."""


def blame(error: object = None, paths: Iterable[str] | None = None) -> str:
    """Say which files hide a module, as sentences; "" if none does.

    Parameters
    ----------
    error : object, optional
        What failed, or its text: only files whose module it names count. Default: all.
    paths : iterable of str, optional
        Where modules are looked for, in this order. Default: `sys.path`.
    """
    text = None if error is None else str(error)
    files = _files(sys.path if paths is None else paths)
    named = {name: file for name, file in files.items() if text is None or re.search(rf"\b{name}\b", text)}
    return " ".join(
        f"{file} hides {'Python' if name in sys.stdlib_module_names else 'the installation'}'s own module {name}, which"
        " may be the cause; rename it."
        for name, file in named.items()
    )


def _files(paths: Iterable[str]) -> dict[str, str]:
    """What hides a module, by its name: it lies in a folder that comes before that of the module."""
    hiding: dict[str, str] = {}
    library = os.path.dirname(os.__file__)
    for entry in paths:
        folder = os.path.abspath(entry) if isinstance(entry, str) else ""
        if os.path.realpath(folder) == os.path.realpath(library):
            break  # what comes later hides nothing of Python's
        if os.path.basename(folder) not in ("site-packages", "dist-packages"):
            for name, file in _modules(folder).items():
                if _needed(name):
                    hiding.setdefault(name, file)
    return hiding


def _modules(folder: str) -> dict[str, str]:
    """Modules and packages in a folder, by name, with their paths."""
    try:
        files = sorted(os.listdir(folder))
    except OSError:
        return {}  # not there, a zip file, or closed to us: nothing is imported from it
    whole = {file: os.path.join(folder, file) for file in files}
    modules = {file[:-3]: path for file, path in whole.items() if file.endswith(".py")}
    return modules | {file: path for file, path in whole.items() if os.path.isfile(f"{path}/__init__.py")}


def _needed(name: str) -> bool:
    """Whether it is a module that could be hidden: what is built in or frozen into Python can't."""
    if name in sys.builtin_module_names or FrozenImporter.find_spec(name):
        return False
    return name in sys.stdlib_module_names or name in OURS

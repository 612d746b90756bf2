"""A working copy of the course in the reader's folder, where nothing that they changed is overwritten."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hpclab import data
from hpclab.language import language

INDEX = "00_index.ipynb"
"""The notebook that opens first: what there is, what is done, and what comes next."""
SETTINGS = Path(__file__).with_name("lab")
"""Jupyter's settings for readers of the course; their own choices in JupyterLab win."""
MANIFEST = ".hpclab-course.json"
"""In the reader's folder: sha256 of each course file when it was last delivered."""


@dataclass
class Summary:
    """What `copy_course` did: names of files, relative to `folder`."""

    folder: Path
    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        named = {
            "added": self.added,
            "updated": self.updated,
            "new, beside the one you changed": self.beside,
            "yours, left as they are": self.kept,
        }
        lines = [f"  {kind}: {', '.join(files)}" for kind, files in named.items() if files]
        return "\n".join([f"The course is in {self.folder}", *lines])


def copy_course(folder: str | Path, course: Path | None = None) -> Summary:
    """Bring the course's notebooks, their glossary and scripts into a folder, or up to date there.

    A file that is missing is added, one that is as it was delivered is updated. One that the reader changed
    stays; if the course has changed too, the new one lands beside it, once, as `00_start.new.ipynb` (and as
    `00_start.new-2.ipynb` if they changed that too). Files are written whole or not at all, and the next call
    mends an interrupted one.

    Parameters
    ----------
    folder : str or Path
        The reader's folder; made if it is missing.
    course : Path, optional
        Folder with the course's notebooks; default the bundled ones.

    Returns
    -------
    Summary
        Names of the files added, updated, laid beside and kept; printing it tells the reader.

    Raises
    ------
    ValueError
        If folder is the course itself.
    OSError
        If folder can't be written, or is a file.
    """
    folder, course = Path(folder).expanduser().resolve(), (course or data.share() / "notebooks").resolve()
    if folder == course:
        raise ValueError(f"folder (={folder}) is the course itself; name another for your own copy.")
    try:
        return _copy(course, folder)
    except OSError as error:
        raise OSError(f"folder (={folder}) can't be written ({error}); name a folder of your own.") from error


def open_lab(folder: str | Path, arguments: list[str], notebook: str = INDEX) -> None:
    """Bring the course into a folder, say so, and run JupyterLab there until it is ended.

    It opens on a notebook, where the reader's language is Chinese on its Chinese edition.

    Parameters
    ----------
    folder : str or Path
        As for `copy_course`.
    arguments : list of str
        Handed on to JupyterLab, for example ["--no-browser", "--port", "8899"]. Without them it has a token
        and listens on loopback, as is its default.
    notebook : str, default "00_index.ipynb"
        What to open: a file's name, or a notebook's short name such as "scaling".

    Raises
    ------
    ModuleNotFoundError
        If JupyterLab isn't installed.
    ValueError
        If there is no such notebook.
    PermissionError
        If Jupyter would refuse to run as root; nothing is copied then.

    Notes
    -----
    What this JupyterLab leaves out for students, for authors ``jupyter lab`` has: nbgrader's menu, and questions about
    news. It wraps long lines of code, and keeps the state of controls in notebooks: opened again, they show them.
    """
    try:
        from jupyterlab.labapp import LabApp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("JupyterLab is missing; pip install jupyterlab ipywidgets") from error
    if _refuses_root(LabApp.serverapp_class(), arguments):
        raise PermissionError("you are root, which Jupyter refuses; in a container of your own, add --allow-root.")
    copied = copy_course(folder)
    first = _find(notebook, copied.folder)
    print(copied, flush=True)
    paths = os.environ.get("JUPYTER_CONFIG_PATH")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, [str(SETTINGS), paths]))
    defaults = {"--ServerApp.root_dir": copied.folder, "--LabApp.default_url": f"/lab/tree/{quote(first)}"}
    chosen = {argument.split("=")[0] for argument in arguments}  # twice the same is an error in Jupyter
    settings = [f"{name}={value}" for name, value in defaults.items() if name not in chosen]
    # In this process: Ctrl-C and signals reach Jupyter itself, which then ends its kernels.
    LabApp.launch_instance([*settings, *arguments])


def _refuses_root(server: Any, arguments: list[str]) -> bool:
    """Whether Jupyter would end as we are root, and neither an argument nor its configuration allows that."""
    allowed = any("allow-root" in word or "allow_root" in word for word in arguments)
    if allowed or getattr(os, "getuid", lambda: 1)() != 0:
        return False
    server.load_config_file()
    return not server.allow_root


def _find(notebook: str, folder: Path) -> str:
    """A notebook's file below a folder, by its name or its short name, in the reader's language if it is there."""
    there = {path.name: path.name for path in sorted(folder.glob("*.ipynb"))}
    short = {slug(name): name for name in there}
    name = there.get(notebook) or short.get(notebook)
    if name is None:
        raise ValueError(f"notebook (={notebook!r}) isn't in {folder}; use one of {', '.join(sorted(short))}.")
    return f"zh/{name}" if language() == "zh" and (folder / "zh" / name).exists() else name


def slug(name: str) -> str:
    """A notebook's short name, which stays when its number changes.

    Examples
    --------
    >>> slug("02_ddp_from_scratch.ipynb")
    'ddp-from-scratch'
    """
    return name.removesuffix(".ipynb").partition("_")[2].replace("_", "-")


def _copy(course: Path, folder: Path) -> Summary:
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary(folder)
    delivered = _read_manifest(folder)
    patterns = ("*.ipynb", "zh/*.ipynb", "glossary.md", "scripts/*.py", "scripts/*.sh")  # and no __pycache__
    for path in sorted(path for pattern in patterns for path in course.glob(pattern)):
        _deliver(path.relative_to(course).as_posix(), path.read_bytes(), delivered, summary)
        _write(folder / MANIFEST, json.dumps(delivered, indent=1, sort_keys=True).encode())
    return summary


def _deliver(name: str, content: bytes, delivered: dict[str, str], summary: Summary) -> None:
    """Deliver one course file, or not, and note in `delivered` and in `summary` what was done."""
    theirs, known, new = (
        _sha256(summary.folder / name),
        delivered.get(name),
        hashlib.sha256(content).hexdigest(),
    )
    delivered[name] = new
    if theirs is None:
        summary.added.append(name)
    elif theirs == new:
        return
    elif theirs == known:
        summary.updated.append(name)
    elif known == new:
        summary.kept.append(name)
        return
    else:
        name = _beside(name, new, delivered, summary.folder)
        delivered[name] = new
        summary.beside.append(name)
    _write(summary.folder / name, content)


def _beside(name: str, new: str, delivered: dict[str, str], folder: Path) -> str:
    """First name beside a file that is free, or holds an earlier delivery that the reader hasn't touched."""
    (stem, suffix), number = os.path.splitext(name), 1
    while True:
        candidate = f"{stem}.new{f'-{number}' if number > 1 else ''}{suffix}"
        if _sha256(folder / candidate) in (None, new, delivered.get(candidate)):
            return candidate
        number += 1


def _read_manifest(folder: Path) -> dict[str, str]:
    """What was delivered; without a readable manifest nothing, so that all that differs is the reader's."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

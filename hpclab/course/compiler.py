"""What torch.compile needs, and a process of its own for what needs much memory."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from hpclab import _namesakes
from hpclab.language import translate as _

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
import cloudpickle
from pathlib import Path
function, arguments = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
Path(sys.argv[2]).write_bytes(cloudpickle.dumps(function(*arguments)))
"""


def missing() -> str | None:
    """What torch.compile lacks on this machine, in words; None if it can compile for a CPU."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if shutil.which(name) is None:
        return _("torch.compile needs a C++ compiler, but there is no {name} here; Debian: apt install g++", name=name)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return _("torch.compile needs Python's headers, which are missing here; Debian: apt install python3-dev")
    return None


def apart(function: Callable, *arguments: Any) -> Any:
    """Call a function in a process of its own, which gives its memory back when it ends.

    Parameters
    ----------
    function : callable
        May be a notebook's own, with all that it uses there; what it prints is dropped.

    Returns
    -------
    object
        What the function returned, by cloudpickle.

    Raises
    ------
    RuntimeError
        If it raised, or its process died; with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="hpclab-") as folder:
        call, answer = Path(folder, "call"), Path(folder, "answer")
        call.write_bytes(cloudpickle.dumps((function, arguments)))
        paths = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        done = subprocess.run([sys.executable, "-c", _CHILD, call, answer, paths], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            what = f"In its own process, {getattr(function, '__name__', function)} failed: {last}"
            raise RuntimeError(f"{what} {_namesakes.blame(done.stderr)}".rstrip())
        return cloudpickle.loads(answer.read_bytes())

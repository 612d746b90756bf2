"""The folder of a private Slurm: how it is made, who keeps it, and what becomes of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from hpclab import _private
from hpclab.slurm import conf

PATIENCE_SECONDS = 30
"""How long daemons may take on a busy machine before what was asked of them counts as failed."""


def home() -> Path:
    """This user's private folder; one in /tmp if Slurm can't read the name of that where TMPDIR says."""
    folder = _private.folder()
    return folder if _readable(folder / "slurm-12345678") or not os.access("/tmp", os.W_OK) else _private.folder("/tmp")


def _readable(folder: Path) -> bool:
    short = len(os.fsencode(folder)) <= conf.MOST_FOLDER
    return short and bool(conf.FOLDER.fullmatch(str(folder)))


def make(wanted: str | Path | None) -> Path:
    """Make the folder: the one that the user wants, or a new one in this user's private folder."""
    if wanted is None:
        folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=home()))
    else:
        folder = Path(wanted).expanduser().absolute()
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"folder (={str(wanted)!r}) already holds something; name a new or empty one.")
        folder.chmod(0o700)
    if not _readable(folder):
        folder.rmdir()
        raise ValueError(
            f"folder (={str(folder)!r}) must have at most {conf.MOST_FOLDER} bytes, for the sockets in it, and"
            " only letters, digits and ._+@-, which Slurm reads; give another as folder=, or set TMPDIR."
        )
    return folder


def hire(folder: Path, plan: dict) -> subprocess.Popen:
    """Start the keeper in a folder; returns when it can be called there."""
    with (folder / "keeper.log").open("w") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", Path(__file__).with_name("keeper.py"), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
    try:
        assert keeper.stdin and keeper.stdout
        with keeper.stdout, keeper.stdin:
            keeper.stdin.write(json.dumps(plan))
            keeper.stdin.close()
            if not keeper.stdout.readline():
                raise RuntimeError(f"the keeper of a private Slurm ended:\n{(folder / 'keeper.log').read_text()}")
    except BaseException:
        keeper.terminate()
        keeper.wait()
        raise
    if plan["owner"] is None:
        keeper.wait()  # it goes on in a child of its own
    return keeper


def call(folder: Path, *words: str) -> list[str]:
    """Ask the keeper of a folder for something; see `hpclab.slurm.keeper`.

    Raises
    ------
    ConnectionError or FileNotFoundError
        If it isn't there.
    TimeoutError
        If it is too busy to answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.settimeout(PATIENCE_SECONDS)
        caller.connect(str(folder / "keeper"))
        caller.send(json.dumps(words).encode())
        try:
            answer = caller.recv(65536)
        except TimeoutError:
            raise TimeoutError(f"the private Slurm in {folder} didn't answer within {PATIENCE_SECONDS} s.") from None
    if not answer:
        raise ConnectionError(f"the private Slurm in {folder} has just ended.")
    return json.loads(answer) or []


def kept(folder: Path) -> bool:
    """Whether the keeper of a folder, or a daemon's host, is alive: they hold a lock that the kernel frees."""
    import fcntl  # Windows has none

    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def own() -> list[Path]:
    """All folders that were made for this user without a wish where; also those that were left."""
    return list(home().glob("slurm-*")) if hasattr(os, "getuid") else []  # Windows has neither


def clear() -> None:
    """Remove the folders whose keeper was killed; hold the lock of the private folder, else one in the making goes."""
    for folder in own():
        if not kept(folder):
            _end_jobs(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _end_jobs(folder: Path) -> None:
    """Kill what was left of jobs: their steps, and processes that still have a job's environment.

    The daemons themselves die with what keeps them.
    """
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):  # of other users, or it has just ended
            env = process.environ()
            of_a_job = "SLURMD_NODENAME" in env and env.get("SLURM_CONF") == f"{folder}/slurm.conf"
            if of_a_job or (process.name() == "slurmstepd" and process.cwd() == str(folder)):
                process.kill()

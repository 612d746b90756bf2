"""A notebook's kernel where it can do no harm: in bubblewrap's namespaces, as another user, under limits."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil

from hpclab import data
from hpclab.course import fork

TASKS = 256
"""Threads of all processes in the sandbox together, beside 16 for each CPU: libraries start one for each."""
PROCESSES = 128
"""Processes at which a notebook is stopped: no training here needs that many."""
STRAY = 2**24
"""Bytes that may be written into the folder of the sockets, the only one that is not private to the sandbox."""
LONGEST_PATH = 75
"""Bytes of the path in which a kernel's folder is made: its own name and a socket's take 32 more."""
HOME = "/home/student"
USER = 61234
"""User and group in a sandbox made by root: nobody's, from the range that systemd keeps for such."""
INSTALL = "apt install bubblewrap"


class Stopped(Exception):
    """A limit ended the notebook's kernel, or the kernel is dead; says why."""


@dataclass
class Kernel:
    """A kernel in a sandbox: the client that talks to it, and its first process."""

    client: Any
    process: subprocess.Popen
    folder: Path
    memory: int
    home: str
    seen: list[psutil.Process] = field(default_factory=list)

    def look(self) -> None:
        """Raise `Stopped` if the kernel has ended, or all of its processes together take too much."""
        if self.process.poll() is not None:
            raise Stopped("dead")
        processes = self.family()
        if len(processes) > PROCESSES:
            raise Stopped("processes")
        if sum(map(_memory, processes)) > self.memory and sum(map(_share, processes)) > self.memory:
            raise Stopped("memory")
        if self.stray() > STRAY:
            raise Stopped("disk")

    def stray(self) -> float:
        """Bytes in the folder of the sockets; infinitely many if a student has put a folder there, or closed it."""
        try:
            with os.scandir(self.folder) as entries:
                return sum(self._size(entry) for entry in entries)
        except OSError:  # closed, or removed
            return math.inf

    def _size(self, entry: os.DirEntry) -> float:
        if entry.is_dir(follow_symlinks=False):
            return 0 if entry.path == self.home else math.inf
        with contextlib.suppress(OSError):  # it has just gone
            return entry.stat(follow_symlinks=False).st_size
        return 0

    def family(self) -> list[psutil.Process]:
        """Its processes; once the first has ended, those that were last seen."""
        self.seen = fork.family(self.process.pid) or self.seen
        return self.seen


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def _share(process: psutil.Process) -> int:
    """Memory of a process where forks share most of their pages: slower to find out than `_memory`."""
    with contextlib.suppress(psutil.Error, AttributeError):
        return process.memory_full_info().pss
    return _memory(process)


def missing() -> str | None:
    """Why no sandbox can be made here, in English; None if one can."""
    if sys.platform != "linux":
        return "bubblewrap is for Linux"
    if shutil.which("bwrap") is None:
        return f"bubblewrap is missing; {INSTALL}"
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        return "setpriv is missing; apt install util-linux"
    try:
        with _folder() as folder:
            command = [*wrapped(folder, []), sys.executable, "-c", "import hpclab, ipykernel.kernelapp"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment(HOME))
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap doesn't work here: {error}"
    if done.returncode:
        return f"bubblewrap doesn't work here, or can't run a kernel: {done.stderr.strip()[-200:]}"
    return None


@contextlib.contextmanager
def kernel(
    memory: int,
    hidden: list[Path],
    environment: dict[str, str],
    trust: bool,
    beside: IO[bytes],
    inner: Path,
) -> Iterator[Kernel]:
    """A fresh kernel, in a sandbox unless it is trusted, which ends with this context, and all that it has started.

    Parameters
    ----------
    memory : int
        Bytes, for all of its processes together.
    hidden : list of Path
        Folders that stay hidden even where they lie within what the kernel must see.
    environment : dict of str
        Variables beside those that a kernel needs.
    trust : bool
        Run it without a sandbox, but with a folder and a session of its own.
    beside : binary file
        A tar archive, unpacked into the kernel's home before it starts.
    inner : Path
        Folder in its home in which the kernel works.
    """
    from jupyter_client import BlockingKernelClient
    from jupyter_client.connect import write_connection_file

    with _folder() as folder:
        file, settings = write_connection_file(
            str(folder / "kernel.json"), ip=str(folder / "s"), transport="ipc", key=os.urandom(24).hex().encode()
        )
        home = HOME
        if trust:
            (folder / "home").mkdir()
            home = str(folder / "home")
        elif os.getuid() == 0:
            for path in (folder, folder / "kernel.json"):
                os.chown(path, USER, USER)
        command = [sys.executable, "-c", _START, str(inner), "-f", file]
        process = subprocess.Popen(
            command if trust else [*wrapped(folder, hidden), *command],
            env=_environment(home) | environment,
            cwd=home if trust else "/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(_limit, memory, trust),
        )
        client = BlockingKernelClient()
        started = Kernel(client, process, folder, memory, home)
        feeder = threading.Thread(target=_feed, args=(beside, process.stdin), daemon=True)
        try:
            feeder.start()
            client.load_connection_info(json.loads(Path(file).read_text()) | {"key": settings["key"]})
            client.start_channels()
            yield started
        finally:
            _end(started)
            if feeder.ident:
                feeder.join()  # it uses the caller's file; the end of the kernel ends the pipe


def _feed(archive: IO[bytes], pipe: IO[bytes] | None) -> None:
    """Write an archive into a pipe: a kernel that had the file itself could write to it, on the grader's disk."""
    assert pipe is not None
    with contextlib.suppress(BrokenPipeError), pipe:  # it has ended, or has read all that it needs
        shutil.copyfileobj(archive, pipe)


_START = """
import os, runpy, sys
del sys.path[0]  # nothing that lies beside the notebook is imported before the kernel has begun
import tarfile
with open(0, "rb", closefd=False) as archive, tarfile.open(fileobj=archive, mode="r|") as tar:
    tar.extractall(**({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
nothing = os.open(os.devnull, os.O_RDONLY)
os.dup2(nothing, 0)
os.makedirs(sys.argv[1], exist_ok=True)
os.chdir(sys.argv.pop(1))
runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
"""
"""What the kernel's first process runs, in its home: it unpacks there as the student, into the student's own disk."""


def _end(started: Kernel) -> None:
    """End the kernel and all that it has started; in a sandbox, the end of its first process is the end of all."""
    family = started.family()
    with contextlib.suppress(Exception):  # whatever state they are in: what counts is that the kernel ends
        started.client.stop_channels()
    fork.kill(started.process.pid, family)
    started.process.wait()
    psutil.wait_procs(family, timeout=30)


def base() -> Path:
    """Where the folders of kernels are made.

    Raises
    ------
    OSError
        If there is no such folder, or its path is too long: a socket's has at most 107 bytes.
    """
    folder = Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    if (size := len(os.fsencode(folder))) > LONGEST_PATH:
        raise OSError(
            f"TMPDIR (={folder}) has {size} bytes, but kernels put sockets there, whose paths may have 107; set it to"
            f" a folder whose path has at most {LONGEST_PATH} bytes."
        )
    return folder


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A private folder with a short name."""
    folder = tempfile.mkdtemp(prefix="hpclab-grade-", dir=base())
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(home: str) -> dict[str, str]:
    """What a kernel needs; nothing else of the grader's own environment, where secrets may be."""
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "HPCLAB_LANG", "HPCLAB_PATIENCE", "HPCLAB_TESTS")
    packages = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if _holds_packages(place)]
    own = {"HOME": home, "USER": "student", "LOGNAME": "student"}
    own |= {"PYTHONPATH": os.pathsep.join([str(Path(data.__file__).parents[2]), *packages])}
    own |= {"PYTHONDONTWRITEBYTECODE": "1", "HPCLAB_SIZE": "small"}
    return {name: os.environ[name] for name in kept if name in os.environ} | own


def _holds_packages(place: str) -> bool:
    """Whether a place that Python looks in is one of installed packages, and no folder of the teacher's."""
    return Path(place).name in ("site-packages", "dist-packages")


def _limit(memory: int, trust: bool) -> None:
    """Limits that the kernel and all its children inherit; runs between fork and exec."""
    import resource

    fork.lower(resource.RLIMIT_DATA, memory)
    fork.lower(resource.RLIMIT_CORE, 0)
    if not trust:
        fork.lower(resource.RLIMIT_NPROC, TASKS + 16 * (os.cpu_count() or 1) + _tasks())


def _tasks() -> int:
    """Threads that the user of the sandbox has already, where that user is the grader: they count to its limit."""
    if os.getuid() == 0:
        return 0
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                count += len(os.listdir(folder / "task"))
    return count


def wrapped(folder: Path, hidden: list[Path]) -> list[str]:
    """Command line that runs another one in a sandbox with a read-only system and Python, and `folder`."""
    passwd, group = folder / "passwd", folder / "group"
    user = USER if os.getuid() == 0 else os.getuid()
    passwd.write_text(f"root:x:0:0::/root:/bin/sh\nstudent:x:{user}:{user}::{HOME}:/bin/sh\n")
    group.write_text(f"root:x:0:\nstudent:x:{user}:\n")
    bwrap = ["bwrap", "--die-with-parent", "--new-session", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    bwrap += ["--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:
        bwrap += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        bwrap += ["--unshare-user"]
    bwrap += ["--proc", "/proc", "--dev", "/dev"]
    for place in ("/tmp", "/var/tmp", "/run", HOME, "/dev/shm"):
        bwrap += ["--perms", "1777", "--size", str(2**30), "--tmpfs", place]
    for place in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt"):
        bwrap += ["--symlink", os.readlink(place), place] if os.path.islink(place) else ["--ro-bind-try", place, place]
    for path in _above([str(folder), *_seen(), *_ETC]):
        bwrap += ["--perms", "0755", "--dir", path]  # what bubblewrap itself makes above a mount is for root only
    for place in (*_ETC, "/sys"):
        bwrap += ["--ro-bind-try", place, place]
    for file in (passwd, group):
        file.chmod(0o644)  # whatever the grader's umask
        bwrap += ["--ro-bind", str(file), f"/etc/{file.name}"]
    for path in _seen():
        bwrap += ["--ro-bind", path, path]
    for masked in hidden:
        if any(Path(seen) in (masked, *masked.parents) for seen in [*_seen(), "/usr", "/opt"]):
            bwrap += ["--tmpfs", str(masked)]
    bwrap += ["--bind", str(folder), str(folder), "--chdir", HOME, "--"]
    if os.getuid() == 0:
        bwrap += ["setpriv", f"--reuid={USER}", f"--regid={USER}"]
        bwrap += ["--clear-groups", "--inh-caps=-all", "--no-new-privs"]
    return bwrap


def _above(paths: list[str]) -> list[str]:
    """Folders that paths lie in, the outer ones first."""
    return sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"})


_ETC = tuple(
    f"/etc/{name}"
    for name in (
        *("alternatives", "fonts", "host.conf", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d"),
        *("localtime", "nsswitch.conf", "services", "protocols", "ssl/certs", "ssl/openssl.cnf", "mime.types"),
    )
)


def _seen() -> list[str]:
    """Folders that a kernel needs beside the system's: Python, its packages, and hpclab without its notebooks."""
    package = Path(data.__file__).parents[1]
    python = Path(os.path.realpath(sys.executable)).parents[1]
    paths = [Path(sys.prefix), Path(sys.base_prefix), python, package, data.share() / "data"]
    paths += [Path(entry) for entry in sys.path if _holds_packages(entry)]
    outermost: list[str] = []
    for name in sorted({str(path) for path in paths if path.is_dir()}):
        if not any(Path(wider) in (Path(name), *Path(name).parents) for wider in [*outermost, "/usr"]):
            outermost.append(name)
    return outermost

"""A folder that only this user can enter, and a lock on it that the kernel frees."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder() -> Path:
    """Where sockets and other things of this user lie; made if it isn't there.

    Raises
    ------
    PermissionError
        If others could enter it, or own it.
    """
    path = Path(tempfile.gettempdir(), f"hpclab-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    about = path.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(
            f"folder {path} must belong to this user alone; remove it, or set TMPDIR to a folder of yours."
        )
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a folder; the kernel frees it, however its holder ends."""
    import fcntl  # Windows has none, and needs none

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

"""A folder that only this user can enter, and a lock on it that the kernel frees."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder(base: str | None = None) -> Path:
    """Where sockets and other things of this user lie, by default in TMPDIR; made if it isn't there.

    Raises
    ------
    PermissionError
        If others could enter it, or own it.
    FileNotFoundError
        If the folder of temporary files is gone.
    """
    path = Path(base or tempfile.gettempdir(), f"hpclab-{os.getuid()}")
    with _named():
        path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(
            f"folder {path} must belong to this user alone; remove it, or set TMPDIR to a folder of your own."
        )
    return path


def restore(path: Path) -> None:
    """Make a worker's own folder again, and the one that it lies in, where somebody has cleaned ``/tmp`` meanwhile.

    Raises
    ------
    PermissionError
        If another user has been faster.
    FileNotFoundError
        If the folder of temporary files is gone, too.
    """
    with _named():
        path.parent.mkdir(exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
        raise PermissionError(f"folder {path} belongs to another user; restart the workers, which then make new ones.")


@contextmanager
def _named() -> Iterator[None]:
    """Say which folder is gone if one can't be made in it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the folder of temporary files, {tempfile.gettempdir()}, is gone; create it again, or set TMPDIR to one"
            " that stays before Python starts."
        ) from None


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock on a folder, which the kernel frees, however its holder ends; gives a handle of the folder."""
    import fcntl  # Windows has none, and needs none

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)

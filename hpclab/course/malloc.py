"""Whether the C library keeps the memory that a process has freed, or gives it back to the system."""

import ctypes
import platform

from hpclab.gangs.host import KEPT

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3): free memory at the top beyond which it is given back; size from which on an
allocation is mapped by itself, and unmapped when it is freed."""
FIRST = 2**17
"""Bytes: the 128 kB with which glibc begins, before it adapts both."""


def missing() -> bool:
    """Whether this system has another C library than glibc, whose malloc can't be set so."""
    return platform.libc_ver()[0] != "glibc"


def keep(kept: bool) -> None:
    """Have malloc keep freed memory of this process from now on, or give back each large block.

    A process that sets neither lies between the two: glibc raises its limits as larger blocks are freed (mallopt(3)).

    Changes nothing where the C library isn't glibc; see `missing`.
    """
    if missing():
        return
    size = KEPT if kept else FIRST
    for parameter in (TRIM_THRESHOLD, MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, size)

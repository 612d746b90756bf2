"""The most memory that a rank has held, as the system counts it. Ranks import it, so it imports little."""

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

RESET = "5"
"""Written to /proc/self/clear_refs, it sets the highest to what is held now: proc_pid_clear_refs(5)."""


class Peak:
    """What this process holds at most from now on, beyond what it holds now.

    It counts pages, so also what a library loads when it is first used, and freed memory that malloc keeps.
    """

    def __init__(self) -> None:
        with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)  # else what is held then would hide in what was freed before
        with suppress(OSError):  # no Linux, or a kernel without CONFIG_PROC_PAGE_MONITOR
            Path("/proc/self/clear_refs").write_text(RESET)
        self.before = _highest()

    def row(self) -> dict[str, float]:
        """For a row: ``peak_mb``, in MB of 10**6 bytes; nothing on Windows."""
        return {} if self.before is None else {"peak_mb": ((_highest() or 0) - self.before) / 1e6}


def _highest() -> int | None:
    """Bytes of memory that this process has held at most."""
    with suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None

"""Kernel: what a run leaves on disk: its folder, rows and logs; and a run that is shown again from them."""

import io
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from hpclab.rows import read


class Record:
    """A run as its folder describes it, even when the kernel is gone.

    Attributes
    ----------
    name : str
        Unique name of this run.
    folder : Path
        Holds ``rows.jsonl``, one row a line, written as they come, and ``rank-<n>.log``, what each rank printed.
    rows : list of dict
        What the ranks have reported, see `hpclab.rows`; the first row, of kind "run", describes the machine.
    ranks : int
        Number of ranks.
    status : str
        "waiting" (for room; ``place`` is its number in the queue), "running", "recovering" (between two attempts),
        "finished", "failed" or "stopped"; "interrupted" if its kernel ended first.
    """

    def __init__(self, name: str, folder: Path, ranks: int, rows: list[dict], status: str):
        self.name = name
        self.folder = folder
        self.ranks = ranks
        self.rows = rows
        self.status = status
        self.place = 0
        self.quiet = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.state()}, {self.ranks} ranks, {len(self.rows)} rows>"

    def state(self) -> str:
        """The status; for a waiting run, with its place in the queue."""
        return f"waiting, {self.place} in the queue" if self.status == "waiting" else self.status

    @property
    def title(self) -> str:
        """What it is called, see `titled`."""
        return titled(self.name)

    @property
    def going(self) -> bool:
        """Whether it has not ended."""
        return self.status in ("waiting", "running", "recovering")

    def error(self) -> str:
        """Return what ended a run that failed, as text; "" of any other."""
        ends = [row for row in self.rows if row.get("kind") == "end"]
        return ends[-1].get("error", "") if ends else ""

    def _ipython_display_(self) -> None:
        from hpclab.views import show

        self.quiet = True  # the view shows what is printed
        show(self)

    def logs(self, rank: int | None = None) -> str:
        """Return what a rank has printed; if you name none, what all ranks have printed, one after another."""
        if rank is None:
            return "".join(f"[rank {number}]\n{self.logs(number)}" for number in range(self.ranks))
        self._check_rank(rank)
        file = self.folder / f"rank-{rank}.log"
        return file.read_bytes().decode() if file.exists() else ""

    def tail(self, rank: int, lines: int, size: int = 4096) -> list[str]:
        """The newest lines that a rank printed, from the last `size` bytes; a progress bar shows its last state."""
        file = self.folder / f"rank-{rank}.log"
        if not file.exists():
            return []
        with open(file, "rb") as text:
            text.seek(max(0, file.stat().st_size - size))
            printed = text.read().decode("utf-8", "replace").rstrip("\r\n").split("\n")
        return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in printed[-lines:]]

    def _check_rank(self, rank: int) -> None:
        if rank not in range(self.ranks):
            raise ValueError(f"rank (={rank!r}) must be from 0 to {self.ranks - 1}.")


def titled(name: str) -> str:
    """What a run is called, without the time and the mark that make its name unique.

    >>> titled("20260101-120000-race-1a2b")
    'race'
    """
    return re.sub(r"^\d{8}-\d{6}-|-[0-9a-f]{4}$", "", name)


def open_run(folder: str | os.PathLike) -> Record:
    """Reopen a run from its folder: a finished run, or one whose kernel is gone.

    Raises
    ------
    FileNotFoundError
        If the folder has no rows of a run.
    """
    path = Path(folder).expanduser().absolute()
    rows = read(path / "rows.jsonl") if (path / "rows.jsonl").is_file() else []
    # Its first row, or if that is damaged any that a rank reported.
    first = next((row for row in rows if row.get("kind") == "run" or {"run", "attempt", "ranks"} <= {*row}), None)
    if first is None:
        raise FileNotFoundError(
            f"folder (={str(folder)!r}) holds no rows.jsonl of a run; name one such as results/<run>."
        )
    status = next((row["status"] for row in rows if row.get("kind") == "end" and "status" in row), "interrupted")
    return Record(first["run"], path, first["ranks"], rows, status)


class Log:
    """What one rank prints: all of it on disk, shown as it comes with the rank's number, and cut short in a flood."""

    LINES = 200
    """Lines that are shown a second."""

    def __init__(self, path: Path, rank: int):
        self.path = path
        self.rank = rank
        self.tail = ""
        self.second, self.shown, self.hidden = 0.0, 0, 0

    def take(self, text: str, shown: bool = True) -> None:
        """Keep what came, and show its whole lines."""
        if text:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        *lines, tail = (self.tail + text).split("\n")
        self.tail = tail.rpartition("\r")[2] or tail  # a progress bar overwrites itself, and may never end its line
        for whole in lines if shown else ():
            self._show(whole)

    def close(self) -> None:
        """Show a last line that has no end, and how many were not shown."""
        if self.tail:
            self._show(self.tail)
        self._own_up()

    def _show(self, line: str) -> None:
        now = time.monotonic()
        if now - self.second > 1:
            self._own_up()
            self.second, self.shown = now, 0
        if self.shown < self.LINES:
            self.shown += 1
            self._write(line.rstrip("\r").rpartition("\r")[2])
        else:
            self.hidden += 1

    def _own_up(self) -> None:
        if self.hidden:
            self._write(f"... {self.hidden:,} more lines are in {self.path}")
            self.hidden = 0

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone must not end a run
            tqdm.write(f"[rank {self.rank}] {line}")
            if isinstance(sys.stdout, io.TextIOWrapper):  # it may be a pipe, or a job's log; a notebook's sends itself
                sys.stdout.flush()


def occupy(folder: str | os.PathLike) -> Path:
    """Make a folder for results; an existing one must be empty.

    Raises
    ------
    ValueError
        If the folder holds something, or is a file.
    PermissionError
        If it can't be written.
    """
    path = Path(folder).expanduser().absolute()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"folder (={str(folder)!r}) already holds something; name a new one, or remove it.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(
            f"folder (={str(folder)!r}) can't be created: {error}; name one that you may write to."
        ) from None
    if not os.access(path, os.W_OK):
        raise PermissionError(f"folder (={str(folder)!r}) can't be written; name one that you may write to.")
    return path

"""Kernel: an interactive gang, whose ranks live between the cells of a notebook, and the magic ``%%ranks``."""

import itertools
import linecache
import os
import queue
import re
import threading
import time
from collections import ChainMap, defaultdict, deque
from collections.abc import Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from distributed import Client
from IPython import get_ipython
from IPython.core.error import UsageError
from IPython.core.inputtransformer2 import TransformerManager

from hpclab._arguments import plain, whole_number
from hpclab.gangs import wire
from hpclab.gangs.attempt import unpickle
from hpclab.gangs.launch import check_size, launch, pickled
from hpclab.gangs.progress import waits, with_source
from hpclab.gangs.run import Run
from hpclab.gangs.scheduler import aside, send
from hpclab.gangs.worker import fetch

FOLD_SECONDS = 0.1
"""How long a line of a rank waits for the same line of the others."""
LOOK_SECONDS = 1.0
"""How often to look whether ranks wait for one that has failed."""
SLOW_SECONDS, SLOWER = 10.0, 3
"""After how long a cell says where its ranks are, and how many times as long until it says so again."""
LEAVE_SECONDS = 2.0
"""How long an interrupted rank may take to leave its cell."""
CLOSE_SECONDS = 2.0
"""How long ranks may take to end when the gang is closed: exit handlers run."""
LOST_SECONDS = 10.0
"""How long a run may take to tell that it has lost a worker that took no order."""
_CELL_FRAME = re.compile(r'File "(?P<file><ranks \w+ \d+>)", line (?P<line>\d+) in (?P<name>.+)')
_cells = itertools.count(1)
_open: list["Gang"] = []


class CellError(RuntimeError):
    """A cell that failed on a rank; the text is that rank's traceback, and who it was."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the frames of the notebook's side would only hide the cell's."""
        return [f"{type(self).__name__}: {self}"]


class CellInterrupt(KeyboardInterrupt):
    """A cell that was interrupted; the text tells on which line of it each rank stood."""

    _render_traceback_ = CellError._render_traceback_


class Values(dict):
    """What the last line of a cell gave, as text by rank; shown with equal ones as one."""

    def __repr__(self) -> str:
        return "\n".join(_labelled(self))


def gang(
    client: Client,
    ranks: int | None = None,
    *,
    threads: int = 1,
    oversubscribe: bool = False,
    wait: bool = False,
    memory: int | str | None = None,
    folder: str | os.PathLike | None = None,
) -> "Gang":
    """Start ranks that stay alive between a notebook's cells: from now on, a ``%%ranks`` cell runs on each of them.

    Each rank keeps the variables of its cells. It starts with `torch`, `dist` (torch.distributed, initialised),
    `rank` and `ranks`.

    Parameters
    ----------
    client, ranks, threads, oversubscribe, wait, memory, folder
        As for `launch`, with the same errors.

    Returns
    -------
    Gang
        When all ranks have started. It is also a context manager, which closes it.

    Notes
    -----
    Cells take IPython's syntax too: ``!command`` prints line by line, ``x = !command``, ``name?``, ``await``, %cd,
    %env, %pwd, %time, and %timeit with a number of loops, which must be the same on all ranks that communicate.
    An asyncio task that a cell leaves behind continues while another cell awaits. Cells can't ask: `input` is an error.

    ``%%ranks`` uses the newest open gang; ``%%ranks --on 0,2`` uses only these ranks of it. It shows what ranks print
    as they print it, equal lines once, and the value of the last line. If you interrupt a cell, or a rank fails while
    others wait for it, no variables are lost. All ranks then have a new process group, so whatever holds the old one (a
    group of `dist.new_group`, a DDP model) must be made again. Interrupting can't end C code that never looks for
    signals, gloo's receive from any rank (`dist.recv` without ``src``) or, on Windows, any collective: the message then
    names the rank, and only `Gang.close` ends it.
    """

    def work() -> None:
        from hpclab.gangs.rank_cells import serve  # here, since it imports torch, which the notebook's kernel need not

        serve()

    settings: dict = {"threads": threads, "oversubscribe": oversubscribe, "wait": wait, "memory": memory}
    run = launch(client, work, ranks=ranks, **settings, folder=folder, hang_after=None, name="gang")
    made = Gang(client, run)
    _open.append(made)
    if (shell := get_ipython()) is not None:
        shell.register_magic_function(_ranks, "cell", "ranks")
    return made


class Gang:
    """Ranks that run one cell after another; `gang` makes one.

    Attributes
    ----------
    ranks : int
        Number of ranks.
    folder : Path
        Holds ``rows.jsonl``, and ``rank-<n>.log`` with what C code and other programs printed on each rank.
    rows : list of dict
        What the ranks reported (by `hpclab.report`); the first row, of kind "run", describes the machine.
    """

    def __init__(self, client: Client, run: Run):
        self.ranks = run.ranks
        self.folder = run.folder
        self.rows = run.rows
        self._client = client
        self._run = run
        self._workers: dict[int, str] = {}
        self._sender = ThreadPoolExecutor(1)  # orders arrive in turn, whatever interrupts the notebook's cell
        self._sent: Future = Future()
        self._group = 1
        self._lock = threading.Lock()
        try:
            while len(self._workers) < self.ranks:
                rank, message = self._hear()
                if isinstance(message, wire.Ready):
                    self._workers[rank] = message.worker
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Gang {self._run.name}: {self._run.state()}, {self.ranks} ranks>"

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, code: str, on: int | Iterable[int] | None = None) -> Values | None:
        """Run code on the ranks, and wait for it; what ``%%ranks`` does with the text of its cell.

        Parameters
        ----------
        code : str
            Python and IPython's additions: ``!command``, ``x = !command``, ``name?``, ``await``, and a few magics.
        on : int or iterable of int, optional
            The rank or ranks to run it on. Default: all.

        Returns
        -------
        Values or None
            If the last line is an expression, the text of its value by rank; None if it is None on all ranks.

        Raises
        ------
        CellError
            If it fails on a rank, or if a rank has died; after a death the gang has ended, and takes no more cells.
        CellInterrupt
            On Ctrl-C, once the ranks have left the cell; it is a KeyboardInterrupt.
        """
        return _values(self._ask(code, on))

    def push(self, **values: Any) -> None:
        """Set variables on the ranks; the values are pickled (by cloudpickle).

        Raises
        ------
        TypeError
            If one can't be pickled; the message names it.
        ValueError
            If they would fill a worker's memory.
        """
        body = pickled(values, values)
        check_size(self._client, len(body), self.ranks, "these values")
        self._ask("", body=body)

    def pull(self, expression: str, on: int | Iterable[int] | None = None) -> list:
        """Return the value of a variable or an expression from all ranks, or some, in rank order."""
        answers = self._ask(expression, on, pull=True)
        workers = sorted(set(self._workers.values()))
        fetching = aside(partial(self._client.run, fetch, self._run.name, workers=workers))
        while futures.wait([fetching], FOLD_SECONDS).not_done:
            self._check()  # a worker that has gone would be tried for long
        values = ChainMap(*fetching.result().values())  # of all workers
        return [unpickle(values[rank], f"the value of rank {rank}") for rank in sorted(answers)]

    def close(self) -> None:
        """End the ranks and lose their variables; a rank that doesn't end by itself is killed."""
        if self in _open:
            _open.remove(self)
        with suppress(RuntimeError):  # it was closed before
            self._order(wire.Close())
        self._run.wait(CLOSE_SECONDS)
        self._run.stop(now=True)
        self._sender.shutdown(wait=False)

    def _ask(
        self, code: str, on: Any = None, name: str = "", body: bytes = b"", pull: bool = False
    ) -> dict[int, wire.Answered]:
        """Run a cell; the answers by rank."""
        wished = range(self.ranks) if on is None else on if isinstance(plain(on), Iterable) else [on]
        try:
            picked = {whole_number("on", rank, 0, self.ranks - 1) for rank in wished}
        except ValueError:
            picked = set()
        if not picked:
            raise ValueError(f"on (={on!r}) must name ranks from 0 to {self.ranks - 1}.")
        number = next(_cells)
        name = name or f"<ranks run {number}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        python = code if pull else _python(code)
        order = wire.RunCell(
            cell=number, name=name, source=code, code=python, pull=pull, on=sorted(picked), group=0, body=body
        )
        with self._lock:
            self._check()
            order.group = self._group
            return _Cell(self, order).follow()

    def _order(self, order: wire.Order) -> None:
        """Give all ranks an order, after those that were given before."""
        workers = sorted(set(self._workers.values()))
        self._sent = self._sender.submit(send, self._client, workers, self._run.name, order)

    def _hear(self) -> tuple[int, wire.Message | None]:
        """The next that a rank says, or its worker of it, or None for now; raises if the gang has ended."""
        try:
            return self._run.said.get(timeout=0.02)
        except queue.Empty:
            lost = self._sent.done() and self._sent.exception() is not None
            self._check(LOST_SECONDS if lost else 0)
            if lost:
                self._sent.result()
            return -1, None

    def _check(self, seconds: float = 0) -> None:
        """Raise if the gang has ended, or does within some seconds, and all that its ranks said has been heard."""
        if self._run.wait(seconds) and self._run.said.empty():
            why = f"gang {self._run.name} was closed."
            try:
                self._run.result()
            except Exception as error:
                why = str(error)
            raise CellError(f"{why} The gang has ended; hpclab.gang(...) makes a new one.")


class _Cell:
    """One cell at work: what its ranks printed and answered, and where they are, if asked."""

    def __init__(self, gang: Gang, order: wire.RunCell):
        self.gang = gang
        self.order = order
        self.left = set(order.on)
        """Ranks that have not answered."""
        self.answers: dict[int, wire.Answered] = {}
        self.failures: dict[int, wire.CellFailed] = {}
        self.stacks: dict[int, str] | None = None
        """Where the ranks are, once they were asked; what comes before is an answer to an earlier cell."""
        self.stood: dict[int, str] = {}
        """Where ranks stood that had to be interrupted."""
        self.lines = _Lines()
        self.begun, self.due = time.monotonic(), SLOW_SECONDS

    def follow(self) -> dict[int, wire.Answered]:
        """Give the order, show what the ranks print until all have answered, and return the answers."""
        try:
            self.gang._order(self.order)
            looked = time.monotonic()
            while self.left:
                self.hear()
                if not self.failures:
                    looked = time.monotonic()
                    self.tell_where()
                elif time.monotonic() - looked > LOOK_SECONDS:
                    looked, self.stacks = time.monotonic(), {}
                    self.gang._order(wire.ShowStack())
                elif self.stacks and all(waits(with_source(self.stacks.get(rank, ""))) for rank in self.left):
                    self.leave()
        except KeyboardInterrupt:
            self.leave()
            raise CellInterrupt(self.where()) from None
        finally:
            self.lines.show(set())
        if self.failures:
            if any(failure.consequence for failure in self.failures.values()):
                self.gang._group += 1
            raise CellError(self.blame()) from None
        return self.answers

    def hear(self) -> None:
        """Take in what comes next, and show what is to be shown."""
        rank, message = self.gang._hear()
        match message:
            case wire.Stack() if self.stacks is not None:
                self.stacks[rank] = message.text
            case wire.Printed():
                self.lines.take(rank, message.text)
            case wire.Answered() if message.cell == self.order.cell:
                self.answers[rank] = message
            case wire.CellFailed() if message.cell == self.order.cell:
                self.stacks = self.stacks if self.failures else None
                self.failures[rank] = message
        self.left -= self.answers.keys() | self.failures.keys()
        self.lines.show(self.left)

    def tell_where(self) -> None:
        """Print where the ranks are, when the cell takes long."""
        if self.stacks is None and time.monotonic() - self.begun > self.due:
            self.stacks = {}
            self.gang._order(wire.ShowStack())
        elif self.stacks is not None and self.left and self.left <= self.stacks.keys():
            where = dict.fromkeys(self.answers, "done") | {rank: _where(self.stacks[rank]) for rank in self.left}
            print(f"after {self.due:g} s:", *_labelled(where), sep="\n")
            self.stacks, self.due = None, self.due * SLOWER

    def leave(self) -> None:
        """Have the ranks that are left leave the cell; all ranks will then have a new process group."""
        left = self.left.copy()
        stacks = self.stacks = {}
        self.gang._group += 1
        self.gang._order(wire.ShowStack())
        self.gang._order(wire.Interrupt(cell=self.order.cell))
        deadline = time.monotonic() + LEAVE_SECONDS
        while self.left and time.monotonic() < deadline:
            self.hear()
        for rank in left:
            failure = self.failures.get(rank)
            awaited = failure and failure.awaited
            self.stood[rank] = _place(*awaited) if awaited else _where(stacks.get(rank, ""))
            if rank in self.left:
                self.stood[rank] += f" (has not left it within {LEAVE_SECONDS:g} s; gang.close() ends it)"
        self.left = set()

    def where(self) -> str:
        """Where the ranks stood when the cell was interrupted."""
        where = dict.fromkeys(self.answers, "had ended")
        where |= {rank: f"had raised {failure.summary}" for rank, failure in self.failures.items()}
        where |= {rank: f"was in {place}" for rank, place in self.stood.items()}
        return "\n".join(["the ranks keep their variables, and get a new process group.", *_labelled(where)])

    def blame(self) -> str:
        """The failure that came first, whose it is, and what followed from it."""
        failures = self.failures.values()
        cause = min(failures, key=lambda failure: (failure.interrupted, failure.consequence, failure.time))
        same = [rank for rank, failure in self.failures.items() if failure.traceback == cause.traceback]
        also = {rank: f"raised {failure.summary}" for rank, failure in self.failures.items() if rank not in same}
        also |= {rank: f"was left waiting in {place}" for rank, place in self.stood.items()}
        lines = [f"{_label(same)}\n{cause.traceback.rstrip()}", *_labelled(also)]
        shell = get_ipython()
        if shell is not None and (name := cause.missing) in shell.user_ns:
            lines.append(f"{name} is defined in the notebook, not on the ranks: gang.push({name}={name})")
        return "\n".join(lines)


class _Lines:
    """Lines that ranks print: shown in each rank's order, equal ones of several ranks as one."""

    def __init__(self) -> None:
        self.waiting: dict[int, deque[tuple[int, float, str]]] = defaultdict(deque)
        """By rank: number of the line, when it came, and its text."""
        self.count: dict[int, int] = defaultdict(int)

    def take(self, rank: int, text: str) -> None:
        """Take lines of a rank."""
        for line in text.removesuffix("\n").split("\n"):
            self.waiting[rank].append((self.count[rank], time.monotonic(), line))
            self.count[rank] += 1

    def show(self, running: set[int]) -> None:
        """Print all lines that need not wait for the same line of a rank that still runs."""
        while heads := {rank: lines[0] for rank, lines in self.waiting.items() if lines}:
            _, came, text = min(heads.values())
            same = [rank for rank, head in heads.items() if head[2] == text]
            if running - set(same) and time.monotonic() - came < FOLD_SECONDS:
                return
            for rank in same:
                self.waiting[rank].popleft()
            print(f"{_label(same)} {text}")


def _ranks(line: str, cell: str) -> Values | None:
    """Run this cell on the ranks of the newest gang: ``%%ranks``, or ``%%ranks --on 0,2`` on some of them."""
    options = re.fullmatch(r"(?:--on[ =] *(\d+(?: *, *\d+)*))?", line.strip())
    if options is None:
        raise UsageError(f"%%ranks {line}: the only option is --on with ranks, as in: %%ranks --on 0,2")
    if not _open:
        raise UsageError("%%ranks needs a gang that is open; make one: gang = hpclab.gang(client, ranks=2)")
    on = [int(rank) for rank in options[1].split(",")] if options[1] else None
    number = len(get_ipython().history_manager.input_hist_parsed) - 1  # execution_count may be the next cell's already
    code = "\n" + cell  # lines are counted from the magic's, as the notebook does
    return _values(_open[-1]._ask(code, on, f"<ranks cell {number}>"))


class _Transformer(TransformerManager):
    """IPython's own, but that lines keep their numbers: a command of several lines leaves empty ones behind."""

    def do_one_token_transform(self, lines: list[str]) -> tuple[bool, list[str]]:
        changed, transformed = super().do_one_token_transform(lines)
        if (fewer := len(lines) - len(transformed)) > 0:
            end = 1 + next(place for place, line in enumerate(transformed) if line != lines[place])
            transformed = [*transformed[:end], *["\n"] * fewer, *transformed[end:]]
        return changed, transformed


def _python(code: str, above: int = 0) -> str:
    """IPython's code as Python, so many lines further down; what is wrong with it the ranks tell."""
    lines = code.splitlines(keepends=True)
    while lines and lines[0].isspace():  # IPython would drop them
        above, lines = above + 1, lines[1:]
    if lines and lines[0].startswith("%%"):
        name, _, line = lines[0][2:].strip().partition(" ")
        cell = _python("".join(lines[1:]), above + 1)
        return "\n" * above + f"get_ipython().run_cell_magic({name!r}, {line.strip()!r}, {cell!r})"
    with suppress(SyntaxError, RuntimeError):
        lines = [_Transformer().transform_cell("".join(lines))]
    return "\n" * above + "".join(lines)


def _values(answers: dict[int, wire.Answered]) -> Values | None:
    return Values({rank: shown for rank in sorted(answers) if (shown := answers[rank].shown)}) or None


def _where(stack: str) -> str:
    """Where in its cells a rank is, outermost call first; without a cell's frame, what its stack says instead."""
    frames = [_place(frame["file"], int(frame["line"])) for frame in reversed([*_CELL_FRAME.finditer(stack)])]
    return ", in ".join(frames) or stack.partition("\n")[0].strip() or "a place that it could not report"


def _place(file: str, line: int) -> str:
    return f"{file}, line {line}: {linecache.getline(file, line).strip()}"


def _labelled(texts: dict[int, str]) -> list[str]:
    """What ranks say, each text once behind the ranks that say it; its other lines are below its first."""
    folded: dict[str, list[int]] = {}
    for rank in sorted(texts):
        folded.setdefault(texts[rank], []).append(rank)
    labels = {text: f"{_label(ranks)} " for text, ranks in folded.items()}
    return [label + text.replace("\n", "\n" + " " * len(label)) for text, label in labels.items()]


def _label(ranks: Iterable[int]) -> str:
    """Ranks as a reader counts them.

    >>> _label([3, 0, 1, 2, 5])
    '[ranks 0-3,5]'
    """
    numbers = sorted(ranks)
    starts = [rank for rank in numbers if rank - 1 not in numbers]
    ends = [rank for rank in numbers if rank + 1 not in numbers]
    spans = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    return f"[rank{'s' * (len(numbers) > 1)} {','.join(spans)}]"

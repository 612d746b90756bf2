"""Rank: of an interactive gang: runs cells, keeps their names between them, and can be interrupted.

The main thread runs the cells. Another one takes the orders, so that an interrupt is heard while a cell runs.
"""

import _thread
import ast
import asyncio
import builtins
import inspect
import io
import linecache
import os
import pickle
import queue
import signal
import socket
import stat
import sys
import threading
import time
import traceback
import types
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from hpclab.gangs import errors, rank, rank_end, rank_magics, wire

CHARACTERS = 20_000
"""What a rank's cells may print a second before the rest goes to its log, as the prints of other runs do."""
QUIET_SECONDS = 0.2
"""How long after the signal of an interrupt all ranks that still talk stand still, since some have left."""
SHOWN = 20_000
"""Characters of a value that are shown."""


def serve() -> NoReturn:
    """Run cells until the gang is closed; what a rank of an interactive gang does."""
    cells = _Cells(rank.current())
    cells.context.should_stop = lambda: False  # type: ignore[method-assign]  # a cell is interrupted, and agrees to nothing
    cells.context.interrupt = cells.leave
    threading.Thread(target=cells.listen, daemon=True).start()
    cells.context.send(wire.Ready(worker=cells.place.worker))
    while (order := cells.orders.get()) is not None:
        cells.take(order)
    cells.context.send(wire.Value(body=pickle.dumps(None)))
    rank_end.leave(0, rank_end.FAILED_SECONDS)


class _Cells:
    """This rank's names, its process group, and the cell that it runs."""

    def __init__(self, context: rank.Context):
        self.context = context
        self.place = context.place
        self.orders: queue.SimpleQueue[wire.RunCell | None] = queue.SimpleQueue()
        self.main = threading.get_ident()
        self.running: int | None = None
        self.awaited: tuple[str, int] | None = None
        """Where a cell stood that awaited when it was interrupted: the line isn't on this thread's stack then."""
        self.interrupted = 0
        """Number of the cell that was interrupted last."""
        self.signalled = False
        """Whether the next signal is of an interrupt; else it ends this rank."""
        self.store = _Store(rank.store())
        self.group = 0
        self.spared: set[int] = set()
        """Connections that were there before the process group was."""
        main = sys.modules["__main__"] = types.ModuleType("__main__")  # where pickle looks for a cell's classes
        self.names = main.__dict__
        self.names.update(torch=torch, dist=dist, rank=self.place.rank, ranks=self.place.ranks)
        shell = rank_magics.Shell(self.execute)
        self.names.update(get_ipython=lambda: shell, display=rank_magics.display)
        self.loop = asyncio.new_event_loop()
        """Of cells that await."""
        builtins.input, sys.breakpointhook = rank_magics.no_input, rank_magics.no_breakpoint
        sys.stdout = sys.stderr = self.prints = _Prints(self)

    def listen(self) -> None:
        """Take orders for ever."""
        while True:
            match self.context.inbox.get():
                case wire.Interrupt(cell=cell):
                    self.interrupt(cell)
                case wire.Close():
                    self.orders.put(None)
                case order:
                    self.orders.put(order)

    def take(self, order: wire.RunCell) -> None:
        """Run one cell, if this rank was picked for it, and answer."""
        self.running, picked = order.cell, self.place.rank in order.on
        answer: wire.FromCell | None
        self.awaited = None
        try:
            if self.interrupted == self.running:
                raise KeyboardInterrupt
            self.regroup(order.group)
            answer = self.answer(order) if picked else None
            self.running = None  # from here on an interrupt comes too late
        except BaseException as error:
            self.running = None
            try:
                answer = self.failure(error, order.cell)
            except BaseException as failed:  # its own code may do anything, such as exit
                answer = self.failure(RuntimeError(f"{type(error).__name__}, of which {failed!r}"), order.cell)
        if picked and answer is not None:
            self.prints.end()
            self.context.send(answer)

    def answer(self, order: wire.RunCell) -> wire.Answered:
        """Run a cell, and tell its value as it was asked for."""
        self.names.update(pickle.loads(order.body) if order.body else {})
        source, name = order.source + "\n", order.name  # without, Python's marks below it are one off
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        value = self.execute(order.code, name, self.names)
        if order.pull:
            body = rank_end.dumps(value, f"the value of {order.code}", self.place.worker_memory)
            return wire.Answered(cell=order.cell, shown=None, body=body)
        shown = None if value is None else errors.printable(rank_magics.as_text(value)[:SHOWN])
        return wire.Answered(cell=order.cell, shown=shown)

    def execute(self, code: str, name: str, names: dict) -> Any:
        """Run code of a cell; the value of its last line if that is an expression that no semicolon ends."""
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        self.evaluate(tree, name, names)
        if not isinstance(last, ast.Expr):
            return None
        value = self.evaluate(ast.Expression(last.value), name, names)
        return None if code.rstrip().endswith(";") else value

    def evaluate(self, tree: ast.Module | ast.Expression, name: str, names: dict) -> Any:
        """Run what was parsed, which may await."""
        mode = "eval" if isinstance(tree, ast.Expression) else "exec"
        code = compile(tree, name, mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        value = eval(code, names)
        return self.finish(value) if code.co_flags & inspect.CO_COROUTINE else value

    def finish(self, work: Coroutine) -> Any:
        """Run a cell that awaits; interrupted, it is cancelled, else it would go on in the next one that awaits."""
        task = self.loop.create_task(work)
        try:
            return self.loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                if frames := task.get_stack():  # the cell's line isn't on this thread's stack while it is suspended
                    self.awaited = frames[-1].f_code.co_filename, frames[-1].f_lineno
                task.cancel()
                with suppress(asyncio.CancelledError):
                    self.loop.run_until_complete(task)
            raise

    def regroup(self, group: int) -> None:
        """Be in the process group of this number, with all other ranks; the one before it may be broken."""
        if group == self.group:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        self.spared = {number for number, _ in _connections()}
        store = dist.PrefixStore(f"cells-{group}", self.store)
        dist.init_process_group(rank.backend(), store=store, rank=self.place.rank, world_size=self.place.ranks)
        dist.barrier()  # a rank that dies in the first line of a cell must find the group made
        self.group = group

    def interrupt(self, cell: int) -> None:
        """Have this rank leave a cell: Python by a signal, and gloo, which hears none, by its connections.

        Not at once: gloo (torch 2.13) may forget a send whose peer got ready for it just as the connection was shut,
        and waits for its end for ever. One in ten loops of DDP steps hung so.
        """
        self.interrupted = cell
        if self.running != cell:
            return
        self.signalled = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(self.main, signal.SIGINT)  # also out of a call that sleeps
        else:
            _thread.interrupt_main()
        time.sleep(QUIET_SECONDS)
        if self.running == cell:
            self.cut()

    def cut(self) -> None:
        """Shut the connections of the process groups, so that what waits for them fails."""
        for number, connection in _connections():
            if number not in self.spared:
                with suppress(OSError):  # the other side was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Leave the cell; if an interrupt finds none any more, go on."""
        interrupt, self.signalled = self.signalled, False
        if self.running is not None or not interrupt:
            raise KeyboardInterrupt

    def failure(self, error: BaseException, cell: int) -> wire.CellFailed:
        """What the kernel is told of an error in a cell."""
        rank_end.tell_of_limit(error, self.place.memory, "gang")
        if isinstance(error, SystemExit):
            text = "A cell can't end its rank, which keeps running with its variables; gang.close() ends all ranks."
            errors.note(error, text)
        return wire.CellFailed(
            cell=cell,
            summary=f"{type(error).__name__}: {errors.message(error)}",
            traceback=errors.printable(_traceback(error)),
            missing=str(error.name) if isinstance(error, NameError) else None,
            time=time.time(),
            awaited=self.awaited,
            interrupted=cell == self.interrupted,
            consequence=rank_end.is_consequence(error),
        )


class _Prints(io.TextIOBase):
    """What cells print, line by line to the kernel; what is printed between them goes where it went before."""

    encoding = "utf-8"

    def __init__(self, cells: _Cells):
        self.cells = cells
        self.usual = sys.stdout
        self.lock = threading.Lock()
        self.line = ""
        self.second, self.room = 0.0, 0
        self.hidden = 0
        """Lines of this cell that went to the log instead."""

    def write(self, text: str) -> int:
        """Send whole lines, and keep the rest; of a line that overwrites itself, its last state."""
        text = text.encode("utf-8", "backslashreplace").decode()  # as a rank's usual output does
        with self.lock:
            lines, end, rest = (self.line + text).rpartition("\n")
            self.line = rest.rpartition("\r")[2] or rest
            self._send(lines + end)
            if len(self.line) > CHARACTERS:  # it would be held, and be sent in one piece
                self._send(self.line)
                self.line = ""
        return len(text)

    def end(self) -> None:
        """Send what is left at the end of a cell."""
        with self.lock:
            if self.line:
                self._print(self.line)  # no longer than CHARACTERS
            if self.hidden:
                log = f"{self.cells.place.folder}/rank-{self.cells.place.rank}.log"
                self._print(f"... {self.hidden:,} more lines are in {log}")
            self.line, self.hidden = "", 0

    def fileno(self) -> int:
        """The descriptor to which C and other programs print."""
        return self.usual.fileno()

    def _send(self, text: str) -> None:
        if (now := time.monotonic()) - self.second > 1:
            self.second, self.room = now, CHARACTERS
        self.room -= len(text)
        if self.room < 0 or self.cells.running is None:
            self.usual.write(text)
            self.hidden += text.count("\n") * (self.cells.running is not None)
        elif text:
            self._print(text)

    def _print(self, text: str) -> None:
        self.cells.context.send(wire.Printed(text=text))


class _Store(dist.Store):
    """A store in which a rank that waits for others can be interrupted, as torch's own can't."""

    def __init__(self, store: dist.Store):
        super().__init__()
        self.set_timeout(timedelta(days=1))
        self.store = store

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for as long as it takes."""
        while not self.store.check(keys):
            time.sleep(0.002)

    def get(self, key: str) -> bytes:
        """The value of a key, once it is there."""
        self.wait([key])
        return self.store.get(key)

    def set(self, key: str, value: Any) -> None:
        """Set a key."""
        self.store.set(key, value)

    def add(self, key: str, number: int) -> int:
        """Add to a key."""
        return self.store.add(key, number)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return self.store.check(keys)


def _connections() -> Iterator[tuple[int, socket.socket]]:
    """This process's TCP connections, each with a number of its own; none where a system doesn't tell, as Windows."""
    for fd in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        with suppress(OSError):  # it has gone meanwhile, or was never connected
            status = os.fstat(int(fd))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                    yield status.st_ino, connection


def _traceback(error: BaseException) -> str:
    """Text of the traceback from the cell's own frames on, without those that ran a line of it for a magic."""
    step = error.__traceback__
    while step is not None and not step.tb_frame.f_code.co_filename.startswith("<ranks "):
        step = step.tb_next
    report = traceback.TracebackException(type(error), error, step)
    report.stack[:] = rank_magics.in_cells(report.stack, __file__)
    return "".join(report.format())

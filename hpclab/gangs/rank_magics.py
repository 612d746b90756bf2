"""Rank: what isn't Python in its cells: commands of the system, and the magics that make sense there.

The notebook's kernel turns them into calls of ``get_ipython()``, as IPython does for its own cells; here is what these
find on a rank. IPython itself is imported only for what needs it, since each rank would pay for it.
"""

import ast
import codecs
import inspect
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import timeit
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

Execute = Callable[[str, str, dict], Any]
"""Runs code, given the name of its file and its names; returns the value of its last line."""
END_SECONDS = 0.5
"""How long a command that was interrupted may take to end."""
REPEAT = 7
"""How often %timeit measures, as IPython does."""
LOOP = "def timed(_times, _clock):\n    _began = _clock()\n    for _ in _times: pass\n    return _clock() - _began"
SECRET = re.compile("key|token|secret|passw", re.IGNORECASE)
"""Names of variables whose values %env doesn't show."""


class Shell:
    """What ``get_ipython()`` is on a rank."""

    def __init__(self, execute: Execute):
        self.execute = execute
        self.magics: dict[str, Callable[[str, str | None, FrameType], Any]] = {
            "%cd": self._cd,
            "%env": self._env,
            "%pinfo": self._help,
            "%pinfo2": self._source,
            "%pwd": lambda line, cell, frame: os.getcwd(),
            "%set_env": self._env,
            "%time": self._time,
            "%timeit": self._timeit,
            "%%time": self._time,
            "%%timeit": self._timeit,
        }

    def system(self, command: str) -> None:
        """Run a command of the system, and print what it prints; ``!command``."""
        frame = sys._getframe(1)
        frame.f_globals["_exit_code"] = _run(_expanded(command, frame), sys.stdout.write)

    def getoutput(self, command: str) -> list[str]:
        """Lines that a command prints; ``x = !command``."""
        from IPython.utils.text import SList

        parts: list[str] = []
        _run(_expanded(command, sys._getframe(1)), parts.append)
        return SList("".join(parts).splitlines())

    def run_line_magic(self, name: str, line: str) -> Any:
        """Run a magic of one line."""
        if name.startswith("%"):
            raise RuntimeError(f"%{name} must be the first line of its cell, or the first below %%ranks.")
        return self._magic(f"%{name}")(line, None, sys._getframe(1))

    def run_cell_magic(self, name: str, line: str, cell: str) -> Any:
        """Run a magic of a whole cell, whose lines are counted from the notebook's."""
        return self._magic(f"%%{name}")(line, cell, sys._getframe(1))

    def _magic(self, name: str) -> Callable[[str, str | None, FrameType], Any]:
        if name not in self.magics:
            there = ", ".join(name for name in self.magics if "pinfo" not in name)
            raise RuntimeError(
                f"{name} isn't available on the ranks, which have {there}, ! and ?; use it in a cell without %%ranks."
            )
        return self.magics[name]

    def _cd(self, line: str, cell: str | None, frame: FrameType) -> None:
        os.chdir(os.path.expanduser(_expanded(line, frame).strip().strip("\"'") or "~"))
        print(os.getcwd())

    def _env(self, line: str, cell: str | None, frame: FrameType) -> Any:
        name, _, value = (part.strip() for part in line.partition("=" if "=" in line else " "))
        if not name:
            return {name: "<hidden>" if SECRET.search(name) else value for name, value in sorted(os.environ.items())}
        if not value:
            return os.environ.get(name)
        os.environ[name] = _expanded(value, frame)
        print(f"env: {name}={os.environ[name]}")
        return None

    def _help(self, line: str, cell: str | None, frame: FrameType) -> None:
        value = self._value(line, frame)
        head = f"{line}: {type(value).__name__}"
        with suppress(TypeError, ValueError):  # it isn't called, or doesn't tell how
            head = f"{line}{inspect.signature(value)}"
        print(f"{head}\n{inspect.getdoc(value) or 'It has no docstring.'}")

    def _source(self, line: str, cell: str | None, frame: FrameType) -> None:
        try:
            print(inspect.getsource(self._value(line, frame)).rstrip())
        except (OSError, TypeError):  # it is no function, class or module, or it is C
            self._help(line, cell, frame)

    def _value(self, line: str, frame: FrameType) -> Any:
        return self.execute(_at_its_line(line, frame), frame.f_code.co_filename, _names(frame))

    def _time(self, line: str, cell: str | None, frame: FrameType) -> Any:
        code = _at_its_line(line, frame) if cell is None else cell
        started, cpu = time.perf_counter(), time.process_time()
        try:
            return self.execute(code, frame.f_code.co_filename, _names(frame))
        finally:
            wall, cpu = time.perf_counter() - started, time.process_time() - cpu
            print(f"wall time {_seconds(wall)}, CPU time {_seconds(cpu)}")

    def _timeit(self, line: str, cell: str | None, frame: FrameType) -> None:
        """A number of loops that each rank chose by itself would differ, and ranks that talk wait for each other."""
        options, code = re.fullmatch(r"((?:\s*-[nr]\s*\d+(?=\s|$))*)\s*(.*)", line).groups()  # type: ignore[union-attr]
        chosen = {name: int(number) for name, number in re.findall(r"-([nr])\s*(\d+)", options)}
        if not chosen.get("n") or code.startswith("-"):
            raise RuntimeError(
                f"%timeit {line}: on ranks it needs the number of loops, which must be the same on all ranks that"
                " communicate, and takes only -n and -r: %timeit -n 100 -r 7 STATEMENT"
            )
        loops, names = chosen["n"], _names(frame)
        if cell is not None:
            self.execute(_at_its_line(code, frame), frame.f_code.co_filename, names)
        timer = timeit.Timer()
        timer.inner = _loop(cell if cell is not None else _at_its_line(code, frame), frame.f_code.co_filename, names)  # type: ignore[attr-defined]
        runs = [seconds / loops for seconds in timer.repeat(chosen.get("r", REPEAT), loops)]
        mean, deviation = statistics.fmean(runs), statistics.pstdev(runs)
        basis = f"(mean and std. dev. of {len(runs)} runs, {loops:,} loops each)"
        print(f"{_seconds(mean)} ± {_seconds(deviation)} per loop {basis}")


def display(*values: Any, **_settings: Any) -> None:
    """Print values as the last line of a cell shows them; a rank has no browser for more."""
    for value in values:
        print(as_text(value))


def as_text(value: Any) -> str:
    """A value as a notebook shows it where it can show only text."""
    if any(hasattr(type(value), name) for name in ("_repr_pretty_", "_repr_mimebundle_")):
        from IPython.core.formatters import DisplayFormatter

        return DisplayFormatter().format(value, include={"text/plain"})[0].get("text/plain") or repr(value)
    return repr(value)


def no_input(prompt: object = "") -> NoReturn:
    """Stand in for `input`: an error at once; as at the end of a file, which is all that a rank can read."""
    raise EOFError(
        f"input({prompt!r}) can't ask on a rank; ask in a cell without %%ranks, and pass the answer on:"
        " gang.push(name=value)"
    )


def no_breakpoint(*_: Any, **__: Any) -> NoReturn:
    """Stand in for `breakpoint`."""
    raise RuntimeError("breakpoint() can't ask on a rank; print what you want to see, or fetch it with gang.pull.")


def in_cells(frames: Iterable[traceback.FrameSummary], *others: str) -> list[traceback.FrameSummary]:
    """Frames of an error without those of this module and others; nor a line twice that a magic ran by itself."""
    kept: list[traceback.FrameSummary] = []
    magic = False
    for frame in frames:
        if frame.filename in (__file__, ast.__file__, timeit.__file__, *others):
            magic = True
            continue
        if magic and kept and (kept[-1].filename, kept[-1].lineno) == (frame.filename, frame.lineno):
            kept.pop()
            frame.colno = frame.end_colno = None  # columns of what the magic ran, not of the line
        kept.append(frame)
        magic = False
    return kept


def _names(frame: FrameType) -> dict:
    """Names that a line sees; inside a function a copy."""
    return frame.f_globals if frame.f_locals is frame.f_globals else frame.f_globals | frame.f_locals


def _at_its_line(code: str, frame: FrameType) -> str:
    """What a magic is to run, as Python; it may be IPython's again, as in ``%time x = !ls``."""
    try:
        ast.parse(code)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        code = TransformerManager().transform_cell(code)
    return "\n" * (frame.f_lineno - 1) + code


def _expanded(text: str, frame: FrameType) -> str:
    """Text of a command with ``{expression}`` and ``$name`` replaced; as in IPython, all of it or nothing."""
    if "{" not in text and "$" not in text:
        return text
    from IPython.utils.text import DollarFormatter

    try:
        return DollarFormatter().vformat(text, args=[], kwargs=_names(frame))
    except Exception:  # braces and dollars of the shell's own, such as awk's
        return text


def _run(command: str, take: Callable[[str], Any]) -> int:
    """Run a command in the system's shell, hand on what it prints as it comes, and return its exit code."""
    if command.rstrip().endswith("&"):
        raise OSError(f"!{command} would be left behind; start background programs with subprocess.Popen.")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with subprocess.Popen(
        command,
        shell=True,
        executable=shutil.which(os.environ.get("SHELL", "sh")) if os.name == "posix" else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # a Python that prints into a pipe would keep its lines
    ) as process:
        try:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):  # type: ignore[union-attr]
                take(decoder.decode(chunk))
            take(decoder.decode(b"", final=True))
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen) -> None:
    """End a command and all that it started: first as Ctrl-C in a terminal does, then by force."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        family = [first, *first.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGINT) if os.name == "posix" else member.terminate()
        for member in psutil.wait_procs(family, timeout=END_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def _loop(code: str, name: str, names: dict) -> Callable:
    """Code as the body of the loop that `timeit.Timer` calls, whose own would lose the lines of a cell."""
    tree = ast.parse(LOOP)
    tree.body[0].body[1].body = ast.parse(code, name).body or [ast.Pass()]  # type: ignore[attr-defined]
    made: dict = {}
    exec(compile(ast.fix_missing_locations(tree), name, "exec"), names, made)
    return made["timed"]


def _seconds(value: float) -> str:
    """Seconds as people read them.

    >>> _seconds(0.00123)
    '1.23 ms'
    """
    unit, name = next(((u, n) for u, n in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if value >= u), (1e-9, "ns"))
    return f"{value / unit:.3g} {name}" if value < 1000 else f"{value:,.0f} s"

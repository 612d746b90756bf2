"""The `hpclab` command: thin words over the package."""

import argparse
import ast
import inspect
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpclab import _namesakes

if TYPE_CHECKING:
    from hpclab.slurm.private import Slurm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a pipe or a file, too: the demo takes a minute
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "lab":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        settings = {name: value for name, value in vars(options).items() if name not in ("command", "verb", "run")}
        options.run(**settings, **({"rest": rest} if options.command == "lab" else {}))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
        if isinstance(error, AttributeError) and not _hints(error):  # else of a module that isn't the one it seems
            raise
        print(f"hpclab {options.command}: {error}", file=sys.stderr)
        for note in dict.fromkeys([*getattr(error, "__notes__", ()), *_hints(error)]):
            print(note, file=sys.stderr)
        return 1
    return 0


def _hints(error: Exception) -> list[str]:
    """What to do about an error, where that is known."""
    if isinstance(error, ImportError | AttributeError):
        return list(filter(None, [_namesakes.blame(traceback.format_exc())]))
    from hpclab import machine  # here, as it loads psutil

    return list(filter(None, [machine.remedy(error)]))


def _parser() -> argparse.ArgumentParser:
    """Make the parser of the functions in `COMMANDS`, of what their docstrings say."""
    from hpclab import __version__

    parser = argparse.ArgumentParser("hpclab", description="Real clusters, real training, real measurements.")
    parser.add_argument("--version", action="version", version=f"hpclab {__version__}")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="command")}
    for words, run in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            verbs = groups[""].add_parser(group, help=GROUPS[group])
            groups[group] = verbs.add_subparsers(dest="verb", required=True, metavar="verb")
        title, _, options = (inspect.getdoc(run) or "").partition(".\n\n")
        command = groups[group].add_parser(name, help=title[:1].lower() + title[1:].rstrip("."))
        command.set_defaults(run=run)
        for line in options.splitlines():
            _add_option(command, *line.split(": ", 1))
    return parser


def _add_option(command: argparse.ArgumentParser, spelling: str, text: str) -> None:
    """Add what a line of a docstring says: "--steps=20: ...", "--csv FILE: ...", or "folder: ..." for what comes first.

    What is after "=" is the default, and tells the type; a default of False makes a flag.
    """
    left, _, metavar = spelling.partition(" ")
    name, _, written = left.partition("=")
    try:
        default = ast.literal_eval(written)
    except (ValueError, SyntaxError):
        default = written or None
    if default is False:
        command.add_argument(name, action="store_true", help=text)
        return
    settings: dict[str, Any] = {"default": default, "type": TYPES.get(name, type(default) if written else str)}
    settings |= {"metavar": metavar or None} if name.startswith("-") else {"nargs": "?"} if written else {}
    command.add_argument(name, help=f"{text} (default: {written})" if written else text, **settings)


def _doctor() -> None:
    """Show what this machine really gives you, and what fits on it."""
    from hpclab import doctor

    print(f"{doctor.examine()}\n\n{doctor.advice()}")


def _demo(epochs: int, repeats: int, folder: str | None) -> None:
    """Race 1 rank against 2 on real images, measure, and write a page of results.

    --epochs=3: epochs of each racer
    --repeats=2: rounds of the measurement
    --folder: where results go; new or empty (default: results/<time>-demo)
    """
    from hpclab.course.demo import demo

    demo(folder, epochs, repeats)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers between commas, such as 1,2,4") from None


def _scale(ranks: list[int] | None, folder: str | None, rows_of: str | None, **settings: Any) -> None:
    """Study how training scales here, strong and weak, and write a page about it.

    --ranks: numbers of ranks, such as 1,2,4 (default: powers of 2 that fit)
    --batch-size=192: samples per step
    --steps=20: steps of each run
    --repeats=3: rounds
    --oversubscribe=False: allow more ranks than CPUs; results then say emulated
    --folder: where results go; an interrupted study there continues (default: results/<time>-scale)
    --rows-of PAGE: measure nothing, but make a new page from the rows of this one
    """
    from hpclab import connect, machine, study

    results = Path(folder or Path("results", time.strftime("%Y%m%d-%H%M%S") + "-scale")).expanduser()
    if rows_of:
        rows = study.read(rows_of)
        results.mkdir(parents=True, exist_ok=True)
        print(study.write(rows, results / "index.html"))
        return
    fits = max(2, machine.fits())
    ranks = ranks or [2**power for power in range(fits.bit_length())]
    with connect(workers=fits) as client:
        print(study.measure(client, ranks, results, **settings))


def _lab(rest: list[str], folder: str, notebook: str) -> None:
    """Open JupyterLab on your own copy of the course; other arguments go to Jupyter.

    --folder=hpclab-course: folder of the copy
    --notebook=index: notebook to open first, such as scaling
    """
    from hpclab.course.copy import open_lab

    open_lab(folder, rest, notebook)


def _grade(folder: str, csv: str | None, seed: str | None, time: float, memory: str, **options: Any) -> None:
    """Run and judge a class's notebooks, each in a sandbox.

    folder: folder with FOLDER/*.ipynb, or FOLDER/STUDENT/*.ipynb
    --csv FILE: also write the rows to this file
    --seed: seed of hidden variants of the checks (default: the class's variants)
    --inconclusive=0.0: share of the points for an inconclusive check
    --time=600.0: seconds for each notebook
    --memory=2GB: memory for all processes of a notebook together
    --course FOLDER: the notebooks that you handed out (default: this course's)
    --trust=False: run without a sandbox: only for code that you wrote yourself
    """
    from hpclab._arguments import size
    from hpclab.course import grading

    file = Path(csv).expanduser().resolve() if csv else None
    if file and not file.parent.is_dir():
        raise ValueError(f"--csv (={csv}) must be in a folder that exists.")

    def announce(row: dict) -> None:
        print(f"{row['submission']}: {row['exercise']} {row['verdict']}", file=sys.stderr, flush=True)

    skip = (file,) if file else ()
    options |= {"seed": seed or "", "time_s": time, "memory": size("--memory", memory)}
    rows = grading.grade(folder, skip=skip, told=announce, **options)
    print(f"{rows}\n\n{grading.totals(rows)}")
    if file:
        grading.write(rows, file)
        print(f"\nwritten to {file}")


def _fetch(name: str, to: str | None, mirror: str | None) -> None:
    """Download the full Fashion-MNIST, 60,000 + 10,000 images.

    name=fashion-mnist: the data set
    --to: folder for the data set (default: your cache folder)
    --mirror: address to try first, such as a mirror in your country
    """
    from hpclab import data

    print(data.fetch(name, to, mirror))


def _verify(source: str) -> None:
    """Check a data set against its checksums.

    source=fashion_mnist: its folder or name
    """
    from hpclab import data

    data.verify(source)
    print(f"{data.find(source)}: every file matches its checksum")


def _slurm_up(folder: str | None, **settings: Any) -> None:
    """Start one that outlives this shell.

    --nodes=4: number of virtual nodes
    --cpus=2: CPUs of each node; together they may exceed the real ones
    --memory=2GiB: memory of each node
    --scheduler=backfill: backfill or builtin
    --walltime: the longest walltime a job may ask for, such as 00:30:00 (default: no limit)
    --folder: folder for its files (default: a private folder, chosen for you)
    """
    from hpclab import slurm

    running = slurm.find(folder)
    if running and (running.owner is None or folder):
        raise RuntimeError(f"a private Slurm is already up, in {running.folder}; end it with: hpclab slurm down")
    up = slurm.start(**settings, folder=folder, detached=True)
    print(f"A private Slurm of {len(up.addresses)} nodes is up in {up.folder}. Use it in a shell of its own:\n")
    print("  hpclab slurm shell\n\nor in this one, after\n")
    print(f"  export SLURM_CONF={up.env['SLURM_CONF']} PATH={up.folder}/bin:$PATH\n")
    print("It runs until\n\n  hpclab slurm down" + (f" --folder {up.folder}" if folder else ""))


def _slurm_down(folder: str | None) -> None:
    """End it, and all its jobs.

    --folder: folder of its files (default: a private folder, chosen for you)
    """
    up = _slurm_that_is_up(folder)
    if up.owner and not folder:
        raise RuntimeError(
            f"the one in {up.folder} was started by process {up.owner}, and ends with it; to end it anyway: hpclab"
            f" slurm down --folder {up.folder}"
        )
    up.stop()
    print(f"the private Slurm in {up.folder} has ended")


def _slurm_status(folder: str | None) -> None:
    """Show its nodes and jobs.

    --folder: folder of its files (default: a private folder, chosen for you)
    """
    print(_slurm_that_is_up(folder).status())


def _slurm_shell(folder: str | None) -> None:
    """Open a shell whose Slurm commands use it.

    --folder: folder of its files (default: a private folder, chosen for you)
    """
    shell = os.environ.get("SHELL", "/bin/sh")
    os.execvpe(shell, [shell], _slurm_that_is_up(folder).env)


def _slurm_that_is_up(folder: str | None) -> "Slurm":
    from hpclab import slurm

    if up := slurm.find(folder):
        return up
    raise RuntimeError("no private Slurm is up" + f" in {folder}" * bool(folder) + "; hpclab slurm up")


GROUPS = {
    "data": "download larger data sets, and check those you have",
    "slurm": "a private Slurm on this machine, without root",
}
TYPES: dict[str, Callable] = {"--ranks": _counts}
COMMANDS: dict[str, Callable[..., None]] = {
    "doctor": _doctor,
    "demo": _demo,
    "scale": _scale,
    "lab": _lab,
    "grade": _grade,
    "data fetch": _fetch,
    "data verify": _verify,
    "slurm up": _slurm_up,
    "slurm down": _slurm_down,
    "slurm status": _slurm_status,
    "slurm shell": _slurm_shell,
}

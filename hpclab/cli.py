"""The `hpclab` command: thin words over the package."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpclab import _namesakes

if TYPE_CHECKING:
    from hpclab.slurm.private import Slurm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "lab":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(options, rest)
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
    from hpclab import __version__

    parser = argparse.ArgumentParser("hpclab", description="Real clusters, real training, real measurements.")
    parser.add_argument("--version", action="version", version=f"hpclab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="tell what this machine really has, and what fits on it")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo", help="race 1 rank against 2 on real images, measure, and leave a page of results"
    )
    demo.add_argument("--epochs", type=int, default=3, help="epochs of each racer (default: 3)")
    demo.add_argument("--repeats", type=int, default=2, help="rounds of the measurement (default: 2)")
    demo.add_argument("--folder", help="where results go; new or empty (default: results/<time>-demo)")
    demo.set_defaults(run=_demo)

    scale = commands.add_parser("scale", help="study how training scales here, strong and weak; leave a page of it")
    scale.add_argument("--ranks", type=_counts, help="numbers of ranks, such as 1,2,4 (default: powers of 2 that fit)")
    scale.add_argument("--batch-size", type=int, default=192, help="samples a step (default: 192)")
    scale.add_argument("--steps", type=int, default=20, help="steps of a run (default: 20)")
    scale.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    scale.add_argument("--oversubscribe", action="store_true", help="run more ranks than CPUs, and say emulated")
    scale.add_argument("--folder", help="where results go; the same again goes on (default: results/<time>-scale)")
    scale.add_argument("--rows-of", metavar="PAGE", help="measure nothing: make a page anew from the rows of another")
    scale.set_defaults(run=_scale)

    lab = commands.add_parser(
        "lab", help="open JupyterLab on a working copy of the course; other arguments go to Jupyter"
    )
    lab.add_argument("--folder", default="hpclab-course", help="the copy (default: hpclab-course)")
    lab.add_argument("--notebook", default="index", help="what to open first, such as scaling (default: index)")
    lab.set_defaults(run=_lab)

    grade = commands.add_parser("grade", help="run a class's notebooks, each in a sandbox, and judge them")
    grade.add_argument("folder", help="with FOLDER/*.ipynb, or FOLDER/STUDENT/*.ipynb")
    grade.add_argument("--csv", metavar="FILE", help="write the rows there, too")
    grade.add_argument("--seed", default="", help="draws hidden variants of the checks (default: those of the class)")
    grade.add_argument("--inconclusive", type=float, default=0.0, help="points where a check can't tell (default: 0)")
    grade.add_argument("--time", type=float, default=600.0, help="seconds for a notebook (default: 600)")
    grade.add_argument("--memory", default="2GB", help="for all processes of a notebook together (default: 2GB)")
    grade.add_argument("--course", metavar="FOLDER", help="the notebooks as handed out (default: this course's)")
    grade.add_argument(
        "--trust", action="store_true", help="without a sandbox: only for what you have written yourself"
    )
    grade.set_defaults(run=_grade)

    data = commands.add_parser("data", help="get larger data sets, and check those that are here")
    verbs = data.add_subparsers(dest="verb", required=True, metavar="verb")
    fetch = verbs.add_parser("fetch", help="get the full Fashion-MNIST, 60,000 + 10,000 images")
    fetch.add_argument("name", nargs="?", default="fashion-mnist")
    fetch.add_argument("--to", help="folder of the data set (default: the user's cache)")
    fetch.add_argument("--mirror", help="address to try first, for instance of a mirror in your country")
    fetch.set_defaults(run=_fetch)
    verify = verbs.add_parser("verify", help="check a data set against its checksums")
    verify.add_argument("source", nargs="?", default="fashion_mnist")
    verify.set_defaults(run=_verify)

    slurm = commands.add_parser("slurm", help="a private Slurm on this machine, without root")
    verbs = slurm.add_subparsers(dest="verb", required=True, metavar="verb")
    up = verbs.add_parser("up", help="start one, which outlives this shell")
    up.add_argument("--nodes", type=int, default=4, help="virtual nodes (default: 4)")
    up.add_argument("--cpus", type=int, default=2, help="CPUs of each; may exceed the real ones (default: 2)")
    up.add_argument("--memory", default="2GiB", help="memory of each (default: 2GiB)")
    up.add_argument("--scheduler", default="backfill", help="backfill or builtin (default: backfill)")
    up.add_argument("--walltime", help="the longest that a job may ask for, such as 00:30:00 (default: no limit)")
    up.set_defaults(run=_slurm_up)
    for name, what, run in (
        ("down", "end it, and all of its jobs", _slurm_down),
        ("status", "its nodes and jobs", _slurm_status),
        ("shell", "a shell whose Slurm commands use it", _slurm_shell),
    ):
        verbs.add_parser(name, help=what).set_defaults(run=run)
    for verb in verbs.choices.values():
        verb.add_argument("--folder", help="where it lies (default: a private folder, chosen for you)")
    return parser


def _doctor(options: argparse.Namespace, rest: list[str]) -> None:
    from hpclab import doctor

    print(f"{doctor.examine()}\n\n{doctor.advice()}")


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    from hpclab.course.demo import demo

    demo(options.folder, options.epochs, options.repeats)


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers between commas, such as 1,2,4") from None


def _scale(options: argparse.Namespace, rest: list[str]) -> None:
    import time
    from pathlib import Path

    from hpclab import connect, machine, study

    folder = Path(options.folder or Path("results", time.strftime("%Y%m%d-%H%M%S") + "-scale")).expanduser()
    if options.rows_of:
        rows = study.read(options.rows_of)
        folder.mkdir(parents=True, exist_ok=True)
        print(study.write(rows, folder / "index.html"))
        return
    fits = max(2, machine.fits())
    ranks = options.ranks or [2**power for power in range(fits.bit_length())]
    with connect(workers=fits) as client:
        settings = {name: getattr(options, name) for name in ("batch_size", "steps", "repeats", "oversubscribe")}
        print(study.measure(client, ranks, folder, **settings))


def _lab(options: argparse.Namespace, rest: list[str]) -> None:
    from hpclab.course.copy import open_lab

    open_lab(options.folder, rest, options.notebook)


def _grade(options: argparse.Namespace, rest: list[str]) -> None:
    from pathlib import Path

    from hpclab._arguments import size
    from hpclab.course import grading

    csv = Path(options.csv).expanduser().resolve() if options.csv else None
    if csv and not csv.parent.is_dir():
        raise ValueError(f"--csv (={options.csv}) lies in no folder that is there.")

    def told(row: dict) -> None:
        print(f"{row['submission']}: {row['exercise']} {row['verdict']}", file=sys.stderr, flush=True)

    rows = grading.grade(
        options.folder,
        course=options.course,
        seed=options.seed,
        inconclusive=options.inconclusive,
        time_s=options.time,
        memory=size("--memory", options.memory),
        trust=options.trust,
        skip=(csv,) if csv else (),
        told=told,
    )
    print(f"{rows}\n\n{grading.totals(rows)}")
    if csv:
        grading.write(rows, csv)
        print(f"\nwritten to {csv}")


def _fetch(options: argparse.Namespace, rest: list[str]) -> None:
    from hpclab import data

    print(data.fetch(options.name, options.to, options.mirror))


def _verify(options: argparse.Namespace, rest: list[str]) -> None:
    from hpclab import data

    data.verify(options.source)
    print(f"{data.find(options.source)}: every file is as it was made")


def _slurm_up(options: argparse.Namespace, rest: list[str]) -> None:
    from hpclab import slurm

    there = slurm.find(options.folder)
    if there and (there.owner is None or options.folder):
        raise RuntimeError(f"a private Slurm is up already, in {there.folder}; end it with: hpclab slurm down")
    settings = {name: getattr(options, name) for name in ("nodes", "cpus", "memory", "scheduler", "walltime", "folder")}
    up = slurm.start(**settings, detached=True)
    print(f"A private Slurm of {options.nodes} nodes is up in {up.folder}. Use it in a shell of its own:\n")
    print("  hpclab slurm shell\n\nor in this one, after\n")
    print(f"  export SLURM_CONF={up.env['SLURM_CONF']} PATH={up.folder}/bin:$PATH\n")
    print("It stays until\n\n  hpclab slurm down" + (f" --folder {up.folder}" if options.folder else ""))


def _slurm_down(options: argparse.Namespace, rest: list[str]) -> None:
    up = _slurm_found(options)
    if up.owner and not options.folder:
        raise RuntimeError(
            f"the one in {up.folder} was started by process {up.owner}, and ends with it; to end it all the same:"
            f" hpclab slurm down --folder {up.folder}"
        )
    up.stop()
    print(f"the private Slurm in {up.folder} has ended")


def _slurm_status(options: argparse.Namespace, rest: list[str]) -> None:
    print(_slurm_found(options).status())


def _slurm_shell(options: argparse.Namespace, rest: list[str]) -> None:
    import os

    shell = os.environ.get("SHELL", "/bin/sh")
    os.execvpe(shell, [shell], _slurm_found(options).env)


def _slurm_found(options: argparse.Namespace) -> "Slurm":
    from hpclab import slurm

    if up := slurm.find(options.folder):
        return up
    raise RuntimeError("no private Slurm is up" + f" in {options.folder}" * bool(options.folder) + "; hpclab slurm up")

"""From launch to the first optimiser step, and the speed of the steps after: hpclab against other launchers.

Run it with ``make bench``, which installs the others in ``.venv-peers``. All run the same plain torch job on two
ranks of one thread. Every round runs all launchers in a new order, and each ratio divides two runs of the same round.
hpclab, Accelerate, torchrunx and Ray keep running between two launches, as in a notebook; torchrun is started anew.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peer_job import job

import hpclab
from hpclab.tables import Table

JOB = Path(__file__).with_name("peer_job.py")
SERVED = ("accelerate", "torchrunx", "ray")


class Server:
    """Another launcher, in a process of its environment that outlives its launches."""

    def __init__(self, python: Path, name: str):
        env = os.environ | {"RAY_TRAIN_V2_ENABLED": "1"}
        self.process = subprocess.Popen(
            [python, JOB, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def __call__(self, out: str, steps: int) -> float:
        """Run the job; return when it was launched."""
        self.process.stdin.write(json.dumps([out, steps]) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self.process.stdout.readline())  # type: ignore[union-attr]


def torchrun(python: Path) -> Callable[[str, int], float]:
    """Torchrun with its defaults."""

    def launch(out: str, steps: int) -> float:
        launched = time.time()
        command = [python.with_name("torchrun"), "--nproc-per-node=2", JOB, "torchrun", out, str(steps)]
        subprocess.run(command, check=True, capture_output=True)
        return launched

    return launch


def ours(client, ranks: int = 2) -> Callable[[str, int], float]:
    """`hpclab.launch`."""

    def launch(out: str, steps: int) -> float:
        launched = time.time()
        hpclab.launch(client, job, out, steps, ranks=ranks, oversubscribe=ranks > 2).result()
        return launched

    return launch


def measure(launch: Callable[[str, int], float], steps: int) -> dict:
    """Seconds from the launch to the end of the first step, and steps a second after the first five."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        launched = launch(out, steps)
        with open(out) as file:
            found = json.load(file)
    return {"first_s": found["first"] - launched, "steps_per_s": (steps - 5) / sum(found["step_s"][5:])}


def row(name: str, runs: list[dict], base: list[dict]) -> dict:
    """One launcher: medians with their range, and the ratios to hpclab, round by round."""
    first, speed = [run["first_s"] for run in runs], [run["steps_per_s"] for run in runs]
    later = [run["first_s"] / other["first_s"] for run, other in zip(runs, base, strict=False)]
    slower = [other["steps_per_s"] / run["steps_per_s"] for run, other in zip(runs, base, strict=False)]
    return {
        "launcher": name,
        "first step after (s)": spread(first, 3),
        "times hpclab's": spread(later, 1),
        "steps a second": spread(speed, 1),
        "hpclab's steps over its": spread(slower, 2),
    }


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    """Measure all launchers, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--launches", type=int, default=200, help="of hpclab alone, for its worst")
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--against", nargs="*", default=["torchrun", *SERVED], choices=["torchrun", *SERVED])
    options = parser.parse_args()
    python = options.python.absolute()
    with tempfile.TemporaryDirectory() as folder, hpclab.connect(workers=2) as client:
        os.chdir(folder)
        measure(ours(client), 6)  # the zygote imports torch, once
        servers = {name: Server(python, name) for name in SERVED if name in options.against}
        cases = {"hpclab": ours(client)} | servers
        if "torchrun" in options.against:
            cases["torchrun"] = torchrun(python)
        found: dict[str, list[dict]] = {name: [] for name in cases}
        for turn in range(options.rounds):
            for name in random.Random(turn).sample(list(cases), len(cases)):
                found[name].append(measure(cases[name], options.steps))
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
        for server in servers.values():
            server.process.kill()
        print(Table(row(name, runs, found["hpclab"]) for name, runs in found.items()))
        for ranks, launches in ((2, options.launches), (8, 10)):
            first = [measure(ours(client, ranks), 6)["first_s"] for _ in range(launches)]
            print(f"hpclab, {ranks} ranks, {launches} launches: first step after {spread(first, 3)} s")
        os.chdir("/")


if __name__ == "__main__":
    main()

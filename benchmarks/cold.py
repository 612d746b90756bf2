"""Cold starts: from `import hpclab` to the end of the first optimiser step on two ranks, against plain torch's.

Run it with ``make bench``. All take the same step, that of ``peer_job.py``, each time in fresh processes. The plain
script is one process that imports torch, wraps the model in DDP as its only rank, and takes the step; it is timed from
before that import, hpclab from before its own, torchrun as a whole command. Every round does all of them in a new
order, and each ratio divides two times of the same round.
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
from pathlib import Path

from hpclab import machine, rows
from hpclab.tables import Table

HERE = Path(__file__).parent
BEGIN = "import time; begun = time.time()\n"
END = "\nimport json; json.dump(begun, open(out + '.begun', 'w'))"
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
PLAIN, OURS, TORCHRUN = "plain script, 1 process", "hpclab, 2 ranks", "torchrun, 2 ranks, whole command"
PROGRAMS = {
    PLAIN: "from peer_job import job; job(out, 1)",
    OURS: (
        "import hpclab; from peer_job import job\n"
        "with hpclab.connect(workers=2) as client:\n"
        "    hpclab.launch(client, job, out, 1, ranks=2, folder=out + '.run').result()"
    ),
}


def seconds(case: str) -> float:
    """How long a case takes, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        if case == TORCHRUN:
            begun = time.time()
            command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "peer_job.py", "torchrun", out, "1"]
            subprocess.run([sys.executable, *command], cwd=HERE, check=True, capture_output=True)
            return time.time() - begun
        program = f"{BEGIN}out = {out!r}\n{PROGRAMS[case]}{END}"
        env = os.environ | (ALONE if case == PLAIN else {})
        subprocess.run([sys.executable, "-c", program], cwd=HERE, check=True, capture_output=True, env=env)
        return json.loads(Path(out).read_text())["first"] - json.loads(Path(f"{out}.begun").read_text())


def row(case: str, times: dict[str, list[float]]) -> dict:
    """One case: the medians of its time, and of its ratio to the plain script, with their range."""
    ratios = [time_s / plain for time_s, plain in zip(times[case], times[PLAIN], strict=True)]
    return {"case": case, "seconds": spread(times[case]), "times the plain script": spread(ratios)}


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """Measure all cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=Path, help="file of JSON lines that each time is added to")
    options = parser.parse_args()
    cases = [*PROGRAMS, TORCHRUN]
    times: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(-1, options.rounds):  # the first fills the disk's cache, and doesn't count
        for case in random.Random(turn).sample(cases, len(cases)):
            time_s = seconds(case)
            if turn < 0:
                continue
            times[case].append(time_s)
            if options.rows:
                measured = {"kind": "cold", "case": case, "round": turn, "time_s": time_s, "source": "measured"}
                rows.append(options.rows, measured | {"started": time.time()} | machine.describe())
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    print(Table(row(case, times) for case in cases))
    sooner = sum(ours < theirs for ours, theirs in zip(times[OURS], times[TORCHRUN], strict=True))
    print(f"hpclab's first step ends before torchrun's command in {sooner} of {options.rounds} rounds")


if __name__ == "__main__":
    main()

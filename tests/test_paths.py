"""Names of folders that hold all that a name may, in one tree of processes; and what is cleaned away below them."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

import hpclab
from hpclab import slurm

ODD = "Ünï cødé [1] 'q' \"d\" $HOME %j 100%"
PROGRAM = """
import json, os, shutil, sys, tempfile
from pathlib import Path

sys.path += [Path("of no use, as Python wants text"), os.path.abspath("lib:with a colon")]
os.environ |= {f"BIG_{number}": "x" * 100_000 for number in range(3)}  # more than a message between processes may have

import hpclab

RESULTS, TEMPORARY = Path("~/results %j"), Path(tempfile.gettempdir())


def work():
    import beside

    return os.getcwd(), beside.X, len(os.environ["BIG_2"])


def local(client):
    yield "ranks", hpclab.launch(client, work, ranks=2, folder=RESULTS / "1").result()
    with hpclab.gang(client, ranks=1, folder=RESULTS / "gang") as gang:
        yield "cell", repr(gang.run("6 * 7"))
    settings = dict(ranks=1, steps=2, batch_size=8, progress=False, name="a name " * 50)
    hpclab.train(client, "CNN", "~/data [1]", folder=RESULTS / "2", checkpoint_every=1, **settings).result()
    again = hpclab.train(client, "CNN", "~/data [1]", resume=RESULTS / "2", folder=RESULTS / "3", **settings)
    yield "resumed at", [row["step"] for row in again.result().rows if row["kind"] == "resume"]
    yield "opened", hpclab.open_run(RESULTS / "3").status
    for made in TEMPORARY.iterdir():
        shutil.rmtree(made)
    yield "ranks after that", hpclab.launch(client, work, ranks=2).result()
    folders = [*TEMPORARY.glob("dask-scratch-space/worker-*"), *TEMPORARY.glob("hpclab-*")]
    yield "modes", sorted({oct(path.stat().st_mode & 0o777) for path in folders})


if __name__ == "__main__":
    told = {"python": sys.executable, "temporary": str(TEMPORARY)}
    with hpclab.connect(workers=2) as client:
        told |= local(client)
    if "slurm" in sys.argv:
        with hpclab.connect("slurm", private=True, workers=1, folder="~/logs %j") as client:
            told["job"] = hpclab.launch(client, os.getcwd, ranks=1).result()
        told["logs"] = sorted(path.suffix for path in Path("~/logs %j").expanduser().iterdir())
    print(json.dumps(told))
"""


def test_odd_names_everywhere(tmp_path):
    base = tmp_path / ODD
    home, here, python = base / "home", base / "here", base / "venv"
    temporary = base / ("long" * 30)  # a socket's path has at most 107 bytes
    for folder in (home, temporary, here / "lib:with a colon"):
        folder.mkdir(parents=True)
    (here / "lib:with a colon" / "beside.py").write_text("X = 3\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", python], check=True)
    (packages,) = python.glob("lib/python*/site-packages")
    ours = Path(hpclab.__file__).parents[1]
    (packages / "ours.pth").write_text(f"{ours}\n{sysconfig.get_path('purelib')}\n")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8)
    split = pixels, np.arange(64) % 10
    hpclab.data.write(home / "data [1]", {"train": split, "test": split})
    jobs = ["slurm"] * (not slurm.missing())
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [python / "bin" / "python", "-", *jobs],  # whose __main__ no worker could import
        input=PROGRAM,
        cwd=here,
        env=bare | {"HOME": str(home), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    ranks = [[str(here), 3, 100_000]] * 2
    found = {
        "python": str(python / "bin" / "python"),
        "temporary": str(temporary),
        "ranks": ranks,
        "cell": "[rank 0] 42",
    }
    found |= {"resumed at": [2], "opened": "finished", "ranks after that": ranks, "modes": ["0o700"]}
    if jobs:
        found |= {"job": [str(here)], "logs": [".err", ".out"]}
    assert told == found
    assert {path.name for path in (home / "results %j").iterdir()} == {"1", "gang", "2", "3"}

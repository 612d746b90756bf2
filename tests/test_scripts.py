"""The script that needs no hpclab: by torchrun, and by sbatch on a private Slurm, against `hpclab.train`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

import hpclab
from hpclab import slurm

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def expected(client):
    """Mean loss over both ranks, by step."""
    settings = {"ranks": 2, "steps": STEPS, "batch_size": 64, "lr": 0.05, "progress": False}
    rows = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", **settings).result(120).rows
    steps: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == "step":
            steps.setdefault(row["step"], []).append(row["loss"])
    return [sum(losses) / len(losses) for _, losses in sorted(steps.items())]


@pytest.fixture
def scripts(tmp_path):
    for file in (ROOT / "notebooks" / "scripts").iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path


def losses(printed: str) -> list[float]:
    return [
        float(loss)
        for _, loss in sorted((int(step), loss) for step, loss in re.findall(r"step (\d+) loss (\S+)", printed))
    ]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"STEPS": str(STEPS), "OMP_NUM_THREADS": "1"} | more


def test_by_torchrun(scripts, expected):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_ddp.py"]
    ran = subprocess.run(
        [*command, ROOT / "data" / "fashion_mnist"], cwd=scripts, env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert losses(ran.stdout) == pytest.approx(expected, rel=1e-4)
    assert (scripts / "weights.pt").exists()


def test_by_sbatch(scripts, expected):
    require(not slurm.missing(), "Slurm's programs")
    with slurm.start(nodes=2, cpus=1, memory="2GB") as private:
        env = private.env | environment(PYTHON=sys.executable, PATH=private.env["PATH"])
        env |= {name: private.env[name] for name in private.env if name.startswith("SLURM")}
        command = ["sbatch", "--wait", "--output=out", "train_ddp.sh", str(ROOT / "data" / "fashion_mnist")]
        ran = subprocess.run(command, cwd=scripts, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr + (scripts / "out").read_text()
    assert losses((scripts / "out").read_text()) == pytest.approx(expected, rel=1e-4)

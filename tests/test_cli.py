"""The command: what it prints, and how it fails. What its demo leaves, test_wheel looks at."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import no_rank_left, ranks_alive

from hpclab import cli, machine

COMMAND = [sys.executable, "-m", "hpclab"]


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"fit here at full speed: {machine.fits()}" in said
    for what in ("CPUs", "memory", "torch", "Slurm", "loopback", "Chinese font"):
        assert what in said


def test_doctor_in_chinese(capsys, monkeypatch):
    monkeypatch.setenv("HPCLAB_LANG", "zh")
    assert cli.main(["doctor"]) == 0
    assert "内存" in capsys.readouterr().out


def test_demo_on_one_cpu_says_emulated(tmp_path):
    """As `taskset` allows it: two ranks take turns on one CPU, and everything that shows them says so."""
    first = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", first, *COMMAND, "demo", "--epochs", "1", "--repeats", "1", "--folder", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fit here at full speed: 1" in done.stdout
    assert "took turns" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {(row["label"], row["source"]) for row in rows} == {("1 rank", "measured"), ("2 ranks", "emulated")}


def test_interrupted_demo_leaves_no_process(tmp_path):
    demo = subprocess.Popen(
        [*COMMAND, "demo", "--folder", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    while len(ranks_alive()) < 1:
        assert demo.poll() is None, demo.stdout.read()
        time.sleep(0.05)
    family = psutil.Process(demo.pid).children(recursive=True)
    os.killpg(demo.pid, signal.SIGINT)
    said = demo.communicate(timeout=60)[0]
    assert demo.returncode == 130
    assert said.rstrip().endswith("interrupted")
    assert not psutil.wait_procs(family, timeout=30)[1]
    assert no_rank_left()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--folder", "full"], "folder (='full') already holds something"),
        (["demo", "--epochs", "0"], "epochs (=0) must be a whole number >= 1"),
        (["data", "verify", "nowhere"], "source (='nowhere')"),
        (["data", "fetch", "cifar"], "cifar"),
        (["lab", "--folder", "full/file", "--allow-root"], "full/file"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
    assert said[-1].startswith(f"hpclab {arguments[0]}: ")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_data_verify(capsys):
    assert cli.main(["data", "verify"]) == 0
    assert "every file matches its checksum" in capsys.readouterr().out

"""Other systems than this one: Debian 13, and ranks without fork, as on macOS and Windows; for `make long`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

ROOT = Path(__file__).parents[1]


def passes(command, env, record_property):
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    summaries = [line.strip("= ") for line in done.stdout.splitlines() if " passed" in line]
    for summary in summaries:
        record_property("measured", summary)
    assert done.returncode == 0, f"{done.stdout[-20000:]}{done.stderr[-5000:]}"
    assert summaries


@pytest.mark.long
def test_debian_13(record_property):
    require(os.name == "posix" and os.geteuid() == 0 and bool(shutil.which("mmdebstrap")), "root, and mmdebstrap")
    passes(["bash", "tests/debian13.sh"], os.environ, record_property)


@pytest.mark.long
def test_gangs_without_fork(record_property):
    tests = [f"tests/test_{name}.py" for name in ("gang", "gangs", "launcher", "rank", "training")]
    env = os.environ | {"HPCLAB_FORK": "0"}
    passes([sys.executable, "-m", "pytest", "-q", *tests], env, record_property)

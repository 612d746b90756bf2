"""Other systems than this one: Debian 13, and ranks without fork, as on macOS and Windows; for `make long`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

ROOT = Path(__file__).parents[1]


def outcome(command, env, record_property):
    """Of a command that runs tests: its exit code, how often it told that some passed, and the end of what it wrote."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    summaries = [line.strip("= ") for line in done.stdout.splitlines() if " passed" in line]
    for summary in summaries:
        record_property("measured", summary)
    return (done.returncode, len(summaries)), f"{done.stdout[-20000:]}{done.stderr[-5000:]}"


@pytest.mark.long
def test_debian_13(record_property):
    require(os.name == "posix" and os.geteuid() == 0 and bool(shutil.which("mmdebstrap")), "root, and mmdebstrap")
    code_and_parts, output = outcome(["bash", "tests/debian13.sh"], os.environ, record_property)
    assert code_and_parts == (0, 2), output


@pytest.mark.long
def test_gangs_without_fork(record_property):
    tests = [f"tests/test_{name}.py" for name in ("gang", "gangs", "launcher", "rank", "training")]
    env = os.environ | {"HPCLAB_FORK": "0"}
    code_and_parts, output = outcome([sys.executable, "-m", "pytest", "-q", *tests], env, record_property)
    assert code_and_parts == (0, 1), output

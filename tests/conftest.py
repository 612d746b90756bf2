import os
import time
import uuid

import psutil
import pytest

import hpclab

os.environ["HPCLAB_TESTS"] = uuid.uuid4().hex  # every process that a test starts inherits it


def require(present: bool, what: str) -> None:
    """Skip a test whose real component isn't on this machine; in CI, where all are installed, that is a failure."""
    if present:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI must have {what}")
    pytest.skip(f"needs {what}")


def ranks_alive() -> list[int]:
    """Process ids of all ranks on this machine that descend from these tests, orphans too."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if any("hpclab._rank" in word for word in process.info["cmdline"] or ())
        and (process.info["environ"] or {}).get("HPCLAB_TESTS") == os.environ["HPCLAB_TESTS"]
    ]


def no_rank_left(seconds: float = 10) -> bool:
    """Whether all ranks are gone within some seconds, which is patience for a loaded machine and no measurement."""
    deadline = time.monotonic() + seconds
    while ranks_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not ranks_alive()


@pytest.fixture(scope="session")
def client():
    """One encrypted cluster of two workers, for all tests that leave it as it was."""
    with hpclab.connect(workers=2) as client:
        yield client


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    """Every test works in a folder of its own, so that default results land there."""
    monkeypatch.chdir(tmp_path)

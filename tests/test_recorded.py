"""The notebook *queues* without Slurm: it says so, tells the way out, and goes on with what was recorded."""

import json
import os
import re
from pathlib import Path

import pytest
from nbclient import NotebookClient
from pipeline import build

from hpclab import rows, slurm
from hpclab.course import recorded

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "notebooks" / "source" / "06_queues.py"


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setattr(slurm, "missing", lambda: ["slurmctld"])


def taped(name: str) -> dict:
    return recorded.recorded()[name]


def test_every_function_of_the_notebook_was_recorded_on_a_real_slurm():
    code = "\n".join(cell.source for cell in build.solution(SOURCE).cells if cell.cell_type == "code")
    called = set(re.findall(r"on_slurm\((\w+)", code))
    assert len(called) >= 8 and called == {row["name"] for row in recorded.recorded().values()}
    for row in recorded.recorded().values():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["day"]) and row["version"] and row["cpu"] and row["cpus"]
    assert recorded.FILE.stat().st_size < 100_000


def test_what_was_recorded_is_what_the_text_explains():
    fifo, filled, killed = (taped(name)["value"] for name in ("first_come", "backfill", "kill"))
    names = [job["name"] for job in fifo]
    assert names == [job["name"] for job in filled] == ["long", "wide", *["short"] * 8, "greedy", "wide"]
    assert all(job["started_s"] >= fifo[1]["started_s"] for job in fifo[2:]), "nobody overtakes"
    overtook = [job["name"] for job in filled[2:] if job["started_s"] < filled[1]["started_s"]]
    assert set(overtook) == {"short"} and len(overtook) >= 4
    lost, again = rows.attempts(killed["rows"])
    assert lost["cause"] and again["cause"] is None
    assert killed["jobs"][0]["state"] == "NODE_FAIL"


def test_without_slurm_it_is_shown_as_recorded(no_slurm, capsys):
    def backfill():
        raise AssertionError("there is no Slurm to call")

    shown = []
    value = recorded.on_slurm(backfill, show=shown.append)
    assert shown == [value]
    assert {job["source"] for job in value} == {"recorded"}
    assert capsys.readouterr().out.startswith(f"Recorded on {taped('backfill')['day']} with Slurm ")
    assert "slurmctld" in recorded.notice() and slurm.install_line() in recorded.notice()


def test_with_slurm_it_is_called_and_kept_if_one_asks(monkeypatch, tmp_path, capsys):
    if slurm.missing():
        pytest.skip("needs Slurm's programs")
    monkeypatch.setenv("HPCLAB_RECORD", str(tmp_path / "kept.jsonl"))

    def twice():
        print("once")
        return [{"kind": "step", "weights": 1} | dict.fromkeys(recorded.STEP[1:], 2), {"kind": "end", "status": "ok"}]

    assert recorded.on_slurm(twice, show=None)[0]["weights"] == 1
    assert capsys.readouterr().out == "once\n"
    (row,) = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    assert (row["name"], row["printed"], row["value"][1]) == ("twice", "once\n", {"kind": "end", "status": "ok"})
    assert row["value"][0] == {"kind": "step"} | dict.fromkeys(recorded.STEP[1:], 2)


def test_the_notebook_runs_without_slurms_programs(tmp_path):
    """The students' build, with a PATH that has none of them."""
    found = build.student(SOURCE)
    environment = {name: value for name, value in os.environ.items() if name != "HPCLAB_LANG"}
    bare = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "HPCLAB_SIZE": "small"}
    client = NotebookClient(found, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment | bare)
    cells = {cell.id: json.dumps(cell.get("outputs", "")) for cell in found.cells}
    assert "There is no Slurm here" in cells["imports"] and slurm.install_line() in cells["imports"]
    for cell in ("up-do", "script-do", "array-do", "fifo-do", "backfill-do", "connect-do", "kill-do", "without-do"):
        assert "Recorded on " in cells[cell], cell
    for cell in ("array-do", "fifo-do", "backfill-do", "kill-show-do"):
        assert "image/png" in cells[cell] and "(recorded)" in cells[cell], cell
    checks = [cell for cell in found.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    shown = [re.findall('data-status=\\\\"(.*?)\\\\"', cells[cell.id]) for cell in checks]
    assert len(shown) >= 2 and all(status != ["pass"] for status in shown)

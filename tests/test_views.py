"""The view of a run, as it is without a browser: what it shows of odd rows, of failures, and of what can't be drawn."""

import contextlib
import html
import json
import math
import resource
import shutil
import time
from pathlib import Path

import pytest
from conftest import no_rank_left, until

import hpclab
from hpclab import live, plots, views
from hpclab.cluster import card


class Shown:
    """Stands in for a browser's place of an output; so far its pages."""

    def __init__(self, shown, display_id):
        self.pages = [getattr(shown, "data", None)]

    def update(self, shown):
        shown.data.encode()  # as the message to the browser is
        self.pages.append(shown.data)


@pytest.fixture
def shown(monkeypatch):
    """The places at which something is shown: of a run its buttons, then its page."""
    places = []
    monkeypatch.setattr(live, "display", lambda *args, **named: places.append(Shown(*args, **named)) or places[-1])
    return places


def last_page(run, shown):
    """The page of a run that stays, once its buttons have gone."""
    assert run.wait(60)
    until(lambda: shown[0].pages[-1] == "")
    return shown[1].pages[-1]


def report_what_one_likes():
    rank = hpclab.gangs.rank._context.place.rank
    odd = (None, "s", math.nan, math.inf, 1e308, True, 2**63)
    for name in ("step", "loss", "time_s", "step_s", "samples", "compute_s"):
        for step, value in enumerate(odd):
            usual = {"step": step, "loss": 1.0, "step_s": 0.01, "compute_s": 0.005} | ({"samples": 8} if rank else {})
            with contextlib.suppress(TypeError, ValueError):  # it is refused, so there is nothing to draw
                hpclab.report(**usual | {name: value})
    hpclab.report(loss=0.5)
    for kind in ("end", "restart", "checkpoint", "resume", "attempt", "other"):
        for step in (3, "s"):
            with contextlib.suppress(TypeError, ValueError):
                hpclab.report(kind=kind, error=0.5, step=step)
    time.sleep(1)
    print("that was all")


def test_rows_of_all_kinds_are_drawn(client, shown):
    run = hpclab.launch(client, report_what_one_likes, ranks=2)
    views.show(run)
    page = last_page(run, shown)
    assert run.status == "finished"
    for seen in shown[1].pages:
        assert "Traceback" not in seen, "a part could not be drawn"
    assert "data:image/png" in page and "[rank 1] that was all" in page and page.count("<tr>") == 3


def test_rows_of_a_file_of_before_are_drawn(tmp_path):
    """When a function might still report any kind, and text where a number is needed."""
    about = {"kind": "run", "run": "old", "ranks": 1, "threads": 1, "cpu": "c", "cpus": 2, "torch": "2"}
    rows = [about | {"started": "2026-01-01T00:00:00", "host": "a"}]
    for place, odd in enumerate((1.0, None, "s", 1e308, True, 2**63)):
        usual = {"kind": "step", "rank": 0, "ranks": 1, "attempt": 0, "step": place, "time_s": place + 1.0, "loss": 1.0}
        rows += [usual | {name: odd} for name in ("step", "loss", "time_s", "step_s", "samples", "compute_s")]
    rows += [{"kind": kind, "rank": 0, "attempt": 0, "error": 0.5} for kind in ("end", "restart", "attempt", "resume")]
    rows += [{"kind": "end", "run": "old", "status": "finished", "time_s": 9.0}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = hpclab.open_run(tmp_path)
    assert run.status == "finished"
    page = views.page(run)
    assert "Traceback" not in page, "a part could not be drawn"
    assert "data:image/png" in page


def test_a_loss_that_is_no_number_any_more_stays_in_the_figure():
    losses = [2.0, 1.0, math.nan, "none"]
    rows = [{"kind": "step", "step": step, "time_s": step + 1.0, "loss": loss} for step, loss in enumerate(losses)]
    _seconds, drawn = plots.loss_curve(rows)
    assert drawn[:2] == [2.0, 1.0] and math.isnan(drawn[2]) and len(drawn) == 3


class SlowToTell(Exception):
    """Its text takes a while: as long, a run has its last status and not yet its last row."""

    def __str__(self):
        time.sleep(0.7)
        return "planted"


def fail_slowly():
    hpclab.report(step=1, loss=1.0)
    raise SlowToTell


def test_the_last_page_of_a_run_that_failed_has_its_error(client, shown):
    run = hpclab.launch(client, fail_slowly, ranks=1)
    views.show(run)
    assert "SlowToTell: planted" in last_page(run, shown)


def chatter():
    while True:
        hpclab.report(loss=0.5)
        print("still here", flush=True)
        time.sleep(0.01)


def test_so_it_is_when_no_row_can_tell_the_error(client, shown):
    """A limit on the size of files gives the error that a full disk gives, to this process alone; and `rm -rf`."""
    run = hpclab.launch(client, chatter, ranks=2)
    views.show(run)
    until(lambda: len(run.rows) > 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        assert "OSError: [Errno 27] File too large" in last_page(run, shown)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    shown.clear()
    run = hpclab.launch(client, chatter, ranks=2)
    views.show(run)
    until(lambda: len(run.rows) > 1)
    shutil.rmtree(run.folder)
    page = last_page(run, shown)
    assert "FileNotFoundError: [Errno 2] No such file or directory: " in page and "rank-" in page
    assert no_rank_left()


def test_a_client_that_has_closed_says_so(capsys):
    with hpclab.connect(workers=1) as client:
        pass
    card.show(client)
    assert capsys.readouterr().out == "This client is closed; hpclab.connect() opens a new one.\n"


def test_a_folder_that_was_removed_is_named_in_full(client, monkeypatch, tmp_path):
    run = hpclab.launch(client, chatter, ranks=1, folder=tmp_path / "run")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert f"hpclab.open_run({str(tmp_path / 'run')!r})" in html.unescape(views.page(run))
    finally:
        monkeypatch.chdir(Path("/"))
        run.stop()

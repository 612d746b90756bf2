"""The playground with real gangs, and the card of a real cluster, as they are without a browser."""

import html
import os
import re
import shutil
import threading
import time

import dask
import matplotlib
import psutil
import pytest
from conftest import no_rank_left, until

import hpclab
from hpclab import live, models
from hpclab.cluster import card as cards
from hpclab.course import playground

SMALL = {"steps": 30, "seed": 1}


class Place:
    """Where something is shown."""

    def __init__(self):
        self.pages = []

    def update(self, shown):
        self.pages.append(shown.data)


@pytest.fixture
def play(client):
    found = playground.Playground(client, models.CNN, "fashion_mnist", **SMALL)
    found.place = Place()
    yield found
    found.stop.click()
    assert found.wait(60)


def test_a_move_trains_anew_and_leaves_a_ghost(play):
    play.train()
    assert play.wait(60)
    first = play.run
    assert first.status == "finished" and first.ranks == 2
    assert "before" not in play.place.pages[-1]
    assert "<p>2 ranks, 128 a step, " in play.place.pages[-1] and ": 30 of 30 steps, " in play.place.pages[-1]
    play.controls["ranks"].value = 1
    assert play.wait(60)
    assert play.run.ranks == 1 and play.run is not first
    (before,) = play.before.values()
    assert before is first.rows
    last = play.place.pages[-1]
    assert re.search(r">1 ranks, 128 a step, .*>before: 2 ranks, 128 a step", last) and "data:image/png" in last


def test_a_move_replaces_a_run_at_once_and_stop_ends_one(play):
    play.settings["steps"] = 100_000
    play.train()
    first = until(lambda: play.run)
    until(lambda: play.place.pages)
    play.controls["batch"].value = 64
    until(lambda: play.run is not first)
    assert first.status == "stopped" and not play.stop.disabled
    until(lambda: any(row["kind"] == "step" for row in play.run.rows))
    assert play.run.rows[-1]["samples"] == 32
    play.stop.click()
    assert play.wait(60)
    assert play.run.status == "stopped" and play.stop.disabled


def test_a_network_can_be_chosen_and_left_again(play):
    choice = play.controls["network"]
    for name, source in (("100 Mb/s", "emulated"), ("this machine's network", "measured")):
        choice.value = name
        assert play.wait(60)
        assert f">2 ranks, 128 a step, {name}</td>" in html.unescape(play.place.pages[-1]) and choice.value == name
        assert {row["source"] for row in play.run.rows if row["kind"] == "step"} == {source}


def test_what_can_not_be_is_told_and_the_next_move_is_met(play):
    play.train()
    assert play.wait(60)
    for _ in range(2):
        play.settings["lr"] = -1
        play.train()
        assert play.wait(60)
        assert "lr (=-1) must be above 0." in play.place.pages[-1]
        play.settings["lr"] = 0.1
        play.train()
        assert play.wait(60)
        assert play.run.status == "finished" and "2 ranks, 128 a step" in play.place.pages[-1]


class SlowToTell(ArithmeticError):
    """Its text takes a while: as long, a run has its last status and not yet its last row."""

    def __str__(self):
        time.sleep(0.7)
        return "planted"


def test_a_run_that_fails_shows_its_error(play):
    def loss(scores, labels):
        raise SlowToTell

    play.settings["loss"] = loss
    play.train()
    assert play.wait(60)
    assert play.run.status == "failed" and "planted" in play.place.pages[-1]


def test_a_folder_that_goes_costs_no_control_its_answer(play):
    """Of a run that has ended (`rm -rf`), and of one that goes on, with all that is temporary."""
    play.train()
    assert play.wait(60)
    shutil.rmtree(play.run.folder)
    play.settings["steps"] = 100_000
    before = play.run
    play.train()
    until(lambda: play.run not in (None, before) and any(row["kind"] == "step" for row in play.run.rows))
    shutil.rmtree(play._folder.name)
    play.settings["steps"] = 30
    play.train()
    assert play.wait(60)
    assert play.run.status == "finished" and "data:image/png" in play.place.pages[-1]


def test_what_can_not_be_drawn_is_shown_in_its_place_and_the_next_move_is_drawn(play):
    with matplotlib.rc_context({"path.effects": [1]}):  # a slip in a reader's own settings
        play.train()
        assert play.wait(60)
    page = play.place.pages[-1]
    assert "data:image/png" not in page and ">2 ranks, 128 a step" in page, "the table is there all the same"
    assert re.search(r"<pre>\w+Error: [^\n]+</pre><details><summary>Traceback", page)
    play.train()
    assert play.wait(60)
    assert play.run.status == "finished" and "data:image/png" in play.place.pages[-1]


def test_a_client_that_closes_is_told():
    with hpclab.connect(workers=1) as client:
        play = playground.Playground(client, models.CNN, "fashion_mnist", steps=100_000)
        play.place = Place()
        play.train()
        until(lambda: play.place.pages)
    assert play.wait(60)
    assert "was stopped" in play.place.pages[-1] or play.run.status == "stopped"
    for _ in range(2):
        play.train()
        assert play.wait(60)
        assert "client is closed; open a new one with hpclab.connect()" in play.place.pages.pop()


@pytest.mark.rounds
def test_moves_leave_nothing_behind(play):
    def state():
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return len(family), sum(process.num_fds() for process in family), threading.active_count()

    def move(times):
        for number in range(times):
            play.controls["batch"].value = (64, 256)[number % 2]
            time.sleep(0.1)
        assert play.wait(60) and no_rank_left()

    move(4)
    before = state()
    move(int(os.environ.get("HPCLAB_KILLS", "20")))
    until(lambda: all(has <= had + most for had, has, most in zip(before, state(), (1, 12, 2), strict=True)))
    assert len(os.listdir(play._folder.name)) == 1


def test_bad_arguments(client):
    with pytest.raises(ValueError, match=r"steps \(=0\) must be a whole number >= 1"):
        playground.Playground(client, models.CNN, "fashion_mnist", steps=0)


def test_a_card_tells_a_cluster_as_text_and_as_a_page(client, capsys):
    client._ipython_display_()
    text = capsys.readouterr().out
    assert text.startswith("2 workers (this machine)\n\nworker  host")
    page = cards.page(client)
    assert f'<a href="{client.dashboard_link}"' in page and page.count("<tr>") == 3


def test_a_card_follows_until_the_client_closes(monkeypatch):
    shown = []

    class Shown(Place):
        def __init__(self, page, display_id):
            super().__init__()
            shown.append(self)
            self.control = None if hasattr(page, "data") else page
            if self.control is None:
                self.update(page)

    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr(live, "display", Shown)
    with hpclab.connect(workers=1) as client:
        client._ipython_display_()
        size, card = shown
        size.control.value = 2
        until(lambda: card.pages[-1].count("<tr>") == 3)
        until(lambda: len(client.cluster.workers) == 2)
    until(lambda: client.id not in live._newest)
    until(lambda: size.pages == [""] and size.control.comm is None)


def test_the_dashboard_is_reached_by_a_hubs_proxy(client, monkeypatch):
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ann/")
    port = client.dashboard_link.rsplit(":", 1)[1].split("/")[0]
    assert cards.dashboard(client) == f"/user/ann/proxy/{port}/status"
    with dask.config.set({"distributed.dashboard.link": "/mine/{port}"}):
        assert cards.dashboard(client) == f"/mine/{port}"

"""The loop that draws what lives in a notebook, without a browser: errors, ends, and two displays of one thing."""

import re
import threading
import time
import types

import pytest
from conftest import until

from hpclab import live


class Shown:
    """Stands in for a browser's place of an output; so far its pages."""

    def __init__(self, shown, display_id):
        self.pages = [getattr(shown, "data", None)]
        self.id = display_id
        self.broken = False

    def update(self, shown):
        shown.data.encode()  # as the message to the browser is
        if self.broken:
            raise RuntimeError("the browser is gone")
        self.pages.append(shown.data)


class Control:
    """A widget, as far as it can be closed."""

    closed = False

    def close(self):
        self.closed = True


class Subject:
    """What is shown: a page, or an error in its place, until it has ended."""

    def __init__(self, page):
        self.page, self.over, self.drawn = page, False, 0

    def draw(self):
        self.drawn += 1
        if isinstance(self.page, Exception):
            raise self.page
        return self.page

    def ended(self):
        return self.over


@pytest.fixture
def shown(monkeypatch):
    places = []
    monkeypatch.setattr(live, "display", lambda *args, **named: places.append(Shown(*args, **named)) or places[-1])
    yield places
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "hpclab-view"])
    assert not live._newest


def test_a_page_that_can_not_be_drawn_is_told_and_drawn_again(shown):
    """And the one that stays is the last that could be."""
    subject = Subject("first")
    live.show("a key", subject.draw, subject.ended)
    (place,) = shown
    subject.page = KeyError("memory")
    until(lambda: place.pages[-1].startswith("<pre>KeyError: &#39;memory&#39;</pre><details>"))
    subject.page = "half a pair: \udcff"
    until(lambda: place.pages[-1] == "half a pair: ?")
    subject.page = OSError("it goes")
    until(lambda: "it goes" in place.pages[-1])
    subject.over = True
    until(lambda: "a key" not in live._newest)
    assert place.pages[-1] == "half a pair: ?"


def test_what_raises_at_first_is_raised_where_it_was_asked_for(shown):
    subject = Subject(RuntimeError("it has ended"))
    with pytest.raises(RuntimeError, match="it has ended"):
        live.show("a key", subject.draw, subject.ended, controls=Control())
    assert shown == []


def test_the_newest_display_of_a_thing_wins(shown):
    """It has the other one's id, by which a browser shows its pages in both places; the other one's controls go."""
    subject, controls = Subject("first"), [Control(), Control()]
    live.show("a key", subject.draw, subject.ended, controls=controls[0])
    live.show("a key", subject.draw, subject.ended, controls=controls[1])
    assert shown[1].id == shown[3].id != shown[0].id
    until(lambda: controls[0].closed)
    subject.page = "second"
    until(lambda: shown[3].pages[-1] == "second")
    assert shown[0].pages[-1] == "" and "second" not in shown[1].pages, "one loop draws"
    assert not controls[1].closed
    subject.page, subject.over = "last", True
    until(lambda: controls[1].closed)
    assert shown[2].pages[-1] == "" and shown[3].pages[-1] == "last"


def test_it_is_drawn_when_there_is_news_and_at_the_end(shown):
    subject, news = Subject("first"), threading.Event()
    live.show("a key", subject.draw, subject.ended, news=news)
    subject.page = "not told yet"
    time.sleep(3 * live.LOOK_SECONDS)
    assert subject.drawn == 1
    subject.page = "second"
    news.set()
    until(lambda: shown[0].pages[-1] == "second")
    subject.page, subject.over = "last", True  # which nobody tells
    until(lambda: shown[0].pages[-1] == "last")
    assert "not told yet" not in shown[0].pages


def test_however_much_news_comes_drawing_takes_its_share(shown):
    subject, news = Subject("first"), threading.Event()
    begun = time.monotonic()
    live.show("a key", subject.draw, subject.ended, news=news)
    while time.monotonic() < begun + 2 * live.LEAST_SECONDS:
        news.set()
        time.sleep(0.001)
    drawn, seconds = subject.drawn, time.monotonic() - begun
    assert 2 <= drawn <= 2 + seconds / live.LEAST_SECONDS
    subject.over = True


def test_a_browser_that_is_gone_ends_no_loop(shown, caplog):
    subject, news = Subject("first"), threading.Event()
    live.show("a key", subject.draw, subject.ended, news=news)
    (place,) = shown
    place.broken, subject.page = True, "lost"
    news.set()
    until(lambda: "a page can't be shown" in caplog.text)
    place.broken, subject.page = False, "seen again"
    news.set()
    until(lambda: place.pages[-1] == "seen again")
    assert "lost" not in place.pages
    subject.over = True


def test_what_can_never_be_drawn_says_so_to_the_end():
    pages = []
    subject = Subject(ZeroDivisionError("of a view"))
    subject.over = True
    live.follow(pages.append, subject.draw, subject.ended)
    assert len(pages) == 1 and "of a view" in pages[0]


def test_a_line_says_how_a_loop_gets_on_and_at_the_end_what_it_took(shown, monkeypatch):
    monkeypatch.setattr(live, "get_ipython", lambda: types.SimpleNamespace(kernel=None))
    with live.bar(4, "sweep", "run") as line:
        until(lambda: shown[0].pages[-1].startswith("<p>sweep: 0 of 4 runs, "))
        line.update()
        line.failures += 1
        line.set_postfix_str("2 ranks, step 3")
        until(lambda: "sweep: 1 of 4 runs, 2 ranks, step 3, failures: 1, " in shown[0].pages[-1])
        assert " s left" in shown[0].pages[-1]
        line.update(3)
        line.set_postfix_str("")
    until(lambda: re.fullmatch(r"<p>sweep: 4 of 4 runs, failures: 1, \d+ s</p>", shown[0].pages[-1]))


def test_outside_of_a_notebook_it_is_a_bar_in_the_terminal(capsys):
    with live.bar(2, "sweep", "run") as bar:
        bar.update(2)
        bar.failures += 1
        bar.set_postfix_str("2 ranks, step 3")
    shown = capsys.readouterr().err
    assert "sweep: 100%" in shown and "2 ranks, step 3, failures: 1" in shown


def test_what_is_tracked_goes_through_all_and_says_so(capsys):
    assert [number**2 for number in live.tracked(range(3), "squares", "number")] == [0, 1, 4]
    assert "squares: 100%" in capsys.readouterr().err

"""What figures say in words, against the rows that they draw."""

import dataclasses
import random
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import require
from IPython.core.formatters import DisplayFormatter
from matplotlib import font_manager

from hpclab import figures, language, laws, plots, racing, rows, tasks, views
from hpclab.course import quizzes
from hpclab.forecast import Workload, calibrate
from hpclab.network import Network

ABOUT = {"source": "measured", "cpu": "c", "cpus": 2, "torch": "2", "started": "2026-01-01T00:00:00"}
TRIALS = [
    ABOUT | {"ranks": ranks, "samples_per_s": rate + extra}
    for ranks, rate in ((1, 100), (2, 190), (4, 360))
    for extra in (0, 4)
]
SUMMARY = [
    ABOUT
    | {"label": "2 ranks", "repeats": 3, "speedup": 1.6, "speedup_low": 1.5, "speedup_high": 1.7, "efficiency": 0.8}
]
SPLIT = {"compute_s": 0.02, "comm_s": 0.003, "straggle_s": 0.001, "data_s": 0.0, "step_s": 0.024}
SPANS = [
    {"rank": rank, "name": name, "start_s": start, "duration_s": 0.01, "source": "emulated"}
    for rank in (0, 1)
    for start, name in ((0.0, "forward"), (0.01, "backward"), (0.015, "all-reduce"), (0.02, "waiting"))
]
STEPS = [
    {"kind": "step", "step": step, "rank": 0, "time_s": step + 1.0, "step_s": 1.0, "samples": 8, "loss": loss}
    for step, loss in enumerate((2.0, 3.0, 1.0))
]
STREAM = [
    {
        "key": f"squeeze-{number}",
        "worker": f"tls://127.0.0.1:{port}",
        "startstops": [
            {"action": "transfer", "start": start - 0.005, "stop": start},
            {"action": "compute", "start": start, "stop": start + duration},
        ],
    }
    for number, (port, start, duration) in enumerate([(40002, 10.01, 0.03), (40001, 10.0, 0.02)])
]
JOB = {"source": "measured", "nodes": None, "started_s": None, "ended_s": None}
JOBS = [
    JOB
    | {
        "job": "1",
        "name": "a",
        "submitted_s": 5.0,
        "started_s": 7.0,
        "ended_s": 10.0,
        "nodes": "n1",
        "state": "FAILED",
    },
    JOB | {"job": "2", "name": "b", "submitted_s": 6.0, "started_s": 8.0, "nodes": "n2", "state": "RUNNING"},
    JOB | {"job": "3", "name": "c", "submitted_s": 7.0, "state": "PENDING"},
]
COUNTS = [2, 2, 10, 10, 100, 100, 1000, 1000, 10_000]
GRAIN_S = [0.3 + 0.001 * count + 0.002 * place for place, count in enumerate(COUNTS)]
GRAIN = [ABOUT | {"tasks": n, "items": 10_000, "duration_s": s} for n, s in zip(COUNTS, GRAIN_S, strict=True)]
AHEAD = calibrate(Workload(0.1, 1e6), Network(), [1, 1, 1], [0.099, 0.1, 0.101], ["compute_s"])
FIGURES = {
    "loss": (lambda: plots.loss({"a": STEPS}), "a (of unknown origin): 2 at 1, 3 at 2, 1 at 3"),
    "rate": (lambda: plots.rate(STEPS), "samples a second against seconds of training (of unknown origin). 8 at 3"),
    "speedup": (lambda: plots.speedup(SUMMARY), "2 ranks: 1.6 (1.5-1.7)"),
    "law": (lambda: plots.law(TRIALS, laws.fit_usl([1, 1, 2, 4], [100, 104, 190, 360])), "measured: 100-104 at 1, "),
    "forecasts": (
        lambda: plots.forecasts({"ring": AHEAD.columns([1, 2])}, [{"ranks": 1, "efficiency": 1.0}]),
        "; of unknown origin: 1 at 1",
    ),
    "gantt": (
        lambda: plots.gantt(JOBS, now=15.0),
        "1 a: waited 2 s, ran 3 s on n1 (FAILED); 2 b: waited 2 s, ran 7 s on n2 (RUNNING); 3 c: waited 8 s",
    ),
    "split": (
        lambda: plots.split([ABOUT | {"rank": 0} | SPLIT]),
        "rank 0: computing 20 ms, communication 3 ms, waiting for a CPU 1 ms",
    ),
    "timeline": (lambda: plots.timeline(SPANS), "rank 1: forward 10 ms, backward 10 ms, waiting"),
    "tasks": (
        lambda: plots.tasks(tasks.spans(STREAM)),
        "milliseconds (measured). worker 0: computing for 20 ms, tasks: 1; worker 1: computing for 30 ms, tasks: 1",
    ),
    "grain": (
        lambda: plots.grain(GRAIN[:-1], laws.fit_alpha_beta(COUNTS[:-1], GRAIN_S[:-1]), GRAIN[-1:]),
        "not used for the law: 10.3 at 1; ",
    ),
    "roofline": (
        lambda: plots.roofline(
            [ABOUT | {"kind": "roofline", "name": "ReLU", "intensity": 0.5, "flops_per_s": 5e8}],
            ABOUT | {"kind": "ceiling", "flops_per_s": 8e9, "bytes_per_s": 2e9, "ridge": 4.0},
        ),
        "ceilings: 8 Gflop/s and 2 GB/s, ridge 4; ReLU: 0.5 Gflop/s at 0.5 flop a byte, 50% of the roof",
    ),
    "allreduce": (
        lambda: plots.allreduce([ABOUT | {"nbytes": 1000, "duration_s": 0.5}]),
        "milliseconds of an all-reduce against bytes (measured: c, 2 CPU, torch 2, 2026-01-01). measured: 500 at 1,000",
    ),
}


@pytest.fixture(params=FIGURES)
def drawn(request):
    draw, says = FIGURES[request.param]
    ax = draw()
    yield ax, says
    plt.close(ax.figure)


def test_a_figure_says_what_it_shows(drawn):
    ax, says = drawn
    assert says in ax.figure.words()


def test_a_notebook_folds_the_words_away_below_the_picture(drawn):
    bundle, _metadata = DisplayFormatter().format(drawn[0].figure)
    told = r"<figcaption.*?><details><summary>This figure in words</summary>(.*)</details></figcaption>"
    caption = re.search(told, bundle["text/html"])[1]
    assert caption.split(".")[0] in bundle["text/plain"].replace("&", "&amp;")
    alt = re.search(r'alt="([^"]+)"', bundle["text/html"])[1]
    assert caption.startswith(alt)
    assert bundle["image/png"].startswith("iVBOR")


MANY = [
    step | {"rank": rank, "time_s": 1.5 * step["step"] + 1.5 + 0.1 * rank, "attempt": 0, "ranks": 2, "cpu_s": 0.5}
    for step in [STEPS[0] | {"step": number, "loss": 3 / (1 + number)} for number in range(50)]
    for rank in (0, 1)
]
CASES = [
    SUMMARY[0] | {"case": case, "label": f"{case + 1} ranks", "speedup": 1.5 + case / 5} | {"speedup_high": 2.5}
    for case in range(4)
]
RANKS = [ABOUT | {"rank": rank} | SPLIT for rank in range(4)]
LAW = laws.fit_usl([1, 1, 2, 4], [100, 104, 190, 360])
LINE = laws.fit_alpha_beta(COUNTS[:-1], GRAIN_S[:-1])
OF_ROWS = {
    "loss": (lambda rows: plots.loss({"a": rows}), MANY),
    "loss on an own CPU": (lambda rows: plots.loss({"a": racing.own_cpu(rows)}), MANY),
    "rate": (plots.rate, MANY),
    "recovery": (plots.recovery, MANY),
    "speedup": (plots.speedup, CASES),
    "efficiency": (
        plots.efficiency,
        [row | {"efficiency_low": 0.7, "efficiency_high": 0.9 + row["case"] / 50} for row in CASES],
    ),
    "law": (lambda rows: plots.law(rows, LAW), TRIALS),
    "forecast of a law": (lambda rows: plots.law(TRIALS, LAW, rows), AHEAD.rows([1, 2, 4, 8, 16])),
    "gantt": (lambda rows: plots.gantt(rows, now=15.0), JOBS),
    "split": (plots.split, RANKS),
    "timeline": (plots.timeline, SPANS),
    "tasks": (plots.tasks, tasks.spans(STREAM)),
    "grain": (lambda rows: plots.grain(rows, LINE), GRAIN),
    "allreduce": (
        lambda rows: plots.allreduce(rows, LINE),
        [ABOUT | {"nbytes": n, "duration_s": s} for n, s in zip(COUNTS, GRAIN_S, strict=True)],
    ),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_in_another_order_make_the_same_figure(name):
    draw, rows = OF_ROWS[name]
    pictures = set()
    for order in (rows, random.Random(1).sample(rows, len(rows))):
        ax = draw(order)
        pictures.add((ax.figure.words(), figures.png(ax.figure)))
        plt.close(ax.figure)
    assert len({words for words, _picture in pictures}) == 1
    assert len(pictures) == 1


def test_tables_of_a_run_do_not_depend_on_the_order_of_its_rows():
    mixed = random.Random(1).sample(MANY, len(MANY))
    assert views.ranks(mixed) == views.ranks(MANY) and views.gang(mixed) == views.gang(MANY)
    newest = ABOUT | {"cpu": "d", "started": "2026-01-02T00:00:00"}
    assert (
        figures.provenance([newest, ABOUT])
        == figures.provenance([ABOUT, newest])
        == "measured: c, 2 CPU, torch 2 | d, 2 CPU, torch 2, 2026-01-01"
    )


def test_a_rank_alone_waits_for_a_cpu_and_talks_to_nobody():
    row = {
        "kind": "step",
        "rank": 0,
        "attempt": 0,
        "step": 0,
        "time_s": 1.0,
        "step_s": 1.0,
        "wait_s": 0.5,
        "samples": 8,
    }
    assert views.ranks([row | {"ranks": 1}])[0]["waiting for a CPU"] == "50%"
    assert "talking and waiting" not in views.ranks([row | {"ranks": 1}])[0]
    two = [row | {"ranks": 2, "rank": rank} for rank in (0, 1)]
    assert views.ranks(two)[0]["talking and waiting"] == "50%"
    alone = plots.split([ABOUT | {"rank": 0} | SPLIT])
    assert "waiting for a CPU 1 ms" in alone.figure.words()
    plt.close("all")


def test_a_loss_curve_has_a_gap_where_its_run_failed_and_marks_it():
    """Killed at 21.5 s with a checkpoint after step 10; it went on 8 s later with step 11."""
    before = [row for row in MANY if row["step"] < 13]
    saved = {"kind": "checkpoint", "attempt": 0, "step": 11, "time_s": 16.7}
    restart = {"kind": "restart", "attempt": 1, "cause": "killed", "failed_s": 21.5, "time_s": 29.0}
    after = [row | {"attempt": 1, "time_s": row["time_s"] + 13.0} for row in MANY if row["step"] >= 11]
    ax = plots.loss({"2 ranks": [*before, saved, restart, *after]})
    seconds, losses = (np.array(ax.get_lines()[0].get_data()[place]) for place in (0, 1))
    (gap,) = seconds[np.isnan(losses)]
    first = before[0]["time_s"] - 1.0
    assert gap == pytest.approx(21.5 - first)
    assert seconds[np.flatnonzero(np.isnan(losses))[0] - 1] == pytest.approx(16.6 - first), "lost steps aren't drawn"
    names = ax.get_legend_handles_labels()[1]
    assert {"failure", "until it went on", "checkpoint"} < set(names) and len(names) == len(set(names))
    assert "; failed and went on at 21-29.5 s" in ax.figure.words()
    plt.close("all")


def test_steps_count_from_one_where_they_are_shown():
    """The run of the quiz: 55 steps, 40 of them kept, then those from the 41st to the 120th."""
    assert [row["steps"] for row in views.recovery(quizzes.RECOVERY)] == ["1-55", "41-120"]
    ax = plots.recovery(quizzes.RECOVERY)
    assert "attempt 1: steps 1 to 55, 15 of them lost" in ax.figure.words()
    assert views.ranks(MANY)[0]["step"] == views.gang(MANY)["step"] == 50
    plt.close("all")


def test_the_legend_of_a_failed_run_is_above_both_panels():
    shown = views._figure(quizzes.RECOVERY)
    png = figures.png(shown)
    left, right = shown.axes
    place = left.get_legend().get_window_extent()
    assert png and left.bbox.y1 < place.y0 and place.y1 <= shown.bbox.y1 and place.x1 <= shown.bbox.x1
    assert not left.get_title(loc="right") and right.get_title(loc="right") == "planted"


def test_rows_of_several_sources_name_each():
    shown = [{"source": "measured"}, {"source": "forecast"}, {"source": "measured"}]
    assert figures.provenance(shown) == "measured, forecast"


def test_timelines_share_one_legend_that_names_all():
    forward = [row for row in SPANS if row["name"] == "forward"]
    plots.timelines([forward, SPANS])
    first, second = plt.gcf().axes
    assert second.get_legend() is None
    names = [text.get_text() for text in first.get_legend().get_texts()]
    assert "forward" in names and "backward" in names and len(names) == len(set(names))
    plt.close("all")


@pytest.mark.parametrize(("last", "numbers"), [(400, ["100", "200"]), (40_000, ["100", "1,000", "10,000"])])
def test_a_logarithmic_axis_has_plain_numbers(last, numbers):
    ax = plots.figures.axes(None)
    ax.plot([1, 2], [80, last])
    plots.logarithmic(ax, "{x:g}", "{x:,.0f}", base=2)
    low, high = ax.get_ylim()
    places = [place for place in ax.yaxis.get_ticklocs() if low <= place <= high]
    assert [ax.yaxis.get_major_formatter()(place) for place in places] == numbers
    assert not any(ax.yaxis.get_minor_formatter().format_ticks(ax.yaxis.get_minorticklocs()))
    plt.close("all")


def test_a_task_of_an_array_is_named_as_in_the_table_of_jobs():
    ax = plots.gantt([JOBS[0] | {"array": None}, JOBS[1] | {"array": "1_2"}], now=15.0)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1 a", "1_2 b"]
    plt.close("all")


def test_pieces_of_different_work_are_not_drawn_as_one():
    with pytest.raises(ValueError, match=r"rows are of different work \(items: \[10000, 20000\]\)"):
        plots.grain(GRAIN, LINE, [GRAIN[0] | {"items": 20_000}])
    plt.close("all")


def test_series_differ_in_more_than_colour():
    assert len({figures.look(place)["marker"] for place in range(7)}) == 7


def test_figures_of_others_take_our_axes_too():
    shown, ax = plt.subplots()
    plots.split([ABOUT | {"rank": 0} | SPLIT], ax)
    assert ax.get_xlabel() == "milliseconds of a step"
    plt.close(shown)


def test_pictures_are_named_by_their_titles():
    shown, (left, right) = figures.subplots(1, 2)
    left.set_title("boot")
    right.set_title("coat")
    assert shown.words() == "boot; coat"
    assert 'alt="boot; coat"' in shown.picture()


def test_figures_name_all_machines_that_rows_are_of():
    run = {"kind": "run", "host": "a", "hosts": 1} | ABOUT
    other = {"kind": "restart", "attempt": 1, "host": "a; b", "hosts": 2, "cpu": "c; d", "cpus": 6, "torch": "2"}
    assert figures.provenance([run]) == "measured: c, 2 CPU, torch 2, 2026-01-01"
    assert figures.provenance([run, other]) == (
        "measured: c, 2 CPU, torch 2 | c; d, 6 CPU on 2 hosts, torch 2, 2026-01-01"
    )
    summed = rows.machine([run, {"kind": "restart"}, other])
    assert summed == {name: run[name] for name in ("started", "torch")} | {
        name: other[name] for name in ("host", "hosts", "cpu", "cpus")
    }


def test_a_font_that_is_newer_than_matplotlibs_list_is_found(monkeypatch):
    """And one that the list has, but whose file has gone, isn't taken for one that is there."""
    fonts = font_manager.fontManager
    chinese = [font for font in fonts.ttflist if font.name in language.CJK_FONTS]
    require(bool(chinese), "a font with Chinese characters")
    gone = dataclasses.replace(chinese[0], name=language.CJK_FONTS[0], fname="/nowhere/gone.ttf")
    files = {font.fname for font in chinese}
    monkeypatch.setattr(fonts, "ttflist", [font for font in fonts.ttflist if font.fname not in files] + [gone])
    language.cjk_font.cache_clear()
    try:
        assert language.cjk_font() in {font.name for font in chinese}
    finally:
        language.cjk_font.cache_clear()

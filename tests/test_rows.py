"""Files of rows: what is whole counts, what is damaged is named, what was cut off is left out, and all of it stays."""

import json
import random
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import pytest

from hpclab import plots, rows, scaling
from hpclab.course import predictions
from hpclab.gangs import run as runs
from hpclab.scaling import sweeps

WHOLE = b'{"kind": "step", "step": 0}\n'
LAST = b'{"kind": "step", "step": 2}\n'
DAMAGED = {
    "cut in the middle": b'{"kind": "st\n',
    "not UTF-8": b'{"kind": "\xff\xfe"}\n',
    "a list": b'[{"kind": "step"}]\n',
    "a number": b"7\n",
    "null": b"null\n",
    "zeros of a disk that lost power": b"\0" * 64 + b"\n",
    "brackets without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_named_and_hides_no_other(damage, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(WHOLE + b"\n" + DAMAGED[damage] + LAST)  # an empty line is no damage
    with pytest.warns(UserWarning, match=r"line 3 of .*rows.jsonl holds no row; it is skipped") as told:
        assert [row["step"] for row in rows.read(file)] == [0, 2]
    assert len(told) == 1 and told[0].filename == __file__
    assert file.read_bytes() == WHOLE + b"\n" + DAMAGED[damage] + LAST


@pytest.mark.parametrize("cut_off", [b'{"kind": "st', b'{"kind": "step"', b'{"kind": "\xe4', b"[", b'{"step": 1}, '])
def test_a_last_line_that_was_cut_off_is_left_out_without_fuss_and_stays(cut_off, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(WHOLE + cut_off)
    assert [row["step"] for row in rows.read(file)] == [0]
    for step in (1, 2):
        rows.append(file, {"kind": "step", "step": step})
        assert [row["step"] for row in rows.read(file)] == [0, *range(1, step + 1)]
    assert file.read_bytes().startswith(WHOLE + cut_off)


@pytest.mark.parametrize("before", [b"", WHOLE, b"\xef\xbb\xbf" + WHOLE.replace(b"\n", b"\r\n")])
def test_a_whole_last_line_without_an_end_counts_and_stays(before, tmp_path):
    """As an editor leaves it; and with the mark and the line ends that Windows' own writes."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(before + LAST.strip())
    assert rows.read(file)[-1] == {"kind": "step", "step": 2}
    rows.append(file, {"kind": "step", "step": 3})
    assert file.read_bytes() == before + LAST + b'{"kind": "step", "step": 3}\n'
    assert [row["step"] for row in rows.read(file)] == [0] * bool(before) + [2, 3]


WRITER = """
import sys
from hpclab import rows
for number in range(200):
    rows.append(sys.argv[1], {"writer": sys.argv[2], "number": number, "text": "x" * 100 * number})
"""


def test_two_writers_at_once_lose_no_row(tmp_path):
    """Without a lock: each row is one write at the end of the file."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(WHOLE + b'{"kind": "st')
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, file, name]) for name in "ab"]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    found = [row for row in rows.read(file) if "writer" in row]
    for name in "ab":
        assert [row["number"] for row in found if row["writer"] == name] == [*range(200)]
    assert {row["writer"] for row in found[:300]} == {"a", "b"}, "they met"


def test_a_row_longer_than_the_last_look_is_whole_too(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 8)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LAST)
    rows.append(file, {"step": 3})
    assert file.read_bytes() == LAST + b'{"step": 3}\n'


def test_a_sweep_of_one_row_without_an_end_goes_on_with_it(tmp_path):
    for number, text in enumerate((b'{"case": 0, "asked": {"ranks": "1"}, "repeat": 0}', b'{"case": 0, "as')):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = folder / "trials.jsonl"
        file.write_bytes(text)
        kept = sweeps._Kept(folder, [{"ranks": 1}], {})
        assert kept.has(0, 0) == (number == 0)
        assert file.read_bytes() == text
        kept.add(0, 1, {"label": "1 rank"})
        assert file.read_bytes().startswith(text)
        assert rows.read(file) == sweeps._Kept(folder, [{"ranks": 1}], {}).rows == kept.rows
    for other in ({"kind": "step"}, {"case": None, "asked": 3}):
        (tmp_path / "0" / "trials.jsonl").write_text(json.dumps(other) + "\n")
        with pytest.raises(ValueError, match="holds another sweep"):
            sweeps._Kept(tmp_path / "0", [{"ranks": 1}], {})


def test_a_run_with_a_damaged_line_is_opened_with_the_others(tmp_path):
    about = {"run": "r", "ranks": 2, "attempt": 0, "rank": 0}
    lines = [
        {"kind": "run"} | about,
        {"kind": "step", "step": 0} | about,
        {"kind": "end", "status": "finished"} | about,
    ]
    texts = [json.dumps(line).encode() + b"\n" for line in lines]
    for place in range(3):
        (tmp_path / "rows.jsonl").write_bytes(b"".join([*texts[:place], b"\0\0\n", *texts[place + 1 :]]))
        with pytest.warns(UserWarning, match=f"line {place + 1} of"):
            run = runs.open_run(tmp_path)
        assert (run.name, run.ranks, len(run.rows)) == ("r", 2, 2)
        assert run.status == ("interrupted" if place == 2 else "finished")
    (tmp_path / "rows.jsonl").write_text('{"kind": "trial", "run": "r", "ranks": 2}\n')
    with pytest.raises(FileNotFoundError, match=r"holds no rows\.jsonl of a run"):
        runs.open_run(tmp_path)


def test_a_prediction_whose_writing_was_cut_off_spoils_no_book(tmp_path):
    book = tmp_path / "book"
    first = predictions.write(book, {"a": (1, 2)})
    book.write_bytes(book.read_bytes() + b'{"predicted": {"a": [1')
    assert predictions.read(book) == [first]
    second = predictions.write(book, {"a": (1, 3)})
    assert predictions.read(book) == [first, second]
    book.write_bytes(book.read_bytes()[:-1])
    assert predictions.read(book) == [first, second], "whole, but for its end"
    book.write_bytes(book.read_bytes() + b"\n7\n")
    with pytest.raises(ValueError, match="was changed after it was written, in line 4"):
        predictions.read(book)


def test_rows_are_chosen_by_their_kind_and_untold_ones_are_believed():
    steps, epochs = [{"kind": "step"}], [{"kind": "epoch"}]
    assert rows.some([*epochs, *steps], "step") == steps
    assert rows.some([{"loss": 1.0}], "step") == [{"loss": 1.0}]
    with pytest.raises(ValueError, match=r"rows hold no trial \(but epoch, step\); give those of a measurement"):
        rows.some([*steps, *epochs], "trial")
    for ask in (rows.span, plots.recovery):
        with pytest.raises(ValueError, match=r"rows hold no step \(but trial\)"):
            ask([{"kind": "trial"}])
    with pytest.raises(ValueError, match=r"rows hold no forecast \(but trial\)"):
        plots.law([{"ranks": 1, "samples_per_s": 1.0}], None, [{"kind": "trial"}])
    plt.close("all")


def attempts(dice):
    """A run of 2 ranks that was lost twice."""
    found = [{"kind": "run", "run": "r", "ranks": 2, "threads": 1, "started": "2026-01-01T00:00:00"}]
    found[0] |= {"host": "h", "cpu": "c", "cpus": 2, "torch": "2"}
    clock, first = 1.0, 0
    for attempt in range(3):
        about = {"attempt": attempt, "ranks": 2}
        if attempt:
            failure = {"kind": "restart", "cause": "lost", "failed_s": clock + 0.1, "time_s": clock + 0.2}
            found += [about | failure, about | {"kind": "resume", "step": first}]
        for step in range(first, first + 12):
            clock += 0.1 + 0.01 * dice.random()
            for rank in range(2):
                row = {"kind": "step", "step": step, "rank": rank, "time_s": clock + 0.001 * rank, "samples": 8}
                found.append(about | row | {"source": "measured", "loss": dice.random()})
        found.append(about | {"kind": "checkpoint", "step": first + 5, "save_s": dice.random(), "nbytes": 1})
        found.append(about | {"kind": "epoch", "epoch": attempt, "step": first + 4, "test_accuracy": dice.random()})
        first += 8
    return [*found, {"kind": "end", "status": "failed", "error": "boom", "time_s": clock + 1}]


@pytest.mark.parametrize("seed", range(3))
def test_what_rows_say_does_not_depend_on_their_order(seed):
    dice = random.Random(seed)
    ordered = attempts(dice)
    shuffled = dice.sample(ordered, len(ordered))
    assert rows.attempts(shuffled) == rows.attempts(ordered)
    summaries = rows.attempts(ordered)
    assert [row["kept"] for row in summaries] == [8, 8, 12]
    assert all(row["start_s"] < row["last_s"] <= row["end_s"] for row in summaries)
    assert [row["end_s"] - row["last_s"] for row in summaries] == pytest.approx([0.099, 0.099, 0])  # failed 0.1 s later
    assert rows.span(shuffled) == rows.span(ordered)
    one_by_one = [json.dumps(row) for row in rows.kept(ordered)]
    assert sorted(json.dumps(row) for row in rows.kept(shuffled)) == sorted(one_by_one)
    assert scaling.trial(shuffled) == scaling.trial(ordered)
    assert scaling.split(shuffled) == scaling.split(ordered)
    trials = [
        scaling.trial(ordered) | {"case": case, "repeat": repeat, "ranks": case + 1, "samples_per_s": dice.random()}
        for repeat in range(3)
        for case in range(4)
    ]
    mixed = dice.sample(trials, len(trials))
    assert scaling.summary(mixed) == scaling.summary(trials)
    assert [row["case"] for row in scaling.summary(mixed)] == [0, 1, 2, 3]
    assert scaling.remarks(mixed) == scaling.remarks(trials)
    assert scaling.regime(mixed) == scaling.regime(trials) == "strong"
    assert scaling.fit(mixed).values == scaling.fit(trials).values
    assert str(scaling.verdict(mixed)) == str(scaling.verdict(trials))


def test_appending_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows.append(tmp_path / "new", {"loss": float("nan")})
        assert rows.read(tmp_path / "new") == [{"loss": None}]

"""A study's page: made from rows alone, it carries them, and makes itself anew."""

import random
import re

import pytest

from hpclab import cli, laws, study

MACHINE = {"host": "h", "cpu": "c", "cpus": 16, "torch": "2", "started": "2026-01-01T00:00:00", "threads": 1}


def rows(counts=(1, 2, 4, 8, 16)):
    """Strong scaling by the USL, weak by Gustafson, and a network of 1 ms and 1 Gb/s; all known."""
    found = []
    for regime in ("strong", "weak"):
        for repeat in range(3):
            for case, count in enumerate(counts):
                strong = regime == "strong"
                speed = laws.usl([count], 0.05, 0.005)[0] if strong else laws.gustafson([count], 0.1)[0]
                batch = 192 if strong else 192 * count
                found.append(
                    {"kind": "trial", "regime": regime, "case": case, "repeat": repeat, "ranks": count, "batch": batch}
                    | {"samples_per_s": 2000 * speed * (1 + 0.002 * repeat), "label": f"{count} ranks"}
                    | {"step_s": batch / (2000 * speed), "jitter_s": 0.001, "source": "measured"}
                    | MACHINE
                )
    for nbytes in (1e3, 1e6):
        for wobble in (0.99, 1.01):
            seconds = float(laws.alpha_beta(nbytes, 2e-3, 8e-9)) * wobble
            message = {"kind": "allreduce", "ranks": 2, "nbytes": nbytes, "duration_s": seconds, "source": "measured"}
            found.append(message)
    return [*found, {"kind": "workload", "gradient_bytes": 200_744, "bucket_bytes": 200_744}]


def test_the_page_carries_its_rows_and_makes_itself_anew(tmp_path, capsys):
    first = study.write(rows(), tmp_path / "index.html")
    assert study.read(first) == rows()
    assert cli.main(["scale", "--rows-of", str(first), "--folder", str(tmp_path / "again")]) == 0
    again = tmp_path / "again" / "index.html"
    assert str(again) in capsys.readouterr().out
    assert again.read_text("utf-8") == first.read_text("utf-8")


def test_rows_in_another_order_make_the_same_page():
    found = rows()
    assert study.sections(random.Random(0).sample(found, len(found))) == study.sections(found)


def test_the_page_says_what_the_rows_prove(tmp_path):
    text = study.write(rows(), tmp_path / "index.html").read_text("utf-8")
    assert "usl: the smallest law that no larger one beats" in text
    assert re.search(r"gustafson: g = 200\d \(.*sigma = 0.1 \(", text)
    assert "alpha-beta: alpha = 0.002" in text
    assert text.count("<figcaption") == 4  # strong, weak, network, forecast
    assert ">1024</td>" in text
    assert not re.search(r'(src|href)="(?!data:)', text), "one file that needs no other"


def test_the_page_begins_with_the_verdict():
    """USL, sigma 0.05 and kappa 0.005 on 16 ranks: 16 / (1 + 0.75 + 1.2) = 5.42; Gustafson, sigma 0.1: 14.5."""
    title, strong, weak, machine, *_rest = study.sections(rows())
    assert "In short" in title and "This machine" in machine
    assert "With 16 ranks training is 5.42 times as fast (5.42 to 5.42 in 3 rounds; measured)." in strong
    assert "</strong> usl: the smallest law that no larger one beats" in strong
    assert "14.50 times as many samples are processed in a second" in weak


def test_the_page_draws_the_law_that_it_names(tmp_path):
    """Not the largest that fits; and where trials don't say their regime, their batches do."""
    found = [row for row in rows() if row.get("regime") == "strong"]
    for row in found:
        del row["regime"]
        row["samples_per_s"] = 2000 * laws.amdahl([row["ranks"]], 0.05)[0] * (1 + 0.002 * row["repeat"])
    text = study.write(found, tmp_path / "index.html").read_text("utf-8")
    assert "amdahl: the smallest law that no larger one beats" in text
    (caption,) = re.findall(r"<figcaption.*?</summary>(.*?)</details>", text)
    assert "amdahl: " in caption and "usl: " not in caption


def test_ranks_that_took_turns_give_no_law(tmp_path):
    found = [row | {"source": "emulated"} if row.get("ranks", 0) > 2 else row for row in rows()]
    text = study.write(found, tmp_path / "index.html").read_text("utf-8")
    assert "or from a dialled network, so this" in text
    assert "kappa = " not in text and "gustafson: " not in text
    assert " law with its band" not in text


def test_two_counts_prove_nothing_and_the_page_says_so(tmp_path):
    text = study.write(rows((1, 2)), tmp_path / "index.html").read_text("utf-8")
    assert "not identifiable: 2 different counts up to 2 can" in text


def test_a_study_of_this_machine(client, tmp_path):
    page = study.measure(client, [2], tmp_path / "s", batch_size=64, steps=8, repeats=1)
    found = study.read(page)
    trials = [(row["regime"], row["ranks"], row["batch"]) for row in found if row["kind"] == "trial"]
    assert sorted(trials) == [("strong", 1, 64), ("strong", 2, 64), ("weak", 1, 64), ("weak", 2, 128)]
    more = study.read(study.measure(client, [2], tmp_path / "s", batch_size=64, steps=8, repeats=2))
    with pytest.raises(ValueError, match="holds another sweep"):
        study.measure(client, [2], tmp_path / "s", batch_size=64, steps=9, repeats=1)
    runs = {row["run"] for row in found if row["kind"] == "trial"}
    assert runs < {row["run"] for row in more if row["kind"] == "trial"}, "what was there is kept"
    assert {path.name for path in tmp_path.iterdir()} == {"s"}, "nothing lies elsewhere"


@pytest.mark.parametrize(("ranks", "says"), [([3], r"ranks \(=3\) must .* divide batch_size \(=64\)"), ([0], "ranks")])
def test_bad_counts(client, tmp_path, ranks, says):
    with pytest.raises(ValueError, match=says):
        study.measure(client, ranks, tmp_path, batch_size=64)


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="rows hold no trial"):
        study.write([], tmp_path / "index.html")
    (tmp_path / "other.html").write_text("<p>")
    with pytest.raises(ValueError, match="isn't a study's page"):
        study.read(tmp_path / "other.html")

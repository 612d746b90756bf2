"""Sweeps: the order they keep, the sums they make, checked against rows written by hand."""

import functools
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

import hpclab
from hpclab import laws, plots, racing, ratios, scaling, study
from hpclab import rows as from_rows
from hpclab.network import Network


def rows(ranks=1, threads=1, step_s=0.1, steps=15, source="measured", samples=64):
    """Rows of a run whose every number is known."""
    about = {
        "kind": "run",
        "run": "r",
        "ranks": ranks,
        "threads": threads,
        "started": "2026-01-01T00:00:00",
        "host": "h",
    }
    found = [about | {"cpu": "c", "cpus": 2, "torch": "2"}]
    time_s = 3.0
    for step in range(steps):
        spent = step_s * 10 if step < 5 else step_s  # what must not count
        time_s += spent
        times = {"time_s": time_s, "step_s": spent, "data_s": spent / 4, "cpu_s": spent / 2}
        common = {"kind": "step", "attempt": 0, "ranks": ranks, "step": step, "samples": samples, "loss": 1.0}
        common["source"] = source
        found += [common | times | {"rank": rank} for rank in range(ranks)]
    return found


def test_throughput_and_trial():
    assert scaling.throughput(rows(step_s=0.1)) == pytest.approx(640)
    assert scaling.throughput(rows(ranks=2, step_s=0.1)) == pytest.approx(1280)
    trial = scaling.trial(rows(ranks=2, step_s=0.1))
    assert trial["label"] == "2 ranks"
    assert trial["start_s"] == pytest.approx(3)
    assert trial["train_s"] == pytest.approx(5 * 1.0 + 10 * 0.1)
    assert trial["data_share"] == pytest.approx(0.25)
    assert trial["accuracy"] is None
    by_rank = sorted(rows(ranks=2), key=lambda row: row.get("rank", -1))  # as they come in: a batch a rank
    losses = [row | {"loss": float(row["step"])} if row["kind"] == "step" else row for row in by_rank]
    assert scaling.trial(losses)["loss"] == pytest.approx((10 + 11 + 12 + 13 + 14) / 5)
    assert trial["source"] == "measured"
    assert trial["warm_up"] == 5
    assert trial["batch"] == 128
    with pytest.raises(ValueError, match="rows hold 5 steps; a throughput needs 6"):
        scaling.throughput(rows(steps=5))
    with pytest.raises(ValueError, match="rows hold no steps of rank 1 of 2 after the warm-up; every rank must report"):
        scaling.trial([row for row in rows(ranks=2) if row.get("rank") != 1 or row["step"] == 0])
    with_one = [row for row in rows(ranks=2) if row.get("rank") != 1] + [{"kind": "restart", "ranks": 1, "attempt": 1}]
    assert scaling.trial(with_one)["samples_per_s"] == pytest.approx(640)


@pytest.mark.parametrize("slow", [0, 1, 3, 7])
def test_the_warm_up_is_found(slow):
    dice = random.Random(slow)
    for _ in range(50):
        seconds = [(3.0 if step < slow else 1.0) + dice.gauss(0, 0.05) for step in range(30)]
        assert scaling.warm_up(seconds) == slow
    assert scaling.warm_up([3.0] * 6 + [1.0] * 4) == 5, "at most half of the steps"
    assert scaling.warm_up([1.0] * 10) == scaling.warm_up([1.0, 1.0]) == 0
    assert scaling.warm_up([]) == 0


def test_a_wait_is_split_by_who_came_last():
    """In each step of 100 ms the network takes 10; rank 1 computes 20 ms longer, and rank 0 waits for it."""
    found = rows(ranks=2, step_s=0.1)
    for row in found[1:]:
        late = row["rank"] == 1
        row |= {"data_s": 0.0, "compute_s": 0.09 if late else 0.07, "wait_s": 0.01 if late else 0.03}
    first, second = scaling.split(found)
    assert (first["compute_s"], first["comm_s"], first["straggle_s"]) == pytest.approx((0.07, 0.01, 0.02))
    assert (second["compute_s"], second["comm_s"], second["straggle_s"]) == pytest.approx((0.09, 0.01, 0.0))
    alone = rows(ranks=1)
    for row in alone[1:]:
        row["wait_s"] = 0.01
    assert (scaling.split(alone)[0]["comm_s"], scaling.split(alone)[0]["straggle_s"]) == pytest.approx((0, 0.01))


def trials(counts, speed, batch=lambda count: 64, **more):
    return [
        {"case": place, "repeat": 0, "ranks": count, "threads": 1, "batch": batch(count), "samples_per_s": speed(count)}
        | {"source": "measured", "label": f"{count} ranks"}
        | more
        for place, count in enumerate(counts)
    ]


def test_laws_of_trials():
    counts = [1, 2, 4, 8, 16] * 2
    strong = trials(counts, lambda n: 100 * laws.amdahl([n], 0.1)[0])
    weak = trials(counts, lambda n: 100 * laws.gustafson([n], 0.1)[0], batch=lambda count: 64 * count)
    assert (scaling.regime(strong), scaling.regime(weak)) == ("strong", "weak")
    assert scaling.fit(strong, "amdahl").values["sigma"] == pytest.approx(0.1)
    assert scaling.fit(weak, "gustafson").values["sigma"] == pytest.approx(0.1)
    assert scaling.verdict(strong).law == "amdahl"
    with pytest.raises(ValueError, match="is not for strong scaling, which these rows are; use 'amdahl' or 'usl'"):
        scaling.fit(strong, "gustafson")
    with pytest.raises(ValueError, match="is not for weak scaling, which these rows are; use 'gustafson' or 'usl'"):
        scaling.fit(weak, "amdahl")
    with pytest.raises(ValueError, match=r"rows are of weak scaling, .*use scaling.fit\(rows, 'gustafson'\)"):
        scaling.verdict(weak)
    assert "this isn't a machine's law" not in scaling.verdict(strong).why
    turns = [row | {"source": "emulated" if row["ranks"] > 2 else "measured"} for row in strong]
    assert scaling.verdict(turns).why.endswith(
        "ranks that take turns, or from a dialled network, so this isn't a machine's law."
    )
    assert not scaling.verdict(strong[:5]).identifiable, "each was measured once"
    with pytest.raises(ValueError, match="keep neither the total batch nor that of each rank constant"):
        scaling.fit(trials(counts, float, batch=lambda count: 64 + count))
    with pytest.raises(ValueError, match=r"rows also differ in threads \(=\[1, 2\]\)"):
        scaling.fit([*strong, strong[0] | {"threads": 2}])
    alike = {"setting": "network ring, 1 ms, 1 Gb/s"}
    exact = [row | alike | {"asked": {"network": f"Network({row['ranks'] % 2})"}} for row in strong]
    with pytest.raises(ValueError, match="rows differ in more than ranks"):
        scaling.fit(exact)


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        *((scaling.trial, "run"), (scaling.summary, "trial"), (scaling.remarks, "trial")),
        *(
            (scaling.regime, "trial"),
            (scaling.verdict, "trial"),
            (scaling.fit, "trial"),
            (scaling.network, "allreduce"),
        ),
        *(
            (plots.throughput, "summary"),
            (plots.split, "split"),
            (plots.timeline, "span"),
            (plots.allreduce, "allreduce"),
            (plots.tasks, "task"),
            (plots.speedup, "summary"),
            (plots.efficiency, "summary"),
            (lambda rows: plots.roofline(rows, {"flops_per_s": 1.0, "bytes_per_s": 1.0, "ridge": 1.0}), "roofline"),
            (lambda rows: plots.grain(rows, laws.fit_alpha_beta([1, 2, 4], [1, 2, 3])), "grain"),
            (study.sections, "trial"),
        ),
        (lambda rows: plots.law(rows, laws.fit_amdahl([1, 2, 4], [1, 2, 3])), "trial"),
    ],
)
def test_no_rows_are_no_answer(ask, kind):
    with pytest.raises(ValueError, match=f"rows hold no {kind}; give"):
        ask([])
    with pytest.raises(ValueError, match=rf"rows hold no {kind} \(but epoch, step\); give"):
        ask([{"kind": "step"}, {"kind": "epoch"}])
    plt.close("all")


def test_messages_of_no_bytes_are_drawn():
    found = [{"nbytes": size, "duration_s": 1e-4 + size * 1e-7, "source": "measured"} for size in (0, 100, 1000)]
    fit = laws.fit_alpha_beta([row["nbytes"] for row in found], [row["duration_s"] for row in found])
    ax = plots.allreduce(found, fit)
    assert ax.get_lines()[0].get_xdata()[0] == 0
    assert ax.transData.transform((0, 1e-4))[0] == pytest.approx(ax.transAxes.transform((0, 0))[0], abs=50)
    assert [float(value) for value in ax.get_lines()[1].get_xdata()[[0, -1]]] == pytest.approx([1, 1000])
    plt.close(ax.figure)


def test_a_network_that_bytes_do_not_slow_has_no_bandwidth_made_up():
    found = [{"ranks": 2, "nbytes": size, "duration_s": 1e-3 - size * 1e-12} for size in (1000, 10_000, 10_000)]
    link = scaling.network([*found, {"kind": "workload"}])
    assert (link.latency, link.bandwidth) == (pytest.approx(5e-4, rel=1e-4), float("inf"))
    assert link.allreduce_s(1e9, 2) == pytest.approx(1e-3, rel=1e-4)


def test_remarks_own_up():
    quiet = [row | {"samples_per_s": speed} for speed in (100, 101, 102) for row in trials([1], float)]
    assert scaling.remarks(quiet) == []
    noisy = [row | {"samples_per_s": speed} for speed in (100, 140, 180) for row in trials([1], float)]
    assert "1 ranks: its repeats differ by 29%" in scaling.remarks(noisy)[0]
    once = scaling.remarks(trials([1], float, source="emulated"))
    assert "emulated" in once[0]
    assert "measured once" in once[1]
    fair = [row | {"repeat": repeat} for repeat in range(2) for row in trials([1, 2], float)]
    assert scaling.remarks(fair) == []
    counted_twice = [row | {"samples_per_s": row["ranks"] ** 2} for row in fair]
    assert "2 ranks: 2.00 times as fast as its CPUs explain" in scaling.remarks(counted_twice)[0]
    for other in ("setting", "threads"):
        assert scaling.remarks([row | {other: row["ranks"]} for row in counted_twice]) == []
    assert scaling.remarks([row | {"samples_per_s": 1.0} for row in reversed(fair)]) == []
    assert scaling.remarks(counted_twice[:1] + counted_twice[3:])[0].startswith("Each case was measured once")


def test_summary_pairs_the_rounds():
    """The machine slows by half in the second round: absolute speeds change, speed-ups don't."""
    trials = []
    for repeat, drift in enumerate((1, 2, 1)):
        for case, step_s in enumerate((0.1, 0.0625)):
            trial = scaling.trial(rows(ranks=1, threads=case + 1, step_s=step_s * drift))
            trials.append({"case": case, "repeat": repeat, "order": len(trials)} | trial)
    base, other = scaling.summary(trials)
    assert base["speedup"] == base["efficiency"] == 1
    assert (other["speedup_low"], other["speedup_high"]) == pytest.approx((1.6, 1.6))
    assert other["efficiency"] == pytest.approx(0.8)
    assert (other["samples_per_s_low"], other["samples_per_s_high"]) == pytest.approx((512, 1024))
    assert other["repeats"] == 3
    base, other = scaling.summary([row for row in trials if (row["case"], row["repeat"]) not in ((0, 0), (1, 2))])
    assert (other["repeats"], other["speedup"]) == (1, pytest.approx(1.6)), "the round that both have"
    with pytest.raises(ValueError, match="rows hold no round with both 1 rank x 2 threads and the baseline"):
        scaling.summary([row for row in trials if (row["case"], row["repeat"]) in ((0, 0), (1, 2))])


def test_paired_ratios_of_a_sweep_have_students_interval():
    speeds = {1: [100, 50, 200, 80], 2: [180, 95, 390, 150]}
    rows = [
        trials([ranks], lambda _count, speed=speed: speed, kind="trial")[0] | {"case": ranks - 1, "repeat": repeat}
        for ranks, all_speeds in speeds.items()
        for repeat, speed in enumerate(all_speeds)
    ]
    (row,) = scaling.paired(rows)
    low, high = stats.ttest_1samp(np.log(np.divide(speeds[2], speeds[1])), 0).confidence_interval(0.95)
    assert [row["low"], row["high"]] == pytest.approx([np.exp(low), np.exp(high)])
    assert (row["measure"], row["rounds"], row["source"]) == ("2 ranks", 4, "measured")
    assert "no difference" not in ratios.told(row)
    with pytest.raises(ValueError, match="rows hold 1 rounds of 2 ranks with the baseline; measure at least 2 in turn"):
        scaling.paired([row for row in rows if row["ranks"] == 1 or row["repeat"] == 0])


def test_sweep_interleaves(client):
    def job(client, ranks):
        share = 128 // ranks
        model = hpclab.models.CNN
        return hpclab.train(client, model, "fashion_mnist", ranks=ranks, batch_size=share, steps=8, progress=False)

    seen = []
    found = scaling.sweep(
        client, job, ranks=[1, 2], repeats=2, progress=False, watch=lambda label, rows: seen.append(label)
    )
    assert [row["repeat"] for row in found] == [0, 0, 1, 1]
    assert [sorted(row["ranks"] for row in found if row["repeat"] == repeat) for repeat in (0, 1)] == [[1, 2], [1, 2]]
    assert len({row["run"] for row in found}) == 4
    assert set(seen) == {"1 rank", "2 ranks"}
    assert len(scaling.summary(found)) == 2


def test_a_sweep_over_networks_names_them(client):
    slow = Network(latency=30e-3, bandwidth=1e9)

    def job(client, ranks, network):
        settings = {"ranks": ranks, "batch_size": 16, "steps": 8, "progress": False}
        return hpclab.train(client, hpclab.models.CNN, "fashion_mnist", network=network, **settings)

    cases = [{"ranks": 2, "network": link} for link in (None, slow)]
    found = scaling.sweep(client, job, cases=cases, repeats=1, seed=None, progress=False)
    assert [row["label"] for row in found] == ["2 ranks, network None", "2 ranks, network ring, 30 ms, 1 Gb/s"]
    assert [row["source"] for row in found] == ["measured", "emulated"]
    assert found[1]["comm_s"] > 0.06 > found[0]["comm_s"]  # two messages, one after the other
    with pytest.raises(ValueError, match=r"differ in more than ranks \(network None; network ring, 30 ms"):
        scaling.verdict(found)


def count_up(width):
    for step in range(12):
        hpclab.report(step=step, samples=width)


def test_a_sweep_of_a_function_of_ones_own(client):
    def job(client, ranks, width):
        return hpclab.launch(client, count_up, width, ranks=ranks)

    found = scaling.sweep(client, job, cases=[{"ranks": 2, "width": 8}], repeats=2, progress=False)
    assert [(row["label"], row["batch"], row["loss"]) for row in found] == [("2 ranks, width 8", 16, None)] * 2
    assert all(row["samples_per_s"] == pytest.approx(16 / row["step_s"], rel=0.5) for row in found)
    untold = ("compute_s", "comm_s", "straggle_s", "data_s", "data_share", "jitter_s")
    assert [row[name] for row in found for name in untold] == [None] * 12
    ax = plots.split([{"rank": 0} | found[0] | {"kind": "split"}])
    assert [bar.get_width() for bar in ax.patches] == [0] * 4
    assert "None" not in str(hpclab.tables.Table(found))
    plt.close(ax.figure)


def test_steps_without_samples_are_refused():
    with pytest.raises(ValueError, match=r"lack 'samples'.*hpclab.report\(step=..., samples=...\)"):
        scaling.trial(rows(samples=None))


def test_an_interrupted_sweep_goes_on(client, tmp_path):
    started = []

    def job(client, ranks):
        started.append(ranks)
        if len(started) == 3:
            raise KeyboardInterrupt
        model = functools.partial(hpclab.models.CNN, channels=(4, 8))
        return hpclab.train(
            client, model, "fashion_mnist", ranks=ranks, batch_size=32 // ranks, steps=8, progress=False
        )

    settings = {"ranks": [1, 2], "repeats": 2, "progress": False, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        scaling.sweep(client, job, **settings)
    found = scaling.sweep(client, job, **settings)
    assert len(started) == 5  # two, the one that was interrupted, and the two that were missing
    assert sorted((row["case"], row["repeat"]) for row in found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert from_rows.read(tmp_path / "trials.jsonl") == found
    with pytest.raises(ValueError, match="holds another sweep"):
        scaling.sweep(client, job, **settings | {"ranks": [2, 1]})


def kept(client, folder, repeats, fixed=None, cases=None):
    started = []

    def job(client, ranks, width=8, model=None):
        started.append(ranks)
        return hpclab.launch(client, count_up, width, ranks=ranks)

    cases = cases or [{"ranks": 1}, {"ranks": 2}]
    found = scaling.sweep(
        client, job, cases=cases, fixed=fixed, repeats=repeats, seed=None, folder=folder, progress=False
    )
    return found, started


def test_a_sweep_that_was_killed_in_a_line_goes_on(client, tmp_path):
    file = tmp_path / "trials.jsonl"
    kept(client, tmp_path, repeats=1)
    file.write_bytes(file.read_bytes()[:-100])
    found, started = kept(client, tmp_path, repeats=2)
    assert started == [2, 1, 2]
    assert from_rows.read(file) == found
    assert kept(client, tmp_path, repeats=2)[1] == []


def test_fewer_repeats_are_those_of_the_first_rounds(client, tmp_path):
    kept(client, tmp_path, repeats=2)
    file = tmp_path / "trials.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))  # it was interrupted in the second round
    found, started = kept(client, tmp_path, repeats=1)
    assert ([row["repeat"] for row in found], started) == ([0, 0], [])
    assert [row["repeats"] for row in scaling.summary(found)] == [1, 1]
    assert len(from_rows.read(file)) == 3


def test_what_is_fixed_is_a_part_of_the_sweep(client, tmp_path):
    found, _started = kept(client, tmp_path, repeats=1, fixed={"width": 8})
    assert [row["label"] for row in found] == ["1 rank", "2 ranks"]
    with pytest.raises(ValueError, match=r"holds another sweep, of {'ranks': '1', 'width': '8'}; name a new one"):
        kept(client, tmp_path, repeats=1, fixed={"width": 16})


def test_a_function_is_known_by_its_name(client, tmp_path):
    def cases():
        return [{"ranks": 1, "model": lambda: None}, {"ranks": 1, "model": functools.partial(count_up, 1)}]

    kept(client, tmp_path, repeats=1, cases=cases())
    assert kept(client, tmp_path, repeats=1, cases=cases())[1] == []
    with pytest.raises(ValueError, match=r"two functions called .*cases.<locals>.<lambda>; define each once"):
        kept(client, tmp_path, repeats=1, cases=cases() + cases())


@pytest.mark.parametrize("returned", [None, 3])
def test_a_job_that_returns_no_run(client, returned):
    with pytest.raises(TypeError, match=f"job returned {returned}; it must return its run"):
        scaling.sweep(client, lambda client, ranks: returned, ranks=[1], progress=False)


def test_a_failed_case_raises_its_error(client):
    def fail(client, ranks):
        return hpclab.launch(client, int, "not a number", ranks=ranks)

    with pytest.raises(ValueError, match="invalid literal"):
        scaling.sweep(client, fail, ranks=[1], progress=False)


def test_a_case_that_cannot_fit_fails_before_any_runs(client):
    started = []
    with pytest.raises(ValueError, match=r"ranks \(=9\)"):
        scaling.sweep(client, lambda client, ranks: started.append(ranks), ranks=[1, 9], progress=False)
    assert not started


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give either ranks"),
        ({"ranks": [1], "cases": [{}]}, "give either ranks"),
        ({"ranks": []}, "ranks or cases is empty"),
        ({"ranks": [1], "repeats": 0}, r"repeats \(=0\)"),
        ({"ranks": 2}, r"ranks \(=2\) must be a list, such as ranks=\[1, 2\]"),
        ({"cases": {"ranks": 2}}, r"cases \(={'ranks': 2}\) must be a list"),
        ({"cases": [1]}, r"cases \(=1\) must be dicts of the job's arguments"),
    ],
)
def test_bad_arguments(client, arguments, says):
    with pytest.raises((ValueError, TypeError), match=says):
        scaling.sweep(client, print, **arguments)


def test_source_is_measured_only_if_all_is():
    assert from_rows.source(rows()) == "measured"
    assert from_rows.source(rows(source="emulated")) == "emulated"
    assert from_rows.source(rows() + rows(source="emulated")) == "emulated"
    assert from_rows.source(rows() + rows(source="recorded")) == "mixed"
    assert from_rows.source([{"kind": "run"}]) == "unknown"


def test_race_tells_what_it_can(monkeypatch):
    seconds = 5 * 10 + 10  # in units of step_s
    race = racing.Race({"1 rank": rows(step_s=0.2), "2 ranks": rows(ranks=2, step_s=0.1)})
    assert "2 ranks trained 2.00 times as fast as 1 rank" in race.verdict()
    assert "took turns" not in race.verdict()
    assert race.verdict()._repr_html_() == f"<p>{race.verdict()}</p>" and repr(race.verdict()) == race.verdict()
    assert "Other programs used" not in race.verdict()
    for row in race.runs["1 rank"][1:]:
        row["wait_s"] = 0.2 * row["step_s"]
    assert "Other programs used this machine: 1 rank spent 20% of its time waiting for a CPU" in race.verdict()
    race.runs["2 ranks"] = rows(ranks=2, step_s=0.2, source="emulated")
    assert "took turns" in race.verdict()
    (name, own) = list(racing.lines(race.runs).items())[-1]
    assert name == "2 ranks, a CPU each"
    assert from_rows.span(own) == pytest.approx((0, seconds * 0.1)), "on its own clock a rank spends half the seconds"
    monkeypatch.setattr(racing.machine, "cpus", lambda: 1)
    assert racing.racers() == [
        {"ranks": 1, "threads": 1},
        {"ranks": 2, "threads": 1, "oversubscribe": True},
    ]
    monkeypatch.setattr(racing.machine, "cpus", lambda: 6)
    assert racing.racers()[1] == {"ranks": 1, "threads": 6}
    with pytest.raises(ValueError, match=r"batch_size \(=7\) must be even"):
        racing.race(None, None, "", batch_size=7)


def test_a_killed_racer_is_compared_by_its_undisturbed_seconds():
    """Killed after step 10 of 15 with a checkpoint at 8, and 30 s until it went on: the time is that of no failure."""
    whole = [row | {"attempt": 0, "ranks": 2} if row["kind"] == "step" else row for row in rows(ranks=2, step_s=0.1)]
    at = {row["step"]: row["time_s"] for row in whole if row["kind"] == "step"}
    before = [row for row in whole if row.get("step", 0) <= 10]
    cause = {"kind": "restart", "attempt": 1, "ranks": 2, "cause": "killed", "failed_s": at[10] + 1.0, "time_s": 40.0}
    delay = at[10] + 1.0 + 30.0 - at[7]
    after = [row | {"attempt": 1, "time_s": row["time_s"] + delay} for row in whole if row.get("step", 0) >= 8]
    race = racing.Race({"1 rank": rows(step_s=0.1), "2 ranks": [*before, cause, *after]})
    first, last = race.trials()
    assert last["train_s"] == pytest.approx(first["train_s"])
    assert last["lost_s"] == pytest.approx(delay) and first["lost_s"] == 0
    assert "2 ranks trained 1.00 times as fast as 1 rank" in race.verdict()
    assert f"2 ranks lost {delay:.1f} s to failures" in race.verdict()
    assert [row["lost to failures (s)"] for row in race.table()] == ["0.0", f"{delay:.1f}"]


def summary():
    trials = []
    for repeat in range(3):
        for case, ranks in enumerate((1, 2)):
            trial = scaling.trial(rows(ranks=ranks, step_s=0.1 + repeat / 1000, source=["measured", "emulated"][case]))
            trials.append({"case": case, "repeat": repeat} | trial)
    return scaling.summary(trials)


@pytest.mark.parametrize("draw", [plots.throughput, plots.speedup, plots.efficiency])
def test_bars_show_median_range_and_source(draw):
    ax = draw(summary())
    assert ax.get_title(loc="right").startswith("in part emulated: c, 2 CPU, torch 2, 2026-01-01")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1 rank", "2 ranks\n(emulated)"]
    measure = {"throughput": "samples_per_s"}.get(draw.__name__, draw.__name__)
    assert len(ax.containers) == 2
    for row, bar in zip(summary(), ax.containers, strict=True):
        ((_, low), (_, high)) = bar.lines[2][0].get_segments()[0]
        assert (low, high) == pytest.approx((row[f"{measure}_low"], row[f"{measure}_high"]))
    plt.close(ax.figure)


def test_loss_is_drawn_against_seconds_of_training():
    ax = plots.loss({"one": rows(step_s=0.2), "two": rows(ranks=2, step_s=0.1)})
    ends = [line.get_xdata()[-1] for line in ax.get_lines()]
    assert ends == pytest.approx([60 * 0.2, 60 * 0.1])
    assert len({line.get_marker() for line in ax.get_lines()}) == 2
    assert ax.get_title(loc="right").startswith("measured: c")
    plt.close(ax.figure)

"""Numbers, sizes and walltimes as users write them: each means the same wherever it is taken."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from dask.utils import parse_bytes

import hpclab
from hpclab import machine, queues, scaling
from hpclab._arguments import clock, plain, seconds, size, whole_number
from hpclab.cluster import client
from hpclab.course.chaos import Chaos
from hpclab.gangs import launch
from hpclab.slurm.conf import SlurmSettings

ONE, TWO = np.int64(1), np.uint8(2)


def test_whole_numbers():
    for value in (3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)):
        found = whole_number("n", value)
        assert (type(found), found) == (int, 3)
    assert whole_number("n", 2**70) == 2**70
    for value in (
        True,
        np.True_,
        torch.tensor(True),
        3.0,
        np.float64(3),
        "3",
        None,
        [3],
        np.array([1, 2]),
        np.array([3]),
        torch.tensor([3]),
        0,
        np.int64(-1),
    ):
        with pytest.raises(ValueError, match=rf"^n \(={re.escape(repr(value))}\) must be a whole number >= 1\.$"):
            whole_number("n", value)
    with pytest.raises(ValueError, match="must be a whole number from 1 to 2"):
        whole_number("n", np.int64(3), 1, 2)
    with pytest.raises(ValueError, match=r"must be a whole number\.$"):
        whole_number("seed", 0.5, least=None)
    for value in (np.float32(0.5), np.True_, "a", None, int, [3], np.float64):
        assert plain(value) == value
    assert plain(three := np.array([3])) is three


def test_several_sizes_of_a_gang_are_several_whatever_holds_them():
    for several in ([2], (2,), np.array([2]), torch.tensor([2]), {2}, range(2, 3)):
        assert launch._sizes(4, several) == (4, 2)
    for number in (2, np.int8(2), np.array(2), torch.tensor(2)):
        assert launch._sizes(4, number) == (4, 3, 2)


SIZES = {
    "200MB": 200 * 10**6,
    "200 mb": 200 * 10**6,
    "200M": 200 * 10**6,
    "2e8": 2 * 10**8,
    "0.2GB": 2 * 10**8,
    "200MiB": 200 * 2**20,
    "200Mi": 200 * 2**20,
    " 204800 KiB ": 200 * 2**20,
    ".25gib": 2**28,
    "0.0003TB": 3 * 10**8,
    200 * 2**20: 200 * 2**20,
    2e8: 2 * 10**8,
    np.int64(2**28): 2**28,
    np.float32(2**28): 2**28,
}
NO_SIZES = (
    "lots",
    "",
    "GB",
    "-1GB",
    "2 GB GB",
    "2GBi",
    "2XB",
    "0",
    "0GB",
    0,
    -1,
    True,
    None,
    [1],
    math.inf,
    math.nan,
    2**63,
)


@pytest.mark.parametrize("spelling", SIZES)
def test_a_size_is_the_same_wherever_it_is_taken(spelling, monkeypatch):
    """And as Dask reads it, which takes some of them too."""
    nbytes = SIZES[spelling]
    assert size("memory", spelling) == parse_bytes(plain(spelling)) == nbytes
    assert queues.request("q", {"kind": "slurm"}, {"memory": spelling}).bytes == nbytes
    assert SlurmSettings(1, 1, spelling, "backfill", None, {"main": {}}).megabytes() == math.ceil(nbytes / 2**20)
    monkeypatch.setattr(machine, "memory", lambda: 2**40)
    assert client._fit(1, spelling) == (1, nbytes)


@pytest.mark.parametrize("value", NO_SIZES)
def test_what_is_no_size_is_refused_with_one_text(value):
    for take in (
        lambda: size("memory", value),
        lambda: queues.request("q", {"kind": "slurm"}, {"memory": value}),
        lambda: SlurmSettings(1, 1, value, "backfill", None, {"main": {}}),
    ):
        with pytest.raises(
            ValueError, match=rf"^memory \(={re.escape(repr(value))}\) must be bytes or a size such as '2GB'"
        ):
            take()


WALLTIMES = {"00:30:00": 1800, "1:00:00": 3600, "100:00:00": 360_000, "1-02:03:04": 93_784}
SLURMS = {"30": 1800, "90:00": 5400, "1-02": 93_600, "1-02:03": 93_780, "0-0:1:0": None, "0-0:01": 60}
NO_WALLTIMES = ("soon", "", "1:2:3", "00:61:00", "00:00:61", "1:00:00:00", "1-", "-5", "UNLIMITED", 30, None, True)


def test_a_walltime_is_the_same_wherever_it_is_taken():
    for walltime, value in {**WALLTIMES, **SLURMS}.items():
        assert seconds(walltime) == value
    for walltime, value in WALLTIMES.items():
        request = queues.request("q", {"kind": "pbs"}, {"walltime": walltime})
        assert (request.seconds, seconds(request.clock), request.clock) == (value, value, clock(value))
        SlurmSettings(1, 1, "1GiB", "backfill", walltime, {"main": {}})
    for walltime in SLURMS:  # other queues read these otherwise: LSF's "90:00" is 90 hours
        with pytest.raises(ValueError, match=r"^walltime \(=.*must be 'HH:MM:SS'"):
            queues.request("q", {"kind": "lsf"}, {"walltime": walltime})


@pytest.mark.parametrize("walltime", NO_WALLTIMES)
def test_what_is_no_walltime(walltime):
    assert seconds(walltime) is None
    if walltime is not None:
        with pytest.raises(
            ValueError, match=rf"^walltime \(={re.escape(repr(walltime))}\) must be text as Slurm reads it"
        ):
            SlurmSettings(1, 1, "1GiB", "backfill", walltime, {"main": {}})


def test_numpys_counts_everywhere(client, tmp_path):
    def draw():
        return random.random()

    settings = {"threads": ONE, "max_restarts": np.int8(0), "min_ranks": ONE, "memory": np.int64(10**9)}
    run = hpclab.launch(client, draw, ranks=TWO, hang_after=np.float64(60), **settings)
    assert len(run.result()) == run.ranks == 2
    assert json.loads((run.folder / "rows.jsonl").read_text().splitlines()[0])["ranks"] == 2
    assert run.logs(TWO - 1) == ""
    with Chaos(run, mtbf=ONE, seed=TWO):
        pass
    counts = {"epochs": ONE, "batch_size": np.int64(64), "steps": TWO, "seed": TWO, "trace": np.int64(0), "ranks": ONE}
    trained = hpclab.train(client, "CNN", "fashion_mnist", checkpoint_every=ONE, progress=False, **counts)
    assert trained.result().rows[-1]["status"] == "finished"
    state = hpclab.checkpoint.load(hpclab.checkpoint.newest(trained.folder / "checkpoints"))["state"]
    assert (type(state["seed"]), state["seed"]) == (int, 2)
    with hpclab.gang(client, ranks=TWO) as gang:
        assert gang.pull("rank", on=ONE) == [1]
        assert gang.pull("rank", on=np.arange(2)) == [0, 1]
        with pytest.raises(ValueError, match=r"on \(=True\) must name ranks from 0 to 1"):
            gang.run("rank", on=True)

    def job(client, ranks):
        def work():
            for step in range(8):
                hpclab.report(step=step, samples=1, step_s=1.0)

        return hpclab.launch(client, work, ranks=ranks)

    rows = scaling.sweep(client, job, ranks=np.array([1]), repeats=ONE, seed=TWO, folder=tmp_path / "s", progress=False)
    assert rows[0]["asked"] == {"ranks": "1"}
    assert len(scaling.allreduce(client, ONE, sizes=np.array([4, 8]), repeats=ONE)) == 2


def test_numpys_counts_of_clusters():
    assert client._fit(ONE, np.int64(2**28)) == (1, 2**28)
    script = queues.script("slurm", cores=TWO, memory=np.int64(2**30), walltime=np.int64(60), workers=ONE)
    assert "--cpus-per-task=2\n#SBATCH --mem=1024M\n#SBATCH -t 00:01:00" in script
    there = SlurmSettings(TWO, ONE, np.int64(2**30), "backfill", None, {"main": {}})
    assert (there.names(), there.cpus, there.megabytes()) == (["n1", "n2"], 1, 1024)

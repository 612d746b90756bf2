"""Counts of any kind: numpy's and torch's are taken wherever an int is, and told and written as one."""

import json
import random
import re

import numpy as np
import pytest
import torch

import hpclab
from hpclab import queues, scaling
from hpclab._arguments import plain, whole_number
from hpclab.chaos import Chaos
from hpclab.cluster import client
from hpclab.slurm.conf import Settings

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
        0,
        np.int64(-1),
    ):
        with pytest.raises(ValueError, match=rf"^n \(={re.escape(repr(value))}\) must be a whole number >= 1\.$"):
            whole_number("n", value)
    with pytest.raises(ValueError, match="must be a whole number from 1 to 2"):
        whole_number("n", np.int64(3), 1, 2)
    with pytest.raises(ValueError, match=r"must be a whole number\.$"):
        whole_number("seed", 0.5, least=None)
    assert [plain(value) for value in (np.float32(0.5), np.True_, "a", None, int)] == [0.5, True, "a", None, int]


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
    there = Settings(TWO, ONE, np.int64(2**30), "backfill", None, {"main": {}})
    assert (there.names(), there.cpus, there.megabytes()) == (["n1", "n2"], 1, 1024)

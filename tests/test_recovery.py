"""Runs that lose ranks, workers, disks: what they end with is what an undisturbed run ends with."""

import functools
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import no_rank_left, require
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hpclab
from hpclab import checkpoint, plots, views
from hpclab import rows as from_rows
from hpclab.course import chaos

STEPS = 30
KILLS = int(os.environ.get("HPCLAB_KILLS", "3"))
"""Kills by number of ranks; by hand more."""
SMALL = functools.partial(hpclab.models.CNN, channels=(4, 8))


@pytest.fixture(scope="module")
def four():
    """Workers for gangs of up to 4 ranks; some of them will be killed."""
    with hpclab.connect(workers=4) as client:
        yield client


class Noisy(nn.Module):
    """A model of two buckets of gradients that also draws random numbers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Dropout(0.2), nn.Linear(400, 10))

    def forward(self, images):
        return self.net(images)


class Deadly:
    """A loss that kills its rank once, at one step: before the forward pass has a loss, or while it goes backward."""

    def __init__(self, folder, rank, step, backward):
        self.mark = Path(folder, "killed")
        self.rank, self.step, self.backward = rank, step, backward
        self.calls = 0

    def __call__(self, scores, labels):
        self.calls += 1
        loss = nn.functional.cross_entropy(scores, labels)
        if os.environ["RANK"] == str(self.rank) and self.calls == self.step + 1 and not self.mark.exists():
            self.mark.touch()
            if self.backward:
                loss.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return loss


def train(client, ranks, model=SMALL, batch=24, **settings):
    settings = {"steps": STEPS, "checkpoint_every": 7, "lr": 0.1, "progress": False, "max_restarts": 3} | settings
    return hpclab.train(
        *(client, model, "fashion_mnist"), ranks=ranks, batch_size=batch // ranks, **{"oversubscribe": True} | settings
    )


def by_step(rows):
    """Loss of each rank's steps that count."""
    return {(row["step"], row["rank"]): row["loss"] for row in from_rows.kept(rows) if row["kind"] == "step"}


def assert_equal(fit, undisturbed):
    assert by_step(fit.rows) == by_step(undisturbed.rows)
    for name, weight in undisturbed.weights.items():
        assert torch.equal(fit.weights[name], weight), name


@pytest.mark.rounds
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_killed_rank_changes_no_bit(four, ranks, tmp_path):
    undisturbed = train(four, ranks).result(120)
    dice = random.Random(ranks)
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        rank, step = dice.randrange(ranks), dice.randrange(STEPS)
        run = train(four, ranks, loss=Deadly(folder, rank, step, backward=number % 2))
        assert_equal(run.result(120), undisturbed)
        (restart,) = [row for row in run.rows if row["kind"] == "restart"]
        assert f"rank {rank} of {ranks} on" in restart["cause"] and "SIGKILL" in restart["cause"]
        resumed = [row["step"] for row in run.rows if row["kind"] == "resume"]
        assert resumed == [step // 7 * 7] * (step >= 7)
    assert no_rank_left()


@pytest.mark.parametrize("ranks", [1, 3])
def test_random_numbers_go_on_where_they_were(four, ranks, tmp_path):
    """Dropout, and two buckets."""
    undisturbed = train(four, ranks, Noisy).result(120)
    for step in (9, 21):
        folder = tmp_path / str(step)
        folder.mkdir()
        run = train(four, ranks, Noisy, loss=Deadly(folder, ranks - 1, step, backward=False))
        assert_equal(run.result(120), undisturbed)


def test_epochs_go_on_in_their_middle(four, tmp_path):
    """A sampler's place: the rest of the epoch, then the next one's own order; tests and their accuracies too."""
    settings = {"steps": None, "epochs": 2, "batch": 480, "checkpoint_every": 8}
    undisturbed = train(four, 2, **settings).result(120)
    for step in (12, 20, 21, 35):  # 20 steps an epoch
        folder = tmp_path / str(step)
        folder.mkdir()
        run = train(four, 2, loss=Deadly(folder, 1, step, backward=False), **settings)
        fit = run.result(120)
        assert_equal(fit, undisturbed)
        assert fit.accuracy == undisturbed.accuracy
        tests = [row["test_accuracy"] for row in from_rows.kept(run.rows) if row["kind"] == "epoch"]
        assert tests == [row["test_accuracy"] for row in undisturbed.rows if row["kind"] == "epoch"]


def test_a_killed_worker_comes_back_and_changes_no_bit(four):
    undisturbed = train(four, 2, steps=60).result(120)
    run = train(four, 2, steps=60)
    seen = []

    def strike(run, rows):
        if not seen and any(row["kind"] == "checkpoint" for row in rows):
            seen.append(True)
            run.kill_worker(1)

    run.watch(strike)
    fit = run.result(120)
    for name, weight in undisturbed.weights.items():
        assert torch.equal(fit.weights[name], weight), name
    missing = by_step(undisturbed.rows).items() - by_step(fit.rows).items()
    assert {rank for (_step, rank), _loss in missing} <= {1}, "rows that its worker had not passed on"
    (restart,) = [row for row in run.rows if row["kind"] == "restart"]
    assert restart["ranks"] == 2 and "worker" in restart["cause"]


def test_with_fewer_workers_fewer_ranks_go_on(tmp_path):
    """A worker without a nanny doesn't come back. The batch of all ranks stays, and so does the number of steps."""
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        hpclab.cluster.ClusterClient(cluster.scheduler_address) as client,
    ):
        settings = {"steps": STEPS, "checkpoint_every": 7, "max_restarts": 3, "progress": False, "batch_size": 12}
        deadly = Deadly(tmp_path, 1, 20, backward=False)
        run = hpclab.train(client, SMALL, "fashion_mnist", ranks=2, min_ranks=1, loss=deadly, **settings)
        nannies = {nanny.worker_address: nanny for nanny in cluster.workers.values()}
        while not deadly.mark.exists():
            time.sleep(0.001)
        cluster.sync(nannies[run._attempt.places[1].worker].close)
        run.result(120)
    (restart,) = [row for row in run.rows if row["kind"] == "restart"]
    assert restart["ranks"] == 1
    steps = [row for row in from_rows.kept(run.rows) if row["kind"] == "step" and row["rank"] == 0]
    assert [(row["attempt"], row["step"], row["samples"]) for row in steps] == [
        *((0, step, 12) for step in range(14)),
        *((1, step, 24) for step in range(14, STEPS)),
    ]


def test_another_number_of_ranks_goes_on_up_to_rounding(four, tmp_path):
    """Rounding differs by about 1e-7 a step; steps this small don't amplify it to 1e-5."""
    whole = train(four, 3, lr=0.005).result(120)
    half = train(four, 3, lr=0.005, loss=Deadly(tmp_path, 0, 20, backward=False), max_restarts=0)
    with pytest.raises(hpclab.RankError):
        half.result(120)
    for ranks in (1, 2, 4):
        fit = train(four, ranks, lr=0.005, resume=half.folder).result(120)
        assert min(row["step"] for row in fit.rows if row["kind"] == "step") == 14
        for name, weight in whole.weights.items():
            torch.testing.assert_close(fit.weights[name], weight, rtol=0, atol=1e-5)
    assert_equal(
        *(train(four, 3, lr=0.005, resume=half.folder).result(120) for _ in range(2)),
    )


def test_a_stopped_run_can_be_resumed_bit_for_bit(four):
    undisturbed = train(four, 2, steps=200).result(120)
    run = train(four, 2, steps=200)
    run.watch(
        lambda run, rows: (
            any(row["kind"] == "checkpoint" for row in rows) and run._inbox.put(lambda: run._halt(now=False))
        )
    )
    run.wait(60)
    assert run.status == "stopped"
    fit = train(four, 2, steps=200, resume=run.folder).result(120)
    begun = min(row["step"] for row in fit.rows if row["kind"] == "step")
    assert begun == max(row["step"] for row in run.rows if row["kind"] == "step") + 1, "not a step is lost"
    later = {key: loss for key, loss in by_step(undisturbed.rows).items() if key[0] >= begun}
    assert by_step(fit.rows) == later
    for name, weight in undisturbed.weights.items():
        assert torch.equal(fit.weights[name], weight)


def test_a_users_error_is_not_tried_again(four):
    def wrong(scores, labels):
        raise ValueError("no such loss")

    run = train(four, 2, loss=wrong)
    with pytest.raises(ValueError, match="no such loss"):
        run.result(60)
    assert not [row for row in run.rows if row["kind"] == "restart"]


def die():
    os._exit(7)


def test_the_last_attempt_says_that_it_was_the_last(four):
    run = hpclab.launch(four, die, ranks=2, max_restarts=2)
    with pytest.raises(hpclab.RankError, match="exited with code 7") as caught:
        run.result(60)
    assert "attempt 3, and the last: max_restarts (=2)" in caught.value.__notes__[-1]
    assert [row["attempt"] for row in run.rows if row["kind"] == "restart"] == [1, 2]
    assert no_rank_left()


def count(steps, folder):
    """A function of one's own: counts, keeps what it has every 5 steps, and dies once."""
    state = hpclab.restore()
    if state is None:
        state = {"step": 0, "draws": []}
        np.random.seed(int(os.environ.get("RANK", 0)))  # noqa: NPY002
        random.seed(int(os.environ.get("RANK", 0)))
    for step in range(state["step"], steps):
        state["draws"].append(float(np.random.random()) + random.random())  # noqa: NPY002
        state["step"] = step + 1
        hpclab.report(step=step)
        if state["step"] % 5 == 0:
            hpclab.save(state, state["step"])
        mark = Path(folder, "died")
        if step == 13 and os.environ.get("RANK") == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return state["draws"]


def test_save_and_restore_in_a_function_of_ones_own(four, tmp_path):
    run = hpclab.launch(four, count, 20, tmp_path, ranks=2, max_restarts=1)
    first, second = run.result(60)
    undisturbed = hpclab.launch(four, count, 20, tmp_path, ranks=2).result(60)
    assert [first[:10], first[10:]] == [undisturbed[0][:10], undisturbed[0][10:]]
    assert [second[:10], second[10:]] == [undisturbed[0][:10], undisturbed[1][10:]], "rank 0's state, its own numbers"
    steps = [row["step"] for row in from_rows.kept(run.rows) if row["kind"] == "step" and row["rank"] == 0]
    assert sorted(steps) == list(range(20))
    assert count(20, tmp_path), "by itself it runs too, and keeps nothing"


def own_loop(folder, rank_to_die, step_to_die, pause=0.0):
    """A training loop as users write them, with `save` and `restore`, and nothing else of hpclab's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    inputs = torch.randn(480, 40, generator=draws)
    images = TensorDataset(inputs, (inputs[:, :10].sum(1) > 0).long())
    sampler = DistributedSampler(images, ranks, rank, seed=5, drop_last=True)
    loader = DataLoader(images, 5, sampler=sampler, generator=torch.Generator(), drop_last=True)
    layers = [nn.Linear(40, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Dropout(0.3), nn.Linear(200, 200), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(200, 2))
    model = DistributedDataParallel(net, bucket_cap_mb=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    torch.manual_seed(rank)
    parts = {"model": net, "optimizer": optimizer, "schedule": schedule}
    state = hpclab.restore() or {"step": 0}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    step, each = state["step"], 2  # batches a step
    while step < STEPS:
        epoch, done = divmod(step * each, len(loader) // each * each)
        sampler.set_epoch(epoch)
        for number, (batch, labels) in enumerate(loader):
            if number < done:
                continue
            if (step, rank) == (step_to_die, rank_to_die) and number % each and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            last = number % each == each - 1
            with nullcontext() if last else model.no_sync():
                (nn.functional.cross_entropy(model(batch), labels) / each).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                hpclab.report(step=step)
                time.sleep(pause)
                if step % 4 == 0:
                    hpclab.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, step)
                if step == STEPS or len(loader) - number <= each:
                    break
    return [tensor.tolist() for tensor in net.state_dict().values()]


def own_sharded_loop(folder, rank_to_die, step_to_die, gathered=True, steps=STEPS):
    """The same under FSDP2: each rank holds a shard of each weight, and of what the optimiser keeps of it.

    They are saved gathered by rank 0, or each rank's own.
    """
    from torch.distributed.checkpoint import state_dict as sharded
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    options = sharded.StateDictOptions(full_state_dict=gathered, cpu_offload=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 61), nn.ReLU(), nn.Dropout(0.3), nn.Linear(61, 61), nn.ReLU(), nn.Linear(61, 2))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model, model):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def state(step):
        weights, moments = sharded.get_state_dict(model, optimizer, options=options)
        return {"model": weights, "optimizer": moments, "step": step}

    first = 0
    like = None if gathered else state(0)
    torch.manual_seed(rank)
    if (held := hpclab.restore(like)) is not None:
        parts = {"model_state_dict": held["model"], "optim_state_dict": held["optimizer"]}
        sharded.set_state_dict(model, optimizer, **parts, options=options)
        first = held["step"]
    for step in range(first, steps):
        if (step, rank) == (step_to_die, rank_to_die) and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.randn(6, 40)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        hpclab.report(step=step)
        if (step + 1) % 4 == 0:
            hpclab.save(state(step + 1), step + 1)
    return [weight.full_tensor().tolist() for weight in model.parameters()]


own_scattered_loop = functools.partial(own_sharded_loop, gathered=False)


def test_shards_go_on_under_other_numbers_of_ranks(four, tmp_path):
    """What 2 ranks have saved in shards, 3 take up, as their own shards or whole; nothing else is left there."""
    short = functools.partial(own_scattered_loop, tmp_path, -1, -1, steps=8)
    saved = hpclab.launch(four, short, ranks=2)
    weights = saved.result(120)[0]
    for loop in (short, functools.partial(short, gathered=True)):
        again = hpclab.launch(four, loop, ranks=3, resume=saved.folder, oversubscribe=True)
        assert again.result(120) == [weights] * 3
    folder = saved.folder / "checkpoints"
    names = sorted(re.sub("-[0-9a-f]{8}[.]shards", "-ID.shards", path.name) for path in folder.iterdir())
    assert names == [f"step-0000000{n}{end}" for n in (4, 8) for end in ("-ID.shards", ".pt")]
    newest = checkpoint.newest(folder)
    whole = checkpoint.load(newest)
    assert [weight.tolist() for weight in whole["state"]["model"].values()] == weights
    assert whole.keys() == {"state", "random", "step"}
    shard = max(folder.glob("step-00000008-*.shards/__1_*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match=r"step-00000008-.* is damaged: the checksum of __1_0.distcp is wrong"):
        checkpoint.load(newest)
    run = hpclab.launch(four, short, ranks=2, resume=saved.folder)
    assert run.result(120)[0] == weights, "on from the one before it"
    assert [row["step"] for row in run.rows if row["kind"] == "resume"] == [4]


class Strike:
    """Kills the worker of a rank, once, when the run has come to a step."""

    def __init__(self, rank, step):
        self.rank, self.step, self.done = rank, step, False

    def __call__(self, run, rows):
        if not self.done and any(row.get("step", -1) >= self.step for row in rows):
            self.done = True
            run.kill_worker(self.rank)


@pytest.mark.rounds
@pytest.mark.parametrize(
    ("loop", "ranks"),
    [
        *((own_loop, ranks) for ranks in (1, 2, 3, 4)),
        *((loop, ranks) for loop in (own_sharded_loop, own_scattered_loop) for ranks in (2, 3)),
    ],
)
def test_loops_of_ones_own_go_on_bit_for_bit(four, loop, ranks, tmp_path):
    """Killed at random: a rank, then a worker with its rank."""
    settings = {"ranks": ranks, "oversubscribe": True}
    undisturbed = hpclab.launch(four, loop, tmp_path, -1, -1, **settings).result(120)
    dice = random.Random(ranks)
    for number in range(max(1, KILLS // 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        rank, step = dice.randrange(ranks), dice.randrange(STEPS)
        run = hpclab.launch(four, loop, folder, rank, step, max_restarts=1, **settings)
        assert run.result(120) == undisturbed
        assert [row["step"] for row in run.rows if row["kind"] == "resume"] == [step // 4 * 4] * (step >= 4)
        if loop is not own_loop:  # dear to start
            continue
        # Slow enough that who sees a step come can still strike.
        run = hpclab.launch(four, loop, tmp_path, -1, -1, 0.03, max_restarts=3, **settings)
        run.watch(Strike(dice.randrange(ranks), dice.randrange(STEPS // 2)))
        assert run.result(120) == undisturbed
        assert any(row["kind"] == "restart" for row in run.rows)


def test_under_chaos_nothing_is_lost_but_time(four):
    undisturbed = train(four, 2, steps=300, batch=96).result(120)
    run = train(four, 2, steps=300, batch=96, max_restarts=50, checkpoint_every=10)
    with chaos.Chaos(run, mtbf=1.0, seed=1) as wild:
        fit = run.result(120)
    assert wild.rows and any(row["kind"] == "restart" for row in run.rows)
    assert_equal(fit, undisturbed)
    found = from_rows.attempts(run.rows)
    assert sum(row["kept"] for row in found) == 300
    ax = plots.recovery(run.rows)
    assert f"attempt {found[-1]['attempt'] + 1}: steps" in ax.figure.words()  # some may have died before a step
    assert "Attempts" in views.page(run)
    plots.figures.plt.close(ax.figure)


def test_bad_arguments(four, tmp_path):
    for arguments, says in [
        ({"max_restarts": -1}, r"max_restarts \(=-1\) must be a whole number >= 0"),
        ({"min_ranks": 3}, r"min_ranks \(=3\) exceeds ranks \(=2\)"),
        ({"min_ranks": 0}, r"min_ranks \(=0\)"),
        ({"checkpoint_every": 0}, r"checkpoint_every \(=0\)"),
        ({"resume": tmp_path}, r"resume \(=.*holds no checkpoints/step"),
    ]:
        with pytest.raises(ValueError, match=says):
            train(four, 2, **arguments)
    with pytest.raises(ValueError, match=r"min_ranks \(=5\) must be from 1 to ranks \(=2\)"):
        hpclab.launch(four, die, ranks=2, oversubscribe=True, min_ranks=5)
    with pytest.raises(ValueError, match=r"mtbf \(=0\)"):
        chaos.Chaos(None, 0)
    with pytest.raises(ValueError, match=r"kill \(='host'\)"):
        chaos.Chaos(None, 1, kill="host")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"batch": 48}, "batch 24, this run 48"),
        ({"steps": 9}, "steps 8, this run 9"),
        ({"seed": 1}, "seed 0, this run 1"),
    ],
)
def test_only_the_same_training_is_resumed(four, other, says):
    train(four, 2, steps=8, folder="first").result(60)
    with pytest.raises(ValueError, match=f"resume has {says}; they must be the same"):
        train(four, 2, **{"steps": 8, "resume": "first"} | other).result(60)


def state(step):
    """A state that knows its step."""
    return {"w": torch.full((300_000,), float(step)), "step": step}


def write_on(folder, first):
    for step in range(first, first + 10_000):
        checkpoint.write(folder, step, state(step))


@pytest.mark.rounds
def test_killed_in_the_middle_of_a_write_none_is_corrupt_or_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the server finds this module too
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # else each writer imports it, and torch
    dice, newest = random.Random(0), -1
    for _ in range(5 * KILLS):
        writer = context.Process(target=write_on, args=(tmp_path, newest + 1))
        writer.start()
        while checkpoint.newest(tmp_path) in (None, tmp_path / f"step-{newest:08d}.pt"):
            time.sleep(0.001)
        time.sleep(dice.random() * 0.02)
        writer.kill()
        writer.join()
        for path in tmp_path.glob("step-*.pt"):
            held = checkpoint.load(path)
            assert torch.equal(held["w"], state(held["step"])["w"])
        found = checkpoint.load(checkpoint.newest(tmp_path))["step"]
        assert found > newest, "what was there once is there still"
        newest = found
        assert len(list(tmp_path.glob("*.part"))) <= 1
    checkpoint.write(tmp_path, newest + 1, state(newest + 1))
    assert len(list(tmp_path.iterdir())) == checkpoint.KEPT, "an undisturbed write tidies up"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True)
    require(mounted.returncode == 0, "the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_told_and_what_was_there_stays(small_disk):
    """Room for two checkpoints of 1.2 MB, and not for the third."""
    for number in range(2):
        checkpoint.write(small_disk, number, state(number))
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoint.write(small_disk, 2, state(2))
    assert "The checkpoint of step 2 could not be written" in caught.value.__notes__[0]
    assert "the newest one there is step-00000001.pt" in caught.value.__notes__[0]
    assert torch.equal(checkpoint.load(checkpoint.newest(small_disk))["w"], state(1)["w"])
    assert not list(small_disk.glob("*.part"))


def test_a_run_whose_disk_fills_up_ends_clearly_and_can_be_resumed(four, small_disk, tmp_path):
    undisturbed = train(four, 2, Noisy, steps=20, checkpoint_every=4).result(120)
    filler = small_disk / "filler"
    run = train(four, 2, Noisy, steps=20, checkpoint_every=4, folder=small_disk / "run")

    def fill(run, rows):
        if any(row["kind"] == "checkpoint" for row in rows) and not filler.exists():
            with open(filler, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))

    run.watch(fill)
    with pytest.raises(OSError, match="No space left on device"):
        run.result(60)
    filler.unlink()
    fit = train(four, 2, Noisy, steps=20, checkpoint_every=4, resume=small_disk / "run").result(60)
    for name, weight in undisturbed.weights.items():
        assert torch.equal(fit.weights[name], weight)


def test_an_unreadable_checkpoint_is_passed_over(four, tmp_path):
    first = train(four, 2, steps=20)
    first.result(60)
    newest = checkpoint.newest(first.folder / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:1000])
    fit = train(four, 2, steps=20, resume=first.folder).result(60)
    assert min(row["step"] for row in fit.rows if row["kind"] == "step") == 7
    assert "the one before it is tried" in hpclab.open_run(fit.folder).logs()


def test_kept_rows():
    def steps(attempt, first, last):
        return [{"kind": "step", "attempt": attempt, "step": step} for step in range(first, last)]

    rows = [*steps(0, 0, 10), {"kind": "resume", "attempt": 1, "step": 6}, {"kind": "resume", "attempt": 2, "step": 6}]
    rows += [*steps(2, 6, 9), {"kind": "resume", "attempt": 3, "step": 4}, *steps(3, 4, 12)]
    counted = [(row["attempt"], row["step"]) for row in from_rows.kept(rows) if row["kind"] == "step"]
    assert counted == [(0, step) for step in range(4)] + [(3, step) for step in range(4, 12)]
    assert from_rows.kept(steps(0, 0, 3)) == steps(0, 0, 3)


def test_what_a_failure_cost():
    """Steps of a second, a checkpoint after the second one, a failure in the fourth, two seconds to restart."""
    of_rank = {"kind": "step", "rank": 0, "ranks": 2, "step_s": 1.0, "source": "measured"}
    rows = [of_rank | {"attempt": 0, "step": step, "time_s": 11.0 + step} for step in range(3)]
    rows += [{"kind": "checkpoint", "attempt": 0, "step": 2, "save_s": 0.25}]
    rows += [{"kind": "restart", "attempt": 1, "ranks": 2, "cause": "it died", "failed_s": 13.5, "time_s": 14.0}]
    rows += [{"kind": "resume", "attempt": 1, "step": 2}]
    rows += [of_rank | {"attempt": 1, "step": step, "time_s": 16.5 + step - 2} for step in range(2, 5)]
    first, second = from_rows.attempts(rows)
    assert (first["first"], first["last"], first["kept"], first["cause"]) == (0, 2, 2, "it died")
    assert (first["lost_s"], first["restart_s"], first["save_s"]) == (1.5, 2.0, 0.25)
    assert (second["first"], second["kept"], second["lost_s"], second["cause"]) == (2, 3, 0.0, None)
    broken = [*rows, {"kind": "end", "status": "failed", "error": "RankError: it died again\nnotes"}]
    assert from_rows.attempts(broken)[-1]["cause"] == "RankError: it died again"


def count_from_one(folder):
    """Without the seconds of its steps, which it counts from 1."""
    state = hpclab.restore() or {"step": 0}
    for step in range(state["step"] + 1, 13):
        hpclab.report(step=step)
        if step % 5 == 0:
            hpclab.save({"step": step}, step)
        if step == 8 and not Path(folder, "died").exists():
            Path(folder, "died").touch()
            os._exit(3)


def test_any_steps_are_kept_once_and_shown(four, tmp_path):
    run = hpclab.launch(four, count_from_one, tmp_path, ranks=1, max_restarts=1)
    run.result(60)
    assert [row["step"] for row in from_rows.kept(run.rows) if row["kind"] == "step"] == list(range(1, 13))
    assert "Attempts" in views.page(run)


def test_a_worker_that_comes_back_at_its_old_address():
    from distributed import LocalCluster

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, worker_port=port, dashboard_address="127.0.0.1:0") as cluster,
        hpclab.cluster.ClusterClient(cluster.scheduler_address) as client,
    ):
        run = hpclab.launch(client, wait_for_the_second_attempt, ranks=1, max_restarts=1)
        run.watch(lambda run, rows: any(row["kind"] == "step" for row in rows) and run.kill_worker(0))
        run.result(60)
    assert [row["attempt"] for row in run.rows if row["kind"] == "restart"] == [1]


def wait_for_the_second_attempt():
    while hpclab.gangs.rank._context.place.attempt == 0:
        hpclab.report(step=0)
        time.sleep(0.1)


def test_who_waits_gets_no_seat_of_a_gang_that_goes_on():
    """Two seats, one of which is lost and comes back, and two runs that wait for any."""
    with hpclab.connect(workers=2) as client:
        run = train(client, 2, steps=100, oversubscribe=False)
        waiting = [hpclab.launch(client, int, ranks=1, wait=True) for _ in range(2)]
        struck = []
        run.watch(lambda run, rows: len(run.rows) > 20 and not struck and struck.append(run.kill_worker(1)))
        run.result(60)
        assert [row["ranks"] for row in run.rows if row["kind"] == "restart"] == [2]
        ended = run.rows[-1]["time_s"] + run._launched
        for other in waiting:
            assert other.result(60) == [0]
            assert other._launched > ended - 0.5


def test_what_restore_could_not_read_is_not_written(tmp_path):
    checkpoint.write(tmp_path, 1, {"x": 1.0})
    with pytest.raises(
        TypeError, match=r"state\['x'\] is numpy.float64, which can't be read again without running code"
    ):
        checkpoint.write(tmp_path, 2, {"x": np.float64(2.0)})
    assert checkpoint.newest(tmp_path).name == "step-00000001.pt"


def test_a_run_that_began_anew_keeps_what_it_writes(tmp_path):
    for step in (10, 20, 1, 2, 3):
        assert checkpoint.write(tmp_path, step, {"step": step}).exists()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002.pt", "step-00000003.pt"]


def test_a_flipped_bit_is_seen(tmp_path):
    path = checkpoint.write(tmp_path, 1, state(1))
    whole = bytearray(path.read_bytes())
    dice = random.Random(0)
    for _ in range(40):
        place = dice.randrange(2000, len(whole) - 2000)  # in the weights
        flipped = whole.copy()
        flipped[place] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(OSError, match="is damaged"):
            checkpoint.load(path)


def test_nothing_readable_to_resume_is_an_error(four):
    first = train(four, 2, steps=20)
    first.result(60)
    for path in (first.folder / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(OSError, match=r"none of the checkpoints .* can be read"):
        train(four, 2, steps=20, resume=first.folder).result(60)

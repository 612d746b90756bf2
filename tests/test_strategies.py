"""Each strategy against one process on the same samples, and what it sends against formulas, counted on a wire."""

import copy
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import require
from torch.nn.functional import cross_entropy

import hpclab
from hpclab import models
from hpclab.training.strategies import kinds, shares
from hpclab.training.strategies.kinds import NAMES, DiLoCo, LocalSGD, Pipeline, Tensor, Zero
from hpclab.training.strategies.wire import Sizes, wire

SYMBOLS, LENGTH, SAMPLES, STEPS = 11, 8, 16, 5
EXACT = ("ddp", "accumulate", "zero1", "zero2", "zero3", "tensor", "sequence", "gpipe", "1f1b", "interleaved")
INEXACT = ("bf16", "fp16", "powersgd", "topk", "local-sgd", "diloco")
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}


def gpt(dtype=torch.float64, layers=8):
    torch.manual_seed(0)
    return models.GPT(SYMBOLS, LENGTH, width=16, heads=4, layers=layers).to(dtype)


shallow = functools.partial(gpt, layers=2)
single, shallow_single = (functools.partial(make, torch.float32) for make in (gpt, shallow))


def fitting(strategy, deep=gpt, others=shallow):
    """A pipeline needs as many layers as stages; for all others two do, in a quarter of the time."""
    return deep if isinstance(strategy, Pipeline) else others


def cnn(dtype=torch.float64):
    torch.manual_seed(0)
    return models.CNN(channels=(2, 4)).to(dtype)


def loss(scores, labels):
    return cross_entropy(scores.flatten(0, -2), labels.flatten())


def texts(step, samples=SAMPLES):
    """Each symbol is 1 or 2 more than the one before: inputs and labels, shape (B, T)."""
    draws = torch.Generator().manual_seed(step)
    first = torch.randint(SYMBOLS, (samples, 1), generator=draws)
    steps = torch.randint(1, 3, (samples, LENGTH), generator=draws)
    text = torch.cat([first, steps], 1).cumsum(1) % SYMBOLS
    return text[:, :-1], text[:, 1:]


def pictures(step):
    draws = torch.Generator().manual_seed(step)
    labels = torch.randint(10, (SAMPLES,), generator=draws)
    return torch.rand(SAMPLES, 1, 28, 28, generator=draws, dtype=torch.float64), labels


def alone(make, data, optimizer, steps=STEPS, clip=None):
    """One process, written from the definitions: its weights after some steps, and the losses."""
    model, losses = make(), []
    moves = OPTIMIZERS[optimizer](model.parameters())
    for step in range(steps):
        inputs, labels = data(step)
        moves.zero_grad()
        losses.append(loss(model(inputs), labels))
        losses[-1].backward()
        if clip is not None:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        moves.step()
    return model.state_dict(), [one.item() for one in losses]


def share(strategy, batch):
    """What the replica of this rank sees of a batch."""
    replicas, replica = strategy.replicas(dist.get_world_size())
    return [part.chunk(replicas)[replica[dist.get_rank()]] for part in batch]


def advance(engine, data, steps):
    """Take steps; returns the mean loss over the ranks, of each."""
    losses = [engine.step(*share(engine.strategy, data(step))) for step in steps]
    if losses:
        dist.all_reduce(means := torch.stack(losses))
        return (means / dist.get_world_size()).tolist()
    return []


def follow(cases, steps=STEPS, clip=None):
    """On every rank: train by each strategy in turn; rank 0 returns the whole weights, and the losses."""
    trained = []
    for strategy, make, data, optimizer in cases:
        engine = strategy.start(make(), OPTIMIZERS[optimizer], loss)
        engine.clip = clip
        losses = advance(engine, data, range(steps))
        trained.append((engine.full_weights(), losses))
    return trained if dist.get_rank() == 0 else None


def furthest(weights, others):
    """Largest distance of a parameter from its like, relative to its norm."""
    assert weights.keys() == others.keys()
    return max(((weights[name] - other).norm() / other.norm()).item() for name, other in others.items())


def trained(client, ranks, cases, *arguments):
    run = hpclab.launch(client, follow, cases, *arguments, ranks=ranks, oversubscribe=True)
    return run.result(600)[0]


def strategies_of(ranks):
    """All exact strategies that this many ranks can do, with some of their settings."""
    exact = [NAMES[name] for name in EXACT]
    exact += [dataclasses.replace(NAMES[name], recompute=True) for name in ("zero3", "sequence", "1f1b")]
    if ranks == 4:
        exact += [Tensor(2), Tensor(2, sequence=True), Pipeline(2), Pipeline(2, schedule="interleaved")]
    return exact


@pytest.mark.parametrize("ranks", [2, 4])
def test_exact_strategies_are_one_process(client, ranks):
    """A GPT by all of them; a CNN, which can't be split, by the others."""
    cases = [(one, fitting(one), texts, name) for one in strategies_of(ranks) for name in OPTIMIZERS]
    cases += [(NAMES[name], cnn, pictures, "SGD") for name in EXACT[:5]]
    expected = {(make, name): alone(make, data, name) for _, make, data, name in cases}
    for (strategy, make, _, name), (weights, losses) in zip(cases, trained(client, ranks, cases), strict=True):
        assert furthest(weights, expected[make, name][0]) < 1e-10, (strategy, name)
        assert losses == pytest.approx(expected[make, name][1], rel=1e-10), (strategy, name)


def test_a_clipped_gradient_is_one_process_too(client):
    """The norm is that of the whole gradient, wherever its parts are."""
    cases = [(one, fitting(one), texts, "SGD") for one in strategies_of(4)]
    expected = {make: alone(make, texts, "SGD", clip=0.05)[0] for make in (gpt, shallow)}
    for (strategy, make, *_), (weights, _) in zip(cases, trained(client, 4, cases, STEPS, 0.05), strict=True):
        assert furthest(weights, expected[make]) < 1e-10, strategy


def test_in_single_precision_only_rounding_differs(client, record_property):
    cases = [(one, fitting(one, single, shallow_single), texts, "SGD") for one in strategies_of(4)]
    expected = {make: alone(make, texts, "SGD")[0] for make in (single, shallow_single)}
    results = trained(client, 4, cases)
    apart = {
        str(one): furthest(weights, expected[make])
        for (one, make, *_), (weights, _) in zip(cases, results, strict=True)
    }
    record_property("measured", f"float32, 5 steps on 4 ranks: at most {max(apart.values()):.1e} from one process")
    assert max(apart.values()) < 1e-4, apart


def test_inexact_strategies_learn_nearly_as_well(client, record_property):
    """The text has 1 bit a symbol, so no loss stays below log 2 = 0.693; in 96 steps AdamW comes near."""
    rounded = [dataclasses.replace(NAMES[name], autocast=True) for name in ("ddp", "zero3", "tensor", "1f1b")]
    strategies = [NAMES["ddp"], *(NAMES[name] for name in INEXACT), *rounded]
    cases = [(one, shallow_single, texts, "AdamW") for one in strategies]
    run = hpclab.launch(client, follow, cases, 96, ranks=2, oversubscribe=True)
    ends = [sum(losses[-16:]) / 16 for _, losses in run.result(600)[0]]
    names = [*map(str, strategies)]
    record_property("measured", ", ".join(f"{name} {end:.3f}" for name, end in zip(names, ends, strict=True)))
    assert 0.69 < ends[0] < 0.9
    for name, end in zip(names, ends, strict=True):
        allowed = {"topk": 0.3, "powersgd": 0.1, "local-sgd": 0.1, "diloco": 0.1}
        assert abs(end - ends[0]) < {str(NAMES[key]): most for key, most in allowed.items()}.get(name, 0.02), name


def go_on(strategies):
    """On every rank: steps, a state, more steps; and the same steps by a new engine from that state."""
    pairs = []
    for strategy in strategies:
        ways = []
        engine = strategy.start(fitting(strategy)(), OPTIMIZERS["AdamW"], loss)
        advance(engine, texts, range(3))
        state = [copy.deepcopy(engine.state())]
        if not engine.shards():  # a checkpoint has rank 0's
            dist.broadcast_object_list(state)
        again = strategy.start(fitting(strategy)(), OPTIMIZERS["AdamW"], loss)
        again.load(state[0])
        for one in (engine, again):
            advance(one, texts, range(3, 7))
            ways.append(one.full_weights())
        pairs.append(ways)
    return pairs if dist.get_rank() == 0 else None


def test_each_strategy_goes_on_bit_for_bit(client):
    strategies = [*NAMES.values(), LocalSGD(every=2), DiLoCo(every=2), Tensor(2), Pipeline(2, schedule="1f1b")]
    run = hpclab.launch(client, go_on, strategies, ranks=4, oversubscribe=True)
    for strategy, (straight, resumed) in zip(strategies, run.result(600)[0], strict=True):
        for name, weight in straight.items():
            assert torch.equal(resumed[name], weight), (strategy, name)


def save_and_go_on(strategy, stop):
    """On every rank: begin, and save after 3 steps, or go on from there; then train on to 6, unless it shall stop."""
    engine = strategy.start(shallow(), OPTIMIZERS["AdamW"], loss)
    saved = engine.restore()
    done = saved["step"] if saved else 0
    if not saved:
        advance(engine, texts, range(3))
        hpclab.save(engine.state() | {"step": 3}, 3)
        done = 3
    advance(engine, texts, range(done, done if stop else 6))
    weights = engine.full_weights()
    return (done, weights) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("name", ["zero3", "sequence"])
def test_shards_are_saved_and_read_by_other_numbers_of_ranks(client, name, record_property):
    strategy = NAMES[name]
    start = hpclab.launch(client, save_and_go_on, strategy, False, ranks=4, oversubscribe=True)
    _, straight = start.result(120)[0]
    weights = {}
    for ranks in (4, 2):
        settings = {"ranks": ranks, "oversubscribe": True, "resume": start.folder}
        done, weights[ranks] = hpclab.launch(client, save_and_go_on, strategy, False, **settings).result(120)[0]
        assert done == 3
    for part, weight in straight.items():
        assert torch.equal(weights[4][part], weight)
    apart = furthest(weights[2], straight)
    record_property("measured", f"{name}, saved by 4 ranks: {apart:.1e} apart when 2 go on")
    assert 0 <= apart < 1e-6
    for other in (Zero(1), NAMES["gpipe"], Tensor()):
        settings = {"ranks": 2, "resume": start.folder}
        with pytest.raises(ValueError, match=rf"can't read this checkpoint; these can: .*{name}\."):
            hpclab.launch(client, save_and_go_on, other, True, **settings).result(120)


def weigh(samples):
    """On every rank: train on a share of each batch; returns the weights."""
    ends = torch.tensor([0, *samples]).cumsum(0)
    mine = slice(ends[dist.get_rank()], ends[dist.get_rank() + 1])
    weights = []
    for strategy in (NAMES["ddp"], NAMES["zero3"]):
        engine = strategy.start(shallow(), OPTIMIZERS["SGD"], loss)
        engine.weight = shares.weights(samples)[dist.get_rank()]
        for step in range(STEPS):
            engine.step(*(part[mine] for part in texts(step)))
        weights.append(engine.full_weights())
    return weights if dist.get_rank() == 0 else None


def test_unequal_shares_are_one_process(client):
    samples = shares.shares([80, 50, 20, 10], SAMPLES)
    assert samples == [8, 5, 2, 1]
    expected, _ = alone(shallow, texts, "SGD")
    for weights in hpclab.launch(client, weigh, samples, ranks=4, oversubscribe=True).result(120)[0]:
        assert furthest(weights, expected) < 1e-10


@pytest.mark.parametrize(
    ("speeds", "batch", "dealt"),
    [([1], 5, [5]), ([1, 1, 1], 10, [4, 3, 3]), ([1, 1000], 10, [1, 9]), ([2, 1], 64, [43, 21]), ([3, 1], 2, [1, 1])],
)
def test_shares(speeds, batch, dealt):
    assert shares.shares(speeds, batch) == dealt
    assert sum(shares.weights(dealt)) == pytest.approx(len(speeds))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: kinds.named("zero"), r"strategy \(='zero'\) must be one of 'ddp', .*'interleaved'\."),
        (lambda: Zero(4), r"stage \(=4\) must be one of 1, 2, 3"),
        (lambda: kinds.Compress("zip"), r"method \(='zip'\) must be one of 'bf16', 'fp16', 'powersgd', 'topk'"),
        (lambda: kinds.Compress("topk", density=2), r"density \(=2\) must be above 0 and at most 1"),
        (lambda: LocalSGD(every=1), r"every \(=1\) must be a whole number >= 2"),
        (lambda: kinds.Accumulate(0), r"micro_batches \(=0\) must be a whole number >= 1"),
        (lambda: shares.shares([1, 0], 8), r"speeds \(=\[1, 0\]\) must all be above 0"),
        (lambda: shares.shares([1, 1], 1), r"batch \(=1\) must be a whole number >= 2"),
        (lambda: gpt().stages(9), r"count \(=9\) of stages exceeds the 8 layers"),
    ],
)
def test_bad_settings(ask, says):
    with pytest.raises(ValueError, match=says):
        ask()


@pytest.mark.parametrize(
    ("strategy", "model", "ranks", "batch", "why", "able"),
    [
        (Tensor(), "CNN", 2, 16, "needs a model that says how it is split", "zero3."),
        (Pipeline(), models.CNN, 2, 16, "needs a model that says how it is split", "zero3."),
        (Tensor(3), "GPT", 4, 16, r"over 3 ranks, which ranks \(=4\) is no multiple of", "interleaved."),
        (Pipeline(), "GPT", 1, 16, "needs at least 2 ranks", "sequence."),
        (NAMES["1f1b"], "GPT", 8, 32, r"as many micro_batches \(=4\) as stages \(=8\)", "gpipe."),
        (
            Pipeline(3, 4, "interleaved"),
            "GPT",
            3,
            12,
            r"micro_batches \(=4\) to be a multiple of stages \(=3\)",
            "1f1b.",
        ),
        (NAMES["accumulate"], "GPT", 4, 8, "deals 8 samples a step to 4 replicas in 4 parts each, unevenly", "gpipe"),
    ],
)
def test_what_a_strategy_cannot_do_is_said_at_once(strategy, model, ranks, batch, why, able):
    with pytest.raises(ValueError, match=why) as caught:
        strategy.check(model, ranks, batch)
    assert "these can: ddp, " in str(caught.value)
    assert able in str(caught.value)


def test_what_all_can_do():
    for strategy in NAMES.values():
        strategy.check("GPT", 4, 32)
        strategy.check(models.GPT, 4, 32)
        strategy.check(gpt, 4, 32)
    split = [
        name for name in ("CNN", "ResNet", "RNN", "Autoencoder", "GPT") if hasattr(getattr(models, name), "stages")
    ]
    assert split == [*kinds.SPLIT]
    assert Tensor(2).replicas(4) == (2, [0, 0, 1, 1])


def split_unevenly(strategy, length):
    engine = strategy.start(models.GPT(SYMBOLS, 8, 24, heads=3), OPTIMIZERS["SGD"], loss)
    engine.step(*(torch.zeros(2, length, dtype=torch.int64),) * 2)


@pytest.mark.parametrize(
    ("strategy", "ranks", "says"),
    [
        (Tensor(), 2, r"ranks \(=2\) of a replica can't share heads \(=3\) evenly"),
        (Tensor(sequence=True), 3, r"ranks \(=3\) of a replica can't share 7 positions evenly"),
    ],
)
def test_what_cannot_be_split(client, strategy, ranks, says):
    with pytest.raises(ValueError, match=says):
        hpclab.launch(client, split_unevenly, strategy, 7, ranks=ranks, oversubscribe=True).result(60)


ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']


def test_bytes_on_the_wire(record_property):
    """Counted on lo in a network of its own, of all ranks together; within 1 % or 50 kB a step of gloo's formula."""
    require(subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0, "unshare --net, and ip")
    script = Path(__file__).with_name("strategies_on_wire.py")
    done = subprocess.run([*ALONE, sys.executable, script, "2", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = []
    for row in rows:
        megabytes = [f"{row[key] / 1e6:.2f}" for key in ("counted", "gloo", "nccl")]
        said = "{} ranks, {}: {} MB counted, {} by gloo's formula, {} by NCCL's".format(
            row["ranks"], row["strategy"], *megabytes
        )
        record_property("measured", said)
        if abs(row["counted"] - row["gloo"]) > max(0.01 * row["gloo"], 50e3):
            wrong.append(said)
    assert len(rows) == 37 and not wrong


def test_textbook_formulas():
    """Of n bytes on p ranks, in units of n, as FSDP's and Megatron's papers give them for NCCL."""
    sizes = Sizes(((1000, 1000),), stream=1000, blocks=3, split=500_000)
    gradients = {name: wire(NAMES[name], 4, sizes)["nccl"] / 4e6 for name in ("ddp", "zero1", "zero2", "zero3")}
    assert gradients == pytest.approx({"ddp": 1.5, "zero1": 2.25, "zero2": 1.5, "zero3": 2.25})
    tensor, sequence = (wire(NAMES[name], 4, sizes)["nccl"] for name in ("tensor", "sequence"))
    assert tensor == pytest.approx(3 * 4 * 1.5 * 4000)
    assert sequence == pytest.approx(tensor + 2 * 0.75 * 4000)


class DoubleGPT(models.GPT):
    """In double precision; a rank of it dies once, in its 9th step, if it is told where to note that."""

    def __init__(self, note=None):
        super().__init__(width=16, context=128, layers=4)
        self.double()
        self.steps, self.note = 0, note
        self.blocks[-1].register_forward_pre_hook(self.live)

    def live(self, *_):
        self.steps += 1
        if self.note and self.steps == 9 and os.environ["RANK"] == "3" and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fit(client, model=DoubleGPT, **settings):
    settings = {"batch_size": 4, "ranks": 4, "oversubscribe": True, "steps": 12, "progress": False} | settings
    return hpclab.train(client, model, "kjv", seed=3, lr=0.1, **settings).result(300)


@pytest.fixture(scope="module")
def by_ddp(client):
    return fit(client)


@pytest.mark.parametrize("name", ["zero1", "zero3", "sequence", "1f1b"])
def test_train_by_name_sees_the_same_samples(client, by_ddp, name):
    result = fit(client, strategy=name, recompute=name == "sequence")
    assert furthest(result.weights, by_ddp.weights) < 1e-10
    rows = [[row for row in made.rows if row["kind"] == "step"] for made in (result, by_ddp)]
    samples, means = ([sum(row[key] for row in some) for some in rows] for key in ("samples", "loss"))
    assert samples[0] == samples[1] == 12 * 16
    assert means[0] == pytest.approx(means[1], rel=1e-10)


@pytest.mark.parametrize("strategy", [Zero(3), Tensor(2)], ids=["zero3", "tensor"])
def test_a_killed_run_of_shards_goes_on_bit_for_bit(client, tmp_path, strategy):
    settings = {"strategy": strategy, "checkpoint_every": 3}
    straight = fit(client, **settings)
    killed = fit(client, functools.partial(DoubleGPT, tmp_path / "killed"), max_restarts=1, **settings)
    assert [row["step"] for row in killed.rows if row["kind"] == "resume"] == [6]
    for name, weight in straight.weights.items():
        assert torch.equal(killed.weights[name], weight)


def test_the_whole_model_is_tested_where_ranks_hold_parts(client, tmp_path):
    bible = hpclab.data.load("kjv")
    text = bible.decode(bible.tokens[:20_000])
    source = hpclab.data.write(tmp_path / "verses", {"train": text[4000:], "test": text[:4000]}, kind="text")
    settings = {"ranks": 2, "batch_size": 4, "seed": 3, "progress": False}
    scores = [
        hpclab.train(client, DoubleGPT, source, strategy=name, **settings).result(120).scores
        for name in ("ddp", "zero3", "gpipe")
    ]
    assert scores[0]["test_bits"] > 0
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    assert scores[2] == pytest.approx(scores[0], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "zero"}, r"strategy \(='zero'\) must be one of 'ddp', 'accumulate'"),
        ({"strategy": "tensor"}, r"strategy \(=Tensor\(\)\) needs a model that says how it is split .*: ddp, "),
        (
            {"strategy": "accumulate", "batch_size": 3},
            r"deals 6 samples a step to 2 replicas in 4 parts each, unevenly",
        ),
        ({"strategy": "zero3", "bucket_cap_mb": 1}, r"bucket_cap_mb \(=1\) is for DDP, which strategy \(=Zero\(\)\)"),
        ({"strategy": "zero3", "network": hpclab.Network(1e-3, 1e9)}, r"network emulates averages of DDP"),
    ],
)
def test_train_says_what_a_strategy_cannot_do(client, settings, says):
    with pytest.raises(ValueError, match=says):
        hpclab.train(client, "CNN", "fashion_mnist", ranks=2, steps=1, progress=False, **settings)

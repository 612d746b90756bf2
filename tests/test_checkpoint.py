"""What a checkpoint takes and gives back, and that all ranks get the same one."""

import ctypes
import functools
import math
import os
import pickle
import subprocess
import threading
import time
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpclab
from hpclab import checkpoint
from hpclab.checkpoint import shards

small = settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
BIG = torch.arange(1000.0)
TENSORS = [
    *(
        torch.empty(0),
        torch.tensor(3),
        torch.tensor([math.nan, -0.0]),
        torch.ones(2).bfloat16(),
        BIG[3:5],
        BIG.view(50, 20).t(),
    ),
    *(torch.ones(2, dtype=torch.uint64), torch.ones(1).expand(5), torch.ones(2, dtype=torch.complex64).conj()),
    *(torch.eye(3).to_sparse(),),
    *(torch.nn.Parameter(torch.ones(2)), torch.Generator().get_state()),
]
Pair = namedtuple("Pair", "a b")


class Words(dict):
    """A subclass of dict."""


scalars = st.one_of(
    *(
        st.none(),
        st.booleans(),
        st.integers(-(2**130), 2**130),
        st.floats(),
        st.complex_numbers(),
        st.binary(min_size=1),
    ),
    st.text(st.characters(exclude_categories=[])),  # lone surrogates too
    st.sampled_from([2**64, 2**2038, "a\udcffb", math.nan, torch.float16, torch.Size([2, 3]), torch.device("cpu")]),
)
keys = st.recursive(scalars, lambda inner: st.tuples(inner, inner), max_leaves=3)
states = st.recursive(
    scalars | st.sampled_from(TENSORS),
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.sets(keys, max_size=3)),
        *(st.dictionaries(keys, inner, max_size=3), st.dictionaries(keys, inner, max_size=3).map(OrderedDict)),
        st.dictionaries(st.integers(0, 9), st.integers(1, 9), max_size=3).map(Counter),
    ),
    max_leaves=12,
)
REFUSED = [
    *(np.float64(1), np.int64(1), np.zeros(2), 2**2040, b"", frozenset([1]), Words(a=1), Pair(1, 2), defaultdict(int)),
    *(Path("x"), range(3), len, int, torch.Generator(), torch.nn.Linear(1, 1), torch.empty(2, device="meta")),
    *(BIG.untyped_storage(), np.random.default_rng(0), ..., slice(1), torch.ones(2).to_mkldnn()),
]


def alike(one, other):
    """Whether two states are the same to the bit, and of the same kinds."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        one, other = one.to_dense(), other.to_dense()
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.isnan(), other.isnan())
            and (torch.equal(one.nan_to_num(), other.nan_to_num()))
        )
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(alike, one, other)) and all(map(alike, one.values(), other.values()))
    if isinstance(one, list | tuple) and not isinstance(one, torch.Size):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, set):
        return repr(sorted(map(repr, one))) == repr(sorted(map(repr, other)))
    return repr(one) == repr(other)


@small
@given(state=states)
def test_what_it_takes_comes_back_as_it_was(tmp_path, state):
    assert alike(checkpoint.load(checkpoint.write(tmp_path, 1, state)), state)


@small
@given(
    bad=st.sampled_from(REFUSED),
    around=st.lists(
        st.tuples(st.sampled_from(["list", "tuple", "dict"]), keys, st.lists(scalars, max_size=2)), max_size=5
    ),
)
def test_what_it_refuses_it_names_and_leaves_the_disk_alone(tmp_path, bad, around):
    folder = tmp_path / "checkpoints"
    checkpoint.write(folder, 1, {"x": 1})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    state, place = bad, ""
    for kind, key, others in around:
        if kind == "dict":
            state, place = {key: state}, f"[{key!r}]{place}"
        else:
            state, place = [*others, state], f"[{len(others)}]{place}"
            state = tuple(state) if kind == "tuple" else state
    with pytest.raises(TypeError) as caught:
        checkpoint.write(folder, 2, state)
    assert str(caught.value).startswith(f"state{place} is ") and type(bad).__qualname__ in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_it_refuses_has_a_way_out(tmp_path):
    itself: list = []
    itself.append(itself)
    for state, says in [
        ({"a": [1, 2, np.float64(1)]}, r"state\['a'\]\[2\] is numpy.float64, which .* use its item\(\)"),
        ({"a": np.zeros(1)}, r"state\['a'\] is numpy.ndarray, .* use torch.from_numpy"),
        ({"a": 2**2039}, r"is int, .* it has 2,040 bits, and up to 2,039 are read: use str\(x\)"),
        ({"a": b""}, r"is bytes, .* use bytearray\(\)"),
        ({"a": torch.Generator()}, r"is torch._C.Generator, .* use its get_state\(\)"),
        ({"a": torch.nn.Linear(1, 1)}, r"Linear, .* use its state_dict\(\)"),
        ({"a": torch.empty(1, device="meta")}, r"on the meta device and has no values"),
        ({np.str_("a"): 1}, r"the key .* of state is numpy.str_"),
        ({"a": {(1, np.int64(2))}}, r"in state\['a'\]\[1\] is numpy.int64"),
        (itself, r"is nested more than 100 deep, or holds itself"),
    ]:
        with pytest.raises(TypeError, match=says):
            checkpoint.write(tmp_path, 1, state)
    assert not list(tmp_path.iterdir())


def each_rank_another_step():
    rank, found = dist.get_rank(), []
    for step, state in [(rank, {}), (-1 if rank == 1 else 2, {}), (3, {"x": np.float64(1)} if rank == 0 else {})]:
        try:
            hpclab.save(state, step)
        except (ValueError, TypeError) as error:
            found.append(str(error))
    folder = hpclab.gangs.rank.run_folder() / "checkpoints"
    if rank == 0:
        folder.write_text("a file, where the folder should be")
    dist.barrier()
    try:
        hpclab.save({}, 4)
    except OSError as error:
        found.append(type(error).__name__)
    dist.barrier()
    if rank == 0:
        folder.unlink()
    hpclab.save({"step": 5}, 5)  # none of them has gone on alone
    return found


def test_an_error_of_save_is_raised_on_every_rank(client):
    run = hpclab.launch(client, each_rank_another_step, ranks=3, oversubscribe=True)
    for told in run.result(60):
        assert "step differs by rank (rank 0: 0, rank 1: 1, rank 2: 2); every rank must call save" in told[0]
        assert told[1].startswith("step (=-1) must be a whole number >= 0")
        assert told[2].startswith("state['x'] is numpy.float64")
        assert told[3] == "FileExistsError"
    assert checkpoint.load(checkpoint.newest(run.folder / "checkpoints"))["state"] == {"step": 5}


def hide(path, instead):
    """Give this thread another file in a place, as a disk would that shows some hosts an old or a broken one."""
    ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", instead, path], check=True)


def draw(init):
    """A function of two saves; with `init` false, before its process group is made."""
    rank = int(os.environ["RANK"])
    state = hpclab.restore()
    if state is not None:
        return state["step"], torch.rand(1).item()
    torch.manual_seed(rank)
    for step in (1, 2):
        torch.rand(1)
        hpclab.save({"step": step}, step)
    if not init:
        dist.init_process_group("gloo")
    return 0, torch.rand(1).item()


def draw_where_one_rank_sees_another_file(newest, instead):
    if os.environ["RANK"] == "1":
        hide(newest, instead)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return draw(True), str(caught[0].message)


def test_all_ranks_restore_the_same_step_and_go_on_with_their_own_numbers(client, tmp_path):
    for init in (True, False):
        run = hpclab.launch(client, draw, init, ranks=3, oversubscribe=True, init=init)
        begun = run.result(60)
        again = hpclab.launch(client, draw, init, ranks=3, oversubscribe=True, init=init, resume=run.folder).result(60)
        assert again == [(2, number) for _, number in begun]
    broken, other = tmp_path / "broken", tmp_path / "other"
    broken.write_bytes(b"PK")
    newest = checkpoint.newest(run.folder / "checkpoints")
    other.write_bytes(newest.with_name("step-00000001.pt").read_bytes())
    mounted = subprocess.run(["unshare", "-m", "mount", "--bind", broken, newest], capture_output=True)
    require(mounted.returncode == 0, "the right to mount")
    for instead, says in [(broken, "on rank 1: "), (other, "on rank 1 the file differs from that on rank 0")]:
        seen = functools.partial(draw_where_one_rank_sees_another_file, newest, instead)
        found = hpclab.launch(client, seen, ranks=3, oversubscribe=True, resume=run.folder).result(60)
        assert {step for (step, _), _ in found} == {1}
        assert all(f"{newest} can't be read ({says}" in told for _, told in found)


def test_a_checkpoint_that_a_disk_shows_late_is_waited_for(tmp_path):
    path = checkpoint.write(tmp_path, 1, {"x": 1})
    late = path.rename(tmp_path / "hidden")
    threading.Thread(target=lambda: (time.sleep(0.3), late.rename(path))).start()
    held, reading = checkpoint._read_for_all(str(path), 0, 1)
    assert held == {"x": 1} and "sums" in reading


def scattered():
    """A tensor of which each rank has a shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])


def save_shards_of_different_tensors():
    shard = scattered()
    said = []
    itself: list = [shard]
    itself += [itself] * 3
    for state, step in [
        (itself, 0),
        ({"a": shard, "b": shard if dist.get_rank() else 0}, 1),
        ({"a": shard, "b": np.zeros(1)}, 2),
        ({"a": shard}, 2 + dist.get_rank()),
    ]:
        with pytest.raises((ValueError, TypeError)) as caught:
            hpclab.save(state, step)
        said.append(str(caught.value))
    hpclab.save({"a": [shard, (1, shard)], "b": {2: shard}}, 3)
    folder = hpclab.gangs.rank.run_folder() / "checkpoints"
    return said, [path.name for path in folder.iterdir()]


def restore_other_shards():
    says = r"state\['a'\]\[0\] is sharded in this state or in checkpoint .*, not in both"
    with pytest.raises(ValueError, match=says):
        hpclab.restore({"b": {2: scattered()}})
    return hpclab.restore()


def test_shards_that_ranks_do_not_agree_on(client):
    run = hpclab.launch(client, save_shards_of_different_tensors, ranks=2)
    for said, names in run.result(60):
        assert said[0].startswith("state[0] is torch.distributed.tensor.DTensor")
        assert said[1] == "state['b'] is sharded on rank 0 or on rank 1, not on both."
        assert said[2].startswith("state['b'] is numpy.ndarray")
        assert said[3].startswith("step differs by rank (rank 0: 2, rank 1: 3)")
        assert sorted(name[:13] for name in names) == ["step-00000003", "step-00000003"], "no shards of what failed"
    whole = torch.arange(6.0)
    for state in hpclab.launch(client, restore_other_shards, ranks=2, resume=run.folder).result(60):
        assert repr(state) == repr({"a": [whole, (1, whole)], "b": {2: whole}})


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.distributed.checkpoint.filesystem.os.system"])
def test_what_describes_shards_runs_no_code(tmp_path, name):
    module, _, function = name.rpartition(".") if "filesystem" not in name else (name[:-10], "", "os.system")
    text = [pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, function, "touch ran")]
    body = pickle.PROTO + b"\x04" + text[0] + text[1] + pickle.STACK_GLOBAL + text[2] + pickle.TUPLE1 + pickle.REDUCE
    (tmp_path / ".metadata").write_bytes(body + pickle.STOP)
    with pytest.raises(pickle.UnpicklingError, match="doesn't describe shards"):
        shards._reader(tmp_path).read_metadata()
    assert not Path("ran").exists()

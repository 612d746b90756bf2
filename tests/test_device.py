"""Where ranks compute. What needs a GPU isn't run here: docs/gpu.md is for those who have one."""

import pytest
import torch

import hpclab
from hpclab.gangs.rank import backend
from hpclab.training import device


@pytest.fixture
def cards(monkeypatch):
    """A host that seems to have GPUs, as far as torch is asked how many; this rank is the third of three there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")


def test_each_rank_of_a_host_has_a_gpu_of_its_own(cards):
    assert device.of_rank("cuda") == torch.device("cuda:2")
    assert device.of_rank("cpu") == torch.device("cpu")


def test_a_host_with_fewer_gpus_than_ranks_is_refused(cards, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(ValueError, match=r"device \(='cuda'\) gives each rank a GPU of its own; .* has 4 for 5 ranks"):
        device.of_rank("cuda")


@pytest.mark.parametrize(("ranks", "expected"), [("3", "cpu:gloo,cuda:nccl"), ("5", "gloo")])
def test_nccl_is_there_where_each_rank_has_a_gpu(cards, monkeypatch, ranks, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert backend() == expected
    assert chosen == ([2] if "nccl" in expected else [])


def test_a_batch_goes_to_a_device_with_all_its_parts():
    """Images and labels, or padded frames with their lengths."""
    here = torch.zeros(2, 3)
    frames, (more, lengths) = device.moved((here, [here, here[0]]), torch.device("meta"))
    assert {part.device.type for part in (frames, more, lengths)} == {"meta"}
    assert (frames.shape, lengths.shape) == ((2, 3), (3,))


def test_training_on_gpus_that_are_not_there_says_so(client):
    settings = {"ranks": torch.cuda.device_count() + 1, "oversubscribe": True, "steps": 1, "progress": False}
    run = hpclab.train(client, "CNN", "fashion_mnist", device="cuda", **settings)
    with pytest.raises(ValueError, match=r"Use fewer ranks a host, or device='cpu'"):
        run.result(60)
    with pytest.raises(ValueError, match=r"device \(='gpu'\) must be one of 'cpu', 'cuda'"):
        hpclab.train(client, "CNN", "fashion_mnist", device="gpu", **settings)

"""The models against torch's own counters, other ways to the same result, and what they promise."""

import numpy as np
import pytest
import torch
from torch import nn

import hpclab
from hpclab import models
from hpclab.models.resnet import SyncBatchNorm

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def of_images(make, **settings):
    return pytest.param(lambda: make(**settings), (IMAGES,), 6, id=f"{make.__name__}-{settings}")


def of_series(cell, lengths):
    def batch():
        return torch.rand(len(lengths), max(lengths), 12), torch.tensor(lengths)

    return pytest.param(lambda: models.RNN(cell=cell, width=32), batch(), batch()[1], id=f"{cell}-{lengths}")


def of_text(length, **settings):
    tokens = torch.zeros(2, length, dtype=torch.int64)
    return pytest.param(lambda: models.GPT(**settings), (tokens,), (2, length), id=f"GPT-{length}-{settings}")


@pytest.mark.parametrize(
    ("make", "inputs", "size"),
    [
        of_images(models.CNN),
        of_images(models.CNN, channels=(3, 5, 7), classes=4),
        of_images(models.ResNet),
        of_images(models.ResNet, widths=(4, 8, 8, 16), blocks=2, classes=3),
        of_images(models.Autoencoder),
        of_images(models.Autoencoder, code=5, channels=(3, 7)),
        *(of_series(cell, x) for cell in ("LSTM", "GRU") for x in ([7, 5, 2], [4, 4, 4], [3, 9, 9, 1], [6])),
        of_text(128),
        of_text(50, vocabulary=7, context=64, width=24, heads=3, layers=2, tied=False),
    ],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_formulas_equal_torchs_own_counters(make, inputs, size, kind):
    model = make().to(kind)
    inputs = [part.to(kind) if part.is_floating_point() else part for part in inputs]
    told = model.counts(*size) if isinstance(size, tuple) else model.counts(size)
    assert told == models.measure(model, *inputs)


def test_sizes_that_the_pages_name():
    counts = {name: getattr(models, name)().counts for name in ("CNN", "ResNet", "Autoencoder", "GPT")}
    assert {name: count().parameters for name, count in counts.items()} == {
        "CNN": 50_186,
        "ResNet": 77_754,
        "Autoencoder": 65_025,
        "GPT": 812_032,
    }


def test_what_is_kept_twice_counts_once():
    """Both products keep the same input, and the ReLU keeps what the last one reads."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, inputs):
            return self.last(torch.relu(self.first(inputs) + self.second(inputs)))

    found = models.measure(Twice(), torch.rand(3, 4))
    assert found == models.Counts(2 * 40 + 9, 3 * (2 * 2 * 32 + 2 * 8), 4 * 3 * (4 + 8))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_padding_changes_nothing(cell):
    """Each sequence alone, unpadded, against all of them in one batch, in any order."""
    model = models.RNN(cell=cell).double()
    lengths = torch.tensor([5, 29, 1, 12])
    frames = torch.rand(4, 29, 12, dtype=torch.float64)
    together = model(frames, lengths)
    for number, length in enumerate(lengths):
        alone = model(frames[number : number + 1, :length], length[None])
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-12, atol=1e-12)


def test_gpt_sees_no_character_ahead():
    model = models.GPT(layers=2).double()
    tokens = torch.randint(63, (1, 40), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[0, 25:] = 0
    torch.testing.assert_close(model(tokens)[:, :25], model(other)[:, :25], rtol=0, atol=1e-14)
    assert not torch.allclose(model(tokens)[:, 25:], model(other)[:, 25:])


def test_gpt_attends_as_the_paper_says():
    """Attention written from its definition (Vaswani et al. 2017, equation 1), over each head alone."""
    attention = models.GPT().blocks[0].attention.double()
    normed = torch.rand(2, 9, 128, dtype=torch.float64)
    mixed = []
    for head in range(4):
        rows = slice(32 * head, 32 * head + 32)
        q, k, v = (normed @ part.weight[rows].T for part in (attention.q, attention.k, attention.v))
        scores = (q @ k.transpose(1, 2)) / 32**0.5
        scores += torch.full((9, 9), -torch.inf).triu(1)
        mixed.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(normed), torch.cat(mixed, -1) @ attention.proj.weight.T)


def test_the_denoiser_adds_noise_only_in_training():
    model = models.Autoencoder(noise=0.3)
    assert not torch.equal(model(IMAGES), model(IMAGES))
    model.eval()
    assert torch.equal(model(IMAGES), model(IMAGES))


def test_the_anomaly_score_is_as_it_is_defined():
    """Each image alone, from the definition, in plain numpy but for the encoder."""
    torch.manual_seed(0)
    model = models.Autoencoder(code=3, channels=(2, 4)).double()
    known, images = torch.rand(40, 1, 28, 28, dtype=torch.float64), IMAGES.double()
    codes = model.encoder(known).detach().numpy()
    for image, score in zip(images, model.anomaly(known, images, neighbours=4), strict=True):
        code = model.encoder(image[None]).detach().numpy()
        nearest = np.argsort((((code - codes) / codes.std(0)) ** 2).sum(1))[:4]
        expected = ((known.numpy()[nearest].mean(0) - image.numpy()) ** 2).mean()
        assert score.item() == pytest.approx(expected, rel=1e-10)


def test_a_flipping_resnet_mirrors_some_images_and_only_in_training():
    model = models.ResNet(flip=1, norm=lambda maps: nn.Identity())
    plain = models.ResNet(norm=lambda maps: nn.Identity())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IMAGES), plain(IMAGES.flip(-1)))
    torch.testing.assert_close(model.eval()(IMAGES), plain(IMAGES))


def test_twenty_layers_are_the_papers():
    """ResNet-20 has 0.27 million parameters (He et al. 2015, table 6); its shortcuts have none, ours are 1x1."""
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    model = models.ResNet(blocks=3)
    assert sum(isinstance(part, nn.Conv2d) for part in model.modules()) + 1 == 20 + 2
    assert round((model.counts().parameters - shortcuts) / 1e6, 2) == 0.27


def gradients(parts, norm):
    """What each rank finds in its share of a batch: outputs, gradients of the mean loss, averages that it keeps."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = hpclab.models.ResNet(widths=(4, 8), norm=norm).double()
    images = torch.rand(sum(parts), 1, 28, 28, dtype=torch.float64)
    rank = dist.get_rank()
    mine = images.split(parts)[rank].requires_grad_()
    scores = model(mine)
    (scores.square().sum() / sum(parts)).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    kept = [*(parameter.grad for parameter in model.parameters()), *model.buffers()]
    return scores.detach().numpy(), mine.grad.numpy(), [value.numpy() for value in kept]


@pytest.mark.parametrize("parts", [(4, 4), (7, 1)], ids=["equal", "unequal"])
def test_synchronized_batch_norm_is_that_of_one_rank(client, parts):
    """Against torch's own batch norm on the whole batch; also where the ranks' shares differ in size."""
    two = hpclab.launch(client, gradients, parts, SyncBatchNorm, ranks=2).result(60)
    ((scores, inputs, kept),) = hpclab.launch(client, gradients, (sum(parts),), nn.BatchNorm2d, ranks=1).result(60)
    np.testing.assert_allclose(np.concatenate([two[0][0], two[1][0]]), scores, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([two[0][1], two[1][1]]), inputs, rtol=1e-10, atol=1e-12)
    for found, expected in (pair for _, _, other in two for pair in zip(other, kept, strict=True)):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_synchronized_batch_norm_reads_the_plain_ones_weights():
    plain, synchronized = models.ResNet(), models.ResNet(norm=SyncBatchNorm)
    synchronized.load_state_dict(plain.state_dict())
    torch.testing.assert_close(synchronized.eval()(IMAGES), plain.eval()(IMAGES))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: models.RNN(cell="tanh"), r"cell \(='tanh'\) must be one of 'GRU', 'LSTM'"),
        (
            lambda: models.RNN()(torch.rand(3, 5, 12), torch.tensor([5, 0, 3])),
            r"lengths\[1\] is 0; each sequence needs a frame",
        ),
        (lambda: models.GPT(width=30), r"width \(=30\) must be a multiple of heads \(=4\)"),
        (
            lambda: models.GPT(context=8)(torch.zeros(2, 9, dtype=torch.int64)),
            r"tokens of shape \(2, 9\) are longer than context \(=8\)",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()

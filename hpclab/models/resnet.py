"""A residual network in CIFAR's style, and a batch norm over the batches of all ranks."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpclab.models.counts import Counts, word

SIDE = 28


class ResNet(nn.Module):
    """A residual network for 28x28 grey images (He et al. 2015, arXiv:1512.03385, section 4.2).

    One 3x3 convolution, then stages of blocks; each stage but the first halves the side. With the defaults it has
    77,754 parameters and does a third of a ResNet-20's work.

    Parameters
    ----------
    classes : int, default 10
    widths : tuple of int, default (16, 32, 64)
        Feature maps in each stage.
    blocks : int, default 1
        Blocks in each stage; 3 make the ResNet-20.
    norm : callable, default torch.nn.BatchNorm2d
        Given a number of feature maps, returns their normalisation. A `BatchNorm2d` sees one rank's share of a batch,
        so its result depends on how many ranks there are; a `SyncBatchNorm` sees the whole batch.
    flip : float, default 0
        Probability with which a training image is mirrored. Each rank draws its own.
    """

    def __init__(
        self,
        classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        flip: float = 0.0,
    ):
        super().__init__()
        self.flip = flip
        self.stem = nn.Sequential(_conv(1, widths[0], 3), norm(widths[0]), nn.ReLU())  # (B, widths[0], 28, 28)
        self.blocks = nn.Sequential()
        for stage, (before, after) in enumerate(pairwise((widths[0], *widths))):
            self.blocks.append(Block(before, after, 2 if stage else 1, norm))  # (B, after, s, s); s: 28, 14, 7, ...
            for _ in range(blocks - 1):
                self.blocks.append(Block(after, after, 1, norm))
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape (B, classes), for images in [0, 1], shape (B, 1, 28, 28)."""
        images = (images - 0.286) / 0.353  # mean and deviation of Fashion-MNIST's pixels
        if self.training and self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < self.flip
            images = torch.where(mirrored, images.flip(-1), images)
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))

    def counts(self, samples: int = 1) -> Counts:
        """Parameters, operations and kept bytes of a forward pass over so many images in training, with batch norm.

        Each convolution's output is kept, as its norm's input, and so is the output of each ReLU, as the next
        convolution's input; a norm also keeps two numbers a feature map for the whole batch.
        """
        width, classes = self.classifier.in_features, self.classifier.out_features
        parameters, flops = classes * (width + 1), 2 * width * classes
        side, kept, statistics = SIDE, SIDE**2 + width, 0
        for layer in (self.stem, *self.blocks):
            convs = [part for part in layer.modules() if isinstance(part, nn.Conv2d)]
            maps, weights = convs[0].out_channels, sum(conv.weight.numel() for conv in convs)
            side = -(-side // convs[0].stride[0])
            parameters += weights + 2 * maps * len(convs)
            flops += 2 * weights * side**2
            kept += (len(convs) + (1 if layer is self.stem else 2)) * maps * side**2
            statistics += 2 * maps * len(convs)
        return Counts(parameters, samples * flops, (samples * kept + statistics) * word(self))


class Block(nn.Module):
    """Two convolutions, added to the input, or to a 1x1 convolution of it where the shape changes."""

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.main = nn.Sequential(
            *(_conv(before, after, 3, stride), norm(after), nn.ReLU()),
            *(_conv(after, after, 3), norm(after)),
        )
        changes = stride > 1 or before != after
        self.skip = nn.Sequential(_conv(before, after, 1, stride), norm(after)) if changes else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """Shape (B, before, s, s) to (B, after, s/stride, s/stride)."""
        return torch.relu(self.main(maps) + self.skip(maps))


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks together: p ranks get what one gets with p times the batch.

    Torch's own `torch.nn.SyncBatchNorm` takes only a GPU's tensors; this one also a CPU's. Its weights and running
    averages have the same names as `BatchNorm2d`'s. Two all-reduces of a number a feature map in the forward pass, and
    two in the backward pass: small messages, of which each costs its latency.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, maps: int):
        super().__init__(maps)

    def forward(self, maps: Tensor) -> Tensor:
        """Shape (B, maps, H, W) to the same."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(maps)
        size = maps.new_tensor([maps.numel() / maps.shape[1]])  # ranks may hold shares of different sizes
        *_, count = total = _Sum.apply(torch.cat([maps.sum((0, 2, 3)), size]))
        mean = total[:-1] / count.detach()
        centred = maps - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count.detach()
        self._remember(mean.detach(), variance.detach(), count.item())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]

    def _remember(self, mean: Tensor, variance: Tensor, count: float) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1


class _Sum(torch.autograd.Function):
    """Sum over all ranks; each rank's loss depends on all of them, so the gradients are summed too."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(context, gradient)


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)

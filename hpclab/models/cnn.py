"""A convolutional network whose result doesn't depend on how a batch is dealt out to the ranks."""

from itertools import pairwise

from torch import Tensor, nn

from hpclab.models.counts import Counts, word

SIDE = 28


class CNN(nn.Module):
    """A convolutional network for 28x28 grey images: convolutions with pooling, one linear layer.

    With the default channels it has 50,186 parameters, so a gradient of 201 kB, and no layer whose result depends on
    how a batch is dealt out to the ranks (no batch norm, no dropout).

    Parameters
    ----------
    classes : int, default 10
        Number of classes.
    channels : tuple of int, default (32, 64)
        Feature maps after each convolution; each halves the side, so at most 4.
    """

    def __init__(self, classes: int = 10, channels: tuple[int, ...] = (32, 64)):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((1, *channels)):  # side s: 28, 14, 7, ...
            layers += [
                nn.Conv2d(before, after, kernel_size=3, padding=1),  # (B, after, s, s)
                nn.MaxPool2d(2),  # (B, after, s/2, s/2); before the ReLU: the same result, for a quarter of its work
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.channels = channels
        self.classifier = nn.Linear(channels[-1] * (SIDE >> len(channels)) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape (B, classes), for images in [0, 1], shape (B, 1, 28, 28)."""
        images = (images - 0.286) / 0.353  # mean and deviation of Fashion-MNIST's pixels
        return self.classifier(self.features(images).flatten(1))

    def counts(self, samples: int = 1) -> Counts:
        """Parameters, operations and kept bytes of a forward pass over so many images, by formula."""
        features, classes = self.classifier.in_features, self.classifier.out_features
        parameters, flops, kept = features * classes + classes, 2 * features * classes, features * word(self)
        for level, (before, after) in enumerate(pairwise((1, *self.channels))):
            area, pooled = (SIDE >> level) ** 2, (SIDE >> level + 1) ** 2
            parameters += 9 * before * after + after
            flops += 2 * 9 * before * after * area
            kept += (before + after) * area * word(self) + 8 * after * pooled  # inputs of both, and the maxima's places
        return Counts(parameters, samples * flops, samples * kept)

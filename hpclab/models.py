"""Neural networks of the course: small enough for a classroom's laptop, real enough to learn."""

from torch import Tensor, nn


class CNN(nn.Module):
    """A convolutional network for 28x28 grey images: two convolutions with pooling, one linear layer.

    With the default channels it has 50,186 parameters, so a gradient of 201 kB, and no layer whose result depends on
    how a batch is dealt out to the ranks (no batch norm, no dropout).

    Parameters
    ----------
    classes : int, default 10
        Number of classes.
    channels : (int, int), default (32, 64)
        Feature maps after the first and the second convolution.
    """

    def __init__(self, classes: int = 10, channels: tuple[int, int] = (32, 64)):
        super().__init__()
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(1, first, kernel_size=3, padding=1),  # (B, first, 28, 28)
            nn.MaxPool2d(2),  # (B, first, 14, 14); before the ReLU: the same result, for a quarter of its work
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=3, padding=1),  # (B, second, 14, 14)
            nn.MaxPool2d(2),  # (B, second, 7, 7)
            nn.ReLU(),
        )
        self.classifier = nn.Linear(second * 7 * 7, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape (B, classes), for images in [0, 1], shape (B, 1, 28, 28)."""
        images = (images - 0.286) / 0.353  # mean and deviation of Fashion-MNIST's pixels
        return self.classifier(self.features(images).flatten(1))

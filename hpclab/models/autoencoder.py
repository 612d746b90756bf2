"""A convolutional autoencoder: images that it rebuilds badly are unlike those that it has seen."""

import torch
from torch import Tensor, nn

from hpclab.models.counts import Counts, word

SIDE = 28
PART = 500
"""Images that are scored at once."""


class Autoencoder(nn.Module):
    """Squeezes 28x28 grey images through a code of a few numbers, and rebuilds them from it.

    Parameters
    ----------
    code : int, default 16
        Numbers in an image's code.
    channels : (int, int), default (16, 32)
        Feature maps at 14x14 and at 7x7.
    noise : float, default 0
        Standard deviation of what is added to the pixels in training only: then it learns to remove noise (Vincent et
        al. 2010, Stacked Denoising Autoencoders). Each rank draws its own.
    """

    objective = "rebuild"
    """What `train` has it learn: its inputs, not the labels."""

    def __init__(self, code: int = 16, channels: tuple[int, int] = (16, 32), noise: float = 0.0):
        super().__init__()
        first, second = channels
        self.code, self.channels, self.noise = code, channels, noise
        self.encoder = nn.Sequential(
            nn.Conv2d(1, first, kernel_size=3, stride=2, padding=1),  # (B, first, 14, 14)
            nn.ReLU(),
            nn.Conv2d(first, second, kernel_size=3, stride=2, padding=1),  # (B, second, 7, 7)
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * 49, code),
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, second * 49),
            nn.ReLU(),
            nn.Unflatten(1, (second, 7, 7)),
            nn.ConvTranspose2d(second, first, kernel_size=4, stride=2, padding=1),  # (B, first, 14, 14)
            nn.ReLU(),
            nn.ConvTranspose2d(first, 1, kernel_size=4, stride=2, padding=1),  # (B, 1, 28, 28)
        )

    def forward(self, images: Tensor) -> Tensor:
        """The images rebuilt, for images in [0, 1], both of shape (B, 1, 28, 28)."""
        if self.training and self.noise:
            images = images + self.noise * torch.randn_like(images)
        return self.decoder(self.encoder(images))

    @torch.no_grad()
    def anomaly(self, known: Tensor, images: Tensor, neighbours: int = 10) -> Tensor:
        """How badly each image is rebuilt from known ones: the higher, the more unlike them it is.

        From an image's own code an autoencoder also rebuilds what it has never seen (Gong et al. 2019,
        arXiv:1904.02639). So an image is compared with the mean of the known images whose codes are nearest to its own,
        where each number of the code is divided by its deviation. With as many principal components as a code, this
        score finds Fashion-MNIST's anomalies about as well: it is more the score's merit than the network's.

        Parameters
        ----------
        known : Tensor, shape (N, 1, 28, 28)
            Images that it was trained on, as many as can be held.
        images : Tensor, shape (M, 1, 28, 28)
        neighbours : int, default 10

        Returns
        -------
        Tensor, shape (M,)
            Mean squared error of an image's pixels.
        """
        codes = torch.cat([self.encoder(part) for part in known.split(PART)])  # (N, code)
        scale = codes.std(0).clamp(min=1e-9)  # a number that is the same for all says nothing
        errors = []
        for part in images.split(PART):
            distances = torch.cdist(self.encoder(part) / scale, codes / scale)  # (PART, N)
            nearest = distances.topk(neighbours, largest=False).indices
            errors.append((known[nearest].mean(1) - part).square().mean((1, 2, 3)))
        return torch.cat(errors)

    def counts(self, samples: int = 1) -> Counts:
        """Parameters, operations and kept bytes of a forward pass over so many images, by formula."""
        code, (first, second) = self.code, self.channels
        flat = second * 49
        shrink, grow = first * (9 + 9 * second), first * (16 + 16 * second)  # weights of the convolutions
        parameters = shrink + grow + 2 * first + second + 1 + 2 * code * flat + code + flat
        flops = 2 * (9 * first * 196 + 9 * first * second * 49 + 2 * code * flat)
        flops += 2 * (16 * first * second * 49 + 16 * first * 196)  # by input's pixels
        kept = SIDE**2 + 2 * (first * 196 + flat) + code
        return Counts(parameters, samples * flops, samples * kept * word(self))

"""Neural networks of the course: small enough for a classroom's laptop, real enough to learn.

Ranks import it, so it imports nothing at its top: each name below loads its file, and torch, when it is first used.
"""

from hpclab import later

_HOME = {
    "CNN": "cnn",
    "ResNet": "resnet",
    "RNN": "rnn",
    "Autoencoder": "autoencoder",
    "GPT": "gpt",
    "Counts": "counts",
    "measure": "counts",
}
__getattr__ = later(__name__, {name: f"models.{home}" for name, home in _HOME.items()})


def __dir__() -> list[str]:
    return [*_HOME]

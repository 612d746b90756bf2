"""Training a network on a gang. Ranks import it, so it imports nothing at its top."""

from hpclab import later

__getattr__ = later(__name__, {"Fit": "training.start", "train": "training.start"})

"""Training a network on a gang. Ranks import it, so it imports nothing at its top."""

from importlib import import_module

_HOME = {"Fit": "start", "train": "start"}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")

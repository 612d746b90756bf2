"""How a gang runs: each file's first line says in which process. Ranks import it, so it imports nothing at its top."""

from importlib import import_module

_PUBLIC = ("CellError", "CellInterrupt", "Gang", "Values", "gang")


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.cells"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")

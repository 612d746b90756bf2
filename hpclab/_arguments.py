"""Numbers that a user gives: numpy's count as Python's, where the latter are asked for, written or sent."""

import operator
from contextlib import suppress
from typing import Any


def whole_number(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """Return a whole number of any kind as an int; raise a ValueError that names it if it is none, or out of bounds."""
    with suppress(TypeError):
        number = operator.index(value)
        fits = (least is None or number >= least) and (most is None or number <= most)
        if fits and not isinstance(plain(value), bool):
            return number
    bounds = "" if least is None else f" >= {least}" if most is None else f" from {least} to {most}"
    raise ValueError(f"{name} (={value!r}) must be a whole number{bounds}.")


def plain(value: Any) -> Any:
    """Return Python's own number for one of numpy's or torch's, and anything else as it is."""
    with suppress(ValueError, RuntimeError):  # what these raise for an array of several numbers
        return value.item() if hasattr(value, "item") and not isinstance(value, type) else value
    return value

"""What a user gives: whole numbers, sizes and walltimes, each with one meaning wherever hpclab takes it."""

import operator
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)(e\+?\d+)?\s*(?:([kmgtp])(i?))?b?", re.IGNORECASE)
_WALLTIME = re.compile(r"\d+(:[0-5]\d){0,2}|\d+-\d+(:[0-5]\d){0,2}")


def whole_number(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """Return a whole number of any kind as an int: Python's, numpy's, torch's, and arrays without dimensions.

    Raises
    ------
    ValueError
        Naming the argument, if its value is no whole number (True is none, and 3.0 and an array of one aren't), or out
        of bounds.
    """
    number = plain(value)
    with suppress(TypeError):
        if isinstance(number, bool) or getattr(number, "ndim", False):
            raise TypeError
        number = operator.index(number)
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    bounds = "" if least is None else f" >= {least}" if most is None else f" from {least} to {most}"
    raise ValueError(f"{name} (={value!r}) must be a whole number{bounds}.")


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ValueError that lists the choices unless the value is one of them."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} (={value!r}) must be one of {', '.join(map(repr, known))}.")


def plain(value: Any) -> Any:
    """Return Python's own number for one of numpy's or torch's without dimensions, and anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def size(name: str, value: Any) -> int:
    """Return a size in bytes.

    Parameters
    ----------
    name : str
        The argument's, for the error.
    value : number or str
        Bytes, or text with a unit as Dask reads it: "2GB" is 2 * 10**9 bytes, "2GiB" is 2 * 2**30. Units are k, M, G, T
        and P, in small letters or large; what is without "i" counts in thousands, with a "B" or none. So Slurm's own
        "2G", which is 2 * 2**30 (sbatch(1), --mem), is "2GiB" here.

    Raises
    ------
    ValueError
        Naming the argument, if it is no size above 0 and below 2**63.
    """
    number = plain(value)
    if isinstance(number, str) and (match := _SIZE.fullmatch(number.strip())):
        digits, exponent, unit, binary = match.groups("")
        number = float(digits + exponent) * (1024 if binary else 1000) ** " kmgtp".index(unit.lower() or " ")
    if isinstance(number, bool) or not (isinstance(number, int | float) and 1 <= number < 2**63):
        raise ValueError(f"{name} (={value!r}) must be bytes or a size such as '2GB', above 0 and below 2**63.")
    return int(number)


def seconds(walltime: object) -> int | None:
    """Seconds of a time as Slurm reads and writes it; None if it is none, such as "UNLIMITED".

    That is "MINUTES", "MM:SS", "HH:MM:SS", "DAYS-HH", "DAYS-HH:MM" or "DAYS-HH:MM:SS", where the first number may be
    as large as you like.

    Examples
    --------
    >>> [seconds(walltime) for walltime in ("30", "30:00", "00:30:00", "1-02", "infinite")]
    [1800, 1800, 1800, 93600, None]
    """
    if not (isinstance(walltime, str) and _WALLTIME.fullmatch(walltime)):
        return None
    days, dash, text = walltime.rpartition("-")
    numbers = [int(number) for number in text.split(":")]
    if not dash and len(numbers) < 3:
        numbers.insert(0, 0)
    hours, minutes, rest = [*numbers, 0, 0][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def clock(seconds: float) -> str:
    """Seconds as "HH:MM:SS", which every queue reads alike.

    >>> clock(93600)
    '26:00:00'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"

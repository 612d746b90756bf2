"""How much the notebooks do: for an old laptop, a class, or a cluster."""

import os

SIZES = ("small", "class", "cluster")


def size() -> str:
    """How much a notebook is to do: what the environment variable ``HPCLAB_SIZE`` says, else "class".

    Raises
    ------
    ValueError
        If the variable names no size.

    Examples
    --------
    >>> size() in SIZES
    True
    """
    chosen = os.environ.get("HPCLAB_SIZE") or "class"
    if chosen not in SIZES:
        raise ValueError(f"HPCLAB_SIZE (={chosen}) isn't a size; use one of {', '.join(SIZES)}.")
    return chosen

"""Tables of what others measured: rows of `data/tables/`, whose README names sources, licences and columns."""

import csv

from hpclab.data.sets import share

Cell = str | float | int | None


def table(name: str) -> list[dict[str, Cell]]:
    """Rows of a table, in its order.

    Parameters
    ----------
    name : str
        "ultrascale", "mosaic_fsdp", "korthikanti_2022" or "megatron_2021".

    Returns
    -------
    list of dict
        One a row. Numbers are int or float, an empty cell is None, and anything else stays text.

    Raises
    ------
    ValueError
        If there is no such table; lists those that there are.

    Examples
    --------
    >>> row = table("korthikanti_2022")[0]
    >>> row["model"], row["layers"], row["iteration_s"]
    ('22B', 48, 1.1)
    """
    files = {path.stem: path for path in sorted((share() / "data" / "tables").glob("*.csv"))}
    if name not in files:
        raise ValueError(f"name (={name!r}) must be a table: {', '.join(files)}.")
    with open(files[name], encoding="utf-8", newline="") as file:
        return [{column: _cell(text) for column, text in row.items()} for row in csv.DictReader(file)]


def _cell(text: str) -> Cell:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None

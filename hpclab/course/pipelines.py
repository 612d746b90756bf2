"""How much of their time the stages of a pipeline wait for each other: the bubble, from traced runs."""

from hpclab.rows import some


def bubble(rows: list[dict]) -> float:
    """Share of their time in which ranks have no micro-batch, between a step's first pass and its last one.

    Parameters
    ----------
    rows : list of dict
        As from `timeline.spans`, of a run with a pipeline; of several traced steps it is the mean.
    """
    rows = some(rows, "span")
    ends: dict[int, list[float]] = {}
    for row in rows:
        if row["name"] == "optimizer":
            ends.setdefault(row["rank"], []).append(row["start_s"])
    steps: dict[int, list[dict]] = {}
    for row in rows:
        if row["name"] in ("forward", "backward"):
            steps.setdefault(sum(end < row["start_s"] for end in ends.get(row["rank"], [])), []).append(row)
    shares = [_idle(step, ranks=len({row["rank"] for row in rows})) for step in steps.values()]
    return sum(shares) / len(shares)


def _idle(passes: list[dict], ranks: int) -> float:
    """Of one step."""
    begun = min(row["start_s"] for row in passes)
    ended = max(row["start_s"] + row["duration_s"] for row in passes)
    return 1 - sum(row["duration_s"] for row in passes) / (ranks * (ended - begun))

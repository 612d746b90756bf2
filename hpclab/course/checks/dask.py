"""Checks of the notebook *dask*: chunks really race, and what really travels is counted.

Where two programs race, they take turns, and a difference that the noise could have made is inconclusive.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any

import numpy as np

from hpclab import live
from hpclab.course import quizzes
from hpclab.course.questions import Numbers, numbers
from hpclab.course.verdicts import (
    Result,
    apart,
    call,
    dice,
    exercise,
    failed,
    inconclusive,
    numpy_dice,
    passed,
    reject,
)
from hpclab.language import translate as _
from hpclab.ratios import interval


@contextmanager
def _small_cluster(workers: int) -> Iterator[Any]:
    """A client of workers that are threads of this process, so that what they do can be counted here.

    They talk as any others do, over encrypted connections: what travels is packed, and packed again for each worker.
    """
    import logging

    from distributed import Client, LocalCluster
    from distributed.utils import silence_logging_cmgr

    with (
        silence_logging_cmgr(logging.CRITICAL),  # the verdict says what fails on a worker
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=False,
            protocol="tls://",
            host="127.0.0.1",
            security=True,
            dashboard_address="127.0.0.1:0",  # not 8787, which may be taken
            silence_logs=False,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        client.as_current(),
    ):
        yield client


@exercise("dask.chunk", forked=False)
def _chunk(cut: object) -> Result:
    result = apart(lambda: _plan_chunks(cut))
    if result.status != "pass":
        return result
    with _small_cluster(4) as client:
        return _race_chunks(client, cut, workers=4)


def _plan_chunks(cut: object) -> Result:
    """What chunks cost by the notebook's model."""
    hidden = dice("dask.chunk")
    for count, workers, item_s, task_s in [
        (2_000, 2, 2e-4, 1e-3),  # a laptop
        (20_000, 16, 1e-5, 1e-3),  # the same with tiny items
        (10_000, 100, 0.1, 5e-4),  # a cluster
        (100_000, 1000, 1e-3, 5e-4),  # more workers than one scheduler can feed
    ]:
        item_s, task_s = item_s * hidden.uniform(0.9, 1.1), task_s * hidden.uniform(0.9, 1.1)
        sizes = _sizes(call(cut, list(range(count)), workers, item_s, task_s), count)
        cost = _planned(sizes, workers, item_s, task_s)
        trials = [_even(count, size) for size in np.unique(np.geomspace(1, count, 40).astype(int))]
        best = min(trials, key=lambda sizes: _planned(sizes, workers, item_s, task_s))
        least = _planned(best, workers, item_s, task_s)
        if cost > 1.3 * least:
            plan = {"count": count, "workers": workers, "tasks": len(sizes), "cost": cost, "least": least}
            plan["handed"] = task_s * len(sizes)
            if len(sizes) > len(best):
                return failed(
                    _(
                        "Too fine: {count} items for {workers} workers, cut into {tasks} tasks, take {cost:.2g} s, of"
                        " which {handed:.2g} s go into handing out tasks; {least:.2g} s is possible.",
                        **plan,
                    )
                )
            return failed(
                _(
                    "Too coarse: {count} items for {workers} workers, cut into {tasks} tasks, take {cost:.2g} s,"
                    " because some workers are idle while others still work; {least:.2g} s is possible.",
                    **plan,
                )
            )
    return passed("")


def _sizes(chunks: Any, count: int) -> np.ndarray:
    """Sizes of the chunks, if together they are all items, each once and in order: else the result wouldn't be."""
    try:
        items = [item for chunk in chunks for item in chunk]
        missing = count - len(set(items) & set(range(count)))
        if isinstance(chunks, str):
            raise TypeError
    except TypeError:
        reject(_("The function must return a list of lists of items, not {returned!r}.", returned=_short(chunks)))
    if missing:
        reject(_("Not the serial result: {missing} of {count} items are in no chunk.", missing=missing, count=count))
    if items != list(range(count)):
        reject(_("Not the serial result: some items are out of order, in two chunks, or new."))
    return np.array([len(chunk) for chunk in chunks])


def _short(returned: Any) -> Any:
    """The same, or the start of its text if that is long."""
    text = repr(returned)
    return returned if len(text) < 60 else f"{text[:57]}..."


def _even(count: int, size: int) -> np.ndarray:
    return np.diff([*range(0, count, size), count])


def _efforts(count: int) -> np.ndarray:
    """What each item costs, over the mean: the first fifth costs 4 times as much as the rest."""
    efforts = np.where(np.arange(count) < count / 5, 4.0, 1.0)
    return efforts / efforts.mean()


def _planned(sizes: np.ndarray, workers: int, item_s: float, task_s: float) -> float:
    """Seconds that chunks of these sizes take by the notebook's model, where whoever is free takes the next."""
    ends = np.cumsum(sizes)
    total = np.concatenate([[0.0], np.cumsum(_efforts(int(ends[-1])))])
    free, last = [0.0] * workers, 0.0
    for seconds in item_s * (total[ends] - total[ends - sizes]):
        end = heappop(free) + seconds
        heappush(free, end)
        last = max(last, end)
    return last + task_s * len(sizes)


def _race_chunks(client: Any, cut: object, workers: int, count: int = 300, item_s: float = 2e-3) -> Result:
    """Race the reader's chunks against a task an item and against a task a worker, in turns, on a job that waits.

    That each item waits, as for a disk, and doesn't compute, makes its cost known and leaves the CPUs to Dask.
    """
    waits = item_s * _efforts(count)

    def seconds(sizes: np.ndarray, waits: np.ndarray = waits) -> float:
        pieces = np.split(np.arange(count), np.cumsum(sizes)[:-1])
        start = time.perf_counter()
        squares = client.gather(client.map(_planted, pieces, [waits[piece].sum() for piece in pieces], pure=False))
        spent = time.perf_counter() - start
        assert [square for piece in squares for square in piece] == _planted(range(count), 0.0)
        return spent

    seconds(_even(count, 10))  # the first tasks open connections
    task_s = seconds(_even(count, 1), 0 * waits) / count
    racers = {
        "yours": _sizes(call(cut, list(range(count)), workers, item_s, task_s), count),
        "items": _even(count, 1),
        "workers": _even(count, count // workers),
    }
    spent: dict[str, list[float]] = {name: [] for name in racers}
    for turns in (5, 10):  # more of them where the first ones don't tell
        with live.bar(turns, _("your chunks against two baselines"), _("round")) as bar:
            for turn in range(turns):
                for name in sorted(racers, reverse=turn % 2 == 1):
                    spent[name].append(seconds(racers[name]))
                bar.update()
        result = _judge_race(spent)
        if result.status != "inconclusive":
            break
    return result


def _judge_race(spent: dict[str, list[float]]) -> Result:
    ratios = {}
    for name, baseline in {"items": _("a task for each item"), "workers": _("a task for each worker")}.items():
        comparison: dict[str, Any] = {"baseline": baseline, **interval(np.array(spent[name]) / spent["yours"])}
        if comparison["high"] < 1:
            return failed(
                _(
                    "In this run {baseline} took {ratio:.2f} times as long as your chunks: yours are slower.",
                    **comparison,
                )
            )
        if comparison["low"] < 1:
            return inconclusive(
                _(
                    "Good by the model, but in this run {baseline} took {low:.2f} to {high:.2f} times as long: the"
                    " noise hides the difference. Run the cell again when this machine is less busy.",
                    **comparison,
                )
            )
        ratios[name] = "{ratio:.1f} ({low:.1f}-{high:.1f})".format(**comparison)
    return passed(
        _(
            "The serial result, and faster: run in turn with yours, a task for each item took {items} times as long,"
            " and a task for each worker {workers} times.",
            **ratios,
        )
    )


def _planted(items: Any, wait_s: float) -> list[int]:
    """Work on a chunk: its items' squares, after a wait."""
    time.sleep(wait_s)
    return [int(item) ** 2 for item in items]


@exercise("dask.bytes", forked=False)
def _bytes(look_up_all: object) -> Result:
    workers = 2
    table = _Table(numpy_dice("dask.bytes").random(250_000))  # 2 MB
    queries = [list(range(start, start + 50)) for start in range(0, 4_000, 100)]
    expected = [_look_up(table, query) for query in queries]
    with _small_cluster(workers) as client:
        _Table.packed, _Table.looked = 0, []
        sums = call(look_up_all, client, table, queries, _look_up)
    times, megabytes = _Table.packed, _Table.packed * table.values.nbytes / 1e6
    try:
        right = np.allclose(sums, expected)
    except (TypeError, ValueError):
        return failed(
            _(
                "The function must return a list of numbers, one for each query, not {returned!r}.",
                returned=_short(sums),
            )
        )
    if not right:
        return failed(_("These aren't the numbers that you get by looking up one query after the other."))
    where = [place for place in _Table.looked if place is not None]
    if len(where) < len(_Table.looked) or not where:
        return failed(_("Queries were looked up in the notebook's own process: the workers had nothing to do."))
    if len(where) > len(queries):
        counts = {"times": len(where), "queries": len(queries)}
        return failed(_("{times} look-ups for {queries} queries: some work is done twice.", **counts))
    if times > 2 * workers:
        return failed(
            _(
                "Right, but the table was packed {times} times to be sent, {megabytes:.0f} MB in all. {workers} workers"
                " need it once each.",
                times=times,
                megabytes=megabytes,
                workers=workers,
            )
        )
    if len(set(where)) < workers:
        return failed(_("One worker did all of it: a single task can't be shared out."))
    return passed(
        _(
            "{queries} look-ups, and the table was packed {times} times to be sent, {megabytes:.0f} MB in all.",
            queries=len(queries),
            times=times,
            megabytes=megabytes,
        )
    )


class _Table:
    """An array that counts how often it is packed to be sent."""

    packed = 0
    looked: list[str | None] = []  # noqa: RUF012
    """Address of the worker of each look-up; None if there was none."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __reduce__(self) -> tuple:
        _Table.packed += 1
        return _Table, (self.values,)

    def __sizeof__(self) -> int:
        return self.values.nbytes

    def __dask_tokenize__(self) -> str:
        return "table"  # else Dask would pack it for a name


def _look_up(table: _Table, query: list[int]) -> float:
    from distributed import get_worker

    try:
        _Table.looked.append(get_worker().address)
    except ValueError:  # not in a task
        _Table.looked.append(None)
    time.sleep(0.005)  # long enough that one worker alone won't take all
    return float(table.values[query].sum())


@numbers("dask.quiz_tasks", tolerance=0.05)
def _tasks() -> Numbers:
    end = max(row["start_s"] + row["duration_s"] for row in quizzes.TASKS)
    busy = sum(row["duration_s"] for row in quizzes.TASKS if row["action"] == "compute")
    every = sum(row["duration_s"] for row in quizzes.TASKS)
    return (100 * busy / (2 * end), 1e3 * busy / 2), [
        ((100 * every / (2 * end), 1e3 * every / 2), _("Fetching data isn't computing.")),
        ((100 * busy / end, 1e3 * busy), _("There are two workers: each second has two seconds of work in it.")),
        ((busy / (2 * end), 1e3 * busy / 2), _("The first number should be in percent.")),
        ((100 * busy / (2 * end), 1e3 * end), _("That is the time it takes now, with one worker idle at the end.")),
    ]


@numbers("dask.quiz_lazy")
def _lazy() -> Numbers:
    import dask

    calls = []

    def load(number: int) -> int:
        calls.append(number)
        return number

    total = dask.delayed(sum)([dask.delayed(load)(number) for number in range(3)])
    with dask.config.set(scheduler="synchronous"):
        total.compute()
        total.compute()
        kept = total.persist()
        kept.compute()
        kept.compute()
    return (len(calls),), [
        ((3,), _("Nothing is kept between two calls of compute, unless you say so.")),
        ((12,), _("What persist returns holds its result: computing it again just returns that.")),
        ((15,), _("What persist returns holds its result: computing it again just returns that.")),
        ((6,), _("Persisting is computing, too.")),
        ((0,), _("compute and persist do run the tasks.")),
    ]

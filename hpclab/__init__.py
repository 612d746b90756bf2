"""Real clusters, real training and real measurements in a notebook cell.

Importing this package loads neither torch nor dask: each name below loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpclab._progress import HangError as HangError
    from hpclab._rank import report as report
    from hpclab._rank import should_stop as should_stop
    from hpclab.checkpoint import restore as restore
    from hpclab.checkpoint import save as save
    from hpclab.cluster import connect as connect
    from hpclab.exercises import check as check
    from hpclab.gangs import CellError as CellError
    from hpclab.gangs import CellInterrupt as CellInterrupt
    from hpclab.gangs import Gang as Gang
    from hpclab.gangs import gang as gang
    from hpclab.launcher import launch as launch
    from hpclab.logbook import progress as progress
    from hpclab.network import Network as Network
    from hpclab.racing import race as race
    from hpclab.runs import RankError as RankError
    from hpclab.runs import Run as Run
    from hpclab.runs import open_run as open_run
    from hpclab.training import train as train

_HOME = {
    "CellError": "gangs",
    "CellInterrupt": "gangs",
    "Gang": "gangs",
    "HangError": "_progress",
    "Network": "network",
    "RankError": "runs",
    "Run": "runs",
    "check": "exercises",
    "connect": "cluster",
    "gang": "gangs",
    "launch": "launcher",
    "race": "racing",
    "open_run": "runs",
    "progress": "logbook",
    "report": "_rank",
    "restore": "checkpoint",
    "save": "checkpoint",
    "should_stop": "_rank",
    "train": "training",
}
_MODULES = (
    "bottlenecks",
    "chaos",
    "checkpoint",
    "compiler",
    "data",
    "doctor",
    "exercises",
    "figures",
    "forecast",
    "grading",
    "language",
    "laws",
    "machine",
    "models",
    "network",
    "playground",
    "plots",
    "predictions",
    "queues",
    "racing",
    "ratios",
    "roofline",
    "rows",
    "scaling",
    "security",
    "sites",
    "slurm",
    "study",
    "tables",
    "tasks",
    "timeline",
    "widgets",
)
__all__ = sorted([*_HOME, *_MODULES])  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(_load(_HOME[name]), name)
    if name in _MODULES:
        return _load(name)
    raise AttributeError(f"module 'hpclab' has no attribute {name!r}; it has {', '.join(__all__)}.")


def _load(name: str) -> object:
    """Import a module of ours; if that fails, name the file that hides another one, should there be such a file."""
    try:
        return import_module(f"hpclab.{name}")
    except Exception as error:
        from traceback import format_exc

        from hpclab import _namesakes

        if why := _namesakes.blame(format_exc()):
            error.add_note(why)
        raise


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

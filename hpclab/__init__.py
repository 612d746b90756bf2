"""Real clusters, real training and real measurements in a notebook cell.

Importing this package loads neither torch nor dask: each name below loads what it needs when it is first used.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpclab.checkpoint import restore as restore
    from hpclab.checkpoint import save as save
    from hpclab.cluster import connect as connect
    from hpclab.course.check import check as check
    from hpclab.course.guesses import came as came
    from hpclab.course.guesses import predict as predict
    from hpclab.course.logbook import progress as progress
    from hpclab.course.sizes import size as size
    from hpclab.gangs.attempt import RankError as RankError
    from hpclab.gangs.cells import CellError as CellError
    from hpclab.gangs.cells import CellInterrupt as CellInterrupt
    from hpclab.gangs.cells import Gang as Gang
    from hpclab.gangs.cells import gang as gang
    from hpclab.gangs.launch import launch as launch
    from hpclab.gangs.past import past_runs as past_runs
    from hpclab.gangs.progress import HangError as HangError
    from hpclab.gangs.rank import report as report
    from hpclab.gangs.rank import should_stop as should_stop
    from hpclab.gangs.record import open_run as open_run
    from hpclab.gangs.run import Run as Run
    from hpclab.network import Network as Network
    from hpclab.racing import race as race
    from hpclab.training.start import train as train

_HOME = {
    "CellError": "gangs.cells",
    "CellInterrupt": "gangs.cells",
    "Gang": "gangs.cells",
    "HangError": "gangs.progress",
    "Network": "network",
    "RankError": "gangs.attempt",
    "Run": "gangs.run",
    "came": "course.guesses",
    "check": "course.check",
    "connect": "cluster",
    "gang": "gangs.cells",
    "launch": "gangs.launch",
    "open_run": "gangs.record",
    "past_runs": "gangs.past",
    "predict": "course.guesses",
    "progress": "course.logbook",
    "race": "racing",
    "report": "gangs.rank",
    "restore": "checkpoint",
    "save": "checkpoint",
    "should_stop": "gangs.rank",
    "size": "course.sizes",
    "train": "training.start",
}
_COURSE = (
    "bottlenecks",
    "chaos",
    "compiler",
    "grading",
    "playground",
    "predictions",
    "roofline",
    "security",
    "tasks",
    "widgets",
)
"""Modules of the course that were public entries at 0.1.0, and stay to be had as such."""
_MODULES = (
    *_COURSE,
    "checkpoint",
    "data",
    "doctor",
    "exercises",
    "figures",
    "forecast",
    "language",
    "laws",
    "machine",
    "models",
    "network",
    "plots",
    "queues",
    "racing",
    "ratios",
    "rows",
    "scaling",
    "sites",
    "slurm",
    "study",
    "tables",
    "timeline",
)
_MOVED = {
    "cards": "cluster.card",
    "exercises": "course.check",
    "launcher": "gangs.launch",
    "runs": "gangs.run",
    **{name: f"course.{name}" for name in ("demo", "logbook", *_COURSE)},
}
"""Where modules are whose paths of 0.1.0 stay."""
MOVED_NAMES = {"hpclab.plots": dict.fromkeys(("grain", "recovery", "roofline", "tasks"), "course.plots")}
"""Where names are that stay to be had from the module that they were in at 0.1.0."""
IN_RANKS = (
    *(f"{__name__}.gangs.{name}" for name in ("buckets", "rank", "rank_cells", "rank_magics", "store")),
    *(f"{__name__}.models.{name}" for name in ("autoencoder", "cnn", "gpt", "resnet", "rnn")),
    *(f"{__name__}.{name}" for name in ("training.entry", "training.loop", "training.objectives")),
    *(f"{__name__}.training.strategies.{name}" for name in ("ddp", "engine", "kinds")),
)
"""Modules of ours that ranks import; a zygote does so once, before it forks them."""
__all__ = sorted([*_HOME, *_MODULES])  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(loaded(_HOME[name]), name)
    if name in _MODULES:
        return loaded(name)
    raise AttributeError(f"module 'hpclab' has no attribute {name!r}; it has {', '.join(__all__)}.")


def loaded(name: str) -> object:
    """Import a module of ours; if that fails, name the file that hides another one, should there be such a file."""
    try:
        return import_module(f"hpclab.{name}")
    except Exception as error:
        from traceback import format_exc

        from hpclab import _namesakes

        if why := _namesakes.blame(format_exc()):
            error.add_note(why)
        raise


def later(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`, for names that are in other modules of ours: these load when a name is first used."""

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(loaded(homes[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}.")

    return __getattr__


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _OldPaths:
    """Has ``import hpclab.predictions`` give the one module that there is, wherever it is now.

    No subclass of what `importlib.abc` has, which would double the time of ``import hpclab``.
    """

    def find_spec(self, name: str, *others: Any) -> ModuleSpec | None:
        parent, module = name.rpartition(".")[::2]
        return ModuleSpec(name, self) if parent == __name__ and module in _MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__name__}.{_MOVED[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # type: ignore[union-attr]  # which the import has replaced


sys.meta_path.append(_OldPaths())

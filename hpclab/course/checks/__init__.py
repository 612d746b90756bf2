"""What checks the exercises: one file a notebook, imported when an exercise of that notebook is asked for."""

from importlib import import_module
from pkgutil import iter_modules

from hpclab.course.verdicts import CHECKS, Check


def find(exercise_id: str) -> Check:
    """The check of an exercise; whatever its id says, nothing is imported but the files here.

    Raises
    ------
    ValueError
        If there is no such exercise; names those that there are.
    """
    _load(str(exercise_id).partition(".")[0])
    if exercise_id not in CHECKS:
        raise ValueError(f"exercise_id (={exercise_id!r}) isn't an exercise; use one of {', '.join(ids())}.")
    return CHECKS[exercise_id]


def ids() -> list[str]:
    """Ids of all exercises; imports all files here."""
    _load()
    return sorted(CHECKS)


def _load(slug: str | None = None) -> None:
    """Import the file of a notebook, if there is one; of all notebooks by default."""
    for file in iter_modules(__path__):
        if slug in (None, file.name.replace("_", "-")):
            import_module(f"{__name__}.{file.name}")

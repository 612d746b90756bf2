"""The course: its notebooks, exercises, checks and grading. The kit never imports it."""

from importlib import import_module

_HOME = {
    "INDEX": "copy",
    "MANIFEST": "copy",
    "Summary": "copy",
    "copy_course": "copy",
    "open_lab": "copy",
    "slug": "copy",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")

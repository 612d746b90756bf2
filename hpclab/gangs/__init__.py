"""How a gang runs: the files of five kinds of process. Ranks import it, so it imports nothing at its top."""

from importlib import import_module

_HOME = {
    "FOLD_SECONDS": "cells",
    "LOOK_SECONDS": "cells",
    "LEAVE_SECONDS": "cells",
    "CLOSE_SECONDS": "cells",
    "LOST_SECONDS": "cells",
    "CellError": "cells",
    "CellInterrupt": "cells",
    "Values": "cells",
    "gang": "cells",
    "Gang": "cells",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")

"""How a gang runs: each file's first line says in which process. Ranks import it, so it imports nothing at its top."""

from hpclab import later

__getattr__ = later(__name__, dict.fromkeys(("CellError", "CellInterrupt", "Gang", "Values", "gang"), "gangs.cells"))

"""How workers take Ctrl-C; a file of its own, since each of them imports it."""

import signal

from distributed import Worker, WorkerPlugin


class IgnoreInterrupt(WorkerPlugin):
    """Ctrl-C in a terminal reaches the workers too; only the client shall act on it, and then end them in order."""

    name = "hpclab-ignore-interrupt"

    def setup(self, worker: Worker) -> None:
        """Ignore SIGINT from now on; called in the main thread of each worker, also of one that is restarted."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

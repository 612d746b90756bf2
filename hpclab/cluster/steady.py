"""TLS connections that don't break for an error of another one; in the kernel, the scheduler and the workers."""

import ssl
from collections.abc import Callable
from typing import Any

import distributed


class Security(distributed.Security):
    """A `distributed.Security` whose connections try once more what failed for no fault of theirs."""

    def get_connection_args(self, role: str) -> dict[str, Any]:
        return _steady(super().get_connection_args(role))

    def get_listen_args(self, role: str) -> dict[str, Any]:
        return _steady(super().get_listen_args(role))


def _steady(arguments: dict[str, Any]) -> dict[str, Any]:
    if (context := arguments["ssl_context"]) is not None:
        context.sslsocket_class = Socket
    return arguments


class Socket(ssl.SSLSocket):
    """A socket that handshakes, reads and writes once more after an error that may be another one's.

    Python doesn't clear OpenSSL's queue of errors, one a thread, before it calls OpenSSL (cpython#148594). What a
    connection that was closed has left there is so raised by the next one that has nothing to read, though it is sound;
    from OpenSSL 3.4 on, each session ticket that nobody took leaves some. A scheduler then drops a worker that has just
    come. To raise clears the queue, so a sound connection goes on at the second call, and a broken one fails again.
    """

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        return _twice(super().read, len, buffer)

    def send(self, data: Any, flags: int = 0) -> int:
        return _twice(super().send, data, flags)

    def do_handshake(self, block: bool = False) -> None:
        _twice(super().do_handshake, block)


def _twice(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except OSError as error:
        # As Python names what the system has told OpenSSL: by its number since 3.12.9 and 3.13.2, before as "SYS".
        if not isinstance(error, ConnectionError) and getattr(error, "library", None) != "SYS":
            raise
    return call(*arguments)

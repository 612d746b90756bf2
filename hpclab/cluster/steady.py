"""TLS connections that don't break for an error of another one; in the kernel, the scheduler and the workers."""

import ssl
from collections.abc import Callable
from contextlib import suppress
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

    OpenSSL keeps a queue of errors for each thread. Python doesn't clear it before it calls OpenSSL (cpython#148594),
    and 3.13 not even when it raises what the system told OpenSSL. What a closed connection left there is so raised by
    the next one that has nothing to read, though that is sound: a scheduler then drops a worker that has just come
    (seen with Python 3.13.5 and OpenSSL 3.5.9). Here the queue is cleared, and a broken connection fails again.
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
        if not _from_system(error):
            raise
    _clear_errors()
    try:
        return call(*arguments)
    except OSError as error:
        if _from_system(error):
            _clear_errors()
        raise


def _from_system(error: OSError) -> bool:
    """Whether OpenSSL had it from the system: to newer Pythons that is one of its errors, to older ones "SYS"."""
    return isinstance(error, ConnectionError) or getattr(error, "library", None) == "SYS"


_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _clear_errors() -> None:
    """Clear this thread's queue of errors: what Python itself does where no cipher of a list is known."""
    with suppress(ssl.SSLError):
        _context.set_ciphers("none-of-that-name")

"""TLS connections beside a broken one, whose error is planted where OpenSSL keeps those of a thread."""

import ctypes
import ctypes.util
import errno
import socket
import ssl
import threading
from contextlib import contextmanager

import distributed
import pytest
from conftest import require

from hpclab.cluster import tls

ERR_LIB_SYS = 2
SOUND = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a connection raises that doesn't block and has nothing to read, or no room to write."""


@contextmanager
def pair(security):
    """The client's and the server's end of an encrypted connection, on which nothing is under way."""
    ends = socket.socketpair()
    server = security.get_listen_args("scheduler")["ssl_context"]
    client = security.get_connection_args("client")["ssl_context"]
    accepted = []
    thread = threading.Thread(target=lambda: accepted.append(server.wrap_socket(ends[0], server_side=True)))
    thread.start()
    connected = client.wrap_socket(ends[1])
    thread.join()
    for one, other in ((connected, accepted[0]), (accepted[0], connected)):
        one.send(b"hello")
        assert other.recv(5) == b"hello"  # with the session's tickets before it
    for end in (connected, accepted[0]):
        end.setblocking(False)
    with connected, accepted[0]:
        yield connected, accepted[0]


def plant_error():
    crypto = ctypes.CDLL(ctypes.util.find_library("crypto"))
    crypto.ERR_new()
    crypto.ERR_set_error(ERR_LIB_SYS, errno.EPIPE, None)


def fill(end):
    while True:
        end.send(bytes(100_000))


@pytest.mark.parametrize("use", [lambda end: end.recv(5), fill], ids=["read", "write"])
def test_an_error_that_another_connection_left_breaks_no_sound_one(use):
    with pair(distributed.Security.temporary()) as (plain, _far):
        plant_error()
        with pytest.raises((ssl.SSLError, BrokenPipeError)) as caught:
            use(plain)
    sound = isinstance(caught.value, SOUND)
    require(not sound, "Python's own OpenSSL, to plant an error in (or this Python has mended cpython#148594)")

    with pair(tls.temporary()) as (steady, far):
        plant_error()
        with pytest.raises(SOUND):
            use(steady)
        if use is not fill:
            far.send(b"alive")
            assert steady.recv(5) == b"alive"


def test_a_broken_connection_still_breaks():
    with pair(tls.temporary()) as (steady, far):
        far.close()
        with pytest.raises(OSError, match=r"[Pp]ipe|reset|EOF|closed"):
            fill(steady)

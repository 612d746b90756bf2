"""Checks of the notebook *security*: strangers really knock, job scripts really run, masks are really taken off."""

import base64
import hashlib
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from hpclab.course import quizzes
from hpclab.course.questions import Numbers, Truths, numbers, statements
from hpclab.course.verdicts import Decided, Result, call, exercise, failed, inconclusive, numpy_dice, passed, reject
from hpclab.language import translate as _

PATIENCE_SECONDS = 60.0
"""How long a job, a greeting or a refusal may take; no answer depends on it, unless something hangs."""


@exercise("security.harden", forked=False)
def _harden(functions: Any) -> Result:
    try:
        certificates, job = functions
    except (TypeError, ValueError):
        return failed(
            _("The answer must be a pair of functions, (certificates, job), not {answer!r}.", answer=functions)
        )
    if os.name != "posix" or shutil.which("bash") is None:
        return inconclusive(_("This needs bash, and files with modes such as 0600; try it on Linux."))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        own, others = _security(certificates, one), _security(certificates, other)
        with ThreadPoolExecutor(1) as pool:  # an event loop already runs in the thread of a notebook's cell
            pool.submit(_knock, own, others).result()
    for message, leaks in _leaks(job):
        if leaks:
            return failed(message)
    return passed(_("Strangers are refused, you aren't, and the job has its token, which nobody else has seen."))


def _security(certificates: Any, folder: str) -> Any:
    """What it returns for a folder that others can enter, a `distributed.Security`; None if it encrypts nothing."""
    from distributed import Security

    os.chmod(folder, 0o755)
    with _umask(0o022):  # what most systems set
        returned = call(certificates, folder)
    if returned is False:
        return None
    if not isinstance(returned, Security):
        reject(_("The first function must return a distributed.Security, not {returned!r}.", returned=returned))
    for name in ("ca_file", "client_key", "scheduler_key", "worker_key"):
        value = getattr(returned, f"tls_{name}")
        if name != "ca_file" and value and "\n" in value:
            reject(_("A private key is in this process only: a worker that a queue starts elsewhere can't read it."))
        if name != "ca_file" and value and os.path.exists(value) and _others_read(value):
            reject(_("Others can read a private key's file: {file}", file=Path(value).name))
    return returned if returned.require_encryption else None


def _knock(own: Any, others: Any) -> None:
    """Open a scheduler and a worker with `own`, and have strangers try; reject if they get in, or if nobody does."""
    import asyncio

    from distributed import Security
    from distributed.utils import silence_logging_cmgr

    try:
        for security in filter(None, (own, others)):
            for role in ("client", "scheduler", "worker"):
                if security.get_connection_args(role)["ssl_context"] is None:
                    raise ValueError(f"tls_{role}_cert, tls_{role}_key")
            security.get_listen_args("scheduler")
    except Exception as error:
        reject(_("It can't be used to encrypt; something is missing: {error}", error=error))

    async def visit() -> None:
        async with _cluster(own) as addresses:
            if own is None and await _let_in(addresses[0], None):
                reject(_("A client without a certificate was let in, and ran code on your worker."))
            for address in addresses:
                if await asyncio.to_thread(_greeted, address):
                    reject(_("A connection without a certificate was answered at {at}.", at=address))
            if await _let_in(addresses[0], Security.temporary()):
                reject(_("A client with self-made certificates was let in."))
            if await _let_in(addresses[0], others):
                reject(
                    _(
                        "One certificate for all: anyone who was ever let into one of your clusters can enter every"
                        " other one that you start."
                    )
                )
            if not await _let_in(addresses[0], own):
                reject(_("Nobody is let in, not even your own client."))

    with silence_logging_cmgr(logging.CRITICAL + 1):  # of each stranger that is refused
        asyncio.run(visit())


def _cluster(security: Any) -> Any:
    """A scheduler and a worker in this process, as a context that gives their addresses."""
    from contextlib import asynccontextmanager

    from distributed import Scheduler, Worker

    @asynccontextmanager
    async def run() -> Any:
        protocol = "tcp://" if security is None else "tls://"
        common: dict[str, Any] = {"security": security, "protocol": protocol, "host": "127.0.0.1", "port": 0}
        with tempfile.TemporaryDirectory() as folder:
            try:
                scheduler = await Scheduler(**common, dashboard=False, dashboard_address="127.0.0.1:0")
            except OSError as error:
                raise Decided(inconclusive(_("No scheduler can start here: {error}", error=error))) from error
            async with scheduler:
                own: dict[str, Any] = {"nthreads": 1, "local_directory": folder, "dashboard_address": "127.0.0.1:0"}
                async with Worker(scheduler.address, **common, **own) as worker:
                    yield scheduler.address, worker.address

    return run()


async def _let_in(address: str, security: Any) -> bool:
    """Whether a client can have a worker compute something."""
    from distributed import Client

    try:
        async with Client(address, security=security, asynchronous=True, timeout=PATIENCE_SECONDS) as client:
            return await client.submit(sum, [1, 2]) == 3
    except OSError:
        return False


def _greeted(address: str) -> bool:
    """Whether a socket without a certificate gets a word of Dask's, in the clear or encrypted."""
    host, port = address.split("://")[1].rsplit(":", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for encrypt in (context.wrap_socket, None):
        try:
            with (
                socket.create_connection((host, int(port)), PATIENCE_SECONDS) as plain,
                encrypt(plain) if encrypt else plain as caller,
            ):
                caller.sendall(b"GET / HTTP/1.0\r\n\r\n")
                if caller.recv(1) not in (b"", b"\x15"):  # closed, or an alert of TLS
                    return True
        except OSError:  # also what TLS refuses
            continue
    return False


TRAIN = """\
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
file = options.get("--token-file")
token = open(file).read().strip() if file else os.environ.get("TRAIN_TOKEN", options.get("--token"))
with open(os.path.join(os.path.dirname(__file__), "seen"), "w") as seen:
    json.dump({"arguments": sys.argv[1:], "token": token}, seen)
"""


def _leaks(job: Any) -> Iterator[tuple[str, bool]]:
    """Ways in which a job could leak its token, and whether this one does, in the order of its life."""
    token = f"tok-{os.urandom(16).hex()}"
    with tempfile.TemporaryDirectory() as base:
        folder, programs = Path(base, "job"), Path(base, "bin")
        os.chmod(base, 0o755)
        folder.mkdir(mode=0o755)
        programs.mkdir()
        (programs / "train.py").write_text(TRAIN)
        (programs / "train").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{programs}/train.py" "$@"\n')
        (programs / "train").chmod(0o755)
        with _umask(0o022):  # what most systems set
            script = call(job, token, str(folder))
        if not isinstance(script, str):
            reject(_("The second function must return the text of a job script, not {returned!r}.", returned=script))
        yield _("The token is in the job script."), _tells(script, token)
        yield _("A private key is in the job script."), "PRIVATE KEY" in script
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            readable = _tells(file.read_text("utf-8", "replace"), token) and _others_read(file, folder)
            mode = f"{file.stat().st_mode & 0o777:04o}"
            yield _("The token is in a file that others can read (mode {mode}).", mode=mode), readable
        output = _run(script, programs, folder)
        yield _("The job prints the token, so the token is in its log."), _tells(output, token)
        if not (programs / "seen").exists():
            reject(_("The job never ran its program, train: {output}", output=output[-300:]))
        seen = json.loads((programs / "seen").read_text())
        arguments = " ".join(seen["arguments"])
        yield (
            _("The token is on the command line of train: while it runs, ps shows it to everybody."),
            token in arguments,
        )
        yield _("Now the job itself has no token, or the wrong one."), seen["token"] != token


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _run(script: str, programs: Path, folder: Path) -> str:
    """Run a job script as a queue does, and return what it prints."""
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            ["bash"],
            input=script,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        reject(_("The job doesn't end."))
    return done.stdout


def _tells(text: str, token: str) -> bool:
    """Whether a text has a token in it, as it is or in an encoding that hides nothing."""
    raw = token.encode()
    dressed = [base64.b64encode(bytes(skipped) + raw).decode()[4:-4] for skipped in range(3)]
    return any(form in text for form in (token, token[::-1], raw.hex(), quote(token), *dressed))


def _others_read(file: str | Path, below: Path | None = None) -> bool:
    """Whether the modes of a file, and of its folders up to one, let other users read it."""
    file = Path(file)
    folders = [folder for folder in file.parents if below is None or below in (folder, *folder.parents)]
    return bool(file.stat().st_mode & 0o044) and all(folder.stat().st_mode & 0o011 for folder in folders)


@exercise("security.masks", imports=("scipy.stats",))
def _masks(mask: object) -> Result:
    ranks, count = 4, 4096
    dice = numpy_dice("security.masks")
    drawn = {frozenset(pair): dice.bytes(32) for pair in combinations(range(ranks), 2)}
    seeds = [
        {other: drawn[frozenset((rank, other))] for other in range(ranks) if other != rank} for rank in range(ranks)
    ]
    gradients = dice.normal(0, 0.01, (2, ranks, count))  # (steps, ranks, count)
    numbers = (gradients * 2**32).astype(np.int64).view(np.uint64)
    shares = np.empty_like(numbers)
    for step, rank in np.ndindex(2, ranks):
        own = numbers[step, rank].copy()
        shares[step, rank] = _share(call(mask, own, rank, dict(seeds[rank]), step, _prg), count)
    if message := _unmasked(shares[0], numbers[0]):
        return failed(message)
    if not np.array_equal(shares.sum(1), numbers.sum(1)):
        return failed(_("The masks don't cancel in the sum: what one of a pair adds, the other must subtract."))
    for rank in range(ranks):
        for seed in seeds[rank].values():
            known = _prg(seed, 0, count)
            if any(_shows(taken) for taken in (shares[0, rank] - known, shares[0, rank] + known)):
                return failed(
                    _("A single other rank can remove a mask: use the seeds shared with all of the other ranks.")
                )
    if any(_shows(step) for step in shares[0] - shares[1]):
        return failed(
            _("Two steps have the same masks: the difference between the shares is that between the gradients.")
        )
    return passed(_("The sum is exact to the last bit; each share looks random, and different in each step."))


def _prg(seed: bytes, step: int, count: int) -> np.ndarray:
    """Random 64-bit numbers, the same for everyone with the seed."""
    stream = hashlib.shake_256(seed + int(step).to_bytes(8, "little")).digest(8 * count)
    return np.frombuffer(stream, dtype=np.uint64)


def _share(returned: Any, count: int) -> np.ndarray:
    if not isinstance(returned, np.ndarray) or returned.dtype != np.uint64 or returned.shape != (count,):
        kind = f"{returned.dtype} {returned.shape}" if isinstance(returned, np.ndarray) else type(returned).__name__
        reject(_("The function must return an array of uint64, as long as the numbers, not this {kind}.", kind=kind))
    return returned


def _unmasked(shares: np.ndarray, numbers: np.ndarray) -> str | None:
    """What a single share gives away, if it does."""
    for rank, (share, own) in enumerate(zip(shares, numbers, strict=True)):
        if np.array_equal(share, own):
            return _("Rank {rank} sends its gradient just as it is.", rank=rank)
        if _shows(share) or _shows(share - own):
            return _("Rank {rank}'s share isn't uniform: a mask must be able to take all 2**64 values.", rank=rank)
    return None


def _shows(share: np.ndarray) -> bool:
    """Whether the highest or the lowest bytes of numbers are far from uniform, by a chi-square test at 1e-9."""
    from scipy.stats import chi2

    octets = share.view(np.uint8).reshape(-1, 8)  # (count, byte)
    counts = np.array([np.bincount(octet, minlength=256) for octet in octets.T])  # (byte, value)
    expected = len(share) / 256
    return bool(((counts - expected) ** 2 / expected).sum(1).max() > chi2.isf(1e-9, 255))


@statements("security.quiz_modes")
def _modes() -> Truths:
    truths = {
        row["letter"]: row["mode of the file"][7] == "r" and row["mode of the folder"][9] == "x"
        for row in quizzes.FILES
    }
    return truths, {
        "b": _("The second three letters are the group's, and the stranger isn't in it."),
        "c": _("To open a file, you must be able to pass through its folder."),
        "e": _("Everybody may pass through that folder, but the file's own mode counts too."),
        "f": _("A folder's r only lets you list its names; you need x to pass through it."),
    }


@numbers("security.quiz_mask")
def _masked() -> Numbers:
    shares, modulus = (37, 85, 12), 100
    possible = {(shares[0] - mask) % modulus for mask in range(modulus)}
    return (sum(shares) % modulus, len(possible)), [
        ((134, 100), _("Numbers wrap around at 100.")),
        ((34, 1), _("The server sees 37, but that is a number plus a mask, which can be anything.")),
        ((34, 37), _("A mask can be larger than the share: numbers wrap around.")),
        ((34, 3), _("Each rank's mask may be any of the numbers, whoever else takes part.")),
    ]

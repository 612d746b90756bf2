"""What *security* shows: who can enter a cluster, what it costs to keep others out, and where a secret can be seen."""

import itertools
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cryptography import x509
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from distributed import Client, Security, wait

from hpclab.cluster import connect
from hpclab.course.tasks import clock
from hpclab.pages import Code
from hpclab.ratios import Measures, paired
from hpclab.tables import Table

PATIENCE_SECONDS = 10.0
"""How long a scheduler may take to say whether it lets somebody in."""
STRANGER = """
import os, sys
from distributed import Client

def look(name):
    return f"ran code in process {os.getpid()}, where {name} is {os.environ.get(name)!r}"

with Client(sys.argv[1], timeout=float(sys.argv[3])) as client:
    print(client.submit(look, sys.argv[2]).result())
"""


def stranger(address: str, variable: str) -> str:
    """Tell what a second program gets from a scheduler: one that was given its address, and nothing else of ours.

    Parameters
    ----------
    address : str
        Such as "tcp://127.0.0.1:8786".
    variable : str
        Name of an environment variable, which it tries to read on a worker.
    """
    command = [sys.executable, "-c", STRANGER, address, variable, str(PATIENCE_SECONDS)]
    done = subprocess.run(command, env=_bare(), capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.strip()
    last = done.stderr.strip().splitlines()[-1]
    return "refused: " + re.sub(r"^[\w.]*[.](\w+: )(in <.*>: )?", r"\1", last)


def knock(client: Client) -> Table:
    """Try a cluster's door: without TLS, without a certificate, with one that is self-made, and with the client's own.

    Returns
    -------
    Table
        A row for each who came, with what came of it, word for word.
    """
    address = _address(client)
    plain = stranger(address.replace("tls://", "tcp://"), "")
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    selfmade = _context(Security.temporary())
    for context in (nobody, selfmade):  # they care for no one's certificate but their own
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return Table(
        [
            {"who comes": "a Dask client without TLS", "what it gets": plain},
            {"who comes": "TLS without a certificate", "what it gets": _tried(address, nobody)},
            {"who comes": "TLS with a certificate of its own making", "what it gets": _tried(address, selfmade)},
            {"who comes": "TLS with ours", "what it gets": _tried(address, _context(client.security))},
        ]
    )


def handshake(client: Client) -> Table:
    """Tell what a client and its scheduler agree on before the first byte of Dask's, beside a plain connection."""
    version, cipher = _greet(_address(client), _context(client.security))
    pem = client.security.tls_scheduler_cert
    made = x509.load_pem_x509_certificate(pem.encode() if "\n" in pem else Path(pem).read_bytes())
    key: Any = made.public_key()
    kind = type(key).__name__.strip("_").removesuffix("PublicKey")
    alone = made.issuer == made.subject
    vouches = "nobody: it is self-signed, and whoever has its key belongs" if alone else made.issuer.rfc4514_string()
    return Table(
        {"question": question, "security=False": plain, "default": encrypted}
        for question, plain, encrypted in [
            ("protocol", "TCP", version),
            ("cipher", "none: all can be read and changed", cipher),
            ("the scheduler proves who it is", "no", f"by a signature with its key, {kind} of {key.key_size} bits"),
            ("the client proves who it is", "no", "by a signature too; without a certificate it is refused"),
            ("who vouches for the certificate", "", vouches),
            ("valid until", "", f"{made.not_valid_after_utc:%Y-%m-%d}"),
        ]
    )


def cost(plain: Client, encrypted: Client, rounds: int, tasks: int) -> list[dict]:
    """Measure what TLS costs, as ratios to a cluster without it; rows are those of `ratios.paired`.

    Parameters
    ----------
    plain, encrypted : distributed.Client
        Of two clusters that differ in nothing else.
    rounds : int
        As for `ratios.paired`; of the start, which takes seconds, a third, and at least 3.
    tasks : int
        Number of tiny tasks in a round.
    """

    # Random, so that nothing can be compressed; and drawn before, as to draw is no part of the transfer.
    drawn = {client: client.submit(os.urandom, 2**25, pure=False) for client in (plain, encrypted)}
    for future in drawn.values():
        wait(future)

    def large(client: Client) -> None:
        drawn[client].result()

    def start(client: Client) -> None:
        connect(workers=1, security=client is encrypted).close()

    quick: Measures = {
        f"seconds for {tasks} tiny tasks": lambda client: clock(client, abs, range(tasks)),
        "seconds for 32 MiB": lambda client: _seconds(large, client),
        "bytes on loopback for 32 MiB": lambda client: _bytes(large, client),
    }
    slow: Measures = {"seconds to start and close": lambda client: _seconds(start, client)}
    few = max(3, rounds // 3)
    return paired(quick, plain, encrypted, rounds) + paired(slow, plain, encrypted, few)


def _seconds(work: Callable[[Client], None], client: Client) -> float:
    begun = time.perf_counter()
    work(client)
    return time.perf_counter() - begun


def _bytes(work: Callable[[Client], None], client: Client) -> int:
    """What this machine sends to itself meanwhile."""
    nics = psutil.net_if_addrs().items()
    name = next(name for name, addresses in nics if any(nic.address == "127.0.0.1" for nic in addresses))
    before = psutil.net_io_counters(pernic=True)[name].bytes_sent
    work(client)
    return psutil.net_io_counters(pernic=True)[name].bytes_sent - before


@contextmanager
def program(*arguments: str, bare: bool = False) -> Iterator[int]:
    """Run a program that does nothing, with these arguments, until the `with` block ends; gives its process id.

    It has this process' environment, or a `bare` one.
    """
    command = [sys.executable, "-c", "import time; time.sleep(3600)", *arguments]
    with subprocess.Popen(command, env=_bare() if bare else None) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def _bare() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}


def exposure(secret: str, pids: Mapping[str, int], files: Mapping[str, str | os.PathLike]) -> Table:
    """Look where a secret is, and whether other users of this machine may read it there.

    Parameters
    ----------
    secret : str
        What to look for.
    pids : dict of str to int
        Processes by name; their command lines and environments are searched.
    files : dict of str to path
        Files by name.

    Returns
    -------
    Table
        A row a place: ``place``, ``mode`` ("" where the system has none, as for other systems' processes),
        ``others can read it`` and ``secret in it``, each "yes" or "no".
    """
    rows = []
    for name, pid in pids.items():
        process = psutil.Process(pid)
        line, env = " ".join(process.cmdline()), str(process.environ())
        rows.append(_place(f"{name}: command line", f"/proc/{pid}/cmdline", secret in line, others=True))
        rows.append(_place(f"{name}: environment", f"/proc/{pid}/environ", secret in env, others=False))
    for name, file in files.items():
        rows.append(_place(name, file, secret in Path(file).read_text("utf-8", "replace"), others=True))
    return Table(rows)


def seen_by_ps(secret: str) -> list[str]:
    """Command lines that hold a secret, as ps shows them to everybody: process id, program, last two words."""
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(secret in word for word in words):
            lines.append(f"{process.pid} {Path(words[0]).name} ... {' '.join(words[-2:])}")
    return lines


def _place(name: str, file: str | os.PathLike, there: bool, others: bool) -> dict[str, str]:
    mode = os.stat(file).st_mode if os.path.exists(file) else None
    readable = others if mode is None else bool(mode & stat.S_IROTH)
    return {
        "place": name,
        "mode": Code(stat.filemode(mode)) if mode is not None else "",
        "others can read it": "yes" if readable else "no",
        "secret in it": "yes" if there else "no",
    }


def prg(seed: bytes, step: int, count: int) -> np.ndarray:
    """Draw random numbers from the stream of ChaCha20: the same for everyone with the seed, new ones in each step.

    numpy's generators are no substitute: they aren't made for secrets.

    Parameters
    ----------
    seed : bytes
        32 of them.
    step : int
        >= 0.
    count : int
        How many.

    Returns
    -------
    ndarray of uint64, shape (count,)
    """
    nonce = bytes(4) + step.to_bytes(12, "little")  # the first 4 count blocks: a step there would only shift the stream
    stream = Cipher(algorithms.ChaCha20(seed, nonce), mode=None).encryptor().update(bytes(8 * count))
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def float_masks(gradients: np.ndarray, size: float) -> tuple[np.ndarray, float]:
    """Mask float gradients by float masks, which cancel in pairs but for rounding.

    Parameters
    ----------
    gradients : ndarray of float32, shape (ranks, weights)
    size : float
        Standard deviation of the masks.

    Returns
    -------
    ndarray, shape (weights,)
        What rank 1 sends.
    float
        Length of the sum's error over that of the sum.
    """
    dice, masked = np.random.default_rng(0), gradients.copy()
    for one, other in itertools.combinations(range(len(gradients)), 2):
        drawn = dice.normal(0, size, gradients.shape[1:]).astype(np.float32)
        masked[one] += drawn
        masked[other] -= drawn
    total = gradients.sum(0)
    return masked[1], float(np.linalg.norm(masked.sum(0) - total) / np.linalg.norm(total))


def _address(client: Client) -> str:
    return client.scheduler_info()["address"]


def _context(security: Security) -> ssl.SSLContext:
    return security.get_connection_args("client")["ssl_context"]


def _greet(address: str, context: ssl.SSLContext) -> tuple[str, str]:
    """Version and cipher of a handshake, if the scheduler then says a word."""
    host, port = address.rsplit("://", 1)[-1].rsplit(":", 1)
    with socket.create_connection((host, int(port)), PATIENCE_SECONDS) as raw, context.wrap_socket(raw) as encrypted:
        if not encrypted.recv(1):  # in TLS 1.3 only now the server says whether it takes the client
            raise ConnectionError("it closed the connection without answering")
        return encrypted.version() or "", (encrypted.cipher() or ("",))[0]


def _tried(address: str, context: ssl.SSLContext) -> str:
    try:
        return "let in: " + ", ".join(_greet(address, context))
    except OSError as error:
        return f"refused: {type(error).__name__}: {error}"

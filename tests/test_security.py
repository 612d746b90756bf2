"""Nobody in who doesn't belong: strangers at the ports, other users at the files, and where secrets could leak."""

import asyncio
import os
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ours, ranks_alive, require, zygotes_alive
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Event, Security, wait
from distributed.core import rpc

import hpclab
from hpclab import checkpoint, plots
from hpclab.course import security
from hpclab.gangs import host

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def stranger():
    """A TLS client that trusts everybody, and has no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def ports(client):
    """Address of the scheduler, and of each worker and its nanny."""
    workers = client.scheduler_info()["workers"]
    addresses = [client.scheduler.address, *workers, *(worker["nanny"] for worker in workers.values())]
    return [(host, int(port)) for host, port in (found.rsplit("/", 1)[1].split(":") for found in addresses)]


def test_a_client_without_a_certificate_gets_nothing(client, stranger):
    assert len(ports(client)) == 5
    for address in ports(client):
        with (
            socket.create_connection(address, 10) as plain,
            pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
            stranger.wrap_socket(plain) as encrypted,
        ):
            encrypted.recv(1)
        with socket.create_connection(address, 10) as plain:
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(ConnectionResetError):
                assert plain.recv(100)[:1] in (b"", b"\x15")  # nothing, or an alert of TLS


def test_a_stranger_reaches_no_rendezvous(client):
    arguments = {"run": "", "attempt": 0, "question": b""}

    async def ask(security):
        async with rpc(client.scheduler.address, connection_args=security.get_connection_args("client")) as scheduler:
            return await scheduler.hpclab_rendezvous(**arguments)

    with pytest.raises(LookupError, match="run  has ended"):  # one that belongs gets an answer
        asyncio.run(ask(client.security))
    with pytest.raises(OSError, match="before comm was established") as refused:
        asyncio.run(ask(Security.temporary()))
    assert "certificate does not match" in str(refused.value.__cause__)


def listeners(processes):
    """Addresses on which processes listen, for TCP and UDP."""
    return [
        connection.laddr.ip
        for process in processes
        for connection in psutil.Process(process).net_connections("inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    ]


def test_all_listens_on_loopback_alone(client):
    with hpclab.gang(client, ranks=2):
        ranks = ranks_alive()
        found = listeners([os.getpid(), *ours("multiprocessing"), *zygotes_alive(), *ranks])
        assert len(ranks) == 2 and len(found) > 5
        assert set(found) == {"127.0.0.1"}
        assert set(listeners(ranks)) == {"127.0.0.1"}  # gloo's


def test_no_secret_on_a_command_line_or_in_an_environment(client):
    with hpclab.gang(client, ranks=1):
        told = []
        for process in psutil.process_iter(["pid"]):
            try:
                if process.environ().get("HPCLAB_TESTS") == os.environ["HPCLAB_TESTS"]:
                    told.append(f"{process.cmdline()} {process.environ()}")
            except psutil.Error:
                continue
        assert len(told) > 3
        assert not [text for text in told if "PRIVATE KEY" in text]


def test_another_user_sees_neither_rendezvous_nor_zygote(client):
    require(shutil.which("setpriv") is not None and os.getuid() == 0, "setpriv, as root")
    with hpclab.gang(client, ranks=2):
        folders = {info["local_directory"] for info in client.scheduler_info()["workers"].values()}
        files = [path for folder in folders for path in Path(folder).iterdir() if "gang" in path.name]
        sockets = list(Path(tempfile.gettempdir(), f"hpclab-{os.getuid()}").iterdir())
        assert files and sockets
        for path in [*files, *sockets]:
            seen = subprocess.run([*NOBODY, "cat", path], capture_output=True, text=True)
            assert seen.returncode != 0 and "Permission denied" in seen.stderr and not seen.stdout


class Authority:
    """One that signs certificates, valid for some days from now, or expired."""

    def __init__(self, folder):
        self.folder = folder
        self.key, self.name, self.made = ec.generate_private_key(ec.SECP256R1()), None, None
        self.file = self.sign("authority")["cert"]

    def sign(self, name, days=1):
        """Files of a certificate and its key; the first is the authority's own."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{self.folder.name} {name}")])
        key = ec.generate_private_key(ec.SECP256R1()) if self.name else self.key
        self.name = self.name or subject
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder(self.name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=key is self.key, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.folder.mkdir(exist_ok=True)
        files = {"cert": self.folder / f"{name}.pem", "key": self.folder / f"{name}.key"}
        files["cert"].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files["key"].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        return files

    def security(self, role="client", **sign):
        """As Dask takes it, for a client by default."""
        files = self.sign("-".join([role, *map(str, sign.values())]), **sign)
        own = {f"tls_{role}_{part}": str(file) for part, file in files.items()}
        return own | {"tls_ca_file": str(self.file)}


def test_certificates_that_do_not_fit_are_told_apart(tmp_path):
    authority, other = Authority(tmp_path / "authority"), Authority(tmp_path / "other")
    own = authority.security()
    everybody = Security(
        require_encryption=True, **own | authority.security("worker") | authority.security("scheduler")
    )
    wrong = {
        "not signed by the scheduler's authority": other.security() | {"tls_ca_file": str(authority.file)},
        "has expired": authority.security(days=-1),
        "not accepted by security.tls_ca_file": own | {"tls_ca_file": str(other.file)},
        "has no certificate of this client": {"tls_ca_file": str(authority.file)},
        "isn't there": own | {"tls_client_cert": str(tmp_path / "missing")},
    }
    with hpclab.connect(workers=1, security=everybody) as client:
        address = client.scheduler.address
        for says, files in wrong.items():
            with pytest.raises(OSError, match=f"the scheduler at {address} doesn't let this client in: .*{says}"):
                hpclab.connect(address, security=Security(require_encryption=True, **files))
        with pytest.raises(OSError, match="its address begins with tls://"):
            hpclab.connect(address.replace("tls", "tcp"), security=False)
        with hpclab.connect(address, security=Security(require_encryption=True, **own)) as joined:
            assert joined.submit(sum, [1, 2]).result() == 3


def test_what_came_of_each_who_knocked(client):
    told = {row["who comes"]: row["what it gets"] for row in security.knock(client)}
    assert re.match(r"refused: (CommClosedError|OSError)", told["a Dask client without TLS"])
    assert re.match(r"refused: .*CERTIFICATE_REQUIRED", told["TLS without a certificate"])
    assert re.match(r"refused: .*UNKNOWN_CA", told["TLS with a certificate of its own making"])
    assert re.match(r"let in: TLSv1\.[23], \w+", told["TLS with ours"])


def test_a_stranger_without_tls_reads_an_environment(monkeypatch):
    monkeypatch.setenv("TEST_TOKEN", "tok-test")
    with hpclab.connect(workers=1, security=False) as plain:
        (pid,) = plain.run(os.getpid).values()
        found = security.stranger(plain.scheduler.address, "TEST_TOKEN")
    assert found == f"ran code in process {pid}, where TEST_TOKEN is 'tok-test'"


def test_a_handshake_in_words(client, tmp_path):
    told = {row["question"]: row["default"] for row in security.handshake(client)}
    assert told["protocol"].startswith("TLSv1.") and "RSA of 2048 bits" in told["the scheduler proves who it is"]
    assert told["who vouches for the certificate"].startswith("nobody: it is self-signed")
    authority = Authority(tmp_path / "authority")
    everybody = authority.security() | authority.security("worker") | authority.security("scheduler")
    with hpclab.connect(workers=1, security=Security(require_encryption=True, **everybody)) as signed:
        told = {row["question"]: row["default"] for row in security.handshake(signed)}
    assert told["who vouches for the certificate"] == "CN=authority authority"


@pytest.mark.alone  # others' bytes count too
def test_costs_are_ratios_of_what_was_done(client):
    with hpclab.connect(workers=1, security=False) as plain:
        rows = security.cost(plain, client, rounds=2, tasks=5)
    assert [row["rounds"] for row in rows] == [2, 2, 2, 3] and all(row["source"] == "measured" for row in rows)
    (sent,) = [row["ratio"] for row in rows if "bytes" in row["measure"]]
    assert 0.9 < sent < 1.1
    told = plots.ratios(rows, "TLS over plain").figure.words()
    assert re.search(r"TLS over plain \(measured\)\. seconds for 5 tiny tasks: [\d.e+-]+ \([\d.e+-]+\)", told)


def test_a_secret_is_found_where_it_is(tmp_path):
    require(sys.platform == "linux", "Linux")
    files = {"usual": tmp_path / "usual", "private": tmp_path / "private"}
    for mode, file in zip((0o644, 0o600), files.values(), strict=True):
        file.write_text("tok-unseen")
        file.chmod(mode)
    with security.program("--token", "tok-unseen") as told, security.program("--file", "x", bare=True) as kept:
        (line,) = security.seen_by_ps("tok-unseen")
        rows = {row["place"]: row for row in security.exposure("tok-unseen", {"told": told, "kept": kept}, files)}
        assert not [name for name in psutil.Process(kept).environ() if name.startswith("HPCLAB")]
    assert re.fullmatch(rf"{told} python\S* \.\.\. --token tok-unseen", line)
    assert not psutil.pid_exists(told) and not psutil.pid_exists(kept)
    assert rows["told: command line"] == {
        "place": "told: command line", "mode": "-r--r--r--", "others can read it": "yes", "secret in it": "yes"
    }  # fmt: skip
    assert [(row["mode"], row["others can read it"], row["secret in it"]) for row in rows.values()][1:] == [
        ("-r--------", "no", "no"),
        ("-r--r--r--", "yes", "no"),
        ("-r--------", "no", "no"),
        ("-rw-r--r--", "yes", "yes"),
        ("-rw-------", "no", "yes"),
    ]


def test_the_stream_is_that_of_rfc_8439_and_new_in_each_step():
    """Test vectors 1 and 5 of its section A.1: zeros for key, counter and nonce, and a nonce that ends in 2."""
    first = security.prg(bytes(32), 0, 4)
    assert first.dtype == np.uint64
    assert first.astype("<u8").tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    other = security.prg(bytes(32), 2 << 88, 4).astype("<u8").tobytes().hex()
    assert other == "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
    steps = np.concatenate([security.prg(bytes(32), step, 1000) for step in range(20)])
    assert len(np.unique(steps)) == 20_000  # no step's stream is another's, shifted


ANOTHER_USER = """
import os, sys
from distributed import Client  # while files of the one who starts this can still be read
from hpclab.course.security import PATIENCE_SECONDS

def act():
    return os.getuid()

with Client(processes=False, dashboard_address="127.0.0.1:0") as warm:  # imports what it takes
    warm.submit(act).result()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
os.chdir("/")
try:
    with Client(sys.argv[1], timeout=PATIENCE_SECONDS) as client:
        print(f"uid {os.getuid()} ran code as uid {client.submit(act, pure=False).result()}")
except Exception as error:
    print(f"refused: {type(error).__name__}")
"""


def test_without_tls_another_user_runs_code_with_it_none(client):
    require(sys.platform == "linux" and os.getuid() == 0, "root")

    def another_user(address):
        command = [sys.executable, "-c", ANOTHER_USER, address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()

    with hpclab.connect(workers=1, security=False) as plain:
        assert another_user(plain.scheduler.address) == "uid 65534 ran code as uid 0"
    assert another_user(client.scheduler.address.replace("tls", "tcp")) == "refused: CommClosedError"


def test_each_cluster_has_a_certificate_of_its_own_in_memory_for_a_year(client):
    with hpclab.connect(workers=1) as other:
        found = [one.security.tls_scheduler_cert for one in (client, other)]
        assert found[0] != found[1]
        assert "in: its certificate is not accepted" in refused(client.scheduler.address, other.security)
    for pem in found:
        made = x509.load_pem_x509_certificate(pem.encode())  # not the name of a file
        assert made.not_valid_after_utc - made.not_valid_before_utc == timedelta(days=365)
    key = client.security.tls_scheduler_key
    folders = [info["local_directory"] for info in client.scheduler_info()["workers"].values()]
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    assert "PRIVATE KEY" in key
    assert not [path for path in files if "PRIVATE KEY" in path.read_text("utf-8", "replace")]


def refused(address, security):
    with pytest.raises(OSError, match="doesn't let this client in") as error:
        hpclab.connect(address, security=security)
    return str(error.value)


def page(address, **data):
    """What a web page says to somebody without any password, and its status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, **data), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


def test_a_dashboard_tells_names_and_lines_to_everybody_and_takes_no_order(client):
    begun = Event("begun", client=client)

    def a_named_task(argument):
        Event("begun").set()
        Event("end").wait(60)  # a line that shows
        raise ValueError("the message of an error")

    future = client.submit(a_named_task, "an argument")
    begun.wait(60)
    base = client.dashboard_link.removesuffix("/status")
    (at,) = [worker for worker, keys in client.processing().items() if keys]
    quoted = urllib.parse.quote(at, safe="")
    pages = {"task": f"/info/task/{future.key}.html", "stack": f"/info/call-stacks/{quoted}.html"}
    told = {name: page(base + path)[1] for name, path in pages.items()}
    Event("end", client=client).set()
    wait(future)
    told["exceptions"] = page(base + "/info/main/exceptions.html")[1]
    told["logs"] = page(f"{base}/info/logs/{quoted}.html")[1]
    assert "a_named_task" in told["task"] and "a line that shows" in told["stack"]
    assert "the message of an error" in told["exceptions"] and "distributed.worker" in told["logs"]
    assert not [name for name, text in told.items() if "an argument" in text]
    assert page(f"{base}/api/v1/retire_workers", data=b'{"workers": []}')[0] == 404  # the page has a button for it
    assert page(f"{base}/info/main/workers.html", data=b"")[0] == 405
    assert page(f"{base}/proxy/22/127.0.0.1/")[0] == 400  # to its workers' pages alone
    assert client.dashboard_link.startswith("http://127.0.0.1:")


def test_the_files_of_a_run_have_the_modes_of_the_umask(client, tmp_path):
    before = os.umask(0o022)
    try:
        hpclab.launch(client, lambda: hpclab.report(loss=1.0), ranks=1, folder=tmp_path / "run").result(60)
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "rows.jsonl").stat().st_mode & 0o777 == 0o644


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    class Gift:
        def __reduce__(self):
            return Path(tmp_path, "it ran").touch, ()

    torch.save({"weights": torch.ones(3), "extra": Gift()}, tmp_path / "crafted.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.load(tmp_path / "crafted.pt")
    assert not Path(tmp_path, "it ran").exists()
    torch.load(tmp_path / "crafted.pt", weights_only=False)
    assert Path(tmp_path, "it ran").exists()


def test_a_folder_that_others_may_enter_is_refused(tmp_path, monkeypatch):
    require(hasattr(os, "getuid"), "modes of files")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"hpclab-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="must belong to this user alone; remove it, or set TMPDIR"):
        host.call_zygote("a cluster")
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="must belong to this user alone"):
        host.call_zygote("a cluster")


def test_where_ranks_meet_is_in_a_folder_that_nobody_else_enters(client):
    with hpclab.gang(client, ranks=2):
        for info in client.scheduler_info()["workers"].values():
            assert Path(info["local_directory"]).stat().st_mode & 0o777 == 0o700
        zygotes = Path(tempfile.gettempdir(), f"hpclab-{os.getuid()}")
        assert zygotes.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def wire():
    """All bytes on loopback, as root sees them."""
    require(sys.platform == "linux" and os.getuid() == 0, "root, on Linux")
    with suppress(PermissionError):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    require("raw" in locals(), "CAP_NET_RAW")
    raw.bind(("lo", 0))
    raw.settimeout(0.2)
    heard, ended = [], threading.Event()

    def listen():
        while not ended.is_set():
            with suppress(TimeoutError):
                heard.append(raw.recv(1 << 17))

    thread = threading.Thread(target=listen)
    thread.start()
    yield heard
    ended.set()
    thread.join()
    raw.close()


@pytest.mark.alone  # others' bytes would crowd out its own
def test_gloo_is_read_on_the_wire_and_dask_is_not(client, wire):
    assert client.submit(lambda: b"over-dask" * 1000).result() == b"over-dask" * 1000
    with hpclab.gang(client, ranks=2) as gang:
        sent = "x = torch.tensor(list(b'over-gloo' * 1000), dtype=torch.uint8)"
        gang.run(f"{sent}; dist.send(x, 1) if rank == 0 else dist.recv(x, 0)")
        listening = [
            connection.laddr
            for pid in ranks_alive()
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        for address in listening:  # it asks a stranger for nothing, and doesn't hang up
            with socket.create_connection(tuple(address), 10) as unasked:
                unasked.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    unasked.recv(1)
        assert listening and gang.run("x = torch.ones(1); dist.all_reduce(x); x.item()") == {0: "2.0", 1: "2.0"}
    heard = b"".join(wire)
    assert b"over-gloo" * 10 in heard and b"over-dask" not in heard


def test_a_kernels_outputs_are_read_at_its_port_and_not_in_a_private_folder(tmp_path):
    import zmq
    from jupyter_client import KernelManager

    def run(**settings):
        manager = KernelManager(**settings)
        manager.start_kernel(env=os.environ | {"PYTHONWARNINGS": ""})
        kernel = manager.client()
        kernel.start_channels()
        kernel.wait_for_ready(60)
        return manager, kernel

    manager, kernel = run(connection_file=str(tmp_path / "tcp.json"))
    context = zmq.Context()
    stranger = context.socket(zmq.SUB)
    stranger.connect(f"tcp://127.0.0.1:{manager.iopub_port}")  # without the key that signs messages
    stranger.subscribe(b"")
    heard = b""
    while b"an output" not in heard:
        kernel.execute("print('an ' + 'output')")
        while stranger.poll(500):
            heard += b"".join(stranger.recv_multipart())
    stranger.close()
    context.term()
    assert (tmp_path / "tcp.json").stat().st_mode & 0o777 == 0o600
    kernel.stop_channels()
    manager.shutdown_kernel(now=True)

    manager, kernel = run(connection_file=str(tmp_path / "ipc.json"), transport="ipc")
    assert sorted(path.name for path in tmp_path.glob("ipc*-ipc-*") if path.is_socket())
    kernel.stop_channels()
    manager.shutdown_kernel(now=True)

"""What a private Slurm's daemons read: its settings, checked, as `slurm.conf`, and the plan of its keeper."""

import math
import os
import re
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hpclab._arguments import seconds, size, whole_number

SCHEDULERS = ("backfill", "builtin")
MOST_NODES = 200
"""More would not fit into the last number of an address."""
MOST_JOBS = 100_000
"""Jobs that the controller holds, the ended ones too; it refuses more."""
MOST_FOLDER = 77
"""Bytes of the folder's path: sockets of job steps lie in it, and a socket's path may have 107."""
REQUEUE_SECONDS = 10
"""How long a requeued job waits at least: Slurm waits until its old credential is no longer valid."""
LOST_SECONDS = 30
"""Silence after which a node counts as down: long, as a busy machine must not look like that."""
KILL_SECONDS = 5
"""How long a job that was cancelled, or has used up its time, may still save something after SIGTERM."""
LISTENING = ("srun", "sattach")
"""Commands that listen while they run."""

HOST = "localhost"
"""Name that the controller and commands go by."""

FOLDER = re.compile(r"[/\w.+@-]+", re.ASCII)
"""A path that Slurm's settings can hold."""
_PARTITION = re.compile(r"[A-Za-z]\w*")


@dataclass
class SlurmSettings:
    """A private Slurm's size and rules; see `hpclab.slurm.start`."""

    nodes: int
    cpus: int
    memory: int | str
    scheduler: str
    walltime: str | None
    partitions: dict[str, dict[str, object]]

    def __post_init__(self):
        for name, most in (("nodes", MOST_NODES), ("cpus", 1024)):
            setattr(self, name, whole_number(name, getattr(self, name), 1, most))
        self.memory = size("memory", self.memory)
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler (={self.scheduler!r}) must be one of {', '.join(SCHEDULERS)}.")
        if self.walltime is not None and seconds(self.walltime) is None:
            raise ValueError(
                f"walltime (={self.walltime!r}) must be text as Slurm reads it: 'MINUTES', 'MM:SS', 'HH:MM:SS',"
                " 'DAYS-HH' or 'DAYS-HH:MM:SS'."
            )
        if not self.partitions:
            raise ValueError(f"partitions (={self.partitions!r}) must name at least one; the first is the default.")
        for name, options in self.partitions.items():
            if not _PARTITION.fullmatch(name):
                raise ValueError(f"partitions (={name!r}) must have names of letters, digits and _.")
            for key, value in options.items():
                if not re.fullmatch(r"\w+", key) or re.search(r"[\s=]", str(value)):
                    raise ValueError(f"partitions[{name!r}] (={key}={value}) must be an option of slurm.conf.")

    def megabytes(self) -> int:
        """Memory of a node as Slurm counts it, in units of 2**20 bytes, and never too little."""
        return math.ceil(size("memory", self.memory) / 2**20)

    def names(self) -> list[str]:
        """Names of the nodes: n1, n2, ..."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def addresses(names: list[str]) -> dict[str, str]:
    """An address of this machine's loopback for each node: 127.0.0.2 for the first, and so on.

    Linux gives all of 127.0.0.0/8 to the loopback; where that isn't so, all share 127.0.0.1.
    """
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
    except OSError:
        return dict.fromkeys(names, "127.0.0.1")
    return {name: f"127.0.0.{number}" for number, name in enumerate(names, 2)}


def controller() -> str:
    """The address at which commands find the controller: 127.0.0.1, as the resolver here lets Slurm write it.

    Slurm asks for addresses that this machine "can use" (AI_ADDRCONFIG). Where only IPv6 goes beyond the loopback,
    those of IPv4 count as none, and 127.0.0.1 must look like one of IPv6.
    """
    try:
        socket.getaddrinfo("127.0.0.1", None, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror:
        return "::ffff:127.0.0.1"
    return "127.0.0.1"


def free_ports(hosts: list[str]) -> list[int]:
    """A port free on each address; all are held until the last is known, so they differ on the same address."""
    with ExitStack() as held:
        return [held.enter_context(socket.create_server((host, 0))).getsockname()[1] for host in hosts]


def write(folder: Path, settings: SlurmSettings, programs: dict[str, str], owner: int | None, keep: bool) -> dict:
    """Write what the daemons read into their folder; returns the plan of their keeper."""
    homes = addresses(settings.names())
    port, *ports = free_ports(["127.0.0.1", *homes.values()])
    for name in ("bin", "state", *homes):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    with open(os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as key:
        key.write(secrets.token_bytes(128))
    _write_names(folder, {HOST: "127.0.0.1"} | homes)
    _write_scripts(folder, programs, homes)
    conf = _conf(folder, settings, programs, homes, port, ports)
    _text(folder / "slurm.conf", conf)
    # With NoInAddrAny they listen where their host's name leads; only the slurmds, which are given names, read this.
    _text(folder / "slurmd.conf", conf.replace("NoCtldInAddrAny", "NoCtldInAddrAny,NoInAddrAny"))
    # Slurm loads its cgroup plugin even where nothing uses it, and that of version 2 fails without root. That of
    # version 1 asks nothing of the system before it is used; newer Slurms do without.
    _text(folder / "cgroup.conf", f"CgroupPlugin={'disabled' if programs['version'] >= '24.05' else 'cgroup/v1'}\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {"SLURM_CONF": f"{folder}/slurm.conf", "TZ": "UTC"}
    plan = {"owner": owner, "keep": keep, "nodes": homes, "port": port, "scontrol": programs["scontrol"], "env": env}
    return plan | {"daemons": _daemons(folder, programs, homes, env)}


def _write_names(folder: Path, hosts: dict[str, str]) -> None:
    """Names that hold for the daemons alone, by nss_wrapper.

    They listen where their host's name leads, and refuse to run in another group than their user's first, as happens
    in containers.
    """
    _text(folder / "hosts", "".join(f"{address} {name}\n" for name, address in hosts.items()))
    _text(folder / "passwd", f"{_user()}:x:{os.getuid()}:{os.getgid()}::/:/bin/sh\n")
    _text(folder / "group", f"{_user()}:x:{os.getgid()}:\n")


def _write_scripts(folder: Path, programs: dict[str, str], homes: dict[str, str]) -> None:
    cases = "\n".join(f'{name}) echo "export HPCLAB_NODE_ADDRESS={address}" ;;' for name, address in homes.items())
    _text(folder / "prolog", _fill("prolog", folder=folder, cases=cases), mode=0o700)
    if not os.access(folder / "prolog", os.X_OK):
        raise PermissionError(f"no program may run in {folder} (noexec); set TMPDIR to another folder.")
    for name in LISTENING:
        script = _fill("listener", folder=folder, wrapper=programs["nss_wrapper"], program=programs[name])
        _text(folder / "bin" / name, script, mode=0o700)


def _daemons(folder: Path, programs: dict[str, str], homes: dict[str, str], env: dict[str, str]) -> dict[str, dict]:
    """Command and environment of each daemon, by its name; a slurmd has that of its node."""
    named = env | {f"NSS_WRAPPER_{what.upper()}": f"{folder}/{what}" for what in ("hosts", "passwd", "group")}
    named["LD_PRELOAD"] = ":".join(filter(None, [programs["nss_wrapper"], env.get("LD_PRELOAD")]))
    files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed", "log")]
    munged = [programs["munged"], "--foreground", "--force", f"--socket={folder}/munge", *files]
    slurmctld = [programs["slurmctld"], "-D", "-f", f"{folder}/slurm.conf"]
    slurmd = [programs["slurmd"], "-D", "-f", f"{folder}/slurmd.conf", "-N"]
    return {
        "munged": {"command": munged, "env": env},  # --force: else its folder would have to be open to others
        "slurmctld": {"command": slurmctld, "env": named | {"NSS_WRAPPER_HOSTNAME": HOST}},
    } | {name: {"command": [*slurmd, name], "env": named | {"NSS_WRAPPER_HOSTNAME": name}} for name in homes}


def _conf(
    folder: Path, settings: SlurmSettings, programs: dict[str, str], homes: dict[str, str], port: int, ports: list[int]
) -> str:
    memory = settings.megabytes()
    text = _fill(
        "slurm.conf",
        folder=folder,
        controller=controller(),
        port=port,
        user=_user(),
        requeue_seconds=REQUEUE_SECONDS,
        true=programs["true"],
        most_jobs=MOST_JOBS,
        scheduler=settings.scheduler,
        memory_per_cpu=max(1, memory // settings.cpus),
        lost_seconds=LOST_SECONDS,
        kill_seconds=KILL_SECONDS,
    )
    for (name, address), node_port in zip(homes.items(), ports, strict=True):
        text += f"NodeName={name} NodeAddr={address} Port={node_port} CPUs={settings.cpus} RealMemory={memory}\n"
    for number, (name, options) in enumerate(settings.partitions.items()):
        standard = {"Nodes": ",".join(homes), "Default": "NO" if number else "YES", "State": "UP"}
        standard |= {"MaxTime": settings.walltime} if settings.walltime else {}
        text += f"PartitionName={name} " + " ".join(f"{k}={v}" for k, v in (standard | options).items()) + "\n"
    return text


def _fill(template: str, **values: object) -> str:
    """The text of a file beside this one, with each @name@ replaced by its value."""
    text = Path(__file__).with_name(f"{template}.in").read_text()
    return re.sub(r"@(\w+)@", lambda name: str(values[name[1]]), text)


def _user() -> str:
    import pwd  # Windows has none

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise RuntimeError(
            f"user id {os.getuid()} has no name on this machine, which Slurm's commands need; whoever set up the"
            " machine can add a line for it to /etc/passwd."
        ) from None


def _text(file: Path, text: str, mode: int = 0o600) -> None:
    file.write_text(text)
    file.chmod(mode)

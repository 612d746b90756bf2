"""Hosts of their own on this machine, made of namespaces, and a Dask cluster on them that a user has started by hand.

Each host has a network, a name, a /tmp and process ids of its own. The kernel's name of its start, by which hpclab
tells machines apart, the model of its CPU and its clock differ as well. Only the folder of the tests is on a disk that
all share.

On every host the default route leads nowhere, and a firewall lets in what docs/cluster.md names, and nothing else.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import psutil
from conftest import require

import hpclab
from hpclab.cluster import ClusterClient, tls

PROGRAMS = ("gcc", "ip", "nft", "nsenter", "unshare")
BEGIN = """set -e
hostname {name}
mount -t tmpfs tmpfs /mnt
{kept}
mount -t tmpfs tmpfs /tmp
{back}
mount --bind {shared}/names /etc/hosts
mount --bind {home}/boot /proc/sys/kernel/random/boot_id
mount --bind {home}/cpu /proc/cpuinfo
ip link set lo up
ip link add eth0 type veth peer name nowhere
ip link set nowhere up
ip address add 192.0.2.{number}/24 dev eth0
ip link set eth0 up
ip route add default via 192.0.2.254
echo {first} {last} >/proc/sys/net/ipv4/ip_local_port_range
nft -f {home}/firewall
echo begun
exec cat
"""
"""Ends with whoever made it, as the pipe that `cat` reads does; and with it all that runs there."""
FIREWALL = """table inet filter {{
  set open {{ type inet_service; flags interval; elements = {{ {ports} }}; }}
  chain input {{
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
    meta l4proto ipv6-icmp accept
    tcp dport @open accept
  }}
}}
"""
SCHEDULER, OF_JOBS, SLURMCTLD = 8786, 8799, 6817
"""Ports that are open on the head: of the scheduler, of one of a cluster of jobs, and of Slurm's controller."""
WORKERS, NANNIES, EPHEMERAL, SLURMD = "40000-40009", "40010-40019", (41000, 41099), 6818
"""Those on the other hosts."""
SLURM = """ClusterName=site
SlurmctldHost=head({net}.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=east NodeAddr={net}.2 CPUs=1 RealMemory=4000
NodeName=west NodeAddr={net}.3 CPUs=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES State=UP
"""
CLOCK = """#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long ahead(void) { return atol(getenv("AHEAD")); }
int clock_gettime(clockid_t which, struct timespec *now) {
  int code = syscall(SYS_clock_gettime, which, now);
  if (code == 0 && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
  return code;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int code = syscall(SYS_gettimeofday, now, zone);
  if (code == 0) now->tv_sec += ahead();
  return code;
}
time_t time(time_t *now) {
  struct timespec found;
  clock_gettime(CLOCK_REALTIME, &found);
  if (now) *now = found.tv_sec;
  return found.tv_sec;
}
"""
"""A clock that is off, for programs that load it. (libfaketime 0.9.10 breaks Python's `time.sleep`.)"""


def needed() -> None:
    """Skip a test where hosts can't be made."""
    require(hasattr(os, "geteuid") and os.geteuid() == 0, "root, to make network namespaces")
    for program in PROGRAMS:
        require(shutil.which(program) is not None, program)


class Host:
    """A host, and what runs on it.

    Parameters
    ----------
    name : str
    number : int
        Last part of its addresses.
    shared : Path
        The folder that all hosts see.
    ports : str
        Those that its firewall opens, as nft has them.
    ahead : int, default 0
        Seconds by which its clock is ahead.
    """

    def __init__(self, name: str, number: int, shared: Path, ports: str, ahead: int = 0):
        self.name, self.number, self.ahead, self.shared = name, number, ahead, shared
        self.jobs: list[subprocess.Popen] = []
        self.home = shared / name
        self.home.mkdir(exist_ok=True)
        (self.home / "boot").write_text(f"boot of {name}\n")
        (self.home / "cpu").write_text(f"model name : CPU of {name}\n")
        (self.home / "firewall").write_text(FIREWALL.format(ports=ports))
        first, last = EPHEMERAL
        # Its own /tmp hides this machine's, where the shared folder lies, and perhaps Python and hpclab.
        seen = {shared, *map(Path, (sys.prefix, sys.base_prefix)), Path(hpclab.__file__).parents[1]}
        outer = [path for path in seen if path.is_relative_to("/tmp") and not seen & {*path.parents}]
        kept = "\n".join(f"mkdir /mnt/{n}; mount --bind '{path}' /mnt/{n}" for n, path in enumerate(outer))
        back = "\n".join(f"mkdir -p '{path}'; mount --move /mnt/{n} '{path}'" for n, path in enumerate(outer))
        own = {"name": name, "number": number, "home": self.home, "shared": shared, "kept": kept, "back": back}
        begin = BEGIN.format(first=first, last=last, **own)
        spaces = ("--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
        with open(self.home / "log", "a") as log:
            self.process = subprocess.Popen(
                ["unshare", *spaces, "sh", "-c", begin],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout.readline() == "begun\n", (self.home / "log").read_text()
        [self.first] = psutil.Process(self.process.pid).children()

    def within(self, *command: str | Path) -> list[str]:
        """A command, to be run on this host."""
        spaces = ("--net", "--mount", "--uts", "--pid")
        return ["nsenter", "--target", str(self.first.pid), *spaces, f"--wd={self.home}", *map(str, command)]

    def run(self, *command: str | Path) -> str:
        """Run a command there, and return what it prints."""
        return subprocess.run(self.within(*command), check=True, capture_output=True, text=True).stdout

    def start(self, *command: str | Path, said: IO | None = None, **env: str) -> None:
        """Start a command there that goes on; what it says is in the file `log`, but what it prints in that given."""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | env
        if self.ahead:
            env |= {"LD_PRELOAD": str(self.shared / "clock.so"), "AHEAD": str(self.ahead)}
        with open(self.home / "log", "a") as log:
            job = subprocess.Popen(
                self.within(*command), env=env, stdin=subprocess.DEVNULL, stdout=said or log, stderr=log
            )
        self.jobs.append(job)

    def plug(self, switch: "Host", *addresses: str, name: str = "ib0") -> None:
        """Plug a cable into the bridge of another host."""
        ends = (switch.first.pid, self.first.pid)
        port = f"port{ends[1]}"  # a host that was killed has its own for a while
        ip("link", "add", port, "netns", ends[0], "type", "veth", "peer", name, "netns", ends[1])
        switch.run("ip", "link", "set", port, "master", "ib0", "up")
        self.address(name, *addresses)

    def address(self, name: str, *addresses: str) -> None:
        """Give an interface its addresses, and take it up."""
        for address in addresses:
            self.run("ip", "address", "add", address, "dev", name, *["nodad"] * (":" in address))
        self.run("ip", "link", "set", name, "up")

    def close_ports(self, *ports: str) -> None:
        """Have the firewall drop what comes for these ports."""
        self.run("nft", "delete", "element", "inet", "filter", "open", "{", ",".join(ports), "}")

    def open_ports(self, *ports: str) -> None:
        """Let it through again."""
        self.run("nft", "add", "element", "inet", "filter", "open", "{", ",".join(ports), "}")

    def kill(self) -> None:
        """Kill all that runs there, at once, as when it loses its power."""
        self.first.kill()
        self.process.communicate()
        for job in self.jobs:
            job.wait()


class Lan:
    """A head with a scheduler, two hosts with a worker each, and this machine with the client, on one network."""

    def __init__(self, shared: Path, ahead: tuple[int, int, int] = (30, 0, -60)):
        self.shared, self.net = shared, f"10.77.{os.getpid() % 250}"
        (shared / "clock.c").write_text(CLOCK)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", shared / "clock.so", shared / "clock.c"], check=True)
        numbers = {"head": 1, "east": 2, "west": 3}
        names = "".join(f"{self.net}.{number} {name}\n" for name, number in numbers.items())
        (shared / "names").write_text(f"127.0.0.1 localhost\n{names}")
        self.security = tls.temporary()
        self.ahead = dict(zip(("head", "east", "west"), ahead, strict=True))
        self.hosts: dict[str, Host] = {}
        self.head = Host("head", 1, shared, f"{SCHEDULER},{OF_JOBS},{SLURMCTLD}", self.ahead["head"])
        self.head.run("ip", "link", "add", "ib0", "type", "bridge")
        self.head.address("ib0", f"{self.net}.1/24", "fd77::1/64")
        here = f"hpclab{os.getpid()}"
        ip("link", "add", here, "type", "veth", "peer", "client", "netns", self.head.first.pid)
        self.head.run("ip", "link", "set", "client", "master", "ib0", "up")
        ip("address", "add", f"{self.net}.9/24", "dev", here)
        ip("link", "set", here, "up")
        self.where = f"tls://{self.net}.1:{SCHEDULER}"

    def dask(self, host: Host, program: str, *options: str, **env: str) -> None:
        """Start a scheduler or a worker, as a user would."""
        role = program.removeprefix("dask_")
        files = self.security.get_tls_config_for_role(role)
        for key, option in {"ca_file": "ca-file", "cert": "cert", "key": "key"}.items():
            path = host.home / f"{role}-{key}.pem"
            path.touch(mode=0o600)
            path.write_text(files[key])
            options += (f"--tls-{option}", str(path))
        # A host that falls silent is missed after 12 s, the least that Dask takes; by default after 30 s.
        env = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s", **env}
        host.start(sys.executable, "-m", f"distributed.cli.{program}", "--no-dashboard", *options, **env)

    def schedule(self) -> None:
        """Start the scheduler."""
        options = ("--host", f"{self.net}.1", "--port", str(SCHEDULER), "--protocol", "tls")
        self.dask(self.head, "dask_scheduler", *options)

    def join(self, name: str, number: int) -> Host:
        """Have a host, new or anew, with a worker."""
        ports = f"{WORKERS},{NANNIES},{EPHEMERAL[0]}-{EPHEMERAL[1]},{SLURMD}"
        host = self.hosts[name] = Host(name, number, self.shared, ports, self.ahead[name])
        host.plug(self.head, f"{self.net}.{number}/24", f"fd77::{number}/64")
        self.work(host)
        return host

    def work(self, host: Host, **env: str) -> None:
        """Start a host's worker."""
        ports = ("--worker-port", WORKERS.replace("-", ":"), "--nanny-port", NANNIES.replace("-", ":"))
        size = ("--nthreads", "1", "--memory-limit", "2GB", "--name", host.name)
        self.dask(host, "dask_worker", self.where, *ports, *size, **env)

    def client(self) -> ClusterClient:
        """A client on this machine."""
        return hpclab.connect(self.where, security=self.security)

    def slurm(self) -> Path:
        """Start a site's Slurm, with its controller on the head; its settings."""
        folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=self.shared))
        for name in ("state", "east", "west"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        settings = folder / "slurm.conf"
        settings.write_text(SLURM.format(net=self.net, folder=folder))
        for host in (self.head, *self.hosts.values()):
            files = [f"--{what}-file={host.home}/munge.{what}" for what in ("pid", "seed", "log")]
            key = f"--key-file={folder}/munge.key"
            host.start("munged", "--foreground", "--force", "--socket=/tmp/munge", key, *files)
            host.run("sh", "-c", "until [ -S /tmp/munge ]; do sleep 0.1; done")
            program = ("slurmctld",) if host is self.head else ("slurmd", "-N", host.name)
            host.start(*program, "-D", "-f", settings)
        return settings

    def close(self) -> None:
        """Kill all."""
        for host in (*self.hosts.values(), self.head):
            host.kill()


def ip(*words: object) -> None:
    """Run `ip` on this machine."""
    subprocess.run(["ip", *map(str, words)], check=True)

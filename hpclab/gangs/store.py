"""Rank: its side of a rendezvous over several hosts, a store of torch's kind, kept by the scheduler.

A rank asks its worker, and that the scheduler; see `scheduler.Ledger.rendezvous`.
"""

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import torch.distributed as dist

from hpclab import machine
from hpclab.gangs import wire

REACH_SECONDS = 5.0
"""How long another host may take to answer."""
PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Ports of this host that programs get which ask for any; for IPv6 too."""


class GangStore(dist.Store):
    """Keys and values that all ranks of a gang share; see ``torch.distributed.Store``.

    It waits for as long as it takes: a gang that hangs is found by its progress.

    Parameters
    ----------
    ask : callable
        Puts a question to the scheduler, and returns the answer.
    """

    def __init__(self, ask: Callable[[wire.Ask], wire.Answer]):
        super().__init__()
        self.set_timeout(timedelta(days=1))
        self.ask = ask

    def _ask(self, do: wire.Do, *keys: str, value: str | bytes = b"", expected: str = "") -> wire.Answer:
        body = value.encode() if isinstance(value, str) else bytes(value)
        answer = self.ask(wire.Ask(do=do, keys=list(keys), expected=expected, body=body))
        if answer.error:
            raise dist.DistStoreError(f"the scheduler doesn't answer this rank: {answer.error}")
        return answer

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        self._ask(wire.Do.SET, key, value=value)

    def get(self, key: str) -> bytes:
        """The value of a key, once it is there."""
        return self._ask(wire.Do.WAIT, key).body

    def add(self, key: str, number: int) -> int:
        """Add to a key, which is 0 if it isn't there, and return the sum."""
        return int(self._ask(wire.Do.ADD, key, value=b"%d" % number).body)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return self._ask(wire.Do.CHECK, *keys).result

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there."""
        self._ask(wire.Do.WAIT, *keys)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a key if its value is the expected one, or "" and it isn't there; return its value then."""
        text = expected if isinstance(expected, str) else bytes(expected).decode("latin-1")
        return self._ask(wire.Do.COMPARE_SET, key, value=desired, expected=text).body

    def delete_key(self, key: str) -> bool:
        """Remove a key; whether it was there."""
        return self._ask(wire.Do.DELETE, key).result

    def num_keys(self) -> int:
        """How many keys there are."""
        return self._ask(wire.Do.COUNT).result


def listen(host: str) -> socket.socket:
    """Listen at a free port of this host's address."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def check_ways(store: dist.Store, host: str, rank: int) -> None:
    """Raise an error if this host can't connect to another one of the gang; called by the first rank of each host.

    Where a firewall drops what gloo sends, that (torch 2.13) waits for half an hour, without a word. Of two hosts the
    one with the higher address connects, as there.

    Raises
    ------
    ConnectionError
        It names both hosts, the port, and which ones must be open.
    """
    node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    ways = dist.PrefixStore("ways", store)
    with listen(host) as listener:
        here = {"rank": rank, "node": machine.node(), "host": host, "port": listener.getsockname()[1]}
        here["ports"] = "-".join(PORTS.read_text().split()) if PORTS.exists() else "any"
        ways.set(str(node), json.dumps(here))
        for other in range(nodes):
            there = json.loads(ways.get(str(other)))
            if ip_address(host).packed > ip_address(there["host"]).packed:
                _reach(here, there)
        ways.set(f"tried-{node}", "")
        ways.wait([f"tried-{other}" for other in range(nodes)])  # until then this one listens


def _reach(here: dict, there: dict) -> None:
    try:
        socket.create_connection((there["host"], there["port"]), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"rank {here['rank']} on {here['node']} can't reach rank {there['rank']} on {there['node']} at"
            f" {there['host']}, port {there['port']}: {error}. Ranks listen on any port that a host gives programs (on"
            f" {there['node']}: {there['ports']}); a firewall between the hosts must let these through."
        ) from None

"""The scheduler's side of a rendezvous: how the ranks of a gang over several hosts find each other.

It goes over Dask's own connections, and so is encrypted and authenticated as they are. (torch's TCPStore is neither:
whoever reaches its port reads and writes.) The rank's side is `store`.
"""

import asyncio


class Keys:
    """What the ranks of one attempt tell each other to meet: keys and values, which others wait for."""

    def __init__(self, attempt: int):
        self.attempt = attempt
        self.values: dict[str, bytes] = {}
        self.changed = asyncio.Event()
        self.closed = False

    def close(self) -> None:
        """Have those who wait give up."""
        self.closed = True
        self.changed.set()

    async def answer(self, question: dict, value: bytes) -> dict:
        """Do what a rank asks, as `store.GangStore` has it; ``found`` and ``value`` are the answer."""
        keys = question["keys"]
        key = next(iter(keys), "")
        match question["do"]:
            case "set":
                self._set(key, value)
            case "add":
                self._set(key, b"%d" % (int(self.values.get(key, b"0")) + int(value)))
            case "compare_set":
                expected = question["expected"].encode("latin-1")
                if self.values.get(key, b"") == expected:
                    self._set(key, value)
                return {"value": self.values.get(key, expected)}
            case "delete":
                return {"found": self.values.pop(key, None) is not None}
            case "check":
                return {"found": self.values.keys() >= set(keys)}
            case "count":
                return {"found": len(self.values)}
            case "get" | "wait":
                while not self.values.keys() >= set(keys):
                    await self.changed.wait()
                    if self.closed:
                        raise LookupError("the attempt has ended")
        return {"value": self.values.get(key, b"")}

    def _set(self, key: str, value: bytes) -> None:
        self.values[key] = value
        self.changed.set()
        self.changed = asyncio.Event()

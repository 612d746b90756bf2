"""Make data/kjv: the King James Bible, one verse a line; the first 90 % to train on, the last 10 % to test.

python data/make_kjv.py [folder]      (uses the program of Debian's bible-kjv)
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from hpclab import data

SHA256 = "b5c4940bcfeee072c0935b5200d0f9d88a00a0199cb0961d16133458fcdfae5d"
FACTS = {
    "licence": "public domain (1611)",
    "source": "King James Version of the Bible, from Debian's bible-kjv-text 4.38",
}


def text() -> str:
    """All verses, each on a line of its own, without the references before them."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    raw = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "".join(line.split(" ", 1)[1] + "\n" for line in raw.splitlines())


def main(folder: Path) -> None:
    whole = text()
    if hashlib.sha256(whole.encode()).hexdigest() != SHA256:
        raise ValueError("the bible program prints another text than the one that we know.")
    end = len(whole) * 9 // 10
    splits = {"train": whole[:end], "test": whole[end:]}
    data.write(folder, splits, name="kjv", kind="text", window=128, **FACTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "kjv")

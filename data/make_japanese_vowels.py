"""Make data/japanese_vowels: all 270 training and 370 test utterances, as the aeon toolkit ships them.

python -m pip download --no-deps aeon
python data/make_japanese_vowels.py aeon-*.whl [folder]
"""

import hashlib
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from hpclab import data

SHA256 = {
    "train": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "test": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}
FACTS = {
    "licence": "CC BY 4.0",
    "source": "Japanese Vowels, UCI Machine Learning Repository: Kudo, Toyama, Shimbo (1999), doi:10.24432/C5NS47",
}


def parse(text: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Utterances, each of shape (T, 12), and the numbers of their speakers, from 0."""
    lines = text.split("@data\n")[1].splitlines()
    rows = [line.split(":") for line in lines]
    series = [np.array([channel.split(",") for channel in channels], float).T for *channels, _ in rows]
    return series, np.array([int(speaker) - 1 for *_, speaker in rows])


def main(wheel: Path, folder: Path) -> None:
    splits = {}
    for split, sha256 in SHA256.items():
        raw = ZipFile(wheel).read(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{split.upper()}.ts")
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise ValueError(f"{wheel} holds another {split} split than the one that we know.")
        splits[split] = parse(raw.decode().replace("\r\n", "\n"))
    names = [f"speaker {number}" for number in range(1, 10)]
    data.write(folder, splits, name="japanese_vowels", classes=names, kind="series", **FACTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "japanese_vowels")

"""Whether freed memory is kept, seen in what the system counts: pages that a process had to be given anew."""

import subprocess
import sys

import pytest

from hpclab.course import malloc

FAULTS = """
import resource, sys
from hpclab.course import malloc
import numpy as np

def faults(kept):
    malloc.keep(kept)
    for turn in range(2):  # the first turn maps what the second may use again
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(80):
            np.ones(2**17)  # 1 MB, 256 pages: too small for huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(False), faults(True), faults(False))
"""


@pytest.mark.skipif(malloc.missing(), reason="another C library than glibc")
def test_kept_memory_needs_no_new_pages_and_the_switch_turns_back():
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept, after = map(int, ran.stdout.split())
    assert before > 10_000 < after
    assert kept < 2_000

"""A process that keeps freed memory asks the system for it once."""

import platform
import subprocess
import sys

import pytest

FREED = """
import resource, sys, torch
from dd_core.memory import keep_freed

if sys.argv[1] == "keeps":
    keep_freed()
before = 0
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**22) for _ in range(4)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to bring in ten turns, each of which takes and frees 64 MiB."""
    done = subprocess.run([sys.executable, "-c", FREED, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_memory_that_was_freed_is_handed_out_again() -> None:
    assert faults("keeps") < 100 < faults("gives back")

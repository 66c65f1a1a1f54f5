"""Peak memory of a stretch of work, and memory that a process keeps.

Every test asks a process of its own, for one that kept memory goes on keeping it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts")

PEAK = """
import torch
from accelkit.calibration import memory
cpu, size = torch.device("cpu"), 1 << 27
memory.restart(cpu)
before = memory.peak(cpu)
held = torch.ones(size, dtype=torch.uint8)
del held
risen = memory.peak(cpu)
memory.restart(cpu)
print((risen - before) / size, (risen - memory.peak(cpu)) / size)
"""
PAGES = """
import resource, sys, torch
from accelkit.calibration import memory
if sys.argv[1] == "keep":
    memory.keep()
def fresh():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(10_000_000) for _ in range(2)]  # more than glibc ever keeps
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(9):
    fresh()  # finds its places by and by
print(min(fresh() for _ in range(3)))
"""


def said(code: str, *arguments: str) -> list[float]:
    run = [sys.executable, "-c", code, *arguments]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return [float(word) for word in text.split()]


def test_a_peak_is_seen_and_forgotten() -> None:
    risen, fallen = said(PEAK)
    assert risen >= 0.9
    assert fallen >= 0.5


def test_kept_memory_is_not_cleared_again() -> None:
    (kept,), (left,) = said(PAGES, "keep"), said(PAGES, "leave")
    assert kept < 100
    assert left > 5_000

"""Peak memory of a stretch of work."""

from __future__ import annotations

import sys

import pytest
import torch

from accelkit.calibration import memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts")
def test_a_peak_is_seen_and_forgotten() -> None:
    size = 1 << 27
    memory.restart(CPU)
    before = memory.peak(CPU)
    held = torch.ones(size, dtype=torch.uint8)
    del held
    assert before is not None
    risen = memory.peak(CPU)
    assert risen is not None and risen >= before + 0.9 * size
    memory.restart(CPU)
    after = memory.peak(CPU)
    assert after is not None and after <= risen - 0.5 * size

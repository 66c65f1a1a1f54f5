"""FreeSwim's inward window against its own formula."""

import planted
import torch

from accelkit.patches.methods.free_swim import FreeSwim
from accelkit.patches.parts import grids


def test_window_is_the_formula():
    """y − d − d_u ≤ y' ≤ y + d + d_b with d_b = max(d − y, 0), d_u = max(d + y − H + 1, 0)."""
    rows, base = 45, 30
    d = base // 2
    found = grids.neighbourhood(rows, base // 2 * 2 + 1)
    for y in range(rows):
        below, above = max(d - y, 0), max(d + y - rows + 1, 0)
        allowed = [y - d - above <= z <= y + d + below for z in range(rows)]
        assert found[y].tolist() == allowed


def test_at_the_training_size_there_is_nothing_to_leave_out():
    q, k, v = planted.noise(3 * 12 * 10)
    call = planted.video_call(q, k, v, (3, 12, 10))
    assert planted.ask(FreeSwim(base=(12, 10)), call) is None
    assert planted.ask(FreeSwim(base=(6, 10), block=16), call) is not None


def test_every_token_reads_its_box():
    """All frames, and of the box of the base size what whole blocks leave."""
    q, k, v = planted.noise(2 * 9 * 14)
    call = planted.video_call(q, k, v, (2, 9, 14))
    seen = planted.select(FreeSwim(base=(4, 6), block=16), call).seen[0, 0]
    at = torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(14))
    box = grids.neighbourhood(9, 5)[at[:, 1]][:, at[:, 1]]
    box &= grids.neighbourhood(14, 7)[at[:, 2]][:, at[:, 2]]
    assert (seen & box).sum() > 0.9 * box.sum()
    assert seen.float().mean() < 0.9

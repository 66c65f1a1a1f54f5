"""FreeSwim's inward window against its own formula."""

import planted
import pytest
import torch

from accelkit.patches.methods.free_swim import FreeSwim
from accelkit.patches.parts import grids
from accelkit.patches.sites import attention


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


@pytest.mark.parametrize("windowed", [True, False])
def test_logits_are_sharpened(windowed: bool):
    """L₀ = 4 · 6 tokens: √(ln 48 / ln 24) = √(3.871201 / 3.178054) = 1.103672."""
    q, k, v = planted.noise(2 * 9 * 14)
    call = planted.video_call(q, k, v, (2, 9, 14))
    method = FreeSwim(base=(4, 6), block=16, windowed=windowed)
    logits = 1.103672 * call.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if windowed:
        logits = logits.masked_fill(~planted.select(method, call).seen, -torch.inf)
    expected = logits.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    found = attention.compute(planted.ask(method, call)).out
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_sharpness_of_wan():
    """Of a frame of 480 × 832, L₀ = 30 · 52: √(ln 3120 / ln 1560) = 1.046076."""
    q, k, v = planted.noise(31 * 52)
    call = planted.video_call(q, k, v, (1, 31, 52))
    assert FreeSwim().execution(call).sharpen == pytest.approx(1.046076, abs=1e-6)
    assert FreeSwim(entropy=False).execution(call) is None

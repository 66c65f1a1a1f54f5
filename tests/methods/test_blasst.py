"""BLASST by hand: visiting order, the skip rule against the kernels' reference, λ, and the fit."""

from dataclasses import replace
from math import exp, log

import hand
import planted
import pytest
import torch

from accelkit.patches.call import Site
from accelkit.patches.methods.blasst import BLASST, TARGETS
from accelkit.patches.parts import visiting
from accelkit.patches.sites.attention import compute

STEPS = {range(16): 5.0, range(32, 48): 6.0, range(48, 64): 4.0}
"""Logits of blocks 0 … 3: 5, 0, 6, 4."""


def small(threshold: float) -> BLASST:
    """Skips more than `threshold` nats under the maximum, at 64 keys."""
    return BLASST(scale_factor=64 * exp(-threshold), block=16, min_tokens=0)


def test_first_block_then_newest_first():
    call = hand.call_with(64, {})
    assert hand.lists(small(2), call) == [[0], [0, 1], [0, 2, 1], [0, 3, 2, 1]]


def test_gaps():
    """Tile 3 visits 5, 4, 6, 0: first, one under, one over, six under."""
    call = hand.call_with(64, STEPS)
    gaps = visiting.peak_gaps(call, small(2).index(call), [3])
    torch.testing.assert_close(gaps[0, 0, 0], torch.tensor([float("inf"), -1.0, 1.0, -6.0]))


def test_skips_what_lies_two_nats_under():
    """In tile 3 block 1 alone is dropped: its rows are softmax over the other three."""
    call = hand.call_with(64, STEPS)
    out = compute(planted.ask(small(2), call)).out[:, :, 63]
    p = planted.probabilities(call)[:, :, 63]
    p[..., 16:32] = 0.0
    p /= p.sum(-1, keepdim=True)
    torch.testing.assert_close(out, p @ call.v[0, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 1.5, 3.0])
def test_counting_agrees_with_the_reference(threshold: float):
    """What calibration counts is what the kernels' reference drops, on noise with padding."""
    q, k, v = planted.noise(200, batch=2)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[1, :37] = False
    call = planted.make_call(8 * q, k, v, key_mask=mask)
    method = BLASST(scale_factor=200 * exp(-threshold), block=16, min_tokens=0)
    seen = planted.select(method, call).seen
    p = planted.probabilities(call) * seen
    p /= p.sum(-1, keepdim=True).clamp(min=1e-30)
    expected = p @ call.v[:, call.kv_of_head]
    torch.testing.assert_close(compute(planted.ask(method, call)).out, expected)
    assert 0 < float(seen.sum()) < float(planted.visible_pairs(call).expand_as(seen).sum())


def test_threshold_shrinks_with_length():
    method = BLASST(scale_factor=512.0)
    assert method.execution(hand.call_with(1024, {})).skip == 0.5
    assert method.execution(hand.call_with(2048, {})).skip == 0.25


def test_threshold_never_drops_a_new_maximum():
    assert BLASST(scale_factor=1e6).execution(hand.call_with(1024, {})).skip == 1.0


def test_fit_finds_the_law():
    """Points on scale_factor = 19 · exp(7 S); those beyond 90 % lie elsewhere and do not count."""
    watcher = BLASST().calibrator(Site("a", 0))
    watcher.points = [(s / 10, 19 * exp(7 * s / 10)) for s in range(1, 10)] + [(0.99, 1.0)]
    found = [method.scale_factor for method in watcher.settings()]
    assert found == pytest.approx([19 * exp(7 * target) for target in TARGETS])


def test_calibrator_reaches_its_targets():
    """After one dense call, the setting for 50 % skips about half of the visits."""
    call = planted.planted(2048)
    method = BLASST(block=64)
    watcher = method.calibrator(Site("a", 0))
    watcher.see(call, call.v, call.v)
    half = watcher.settings()[TARGETS.index(0.5)]
    gaps = visiting.peak_gaps(call, half.index(call), range(32))
    visits = gaps == gaps
    share = float((gaps < log(half.execution(call).skip)).sum() / visits.sum())
    assert 0.3 < share < 0.7


def test_per_head_thresholds():
    call = replace(hand.call_with(64, STEPS), tables={"factor": torch.tensor([0.0, 64.0])})
    execution = small(1).model_copy(update={"scale_factor": "factor"}).execution(call)
    assert execution.skip.tolist() == [0.0, 1.0]

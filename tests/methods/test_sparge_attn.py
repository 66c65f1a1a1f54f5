"""SpargeAttn by hand: regular blocks are predicted, irregular ones are computed."""

from dataclasses import replace

import hand
import pytest
import torch

from accelkit.patches.call import Site
from accelkit.patches.methods.sparge_attn import SpargeAttn


def small(**fields: float) -> SpargeAttn:
    return SpargeAttn(**{"coverage": 0.9, "query_block": 16, "key_block": 16, **fields})


def spread(call):
    """Each block of keys points its own way, and block 3 has no way at all: signs alternate."""
    for block in range(6):
        call.k[:, :, 16 * block : 16 * block + 16, 2 + block] = 30.0
    call.k[:, :, 48:64, 5] *= torch.tensor([1.0, -1.0]).repeat(8)
    return call


def test_lists():
    """Block 2 holds the mass; block 3 is irregular and always in, as are sink and diagonal."""
    call = spread(hand.call_with(96, {range(32, 48): 30.0}))
    assert hand.lists(small(), call) == [
        [0],
        [0, 1],
        [0, 2],
        [0, 2, 3],
        [0, 2, 3, 4],
        [0, 2, 3, 5],
    ]


@pytest.mark.parametrize("guard", [-0.1, 0.0])
def test_no_block_is_irregular_below_zero(guard: float):
    """The mean of all cosines is never negative: block 3, which has no way, is just another one."""
    call = spread(hand.call_with(96, {range(32, 48): 30.0}))
    call.k[:, :, 48:64, 2] += 1e-3
    assert hand.lists(small(similarity=guard), call)[5] == [0, 2, 5]


def test_irregular_query_blocks_read_everything():
    call = spread(hand.call_with(96, {range(32, 48): 30.0}))
    call.q[:, :, 64:80, 1] = 30 * torch.tensor([1.0, -1.0]).repeat(8)
    found = hand.lists(small(), call)
    assert found[4] == [0, 1, 2, 3, 4]
    assert found[5] == [0, 2, 3, 5]


def test_a_strong_irregular_block_takes_no_share():
    """It would hold all of the predicted mass and hide block 2."""
    call = spread(hand.call_with(96, {range(32, 48): 30.0, range(48, 64): 60.0}))
    call.k[:, :, 48:64, 5] *= 20
    assert hand.lists(small(), call)[5] == [0, 2, 3, 5]


@pytest.mark.parametrize(("log2", "factor"), [(3.0, 0.125), (50.0, 2.0**-50)])
def test_skip_is_in_powers_of_two(log2: float, factor: float):
    execution = small(skip_log2=log2).execution(hand.call_with(96, {}))
    assert execution is not None
    assert execution.skip == factor


def test_no_skip_by_default():
    assert SpargeAttn().execution(hand.call_with(4096, {})) is None


def test_calibration_tries_both_guards_and_taller_tiles():
    settings = SpargeAttn().calibrator(Site("a", 0)).settings()
    kinds = {(m.similarity, m.query_block) for m in settings}
    assert kinds == {(-0.1, 128), (0.6, 128), (-0.1, 256), (-0.1, 1024)}
    assert {m.coverage for m in settings} == set(SpargeAttn.dial.values)


def test_tall_tiles_are_for_causal_calls():
    call = hand.call_with(96, {})
    watching = SpargeAttn().calibrator(Site("a", 0))
    watching.see(replace(call, causal=False), None, None)
    assert {m.query_block for m in watching.settings()} == {128}

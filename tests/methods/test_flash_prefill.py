"""FlashPrefill by hand: one row is heard, and `alpha` is a ratio of the row's best."""

import hand
import pytest
import torch

from accelkit.patches.methods.flash_prefill import FlashPrefill


def small(**fields: float) -> FlashPrefill:
    sizes = {"sink_blocks": 1, "local_blocks": 1, "dense_tiles": 0, "block": 16}
    return FlashPrefill(**{**sizes, **fields})


def test_a_single_row_is_heard():
    """Only row 85 reads block 1, 30 nats; its tile's other rows are indifferent, a mean of them
    would say 2 nats. Tile 4 is indifferent throughout and keeps all.
    """
    call = hand.call_with(96, {range(16, 32): 30.0})
    call.q[:, :, :85] = call.q[:, :, 86:] = 0.0
    found = hand.lists(small(), call)
    assert found[5] == [0, 1, 5]
    assert found[4] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("alpha", "kept"), [(0.3, [0, 1, 2, 5]), (0.4, [0, 1, 5])])
def test_ratio_of_max(alpha: float, kept: list[int]):
    """Block 1 has 10 nats and block 2 has 9: e⁻¹ = 0.37 of the best."""
    call = hand.call_with(96, {range(16, 32): 10.0, range(32, 48): 9.0})
    assert hand.lists(small(alpha=alpha), call)[5] == kept


def test_last_tiles_are_dense():
    call = hand.call_with(96, {range(16, 32): 30.0})
    found = hand.lists(small(dense_tiles=1), call)
    assert found[5] == [0, 1, 2, 3, 4, 5]
    assert found[4] == [0, 1, 4]


def test_a_chunk_decides_like_the_whole():
    import planted

    q, k, v = planted.noise(512, seed=3)
    method = small(alpha=0.6)
    whole = planted.select(method, planted.make_call(q * 4, k, v))
    chunk = planted.select(method, planted.make_call(q[:, :, 256:] * 4, k, v, q_start=256))
    assert torch.equal(chunk.seen, whole.seen[:, :, 256:])

"""AnchorAttention by hand: superblocks of two tiles of 16, and ranges that neither overlap nor
leave a key out.
"""

import hand
import planted
import pytest
import torch

from accelkit.patches.methods.anchor_attention import AnchorAttention

SMALL = AnchorAttention(theta_nats=3.0, block=16, superblock_tiles=2)


def test_pieces():
    """The anchor is key 5 with 12 nats, so 9 is enough for a stripe: key 20, key 63, not key 40.
    Key 5 itself lies in the first block; 63 is the last key before the third superblock.
    """
    call = hand.call_with(96, {5: 12.0, 20: 10.0, 40: 8.0, 63: 10.0})
    near, stripes = hand.pieces(SMALL, call)
    assert hand.rows(near) == [[0], [0, 1], [0, 2], [0, 2, 3], [0, 4], [0, 4, 5]]
    assert hand.rows(stripes) == [[], [20], [20, 63]]
    assert (near.size, stripes.size) == ((16, 16), (32, 1))


def test_one_tile_of_a_superblock_is_enough():
    """Key 20 matters to the rows of tile 5 only; the whole superblock reads it."""
    call = hand.call_with(96, {5: 12.0, 20: 10.0})
    call.k[:, :, 20, 0], call.k[:, :, 20, 1] = 0.0, 40.0
    call.q[:, :, 80:, 1] = 1.0
    _, stripes = hand.pieces(SMALL, call)
    assert hand.rows(stripes)[2] == [20]


@pytest.mark.parametrize("n", [4096, 4224, 4100])
def test_every_key_is_offered_once(n: int):
    """With an endless threshold the pieces tile the causal triangle, for whole and ragged lengths
    (released code counted keys 128 … 2047 twice and never offered the last 128).
    """
    q, k, v = planted.noise(n, width=16)
    call = planted.make_call(q[:, :2], k[:, :1], v[:, :1])
    found = planted.select(AnchorAttention(theta_nats=1e9), call, slice(0, None, 61))
    assert torch.equal(found.pairs * found.visible, found.visible.expand_as(found.pairs).int())


def test_a_chunk_inside_a_superblock_stays_dense():
    q, k, v = planted.noise(96)
    assert SMALL.index(planted.make_call(q[:, :, 40:], k, v, q_start=40)) is None
    assert SMALL.index(planted.make_call(q[:, :, 64:], k, v, q_start=64)) is not None

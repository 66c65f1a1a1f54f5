"""PBS-Attn by hand: blocks of 16, segments of 32; three important keys in segment 1."""

import hand
import planted
import torch

from accelkit.patches.methods.pbs_attn import PBSAttn
from accelkit.patches.sites.attention import compute

SMALL = PBSAttn(segment_tokens=32, block=16)
IMPORTANT = {40: 160.0, 50: 150.0, 63: 140.0}


def test_order():
    """Important keys lead their segment, the others keep their order; no key leaves its segment."""
    order = SMALL.order(hand.call_with(128, IMPORTANT))
    keys = order.k_table[order.row[0, 0]]
    assert keys[32:36].tolist() == [40, 50, 63, 32]
    assert torch.equal(keys.view(4, 32).sort(-1).values.flatten(), torch.arange(128).int())


def test_lists():
    """All three land in block 2, so block 3 is not needed after segment 1. Tile 2 reads it, since
    keys 45 … 47 moved there, and blocks 0 and 1, which are equal to it.
    """
    assert hand.lists(SMALL, hand.call_with(128, IMPORTANT)) == [
        [0],
        [0, 1],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 2, 4],
        [0, 2, 4, 5],
        [0, 2, 6],
        [0, 2, 6, 7],
    ]


def test_order_undoes_itself():
    """Permuted keys with everything selected are plain causal attention, also in the own segment
    and in an incomplete last one.
    """
    q, k, v = planted.noise(117)
    call = planted.make_call(3 * q, k, v)
    method = SMALL.model_copy(update={"coverage": 1.0})
    torch.testing.assert_close(compute(planted.ask(method, call)).out, planted.dense(call))


def test_the_tail_decides_causally():
    """The last rows do not look into their own future when they vote: of two equal keys near the
    end the earlier one is seen by more rows and comes first.
    """
    keys = SMALL.order(hand.call_with(128, {125: 9.0, 114: 9.0})).k_table[0]
    assert keys[96:98].tolist() == [114, 125]

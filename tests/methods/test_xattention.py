"""XAttention by hand, and the line that a mean cannot see."""

import hand
import planted
import torch

from accelkit import kernels
from accelkit.patches.methods.xattention import XAttention


def test_lists():
    """Block 2 holds everything; block 0 (a key column, not a query row) and the diagonal join."""
    call = hand.call_with(96, {range(32, 48): 30.0})
    assert hand.lists(XAttention(block=16, stride=4), call)[2:] == [
        [0, 2],
        [0, 2, 3],
        [0, 2, 4],
        [0, 2, 5],
    ]


def test_antidiagonals_see_what_means_lose():
    """Signs alternate along the queries and along block 2, so both means are zero; in cells of two,
    the antidiagonal joins q[1] with k[0] and q[0] with k[1], which agree.
    """
    q, k = torch.zeros(1, 2, 96, 16), torch.zeros(1, 1, 96, 16)
    q[..., 0] = torch.tensor([1.0, -1.0]).repeat(48)
    k[..., 32:48, 0] = torch.tensor([-120.0, 120.0]).repeat(8)
    call = planted.make_call(q, k, k)
    assert (kernels.scores.pooled(call, (16, 16))[0, 0, 5] == 0).all()
    assert hand.lists(XAttention(block=16, stride=2), call)[5] == [0, 2, 5]


def test_blocks_of_rounded_cells():
    """Rounding to int8 moves hardly a block, though every key lies far from zero."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 512, 32), torch.randn(1, 1, 512, 32) + 90.0
    call = planted.make_call(q * 2, k, k)
    lists = [
        {(i, j) for i, row in enumerate(hand.lists(method, call)) for j in row}
        for method in (
            XAttention(block=16, coverage=0.7),
            XAttention(block=16, coverage=0.7, qk="int8"),
        )
    ]
    assert len(lists[0] ^ lists[1]) <= 0.02 * len(lists[0])
    assert len(lists[0]) < 32 * 33 // 2

"""FlexPrefill: both patterns by hand. Six blocks of 16 keys; every query reads block 2."""

import hand
import pytest

from accelkit import kernels
from accelkit.patches.methods.flex_prefill import FlexPrefill


def small(**fields: float) -> FlexPrefill:
    return FlexPrefill(**{"coverage": 0.95, "min_budget_tokens": 16, "block": 16, **fields})


def test_lines():
    """Columns: 15 of 16 equal keys stay below .95, so (15 + 1) // 16 + 1 = 2 blocks: 0 and 2.
    Offsets from the last tile: 33 … 63, in a triangle; 24 stay below .95, so 2 blocks: the main
    diagonal and 48 … 63.
    """
    call = hand.call_with(96, {range(32, 48): 30.0})
    assert hand.lists(small(divergence=0.0), call) == [
        [0],
        [0, 1],
        [0, 2],
        [0, 2, 3],
        [0, 1, 2, 4],
        [0, 2, 5],
    ]


def test_query_aware():
    """Pooling predicts block 2 exactly. Lines shrink to block 0 and the diagonal; of the pooled
    map rows 0 and 2 … 5 spend one entry of mass 1 each and row 1, with two equal blocks, both.
    """
    call = hand.call_with(96, {range(32, 48): 30.0})
    assert hand.lists(small(divergence=0.1), call) == [
        [0],
        [0, 1],
        [0, 2],
        [0, 2, 3],
        [0, 2, 4],
        [0, 2, 5],
    ]


def test_pattern_test_sees_that_pooling_fails():
    """One strong key in block 2, weaker ones all over block 1: the means prefer block 1."""
    call = hand.call_with(96, {range(16, 32): 6.0, 40: 40.0})
    method = small(divergence=0.1, min_budget_tokens=32)
    assert not method._trusted(call, kernels.scores.probe(call, 16)).any()
    assert 2 in hand.lists(method, call)[5]


@pytest.mark.parametrize(("least", "most", "blocks"), [(16, None, 2), (48, None, 3), (16, 16, 1)])
def test_budget_is_clamped(least: int, most: int | None, blocks: int):
    call = hand.call_with(96, {range(32, 48): 30.0})
    method = small(min_budget_tokens=least, max_budget_tokens=most)
    mass = kernels.scores.probe(call, 16).columns
    budget = method._budget(call, mass, mass.new_zeros(1, 2).bool())
    assert budget.tolist() == [[blocks, blocks]]

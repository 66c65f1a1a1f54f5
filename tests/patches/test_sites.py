"""Around a launch: orders of a chunk and with tokens left out, lists that are lent and renewed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accelkit.kernels.index import BlockIndex, equal_groups
from accelkit.patches.call import AttentionCall, Site
from accelkit.patches.method import AttentionMethod, Order
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy, Reuse
from accelkit.patches.sites import attention
from accelkit.patches.sites.order import in_kernel_order
from accelkit.patches.sites.reuse import borrow, store
from accelkit.patches.state import PatchState, Saved

HEADS = 4


def call_of(n_q: int, n_k: int, causal: bool, q_start: int = 0) -> AttentionCall:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, n_q, 32, generator=g)
    k, v = (torch.randn(1, 2, n_k, 32, generator=g) for _ in range(2))
    kv = equal_groups(HEADS, 2)
    heads = tuple(range(HEADS))
    return AttentionCall(q, k, v, 32**-0.5, causal, q_start, None, heads, kv, site=Site("layer", 0))


def state_of(**layer: object) -> PatchState:
    plan = Plan.model_construct(
        policies=(Policy(reuse=Reuse()),), sites={"layer": LayerPlan(**layer)}, tables={}
    )
    return PatchState(plan)


def lists(heads: int, block: int) -> tuple[BlockIndex]:
    """One row that reads one block."""
    mask = (torch.arange(4) == block).expand(1, heads, 1, 4)
    return (BlockIndex.from_mask(mask, (64, 16)),)


def first_of(saved: Saved, head: int) -> int:
    """The block that a head's row reads."""
    (index,) = saved.pieces
    return int(index.blocks[index.start[0, saved.heads.index(head), 0]])


def test_rows_of_a_chunk_keep_their_positions() -> None:
    order = Order(torch.tensor([[2, 0, 3, 1]], dtype=torch.int32), None, torch.zeros(HEADS).int())
    found = in_kernel_order(call_of(4, 8, True, q_start=4), order)
    assert found.q_pos.flatten().tolist() == [6, 4, 7, 5]


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_that_an_order_leaves_out_are_zero(causal) -> None:
    class Most(AttentionMethod):
        def order(self, call):
            ids = torch.arange(64, dtype=torch.int32)[None]
            return Order(ids, None, torch.zeros(HEADS, dtype=torch.int32))

        def index(self, call):
            return BlockIndex.from_mask(torch.ones(1, len(call.heads), 2, 3) > 0, (32, 32))

    call = call_of(66, 66, causal)
    out = torch.full_like(call.q, float("nan"))
    group = HeadGroup(call.heads, Policy(methods=(Most(),)), 0)
    assert attention.attend(call, [group], state_of(), out)
    assert (out[:, :, 64:] == 0).all()
    dense = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, :64], dense[:, :, :64])


def test_the_newest_of_overlapping_lists_is_lent() -> None:
    call = replace(call_of(64, 64, False), heads=(0, 1), kv_heads=(0, 0))
    call.memory["saved"] = [Saved((0, 1), lists(2, 1)), Saved((1, 2), lists(2, 3))]
    found = borrow(call, Reuse(), state_of())
    assert found is not None
    assert {h: first_of(s, h) for s in found for h in s.heads} == {0: 1, 1: 3}


def test_own_lists_make_room_for_newer_ones() -> None:
    call, state = call_of(64, 64, False), state_of()
    state.own_anchors = frozenset({"layer"})
    for block in (1, 2):
        store(call, Policy(), [Saved(call.heads, lists(HEADS, block))], state)
    (kept,) = call.memory["saved"]
    assert first_of(kept, 0) == 2

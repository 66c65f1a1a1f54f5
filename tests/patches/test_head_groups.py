"""Heads of one layer in different groups, each with keys laid out in an order of its own."""

from __future__ import annotations

import pytest
import torch

from accelkit.kernels.index import BlockIndex, equal_groups
from accelkit.patches.call import AttentionCall, Clock, Site
from accelkit.patches.method import AttentionMethod, Order
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention
from accelkit.patches.sites.attention import answer, attend, compute
from accelkit.patches.state import PatchState

N, HEADS = 384, 4


class Shuffled(AttentionMethod):
    """Every block, in another order of tokens for every head."""

    def order(self, call: AttentionCall) -> Order:
        tables = torch.stack(
            [torch.randperm(N, generator=torch.Generator().manual_seed(n)) for n in range(HEADS)]
        ).int()
        return Order(tables, tables, torch.tensor(call.heads), whole=True)

    def index(self, call: AttentionCall) -> BlockIndex:
        return BlockIndex.dense(len(call.heads), N // 128, (128, 128), call.q.device)


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (0, 1), (1, 2, 3), (2,), (3, 0)])
def test_some_heads_read_their_own_keys(heads):
    q, k, v = torch.randn(3, 1, HEADS, N, 16, generator=torch.Generator().manual_seed(9)).unbind(0)
    call = AttentionCall(
        q, k, v, 0.25, False, 0, None, tuple(range(HEADS)), tuple(range(HEADS)),
        site=Site("a", 0), clock=Clock("denoise"),
    )  # fmt: skip
    (answered,) = answer(call.take(heads), Policy(methods=(Shuffled(),)))
    found = compute(answered).out
    true = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(found, true[:, list(heads)], atol=1e-5, rtol=1e-5)


class Newest(AttentionMethod):
    """The newest block of each tile; tells how many heads it was asked about, and for whom."""

    def index(self, call: AttentionCall) -> BlockIndex:
        ASKED.append(call.heads)
        call.once("score", lambda: torch.zeros(len(call.heads)))
        at = torch.arange(call.n_q // 128)
        mask = at[:, None] == at[None]
        return BlockIndex.from_mask(mask.expand(1, len(call.heads), -1, -1), (128, 128))


ASKED: list[tuple[int, ...]] = []


@pytest.mark.parametrize(
    ("most", "asked"),
    [
        (9, [(5, 3), (0, 2, 1)]),  # nine pairs of blocks a head; who shares keys comes along
        (36, [(5, 3), (0, 2, 1)]),
        (45, [(5, 0, 2, 1, 3)]),
    ],
)
def test_long_calls_ask_about_some_heads_at_a_time(monkeypatch, most, asked):
    q, k, v = (torch.randn(1, h, N, 16) for h in (6, 2, 2))
    call = AttentionCall(
        q, k, v, 0.25, True, 0, None, tuple(range(6)), equal_groups(6, 2), site=Site("a", 0)
    )
    groups = [HeadGroup((5, 0, 2, 1, 3), Policy(methods=(Newest(),)), 1)]
    state = PatchState(Plan.model_construct(sites={"a": LayerPlan()}, tables={}))
    whole, parts = torch.zeros(2, 1, 6, N, 16).unbind(0)
    assert attend(call, groups, state, whole)
    monkeypatch.setattr(attention, "MOST_CELLS", most)
    ASKED.clear()
    assert attend(call, groups, state, parts)
    assert asked == ASKED
    assert bool(call._shared) == (len(asked) == 1)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("most", [9, 18])
def test_dense_heads_of_long_calls_run_some_at_a_time(monkeypatch, most):
    q, k, v = (torch.randn(1, h, N, 16) for h in (6, 2, 2))
    call = AttentionCall(
        q, k, v, 0.25, True, 0, None, tuple(range(6)), equal_groups(6, 2), site=Site("a", 0)
    )
    groups = [
        HeadGroup((0, 1, 3), Policy(methods=(Newest(),)), 1),
        HeadGroup((2, 4, 5), Policy(), 0),
    ]
    state = PatchState(Plan.model_construct(sites={"a": LayerPlan()}, tables={}))
    state.measure_density = True
    monkeypatch.setattr(attention, "MOST_CELLS", most)
    found = torch.full((1, 6, N, 16), torch.nan)
    assert attend(call, groups, state, found)
    full = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(found[:, [2, 4, 5]], full[:, [2, 4, 5]], atol=1e-5, rtol=1e-5)
    near = torch.arange(N) // 128
    mask = (near[:, None] == near) & torch.ones(N, N, dtype=torch.bool).tril()
    own = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(found[:, [0, 1, 3]], own[:, [0, 1, 3]], atol=1e-5, rtol=1e-5)
    assert not attend(call, groups[1:], state, found)  # nothing is left to others than before
    kept = torch.cat(state.counts["a"].densities)
    assert sorted(round(float(x), 3) for x in kept) == [0.335] * 3 + [1.0] * 3

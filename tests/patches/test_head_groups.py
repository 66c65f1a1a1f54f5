"""Heads of one layer in different groups, each with keys laid out in an order of its own."""

from __future__ import annotations

import pytest
import torch

from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall, Clock, Site
from accelkit.patches.method import AttentionMethod, Order
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import answer, compute

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

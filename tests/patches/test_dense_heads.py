"""Dense heads beside sparse ones: where they ride, and that they compute what they should."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from accelkit.kernels.index import BlockIndex, equal_groups
from accelkit.patches.call import AttentionCall, Site
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention, dense
from accelkit.patches.state import PatchState

N, HEADS, KV_HEADS = 256, 8, 4


class Rows:
    """A batch of one, on a device that this machine need not have."""

    device = torch.device("cpu")

    def __init__(self, is_cuda: bool) -> None:
        self.is_cuda = is_cuda

    def __len__(self) -> int:
        return 1


def shape(tokens: int, is_cuda: bool) -> SimpleNamespace:
    return SimpleNamespace(q=Rows(is_cuda), heads=(0, 2), n_q=tokens, n_k=tokens, causal=True)


@pytest.mark.parametrize(
    ("on_gpu", "tokens", "sizes", "rides_in"),
    [
        (False, 1 << 15, [(128, 64)], (128, 64)),
        (False, 1 << 15, [], (128, 128)),
        (True, 1 << 15, [(128, 64)], (128, 128)),  # enough pairs for a launch of their own
        (True, 1 << 10, [(128, 64), (64, 64)], (128, 64)),
        (True, 1 << 10, [(256, 64), (128, 128)], (128, 128)),
    ],
)
def test_a_gpu_computes_many_dense_pairs_in_wide_blocks(on_gpu, tokens, sizes, rides_in):
    assert dense.unit(shape(tokens, on_gpu), sizes) == rides_in  # type: ignore[arg-type]


def causal(seed: int = 0) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, N, 16, generator=g) for h in (HEADS, KV_HEADS, KV_HEADS))
    kv = equal_groups(HEADS, KV_HEADS)
    return AttentionCall(q, k, v, 0.3, True, 0, None, tuple(range(HEADS)), kv, site=Site("a", 0))


def exact(call: AttentionCall) -> torch.Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (call.k, call.v))
    scores = call.q @ k.mT * call.scale
    return scores.masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf).softmax(-1) @ v


class Newest(AttentionMethod):
    """The newest block of each tile."""

    def index(self, call: AttentionCall) -> BlockIndex:
        mask = torch.eye(call.n_q // 128).bool()
        return BlockIndex.from_mask(mask.expand(1, len(call.heads), -1, -1), (128, 128))


def test_a_call_with_dense_and_sparse_heads():
    """Dense heads count as such."""
    call = causal(1)
    groups = [
        HeadGroup((0, 3, 4), Policy(methods=(Newest(),)), 1),
        HeadGroup((1, 2, 5, 6, 7), Policy(), 0),
    ]
    state = PatchState(Plan.model_construct(sites={"a": LayerPlan()}, tables={}))
    state.measure_density = True
    out = torch.full_like(call.q, 7.0)
    assert attention.attend(call, groups, state, out)
    true = exact(call)
    torch.testing.assert_close(
        out[:, [1, 2, 5, 6, 7]], true[:, [1, 2, 5, 6, 7]], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        out[:, [0, 3, 4], :128], true[:, [0, 3, 4], :128], atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(out[:, [0, 3, 4], 128:], true[:, [0, 3, 4], 128:], atol=1e-2)
    (seen,) = state.counts["a"].densities
    assert seen.sort().values[-5:].tolist() == [1.0] * 5 and seen.min() < 0.9

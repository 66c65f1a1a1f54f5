"""Dense heads beside sparse ones: where they ride, and that they compute what they should."""

from __future__ import annotations

from dataclasses import replace
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


def shape(tokens: int, is_cuda: bool = True, **changes) -> SimpleNamespace:
    call = {
        "q": Rows(is_cuda), "heads": (0, 2), "n_q": tokens, "n_k": tokens, "causal": True,
        "q_start": 0, "key_mask": None, "q_pos": None, "k_pos": None,
    }  # fmt: skip
    return SimpleNamespace(**{**call, **changes})


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


def test_only_whole_bare_long_causal_prompts_run_as_without_a_patch():
    assert dense.apart(shape(1 << 14))  # type: ignore[arg-type]
    assert not dense.apart(shape(1 << 13, heads=(0,)))  # type: ignore[arg-type]
    for odd in (
        {"is_cuda": False}, {"causal": False}, {"q_start": 128}, {"n_k": 1 << 15},
        {"key_mask": torch.ones(1)}, {"q_pos": torch.ones(1)}, {"k_pos": torch.ones(1)},
    ):  # fmt: skip
        assert not dense.apart(shape(1 << 14, **odd)), odd  # type: ignore[arg-type]


def causal(seed: int = 0) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, N, 16, generator=g) for h in (HEADS, KV_HEADS, KV_HEADS))
    kv = equal_groups(HEADS, KV_HEADS)
    return AttentionCall(q, k, v, 0.3, True, 0, None, tuple(range(HEADS)), kv, site=Site("a", 0))


def exact(call: AttentionCall) -> torch.Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (call.k, call.v))
    scores = call.q @ k.mT * call.scale
    return scores.masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    "heads", [(0, 1, 2, 3), (2, 3), (1, 3, 5), (0, 1, 3), (7,), (0, 4), tuple(range(HEADS))]
)
def test_dense_heads_in_their_places(heads):
    call = causal()
    out = torch.full((2, N, HEADS, 16), 7.0).transpose(1, 2)
    dense.attend(call.take(heads), out)
    torch.testing.assert_close(out[:, heads], exact(call)[:, heads], atol=1e-5, rtol=1e-5)
    others = [h for h in range(HEADS) if h not in heads]
    assert (out[:, others] == 7.0).all()


def test_heads_need_not_lie_by_their_keys():
    """Query heads whose keys are laid out in turns."""
    call = causal()
    turns = tuple(h % KV_HEADS for h in range(HEADS))
    odd = replace(call, kv_heads=turns)
    whole = replace(call, k=call.k[:, list(turns)], v=call.v[:, list(turns)])
    heads = (0, 1, 4, 6)
    out = torch.zeros_like(call.q)
    dense.attend(odd.take(heads), out)
    scores = (whole.q @ whole.k.mT * call.scale).masked_fill(
        ~torch.ones(N, N).tril().bool(), -torch.inf
    )
    true = scores.softmax(-1) @ whole.v
    torch.testing.assert_close(out[:, heads], true[:, heads], atol=1e-5, rtol=1e-5)


class Newest(AttentionMethod):
    """The newest block of each tile."""

    def index(self, call: AttentionCall) -> BlockIndex:
        mask = torch.eye(call.n_q // 128).bool()
        return BlockIndex.from_mask(mask.expand(1, len(call.heads), -1, -1), (128, 128))


@pytest.mark.parametrize("apart", [False, True])
def test_a_call_with_dense_and_sparse_heads(monkeypatch, apart):
    """The same heads run dense, and count as such, wherever they run."""
    monkeypatch.setattr(dense, "apart", lambda call: apart)
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

"""With which arithmetic heads run: each launch has one, and a wish reaches the kernel."""

from __future__ import annotations

import pytest
import torch

from accelkit import kernels
from accelkit.kernels.index import BlockIndex, equal_groups
from accelkit.patches.call import AttentionCall, Site
from accelkit.patches.method import AttentionMethod, Execution
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention
from accelkit.patches.state import PatchState


class Rounded(AttentionMethod):
    """The first blocks of every row, with some arithmetic."""

    qk: str = "native"
    pv: str = "native"
    skip: float | None = None
    blocks: int = 2

    def index(self, call):
        rows, _ = call.tiles((32, 32))
        mask = torch.ones(1, len(call.heads), rows, rows, dtype=torch.bool)
        mask[..., self.blocks :] = torch.eye(rows, dtype=torch.bool)[..., self.blocks :]
        return BlockIndex.from_mask(mask, (32, 32))

    def execution(self, call):
        return Execution(qk=self.qk, pv=self.pv, smooth_k=self.qk != "native", skip=self.skip)


def call_of(heads: int = 6) -> AttentionCall:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 130, 32) for h in (heads, 2, 2))
    ids, kv = tuple(range(heads)), equal_groups(heads, 2)
    return AttentionCall(q, k, v, 32**-0.5, True, 0, None, ids, kv, site=Site("layer", 0))


@pytest.fixture
def launches(monkeypatch) -> list[dict]:
    seen: list[dict] = []
    run = kernels.attend

    def attend(*tensors, **options):
        seen.append({"heads": tuple(options["heads"]), **options})
        return run(*tensors, **options)

    monkeypatch.setattr(attention.kernels, "attend", attend, raising=False)
    return seen


def test_lanes_are_split_by_arithmetic(launches) -> None:
    call = call_of()
    policies = [
        Rounded(),
        Rounded(qk="int8", pv="fp8"),
        Rounded(qk="int8", pv="fp8", blocks=1),
        Rounded(skip=0.1),
        Rounded(skip=0.01),
        None,
    ]
    groups = [HeadGroup((h,), Policy(methods=(p,) if p else ()), h) for h, p in enumerate(policies)]
    out = torch.full_like(call.q, float("nan"))
    assert attention.attend(
        call, groups, PatchState(Plan.model_construct(sites={"layer": LayerPlan()}, tables={})), out
    )
    found = {(x["heads"], x["qk"], x["pv"], x["smooth_k"], x["skip"] is None) for x in launches}
    assert found == {
        ((0, 5), "native", "native", False, True),  # the dense head rides where nothing is rounded
        ((1, 2), "int8", "fp8", True, True),
        ((3, 4), "native", "native", False, False),
    }
    skips = next(x["skip"] for x in launches if x["heads"] == (3, 4))
    assert skips.tolist() == pytest.approx([0.1, 0.01])
    for group in groups[:-1]:
        answers = attention.answer(call.take(group.heads), group.policy)
        assert answers is not None
        alone = attention.compute(answers[0]).out
        torch.testing.assert_close(out[:, list(group.heads)], alone)


def test_rounding_is_seen_in_the_output(launches) -> None:
    call = call_of(2)
    outs = {}
    for qk in ("native", "int8", "fp8"):
        answers = attention.answer(call, Policy(methods=(Rounded(qk=qk),)))
        assert answers is not None
        outs[qk] = attention.compute(answers[0]).out
    assert [x["qk"] for x in launches] == ["native", "int8", "fp8"]
    off = {qk: float((o - outs["native"]).norm() / outs["native"].norm()) for qk, o in outs.items()}
    assert 0 < off["int8"] < off["fp8"] < 0.05

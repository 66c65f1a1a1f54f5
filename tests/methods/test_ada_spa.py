"""AdaSpa: searches, budgets of heads, what lasts over steps."""

from dataclasses import replace

import planted
import pytest
import torch

from accelkit import kernels
from accelkit.kernels import BlockIndex, Partial
from accelkit.patches.methods.ada_spa import AdaSpa


def at(call, step, total=50):
    return replace(call, clock=replace(call.clock, step=step, total=total), _shared={})


def test_a_search_step_is_dense_and_the_others_read_its_mask():
    call = replace(planted.video(), memory={})
    method = AdaSpa(block=64)
    first = method.index(at(call, 10))
    assert isinstance(first, Partial)
    torch.testing.assert_close(first.out, planted.dense(call), atol=1e-4, rtol=1e-4)
    second = method.index(at(call, 11))
    assert isinstance(second, BlockIndex) and second.size == (64, 64)


def test_searches(monkeypatch: pytest.MonkeyPatch):
    """At 20 % and 60 % of the steps; the second needs no dense run, a missed one is made up for."""
    searched, dense = [], []
    real = kernels.scores.block_mass
    monkeypatch.setattr(kernels.scores, "block_mass", lambda *a: searched.append(1) or real(*a))
    run = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *a, **k: dense.append(1) or run(*a, **k), False)
    call = replace(planted.video(), memory={})
    for step in (3, 9, 12, 25, 35, 49):
        AdaSpa(block=64).index(at(call, step))
    assert len(searched) == 2 and len(dense) == 1


def test_budget_moves_between_heads_and_its_mean_stays():
    """Two good heads of six: they give half of their share to the two worst."""
    recall = torch.tensor([0.7, 0.95, 0.3, 0.85, 0.5, 0.75])
    budget = AdaSpa()._budget(recall)
    torch.testing.assert_close(budget, torch.tensor([0.2, 0.1, 0.3, 0.1, 0.3, 0.2]))
    assert float(budget.mean()) == pytest.approx(0.2)
    assert AdaSpa()._budget(torch.full((5,), 0.9)).mean() == pytest.approx(0.2)


def test_rows_keep_equal_numbers_of_the_greatest_masses():
    call = replace(planted.video(), memory={})
    method = AdaSpa(adaptive=False, block=64)
    method.index(at(call, 10))
    found = method.index(at(call, 11))
    lse = (call.q @ call.k.transpose(-1, -2) * call.scale).logsumexp(-1)
    mass = kernels.scores.block_mass(call, lse, (64, 64))
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), atol=1e-4, rtol=0)
    mask = found.to_mask(mass.shape[-1])
    text = -(-planted.TEXT // 64)
    assert mask[:, :, :text].all() and mask[..., :text].all()
    best = mass[0, 0, 20].topk(-(-mass.shape[-1] // 5)).indices
    assert mask[0, 0, 20, best].all()

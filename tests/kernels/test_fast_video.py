"""Triton kernels of diffusion against their torch twins, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import hand
import pytest
import torch

from accelkit.kernels import (
    attend,
    dispatch,
    permute,
    pyramid,
    scores,
    scores_blocks,
    scores_pooled,
    select,
)
from accelkit.kernels.index import BlockIndex, plain_inputs

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytestmark = [
        pytest.mark.interpreter,
        pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="no interpreter"),
    ]

from accelkit.kernels._triton import permute as fast_permute
from accelkit.kernels._triton import pyramid as fast_pyramid
from accelkit.kernels._triton import rows as fast_rows
from accelkit.kernels._triton import runs as fast_runs
from accelkit.kernels._triton import scores as fast
from accelkit.kernels._triton import select as fast_select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch):
    """Public functions take the torch way here, also on a GPU."""
    for module in (dispatch, permute):
        monkeypatch.setattr(module, "fast_device", lambda t: False)
    torch.manual_seed(0)


def rows(batch: int, heads: int, n: int, d: int) -> torch.Tensor:
    """Tokens as projections leave them: heads beside one another."""
    return torch.randn(batch, n, heads, d, device=DEVICE).transpose(1, 2)


def test_means_of_runs():
    """Runs of 70, 3 and 12 tokens behind five that belong to none."""
    x = rows(2, 3, 93, 24)
    begin = torch.tensor([5, 75, 78, 90], dtype=torch.int32, device=DEVICE)
    expected = torch.stack([x[:, :, a:b].mean(2) for a, b in ((5, 75), (75, 78), (78, 90))], 2)
    heads = torch.tensor([2, 0], device=DEVICE)
    for found in (scores.pool_runs(x, begin, heads), fast.pool(x, 64, heads, begin=begin)):
        torch.testing.assert_close(found, expected[:, heads], atol=1e-5, rtol=1e-5)


def test_budgets_of_routed_heads():
    """Beyond one chunk; own gates are spent first and are not chosen again."""
    gate, own = torch.randn(2, 3, 40, 70, device=DEVICE), torch.zeros(40, 70).bool().to(DEVICE)
    own[torch.arange(40), torch.arange(40)] = True
    for coverage in (0.3, 0.9):
        found = fast_runs.routed(gate, own, coverage)
        assert torch.equal(found, select.routed(gate, own, coverage))
        assert found.any() and not (found & own).any()


def test_blocks_that_touch_chosen_runs():
    """Block 0 touches no run, block 2 three of them."""
    begin, end = (torch.tensor(t).int().to(DEVICE) for t in ([0, 0, 1, 3], [0, 2, 4, 4]))
    runs, kept = select.Runs(begin, end, 3), torch.zeros(1, 1, 2, 4).bool().to(DEVICE)
    kept[..., 1, 0] = True
    chosen = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]]).bool().to(DEVICE)[None, None]
    call = plain_inputs(rows(1, 1, 32, 16), rows(1, 1, 64, 16), rows(1, 1, 64, 16), causal=False)
    slow = select.compact_runs(call, chosen, runs, kept, (16, 16))
    for found in (slow, fast_runs.compact(chosen, runs, kept, (16, 16))):
        assert hand.rows(found) == [[1, 2], [0, 2, 3]]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("n", "unit"), [(91, 4), (205, 16), (64, 8)])
def test_the_levels_of_a_pyramid(n: int, unit: int, ordered: bool):
    """Means behind the last whole entry of a level are left out."""
    x = rows(2, 3, n, 24)
    order = torch.randperm(n, dtype=torch.int32, device=DEVICE) if ordered else None
    slow = pyramid._levels(x, unit, order)
    moved = x if order is None else x[:, :, order.long()]
    torch.testing.assert_close(slow, pyramid._levels(moved, unit, None))
    torch.testing.assert_close(fast_pyramid.levels(x, unit, order), slow, atol=1e-5, rtol=1e-5)


def test_the_prefix_of_all_rows_of_a_head(monkeypatch: pytest.MonkeyPatch):
    """Beyond one chunk, with ties across chunks and entries that nobody may take."""
    x = (torch.rand(1, 2, 1, 9_000, device=DEVICE) * 50).floor() / 50
    x[..., ::7] = -float("inf")
    for share, wide in ((0.3, 1 << 22), (0.9, 0)):
        mass = share * x.clamp(min=0).sum(-1, keepdim=True)
        monkeypatch.setattr(fast_select, "_WIDE", wide)
        found = fast_select.long_prefix(x, mass)
        assert torch.equal(found, select.global_prefix(x, mass))
        assert found.any()


@pytest.mark.parametrize("shared", [True, False])
def test_rows_move_and_come_back(shared: bool):
    x = rows(2, 3, 90, 24)
    table = torch.stack([torch.randperm(90), torch.randperm(90)])
    table = torch.cat([table, torch.full((2, 6), -1)], 1)[:, torch.randperm(96)].int().to(DEVICE)
    row = torch.tensor([0, 0] if shared else [1, 0], device=DEVICE)
    heads = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    ids = table[:1][None] if shared else table[row][None]
    table = table[:1] if shared else table
    moved = permute.take_rows(x, table, row, heads)
    assert torch.equal(moved, fast_permute.take_rows(x, ids, heads))
    for h, slot in ((2, 0), (0, 1)):
        at = ids[0, 0 if shared else slot].long()
        assert torch.equal(moved[:, slot, at >= 0], x[:, h, at[at >= 0]])
        assert not moved[:, slot, at < 0].any()
    for put in (
        lambda out: permute.put_rows(out, moved, table, row, heads),
        lambda out: fast_permute.put_rows(out, moved, ids, heads),
    ):
        out = torch.zeros_like(x)
        put(out)
        assert torch.equal(out[:, [2, 0]], x[:, [2, 0]])
        assert not out[:, 1].any()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_self_similarity(center: bool, masked: bool):
    x = rows(2, 3, 90, 24)
    mask = (torch.rand(2, 1, 90) > 0.2).to(DEVICE) if masked else None
    slow = scores.self_similarity(x, 16, mask, center)
    torch.testing.assert_close(
        slow, scores_pooled._fast_self_similarity(x, 16, mask, center), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (32, 16)])
@pytest.mark.parametrize("q_start", [None, 0, 20])
def test_block_mass(size: tuple[int, int], q_start: int | None):
    """Exact masses of a tile sum to one, whichever way they are found; causal calls with a
    `q_start`.
    """
    keys, causal = 150 + (q_start or 0), q_start is not None
    call = plain_inputs(
        rows(1, 4, 150, 24), rows(1, 2, keys, 24), rows(1, 2, keys, 24), causal=causal,
        q_start=q_start or 0,
    )  # fmt: skip
    s = call.q @ call.k.repeat_interleave(2, 1).transpose(-1, -2) * call.scale
    if causal:
        s = s.masked_fill(torch.ones_like(s[0, 0]).triu(1 + call.q_start).bool(), -torch.inf)
    lse = s.logsumexp(-1)
    assert fast.mass_fits(call, size)
    found = fast.block_mass(call, lse, size)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), atol=2e-4, rtol=0)
    torch.testing.assert_close(found, scores.block_mass(call, lse, size), atol=2e-4, rtol=1e-3)
    some = torch.tensor([2, 0], device=DEVICE)
    torch.testing.assert_close(fast.block_mass(call, lse, size, some), found[:, :, some])


def test_sampled_maxima(monkeypatch: pytest.MonkeyPatch):
    call = plain_inputs(rows(1, 4, 270, 24), rows(1, 2, 270, 24), rows(1, 2, 270, 24), causal=False)
    slow = scores.sampled_max(call, (64, 64), every=4)
    places = (scores_blocks._drawn(64, 4, seed, call.q.device) for seed in (0, 1))
    found = fast.sampled_max(call, (64, 64), *places)
    torch.testing.assert_close(found, slow, atol=5e-3, rtol=5e-3)
    monkeypatch.setattr(fast, "SCRATCH_BYTES", 1)  # head by head
    places = (scores_blocks._drawn(64, 4, seed, call.q.device) for seed in (0, 1))
    assert torch.equal(found, fast.sampled_max(call, (64, 64), *places))
    monkeypatch.undo()
    order = torch.randperm(270, dtype=torch.int32, device=DEVICE)
    ordered = scores.sampled_max(call, (64, 64), every=4, key_order=order)
    moved = replace(call, k=call.k[:, :, order.long()])
    torch.testing.assert_close(ordered, scores.sampled_max(moved, (64, 64), every=4))
    places = (scores_blocks._drawn(64, 4, seed, call.q.device) for seed in (0, 1))
    found = fast.sampled_max(call, (64, 64), *places, order)
    torch.testing.assert_close(found, ordered, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_a_few_rows_under_masks(number: int):
    """Pieces of keys, joined: with rows that read nothing in some of them."""
    n = 700
    call = plain_inputs(rows(2, 4, n, 24), rows(2, 2, n, 24), rows(2, 2, n, 16), causal=False)
    call = replace(call, heads=(3, 0), kv_heads=(call.kv_heads[3], call.kv_heads[0]))
    places = torch.tensor([0, 77, 300, 699, 5], device=DEVICE)
    masks = torch.rand(2, 5, n, device=DEVICE)[:number] < 0.3
    masks[:, 1, :400] = False
    slow = scores.masked_rows(call, places, masks)
    assert slow.shape == (2, 2, 1 + number, 5, 16)
    found = fast_rows.masked_rows(call, places, masks)
    torch.testing.assert_close(found, slow, atol=2e-4, rtol=2e-3)


def test_a_pyramid():
    """Lists over levels: Triton gives what the reference gives, text and ragged end included."""
    q, k, v = rows(1, 4, 270, 32), rows(1, 2, 270, 32), rows(1, 2, 270, 32)
    levels = torch.randint(-1, 4, (1, 4, 9, 9), generator=torch.Generator().manual_seed(0))
    levels[..., 0], levels[:, :, 0] = 0, 0
    index = select.compact_levels(levels.to(torch.int8).to(DEVICE), 270, (32, 32), 16)
    slow = attend(q, k, v, index, causal=False, backend="reference")
    found = attend(q, k, v, index, causal=False, backend="triton")
    torch.testing.assert_close(found.out, slow.out, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.lse, slow.lse, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.parametrize(("block", "unit"), [(32, 16), (32, 32), (64, 16)])
def test_from_scores_to_a_pyramid(by_energy: bool, block: int, unit: int):
    """One launch lists what selecting level by level lists."""
    tokens = 11 * block - 5
    scores_ = rows(2, 2, 4, 11).exp()
    scores_[0, 0, 0] = 0.5  # ties go to the lower block
    kept = torch.zeros(1, 1, 4, 11, dtype=torch.bool, device=DEVICE)
    kept[..., 3] = kept[:, :, 2] = True
    ends = (0.05, 0.3, 0.5, 0.9)
    least = 0.2 if by_energy else 0.0
    level = select.levels(scores_, ends, by_energy=by_energy, least=least).masked_fill_(kept, 0)
    slow = select.compact_levels(level, tokens, (16, block), unit)
    found = fast_pyramid.listed(
        scores_, ends, kept, tokens, (16, block), unit, by_energy, least
    )  # fmt: skip
    assert found.size == slow.size and found.pyramid
    entries = pyramid.firsts(tokens, unit)[-1]
    assert torch.equal(found.count, slow.count)
    assert torch.equal(found.to_mask(entries), slow.to_mask(entries))


def test_holes_as_keys_without_weight():
    """A bias of −inf on the places of holes hides them in every kernel."""
    q, k, v = rows(1, 2, 96, 32), rows(1, 2, 96, 32), rows(1, 2, 96, 32)
    hole = torch.zeros(1, 1, 96, dtype=torch.bool, device=DEVICE)
    hole[..., 7:16] = hole[..., 32:48] = True
    index = BlockIndex.dense(2, 6, (16, 16), q.device)
    bias = torch.where(hole, -torch.inf, 0.0)
    place = torch.where(hole, -1, torch.arange(96, device=DEVICE)).int()
    found = attend(q, k, v, replace(index, bias=bias), causal=False, backend="triton")
    slow = attend(q, k, v, index, causal=False, k_pos=place, backend="reference")
    torch.testing.assert_close(found.out, slow.out, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found.lse, slow.lse, atol=2e-4, rtol=2e-4)

"""PSA: levels by rank, means that count for several keys."""

import math
from dataclasses import replace

import hand
import planted
import pytest
import torch

from accelkit.kernels import attend, pyramid, select
from accelkit.kernels.index import BlockIndex
from accelkit.patches.methods import psa
from accelkit.patches.methods.psa import PSA
from accelkit.patches.sites import attention


def test_levels_by_rank_and_energy():
    scores = torch.tensor([8.0, 1, 4, 2, 0.5, 0.25, 0.125, 0.0625])[None, None, None]
    found = select.levels(scores, (0.25, 0.5, 0.75, 0.875), by_energy=False)
    assert found.flatten().tolist() == [0, 1, 0, 1, 2, 2, 3, -1]
    found = select.levels(scores, (0.5, 0.75, 0.9, 0.99), by_energy=True, least=0.06)
    assert found.flatten().tolist() == [0, 2, 1, 2, 3, 3, 3, -1]


def test_entries_are_whole_tiles():
    """Blocks of 16, entries of 8 keys: level 1 takes one, level 2 a pair, level 3 four blocks; a
    block is never read more coarsely than asked for. Coarse levels lie in front.
    """
    levels = torch.tensor([[0, 1, 2, 2, 2, 1, 3, -1, 3, 3, -1, 3]]).to(torch.int8)[None, None]
    index = select.compact_levels(levels, 12 * 16, (16, 16), 8)
    assert pyramid.firsts(12 * 16, 8) == (21, 9, 3, 0, 45)
    assert hand.rows(index)[0] == [
        *(0 + i for i in [2]),  # blocks 8 … 11
        *(3 + i for i in [1, 3]),  # blocks 2 and 3; 6 and 7, whose four blocks hold finer ones
        *(9 + i for i in [1, 4, 5]),  # blocks 1, 4 (beside a finer one) and 5
        *(21 + i for i in [0, 1]),  # block 0 itself
    ]


def test_the_ragged_end_is_read_itself():
    """Four blocks and a few keys: level 3 is whole, the end comes key by key."""
    levels = torch.full((1, 1, 1, 5), 3, dtype=torch.int8)
    index = select.compact_levels(levels, 4 * 16 + 5, (16, 16), 8)
    assert pyramid.firsts(4 * 16 + 5, 8)[0] == 7
    assert hand.rows(index)[0] == [0, 7 + 8]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_means_of_equal_keys_are_exact(backend: str):
    """Runs of eight equal keys and values: every level gives what the keys give."""
    n = 190
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, n, 16, generator=g)
    k, v = (torch.randn(1, 2, 24, 16, generator=g).repeat_interleave(8, 2)[:, :, :n] for _ in "kv")
    levels = torch.randint(0, 4, (1, 4, 12, 12), generator=g).to(torch.int8)
    index = select.compact_levels(levels, n, (16, 16), 8)
    out = attend(q, k, v, index, causal=False, backend=backend)
    dense = attend(q, k, v, BlockIndex.dense(4, 12, (16, 16), q.device), causal=False)
    torch.testing.assert_close(out.out, dense.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.lse, dense.lse, atol=1e-5, rtol=1e-5)


def test_backends_agree():
    """On keys that differ: means lie in front of the keys, each for several of them."""
    q, k, v = planted.noise(150, width=16)
    levels = torch.randint(-1, 4, (1, 4, 10, 10), generator=torch.Generator().manual_seed(1))
    levels[..., 0] = 0
    index = select.compact_levels(levels.to(torch.int8), 150, (16, 16), 8)
    slow, fast = (attend(q, k, v, index, causal=False, backend=b) for b in ("reference", "torch"))
    torch.testing.assert_close(slow.out, fast.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slow.lse, fast.lse, atol=1e-5, rtol=1e-5)
    keys, _, lowered = pyramid.lower(k, v, index)
    assert keys.shape[2] == 150 + 9 * 8 + 4 * 8 + 2 * 8
    assert lowered.bias.unique().tolist() == pytest.approx([math.log(2**i) for i in range(4)])
    torch.testing.assert_close(keys[:, :, 2], k[:, :, 16:24].mean(2))
    torch.testing.assert_close(keys[:, :, -150:], k)


def test_keys_in_an_order():
    """What a pyramid of keys in an order gives is what it gives on keys laid out that way."""
    q, k, v = planted.noise(150, width=16)
    levels = torch.randint(0, 4, (1, 4, 10, 10), generator=torch.Generator().manual_seed(1))
    index = select.compact_levels(levels.to(torch.int8), 150, (16, 16), 8)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2)).int()
    found = attend(q, k, v, replace(index, key_order=order), causal=False)
    laid = attend(q, k[:, :, order.long()], v[:, :, order.long()], index, causal=False)
    torch.testing.assert_close(found.out, laid.out)
    torch.testing.assert_close(found.lse, laid.lse)


def test_ends_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        PSA(ends=(0.5, 0.2, 0.6, 0.7))


def test_runs_are_equal():
    """The sampled places are drawn with a seed."""
    call = planted.video()
    first, second = (PSA().index(replace(call, _shared={})) for _ in range(2))
    assert torch.equal(first.count, second.count) and torch.equal(first.blocks, second.blocks)


def test_blocks_are_larger_in_long_calls(monkeypatch: pytest.MonkeyPatch):
    """Unless their side is given."""
    call = planted.video()
    assert PSA().index(call).size == (128, 64)
    monkeypatch.setattr(psa, "LONG", call.n_k - 1)
    assert PSA().index(replace(call, _shared={})).size == (256, 64)
    assert PSA(block=64).index(replace(call, _shared={})).size == (64, 64)


def test_means_are_better_than_nothing():
    """Reading the rest as means beats leaving it out, at nearly the same work."""
    call = planted.video()
    dense = planted.dense(call)

    def error(ends):
        answer = planted.ask(PSA(ends=ends), replace(call, _shared={}))
        return float((attention.compute(answer).out - dense).norm() / dense.norm())

    assert error((0.1, 0.25, 0.4, 0.75)) < 0.8 * error((0.1, 0.1, 0.1, 0.1))

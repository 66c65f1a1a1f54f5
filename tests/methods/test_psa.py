"""PSA: levels by rank, means that count for several keys."""

from dataclasses import replace

import planted
import pytest
import torch

from accelkit.kernels import attend, pyramid, select
from accelkit.kernels.index import BlockIndex
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
    block is never read more coarsely than asked for.
    """
    levels = torch.tensor([[0, 1, 2, 2, 2, 1, 3, -1, 3, 3, -1, 3]]).to(torch.int8)[None, None]
    index = select.compact_levels(levels, 12 * 16, (16, 16), 8)
    entries = [
        (int(index.level[i]), int(index.blocks[i])) for i in range(int(index.count[0, 0, 0]))
    ]
    assert entries == [
        (0, 0), (0, 1),  # block 0 itself
        (1, 1), (1, 4), (1, 5),  # blocks 1, 4 (beside a finer one) and 5
        (2, 1), (2, 3),  # blocks 2 and 3; 6 and 7, whose four blocks hold finer ones
        (3, 2),  # blocks 8 … 11
    ]  # fmt: skip


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
    """On keys that differ, with padding: the pyramid is one launch of keys with a bias."""
    q, k, v = planted.noise(150, width=16)
    levels = torch.randint(-1, 4, (1, 4, 10, 10), generator=torch.Generator().manual_seed(1))
    levels[..., 0] = 0
    index = select.compact_levels(levels.to(torch.int8), 150, (16, 16), 8)
    mask = torch.ones(1, 150, dtype=torch.bool)
    mask[:, 140:] = False
    some = [
        attend(q, k, v, index, causal=False, key_mask=mask, backend=b)
        for b in ("reference", "torch")
    ]
    torch.testing.assert_close(some[0].out, some[1].out, atol=1e-5, rtol=1e-4)
    keys, _, lowered = pyramid.lower(k, v, index, mask)
    counts = lowered.bias.exp()
    assert keys.shape[2] == counts.shape[2] == 192 + 96 + 48 + 24
    assert counts[0, 0, 192:288].sum() == pytest.approx(140)
    torch.testing.assert_close(keys[:, :, 192], k[:, :, :2].mean(2))


def test_ends_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        PSA(ends=(0.5, 0.2, 0.6, 0.7))


def test_runs_are_equal():
    """The sampled places are drawn with a seed."""
    call = planted.video()
    first, second = (PSA().index(replace(call, _shared={})) for _ in range(2))
    assert torch.equal(first.blocks, second.blocks) and torch.equal(first.level, second.level)


def test_means_are_better_than_nothing():
    """Reading the rest as means beats leaving it out, at nearly the same work."""
    call = planted.video()
    dense = planted.dense(call)

    def error(ends):
        answer = planted.ask(PSA(ends=ends), replace(call, _shared={}))
        return float((attention.compute(answer).out - dense).norm() / dense.norm())

    assert error((0.1, 0.25, 0.4, 0.75)) < 0.8 * error((0.1, 0.1, 0.1, 0.1))

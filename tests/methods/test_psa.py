"""PSA: levels by rank, means that count for several keys."""

import math
from dataclasses import replace

import hand
import planted
import pytest
import torch

from accelkit.kernels import attend, pyramid, select
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.merge import merge
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
    pieces = select.compact_levels(levels, 12 * 16, (16, 16), 8)
    assert [p.level for p in pieces] == [None, 1, 2, 3]
    assert [hand.rows(p)[0] for p in pieces] == [
        [0, 1],  # block 0 itself
        [1, 4, 5],  # blocks 1, 4 (beside a finer one) and 5
        [1, 3],  # blocks 2 and 3; 6 and 7, whose four blocks hold finer ones
        [2],  # blocks 8 … 11
    ]


def test_the_ragged_end_is_read_itself():
    """Four blocks and a few keys: level 3 is whole, the end comes key by key."""
    levels = torch.full((1, 1, 1, 5), 3, dtype=torch.int8)
    pieces = select.compact_levels(levels, 4 * 16 + 5, (16, 16), 8)
    assert [hand.rows(p)[0] for p in pieces] == [[8], [], [], [0]]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_means_of_equal_keys_are_exact(backend: str):
    """Runs of eight equal keys and values: every level gives what the keys give."""
    n = 190
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, n, 16, generator=g)
    k, v = (torch.randn(1, 2, 24, 16, generator=g).repeat_interleave(8, 2)[:, :, :n] for _ in "kv")
    levels = torch.randint(0, 4, (1, 4, 12, 12), generator=g).to(torch.int8)
    pieces = select.compact_levels(levels, n, (16, 16), 8)
    out = merge([attend(q, k, v, p, causal=False, backend=backend) for p in pieces])
    dense = attend(q, k, v, BlockIndex.dense(4, 12, (16, 16), q.device), causal=False)
    torch.testing.assert_close(out.out, dense.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.lse, dense.lse, atol=1e-5, rtol=1e-5)


def test_backends_agree():
    """On keys that differ; a level is a launch over its means, each for several keys."""
    q, k, v = planted.noise(150, width=16)
    levels = torch.randint(-1, 4, (1, 4, 10, 10), generator=torch.Generator().manual_seed(1))
    levels[..., 0] = 0
    for piece in select.compact_levels(levels.to(torch.int8), 150, (16, 16), 8):
        slow, fast = (
            attend(q, k, v, piece, causal=False, backend=b) for b in ("reference", "torch")
        )
        torch.testing.assert_close(slow.out, fast.out, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(slow.lse, fast.lse, atol=1e-5, rtol=1e-5)
    keys, _, lowered = pyramid.lower(k, v, piece)
    assert keys.shape[2] == 150 // 8 and lowered.bias == pytest.approx(math.log(8))
    torch.testing.assert_close(keys[:, :, 2], k[:, :, 16:24].mean(2))


def test_ends_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        PSA(ends=(0.5, 0.2, 0.6, 0.7))


def test_runs_are_equal():
    """The sampled places are drawn with a seed."""
    call = planted.video()
    first, second = (PSA().index(replace(call, _shared={})) for _ in range(2))
    assert all(torch.equal(a.count, b.count) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a.blocks, b.blocks) for a, b in zip(first, second, strict=True))


def test_means_are_better_than_nothing():
    """Reading the rest as means beats leaving it out, at nearly the same work."""
    call = planted.video()
    dense = planted.dense(call)

    def error(ends):
        answer = planted.ask(PSA(ends=ends), replace(call, _shared={}))
        return float((attention.compute(answer).out - dense).norm() / dense.norm())

    assert error((0.1, 0.25, 0.4, 0.75)) < 0.8 * error((0.1, 0.1, 0.1, 0.1))

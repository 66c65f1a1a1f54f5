"""Selectors on cases that can be checked by eye, and the promises of `force` on all calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from score_cases import NAMES, blocks, case, close, dense_softmax, seen, visible_by_hand

from accelkit.errors import InvalidInputError, UnsupportedConfigurationError
from accelkit.kernels import scores, select
from accelkit.kernels.index import BlockIndex, plain_inputs

INF = float("inf")
SIZES = [(32, 16), (16, 48)]


def call_of(n_q, n_k=None, q_start=0, causal=True, heads=1):
    n_k = n_q + q_start if n_k is None else n_k
    q, k = torch.zeros(1, heads, n_q, 4), torch.zeros(1, heads, n_k, 4)
    return plain_inputs(q, k, k, causal=causal, q_start=q_start)


def row(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def picked(mask):
    return mask.flatten().nonzero().flatten().tolist()


def random_scores(nq=6, nk=9, heads=3):
    """Block-causal scores with −inf above the diagonal; quarters, so that there are ties."""
    g = torch.Generator().manual_seed(0)
    s = torch.randint(0, 9, (2, heads, nq, nk), generator=g) / 4
    return s.masked_fill(torch.arange(nk) > torch.arange(nq)[:, None] + 3, -INF)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_visible(name, size):
    call = case(name)
    found = select.visible_blocks(call, size)
    expected = visible_by_hand(call, size)
    assert torch.equal(found.expand_as(expected), expected)


def test_probabilities():
    p = select.probabilities(torch.stack([row(0, 0, -INF), row(-INF, -INF, -INF)], 2)[:, :, :, 0])
    assert p.flatten().tolist() == [0.5, 0.5, -INF, -INF, -INF, -INF]


def test_top_k():
    s = row(3, 1, 2, -INF, -INF)
    assert picked(select.top_k(s, 2)) == [0, 2]
    assert picked(select.top_k(s, 99)) == [0, 1, 2]  # never what is invisible
    assert picked(select.top_k(s, 0)) == []
    assert picked(select.top_k(s, 0.34)) == [0, 2]  # of three visible blocks
    assert picked(select.top_k(s, 0.0)) == [0]
    assert picked(select.top_k(s, 1.0)) == [0, 1, 2]
    assert picked(select.top_k(row(1, 1, 1, 1), 2)) == [0, 1]  # ties: lower ids
    per_head = select.top_k(s.expand(1, 3, 1, 5), torch.tensor([1, 2, 3]))
    assert per_head.sum(-1).flatten().tolist() == [1, 2, 3]
    per_head = select.top_k(s.expand(1, 2, 1, 5), torch.tensor([0.5, 1.0]))
    assert per_head.sum(-1).flatten().tolist() == [2, 3]
    assert picked(select.top_k(row(*range(10)), 0.3)) == [7, 8, 9]
    with pytest.raises(InvalidInputError, match="fraction"):
        select.top_k(s, 3.0)


def test_a_fraction_counts_visible_blocks_only():
    """Early rows of a causal map must not spend their budget on the future."""
    s = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -INF)
    assert select.top_k(s, 0.5).sum(-1).flatten().tolist() == [1, 1, 2, 2]


def test_top_p():
    p = row(0.5, 0.1, 0.3, 0.1, -INF)
    assert picked(select.top_p(p, 0.5)) == [0]
    assert picked(select.top_p(p, 0.51)) == [0, 2]  # the block that crosses is kept
    assert picked(select.top_p(p, 0.85)) == [0, 1, 2]  # ties: lower ids
    assert picked(select.top_p(p, 1.0)) == [0, 1, 2, 3]
    assert picked(select.top_p(row(1, 0, 0, -INF), 1.0)) == [0, 1, 2]  # zeros are visible
    assert picked(select.top_p(p * 16, 0.51)) == [0, 2]  # rows need not sum to one
    assert picked(select.top_p(p, 0.0)) == []
    both = select.top_p(p.expand(1, 2, 1, 5), torch.tensor([0.5, 0.9]))
    assert both.sum(-1).flatten().tolist() == [1, 3]


def test_global_top_p_lets_rows_compete():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).view(1, 1, 2, 2)
    assert picked(select.global_top_p(p, 0.45)) == [0]  # 0.9 of 2
    assert picked(select.global_top_p(p, 0.6)) == [0, 2]
    assert picked(select.global_top_p(p, 1.0)) == [0, 1, 2, 3]
    hidden = p.masked_fill(torch.tensor([[False, True], [False, False]]), -INF)
    assert picked(select.global_top_p(hidden, 1.0)) == [0, 2, 3]
    both = select.global_top_p(p.expand(1, 2, 2, 2), torch.tensor([0.45, 0.6]))
    assert both.sum((-1, -2)).flatten().tolist() == [1, 2]


def test_ratio_of_max_and_threshold():
    s = row(8, 4, 1, 0, -INF)
    assert picked(select.ratio_of_max(s, 0.5)) == [0, 1]
    assert picked(select.ratio_of_max(s, 0.0)) == [0, 1, 2, 3]
    assert not select.ratio_of_max(row(-INF, -INF), 0.0).any()
    assert picked(select.threshold(s, 1.0)) == [0, 1, 2]
    assert picked(select.threshold(s, -INF)) == [0, 1, 2, 3]
    both = select.ratio_of_max(s.expand(1, 2, 1, 5), torch.tensor([0.5, 0.1]))
    assert both.sum(-1).flatten().tolist() == [2, 3]


def test_force_by_hand():
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    call = call_of(32)
    found = select.force(nothing, call, (8, 8), sink=1, local=2)[0, 0].int().tolist()
    assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    found = select.force(nothing, call, (8, 8), sink=0, local=1, last=1)[0, 0].int().tolist()
    assert found == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]
    # The future is taken out, whoever put it in.
    found = select.force(~nothing, call, (8, 8), sink=0, local=0)[0, 0].int().tolist()
    assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # Sinks of a padded sequence begin with its first token.
    mask = torch.arange(32)[None] >= 10
    call = replace(call, key_mask=mask)
    found = select.force(nothing, call, (8, 8), sink=1, local=0)[0, 0].int().tolist()
    assert found == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    # Without causality local blocks lie on both sides.
    call = call_of(32, causal=False)
    found = select.force(nothing, call, (8, 8), sink=0, local=2)[0, 0].int().tolist()
    assert found == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    # A chunk that begins inside a block.
    call = call_of(16, q_start=12)
    found = select.force(nothing[:, :, :2], call, (8, 8), sink=0, local=1)[0, 0].int().tolist()
    assert found == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 2, 1)])
def test_no_row_is_left_without_a_key(name, size, keep):
    call = case(name)
    sink, local, last = keep
    visible = visible_by_hand(call, size)
    g = torch.Generator().manual_seed(1)
    for share in (0.0, 0.2):
        random = torch.rand(visible.shape, generator=g) < share
        mask = select.force(random, call, size, sink=sink, local=local, last=last)
        assert not (mask & ~visible).any()
        assert not (random & visible & ~mask).any()
        tokens = mask.repeat_interleave(size[0], 2)[:, :, : call.n_q]
        tokens = tokens.repeat_interleave(size[1], 3)[..., : call.n_k]
        ok = seen(call)
        assert torch.equal((tokens & ok).any(-1), ok.any(-1))
        if local and call.k_pos is None:
            own = torch.arange(call.n_q)[:, None] + call.q_start == torch.arange(call.n_k)
            assert not (own & ok & ~tokens).any()
        if last:
            assert torch.equal(mask[:, :, -last:], visible[:, :, -last:])


def test_lines_by_hand():
    call = call_of(32)
    columns = torch.tensor([0, 1, 0, 0]).bool().view(1, 1, 4)
    offsets = torch.tensor([1, 0, 1, 0]).bool().view(1, 1, 4)
    found = select.lines(call, columns, offsets, (8, 8))[0, 0].int().tolist()
    assert found == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]]
    # Rows 12 … 19 lie in block rows 1 and 2.
    found = select.lines(call_of(8, q_start=12), columns[..., :3] & False, offsets, (8, 8))
    assert found[0, 0].int().tolist() == [[1, 1, 1]]
    with pytest.raises(UnsupportedConfigurationError, match="goes by positions"):
        select.lines(call_of(32, causal=False), columns, offsets, (8, 8))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("not causal", "permuted keys")])
@pytest.mark.parametrize("size", SIZES)
def test_vertical_slash_covers_every_line_once(name, size):
    call = case(name)
    heads, g = len(call.heads), torch.Generator().manual_seed(2)
    n = call.n_k
    columns = torch.randint(-1, n, (2, heads, 12), generator=g)
    offsets = torch.randint(-1, n, (2, heads, 4), generator=g)
    blocks_, singles = select.vertical_slash(call, columns, offsets, size)
    listed = blocks_.to_mask(-(-n // size[1])).repeat_interleave(size[1], 3)[..., :n]
    alone = singles.to_mask(n)
    assert int(singles.count.sum()) == int(alone.sum())  # no key twice in a list
    assert not (listed & alone).any()  # nor in both pieces
    tokens = (listed | alone).repeat_interleave(size[0], 2)[:, :, : call.n_q]
    rows, keys = call.q_start + torch.arange(call.n_q)[:, None], torch.arange(n)
    wanted = torch.zeros(2, heads, call.n_q, n, dtype=torch.bool)
    for b in range(2):
        for h in range(heads):
            for c in columns[b, h].tolist():
                wanted[b, h] |= (keys == c) & (c >= 0)
            for o in {0, *offsets[b, h].tolist()} - {-1}:
                wanted[b, h] |= rows - keys == o
    assert not (wanted & seen(call) & ~tokens).any()
    limit = torch.stack([rows[r].max() for r in blocks(call.n_q, size[0])])
    assert not (alone & (keys > limit[:, None])).any()  # no column from the tile's future


def test_vertical_slash_is_as_sparse_as_its_lines():
    call = call_of(64)
    columns, offsets = torch.tensor([[[3, 3, 40]]]), torch.tensor([[[32]]])
    b, c = select.vertical_slash(call, columns, offsets, (8, 8))
    assert [b.to_mask(8)[0, 0, t].nonzero().flatten().tolist() for t in (0, 4, 7)] == [
        [0], [0, 4], [3, 7],
    ]  # fmt: skip
    assert [c.to_mask(64)[0, 0, t].nonzero().flatten().tolist() for t in (0, 1, 4, 5, 6)] == [
        [], [3], [], [3], [3, 40],
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [*SIZES, (32, 1)])
def test_density_counts_pairs(name, size):
    call = case(name)
    g = torch.Generator().manual_seed(3)
    nq, nk = call.tiles(size)
    mask = torch.rand(2, len(call.heads), nq, nk, generator=g) < 0.3
    other = (torch.rand(mask.shape, generator=g) < 0.2) & ~mask
    ok = seen(call)

    def share(m):
        tokens = m.repeat_interleave(size[0], 2)[:, :, : call.n_q]
        tokens = tokens.repeat_interleave(size[1], 3)[..., : call.n_k]
        return (tokens & ok).sum((0, 2, 3)) / ok.sum((0, 2, 3))

    index = BlockIndex.from_mask(mask, size)
    close(select.density(index, call), share(mask), atol=1e-6)
    close(
        select.density((index, BlockIndex.from_mask(other, size)), call),
        share(mask | other),
        atol=1e-6,
    )
    dense = BlockIndex.dense(len(call.heads), nq, size, torch.device("cpu"))
    close(select.density(dense, call), torch.ones(len(call.heads)))
    whole = BlockIndex.from_mask(select.visible_blocks(call, size).expand_as(mask), size)
    close(select.density(whole, call), torch.ones(len(call.heads)))


def test_density_refuses_an_index_of_another_call():
    index = BlockIndex.dense(2, 4, (8, 8), torch.device("cpu"))
    with pytest.raises(InvalidInputError, match="heads"):
        select.density(index, call_of(32))


def test_recall():
    call = case("grouped")
    mass = scores.block_mass(call, None, (32, 16))
    close(select.recall(torch.ones_like(mass).bool(), mass), torch.ones(4))
    mask = torch.zeros_like(mass).bool()
    mask[..., 0] = True
    p = dense_softmax(call)[..., :16].sum(-1)
    by_hand = torch.stack([p[:, :, r].mean(2) for r in blocks(call.n_q, 32)], -1).mean((0, 2))
    close(select.recall(mask, mass), by_hand)


def test_compact_is_from_mask():
    mask = random_scores() > 1
    found, expected = select.compact(mask, (8, 8)), BlockIndex.from_mask(mask, (8, 8))
    assert torch.equal(found.to_mask(9), mask)
    assert torch.equal(found.count, expected.count)


@pytest.mark.parametrize("name", NAMES)
def test_full_budget_is_dense(name):
    call, size = case(name), (32, 16)
    visible = visible_by_hand(call, size)
    p = select.probabilities(scores.pooled(call, size))
    for mask in (
        select.top_p(p, 1.0),
        select.global_top_p(p, 1.0),
        select.top_k(p, 1.0),
        select.ratio_of_max(scores.rows_by_block_mean(call, size), 0.0),
        select.top_p(scores.strided(call, 8, size), 1.0),
        select.threshold(scores.pooled(call, size), -INF),
    ):
        assert torch.equal(mask, visible)


def test_the_least_share_is_of_level_0_whatever_the_ends():
    """One block holds all energy, so every end stops behind it; half of the row stays exact."""
    scores = torch.tensor([8.0, 0.1, 0.01, 0.0]).view(1, 1, 1, 4)
    found = select.levels(scores, (0.5, 0.6, 0.7), by_energy=True, least=0.5)
    assert found.flatten().tolist() == [0, 0, -1, -1]

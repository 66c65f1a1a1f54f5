"""Estimators against the same numbers taken from dense attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from score_cases import (
    NAMES,
    blocks,
    case,
    close,
    dense_logits,
    dense_softmax,
    seen,
    visible_by_hand,
    voting,
)

from accelkit.errors import InvalidInputError, UnsupportedConfigurationError
from accelkit.kernels import scores
from accelkit.kernels.index import plain_inputs

INF = float("inf")
SIZE = (32, 16)


def means(x, keep, size):
    """Mean of the kept tokens of each block, [B, H, nb, D]."""
    out = []
    for b in blocks(x.shape[2], size):
        w = keep[:, :, b, None].float()
        out.append((x[:, :, b] * w).sum(2) / w.sum(2).clamp(min=1))
    return torch.stack(out, 2)


def real_keys(call):
    ok = torch.ones(call.q.shape[0], len(call.heads), call.n_k, dtype=torch.bool)
    return ok if call.key_mask is None else ok & call.key_mask[:, None]


def test_pool_divides_the_last_block_by_its_true_length():
    x = torch.arange(10.0).view(1, 10, 1)
    close(scores.pool(x, 4).flatten(), torch.tensor([1.5, 5.5, 8.5]))
    keep = torch.tensor([True] * 5 + [False] * 5)
    close(scores.pool(x, 4, mask=keep).flatten(), torch.tensor([1.5, 4.0, 0.0]))


@pytest.mark.parametrize("name", NAMES)
def test_pooled(name):
    call = case(name)
    q = means(call.q[:, list(call.heads)], voting(call), SIZE[0])
    k = means(call.k[:, call.kv_of_head], real_keys(call), SIZE[1])
    expected = (q @ k.transpose(-1, -2) * call.scale).masked_fill(
        ~visible_by_hand(call, SIZE), -INF
    )
    close(scores.pooled(call, SIZE), expected)


def test_self_similarity_is_the_mean_of_the_gram_matrix():
    x = torch.randn(2, 3, 70, 8)
    unit = torch.nn.functional.normalize(x, dim=-1)
    gram = [
        (unit[:, :, b] @ unit[:, :, b].transpose(-1, -2)).mean((-1, -2)) for b in blocks(70, 32)
    ]
    close(scores.self_similarity(x, 32), torch.stack(gram, -1))
    keep = torch.arange(70) < 40
    unit = unit[:, :, 32:40]
    close(
        scores.self_similarity(x, 32, keep)[..., 1],
        (unit @ unit.transpose(-1, -2)).mean((-1, -2)),
    )
    same = torch.ones(1, 1, 64, 4)
    close(scores.self_similarity(same, 32), torch.ones(1, 1, 2))
    # The common part does not count when the mean is removed.
    assert scores.self_similarity(x + 100, 32, center=True).mean() < 0.2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [24, 1, 400])
def test_probe(name, rows):
    call = case(name)
    p, votes = dense_softmax(call), voting(call)
    batch, heads = p.shape[:2]
    columns = torch.zeros(batch, heads, call.n_k)
    diagonals = torch.zeros(batch, heads, call.n_k)
    for b in range(batch):
        last = votes[b, 0].nonzero().flatten()[-rows:].tolist()
        for h in range(heads):
            for r in last:
                columns[b, h] += p[b, h, r] / len(last)
                pos = torch.arange(call.n_k) if call.k_pos is None else call.k_pos[b, h].long()
                offset = call.q_start + r - pos
                ok = (offset >= 0) & (offset < call.n_k)
                diagonals[b, h].index_add_(0, offset[ok], p[b, h, r][ok] / len(last))
    found = scores.probe(call, rows)
    close(found.columns, columns)
    close(found.diagonals, diagonals)
    close(found.columns.sum(-1), torch.ones(batch, heads))
    if call.causal:
        close(found.diagonals.sum(-1), torch.ones(batch, heads))
    expected = torch.stack([columns[..., b].sum(-1) for b in blocks(call.n_k, 16)], -1)
    close(found.blocks(16), expected)


def test_a_diagonal_lands_on_its_offset():
    """Queries that copy the key 7 back."""
    k = torch.eye(40).view(1, 1, 40, 40) * 30
    q = torch.zeros(1, 1, 40, 40)
    q[:, :, 7:] = k[:, :, :-7]
    found = scores.probe(plain_inputs(q, k, k, causal=True, scale=1.0), rows=16)
    assert found.diagonals[0, 0].argmax() == 7
    assert found.diagonals[0, 0, 7] > 0.99
    assert found.offset_blocks(4)[0, 0].argmax() == 1


@pytest.mark.parametrize("name", NAMES)
def test_pooled_probe(name):
    call = case(name)
    found = scores.pooled_probe(call, 24, 16)
    votes = voting(call)
    k = means(call.k[:, call.kv_of_head], real_keys(call), 16)
    for b in range(2):
        last = votes[b, 0].nonzero().flatten()[-24:]
        q = call.q[b, list(call.heads)][:, last].mean(1)
        s = torch.einsum("hd,hnd->hn", q, k[b]) * call.scale
        ok = torch.stack([seen(call)[b, :, last[-1], c].any(-1) for c in blocks(call.n_k, 16)], -1)
        close(found[b], s.masked_fill(~ok, -INF))


@pytest.mark.parametrize("name", NAMES)
def test_rows_by_block_mean(name):
    call, (bq, bk) = case(name), SIZE
    k = means(call.k[:, call.kv_of_head], real_keys(call), bk)
    s = call.q[:, list(call.heads)] @ k.transpose(-1, -2) * call.scale
    ok = torch.stack([seen(call)[..., c].any(-1) for c in blocks(call.n_k, bk)], -1)
    s = s.masked_fill(~(ok & voting(call)[..., None]), -INF)
    expected = []
    for r in blocks(call.n_q, bq):
        top = s[:, :, r].amax((-1, -2), keepdim=True).clamp(min=-1e30)
        expected.append((s[:, :, r] - top).exp().sum(2))
    expected = torch.stack(expected, 2).masked_fill(~visible_by_hand(call, SIZE), -INF)
    close(scores.rows_by_block_mean(call, SIZE), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [4, 8])
def test_strided(name, stride):
    call, (bq, bk) = case(name), SIZE
    q, k = call.q[:, list(call.heads)], call.k[:, call.kv_of_head] * real_keys(call)[..., None]
    nqc, nkc = -(-call.n_q // stride), -(-call.n_k // stride)
    s = torch.zeros(*q.shape[:2], nqc, nkc)
    for i in range(nqc):
        for j in range(nkc):
            for t in range(stride):
                r, c = i * stride + stride - 1 - t, j * stride + t
                if r < call.n_q and c < call.n_k:
                    s[:, :, i, j] += (q[:, :, r] * k[:, :, c]).sum(-1) * call.scale / stride
    ok = seen(call) & voting(call)[..., None]
    ok = torch.stack([ok[..., c].any(-1) for c in blocks(call.n_k, stride)], -1)
    ok = torch.stack([ok[:, :, r].any(2) for r in blocks(call.n_q, stride)], 2)
    p = s.masked_fill(~ok, -INF).softmax(-1).nan_to_num(0.0)
    p = torch.stack([p[..., c].sum(-1) for c in blocks(nkc, bk // stride)], -1)
    p = torch.stack([p[:, :, r].sum(2) for r in blocks(nqc, bq // stride)], 2)
    close(scores.strided(call, stride, SIZE), p.masked_fill(~visible_by_hand(call, SIZE), -INF))


def test_strided_in_small_chunks(monkeypatch):
    from accelkit.kernels import scores_blocks

    call = case("grouped")
    whole = scores.strided(call, 8, SIZE), scores.rows_by_block_mean(call, SIZE)
    monkeypatch.setattr(scores_blocks, "CHUNK_TOKENS", 1)
    close(scores.strided(call, 8, SIZE), whole[0])
    close(scores.rows_by_block_mean(call, SIZE), whole[1])
    with pytest.raises(InvalidInputError, match="divide"):
        scores.strided(call, 12, SIZE)
    with pytest.raises(InvalidInputError, match="int4"):
        scores.strided(call, 8, SIZE, "int4")


@pytest.mark.parametrize("name", ["grouped", "left padding", "permuted keys"])
def test_strided_of_int8_cells_is_near(name):
    call = case(name)
    exact, found = scores.strided(call, 8, SIZE), scores.strided(call, 8, SIZE, "int8")
    seen = exact != -INF
    assert torch.equal(seen, found != -INF)
    assert 0 < (found - exact)[seen].abs().sum() < 0.01 * exact[seen].sum()


@pytest.mark.parametrize("name", NAMES)
def test_block_mass(name):
    call = case(name)
    p, lse = dense_softmax(call), dense_logits(call).logsumexp(-1)
    votes = voting(call)[..., None]
    expected = []
    for r in blocks(call.n_q, SIZE[0]):
        m = (p[:, :, r] * votes[:, :, r]).sum(2) / votes[:, :, r].sum(2).clamp(min=1)
        expected.append(torch.stack([m[..., c].sum(-1) for c in blocks(call.n_k, SIZE[1])], -1))
    expected = torch.stack(expected, 2)
    close(scores.block_mass(call, None, SIZE), expected)
    close(scores.block_mass(call, lse, SIZE, rows=[3, 1]), expected[:, :, [3, 1]])


STRIPED = [n for n in NAMES if n not in ("not causal", "permuted keys")]


@pytest.mark.parametrize("name", STRIPED)
def test_stripes(name):
    """Block 16, superblock 64: ranges disjoint and complete, also for a chunk in the middle."""
    call, b, sup = case(name), 16, 64
    s, votes = dense_logits(call), voting(call)
    row = call.q_start + torch.arange(call.n_q)
    key = torch.arange(call.n_k)
    begin = (row // sup * sup)[:, None]
    anchor_keys = (key < b) | (key >= begin)
    top = s.masked_fill(~anchor_keys, -INF).amax(-1)
    ok = (top > -INF) & votes
    expected = torch.stack(
        [
            torch.where(
                ok[:, :, r].any(-1),
                torch.where(ok[:, :, r], top[:, :, r], 0.0).sum(-1)
                / ok[:, :, r].sum(-1).clamp(min=1),
                INF,
            )
            for r in blocks(call.n_q, b)
        ],
        -1,
    )
    anchor = scores.anchor_max(call, b, sup)
    close(anchor, expected)
    theta = torch.linspace(0.5, 3, len(call.heads))
    mask = scores.stripes(call, anchor, theta, b, sup)
    q = means(call.q[:, list(call.heads)], votes, b)
    near = q @ call.k[:, call.kv_of_head].transpose(-1, -2) * call.scale + theta[:, None, None]
    near = near >= expected[..., None]
    for i, r in enumerate(blocks(q.shape[2], sup // b)):
        between = (key >= b) & (key < call.q_start + i * sup)
        by_hand = near[:, :, r].any(2) & between & real_keys(call)
        assert torch.equal(mask[:, :, i], by_hand)
        # Each key has exactly one owner: anchor piece, scan, or the future.
        assert torch.equal(between, ~anchor_keys[i * sup] & (key < call.q_start + i * sup))
    assert mask.any()


def test_stripes_refuse_what_has_no_ranges():
    call = case("permuted keys")
    with pytest.raises(UnsupportedConfigurationError, match="k_pos"):
        scores.anchor_max(call)
    call = replace(case("grouped"), q_start=8)
    with pytest.raises(InvalidInputError, match="q_start"):
        scores.stripes(call, torch.zeros(2, 4, 5), 1.0, 16, 64)


@pytest.mark.parametrize("name", STRIPED)
def test_tile_top_k(name):
    call, tile, k = case(name), 32, 20
    p = dense_softmax(call) * voting(call)[..., None]
    index = scores.tile_top_k(call, tile, k)
    mask = index.to_mask(call.n_k)
    assert index.size == (tile, 1)
    assert int(index.count.sum()) == int(mask.sum())  # no key twice
    for slot, kv in enumerate(call.kv_of_head.tolist()):
        group = [s for s, other in enumerate(call.kv_of_head.tolist()) if other == kv]
        for t, r in enumerate(blocks(call.n_q, tile)):
            before = call.q_start + t * tile
            mass = p[:, group][:, :, r].sum((1, 2))[:, :before]
            for b in range(2):
                real = real_keys(call)[b, slot]
                allowed = min(k, int(real[:before].sum()))
                chosen = mask[b, slot, t, :before]
                assert chosen.sum() == allowed
                assert not (chosen & ~real[:before]).any()
                best = mass[b].masked_fill(~real[:before], -1).topk(allowed).values
                close(mass[b][chosen].sum(), best.sum())
                mine = mask[b, slot, t, before:]
                assert int(mine.sum()) == int(real[before : before + tile].sum())


def test_tile_top_k_rolls_with_the_past():
    call = case("grouped")
    index = scores.tile_top_k(call, 32, 0.5, least=8)
    assert index.count[0, 0].tolist() == [32, 48, 64, 80, 86]
    lse = dense_logits(call).logsumexp(-1)
    again = scores.tile_top_k(call, 32, 0.5, least=8, lse=lse)
    assert torch.equal(index.to_mask(call.n_k), again.to_mask(call.n_k))


def test_heads_of_a_group_share_one_list():
    call = case("grouped")
    mask = scores.tile_top_k(call, 32, 16).to_mask(call.n_k)
    assert torch.equal(mask[:, 0], mask[:, 1])
    assert torch.equal(mask[:, 2], mask[:, 3])
    assert not torch.equal(mask[:, 0], mask[:, 2])


@pytest.mark.parametrize("name", ["grouped", "chunk"])
def test_half_inputs_give_fp32_scores(name):
    exact, call = case(name), case(name, dtype=torch.bfloat16)
    for found, expected in (
        (scores.pooled(call, SIZE), scores.pooled(exact, SIZE)),
        (scores.rows_by_block_mean(call, SIZE), scores.rows_by_block_mean(exact, SIZE)),
        (scores.strided(call, 8, SIZE), scores.strided(exact, 8, SIZE)),
        (scores.probe(call, 24).columns, scores.probe(exact, 24).columns),
        (scores.block_mass(call, None, SIZE), scores.block_mass(exact, None, SIZE)),
    ):
        assert found.dtype == torch.float32
        close(found, expected, atol=0.12, rtol=0.05)

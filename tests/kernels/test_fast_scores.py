"""Triton estimators and selectors against their torch twins, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from score_cases import case, close, dense_logits

from accelkit.kernels import scores, select, select_stats
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.positions import groups as kv_groups
from accelkit.kernels.positions import key_places, visible_blocks
from accelkit.kernels.scores_keys import probe_rows

pytest.importorskip("triton")
if not torch.cuda.is_available():
    import os

    pytestmark = [
        pytest.mark.interpreter,
        pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="no interpreter"),
    ]

from accelkit.kernels._triton import nucleus as fast_nucleus
from accelkit.kernels._triton import scores as fast
from accelkit.kernels._triton import select as fast_select
from accelkit.kernels._triton import strided as fast_strided
from accelkit.kernels._triton import stripes as fast_stripes
from accelkit.kernels._triton import tile_top as fast_top

INF = float("inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = ["grouped", "chunk", "some heads", "not causal"]
SIZE = (32, 16)


def small(name, **more):
    return case(name, n=70, device=DEVICE, **more)


@pytest.mark.parametrize("name", ["some heads", "left padding", "permuted keys"])
def test_pool(name):
    call = small(name)
    found = fast.pool(call.q, 24, call.heads)
    close(found, scores.pool(call.q[:, list(call.heads)], 24))
    places = key_places(call)
    if name == "permuted keys":
        places = torch.where(places % 5 == 0, -1, places)
        call = replace(call, k_pos=places)
    found = fast.pool(call.k, 16, call.kv_of_head, places)
    close(found, scores.pool(call.k[:, call.kv_of_head], 16, mask=places >= 0))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", [SIZE, (24, 8)])
def test_rows_by_block_mean(name, size):
    call = small(name)
    found = fast.rows_by_block_mean(call, size, scores.pool_keys(call, size[1]))
    found = found.masked_fill(~visible_blocks(call, size), -INF)
    close(found, scores.rows_by_block_mean(call, size))


@pytest.mark.parametrize("name", ["grouped", "chunk", "some heads", "left padding"])
def test_probe(name, monkeypatch):
    call = small(name)
    expected = scores.probe(call, 24)
    for scratch in (2**20, 1):  # all heads at once, then one at a time
        monkeypatch.setattr(fast, "SCRATCH_BYTES", scratch)
        columns, diagonals = fast.probe(call, *probe_rows(call, 24))
        close(columns, expected.columns)
        close(diagonals, expected.diagonals)


def test_probe_of_right_padding():
    call = small("right padding")
    columns, diagonals = fast.probe(call, *probe_rows(call, 24))
    expected = scores.probe(call, 24)
    close(columns, expected.columns)
    close(diagonals, expected.diagonals)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("stride", "size"), [(8, SIZE), (4, (16, 16))])
def test_strided(name, stride, size, monkeypatch):
    call = small(name)
    expected = scores.strided(call, stride, size)
    tile = (16, 16, 16, 4, 2)
    for scratch in (2**20, 1):
        monkeypatch.setattr(fast_strided, "SCRATCH_BYTES", scratch)
        close(fast_strided.strided(call, stride, size, tile), expected)


@pytest.mark.parametrize("name", ["grouped", "chunk", "some heads"])
@pytest.mark.parametrize("scratch", [2**20, 1])
def test_strided_of_int8_cells(name, scratch, monkeypatch):
    call = case(name, d=32, device=DEVICE)
    monkeypatch.setattr(fast_strided, "SCRATCH_BYTES", scratch)
    found = fast_strided.strided(call, 8, SIZE, (16, 16, 32, 4, 2), int8=True)
    expected = scores.strided(call, 8, SIZE, qk="int8")
    close(found, expected, atol=2e-3, rtol=2e-2)


def test_strided_fits():
    call = small("grouped")
    assert fast_strided.strided_fits(call, 8, (128, 128))
    assert fast_strided.strided_fits(call, 16, (64, 64))
    assert not fast_strided.strided_fits(call, 8, (96, 128))
    assert not fast_strided.strided_fits(call, 8, (128, 96))
    narrow = replace(call, q=call.q[..., :6].half(), k=call.k[..., :6].half())
    assert not fast_strided.strided_fits(narrow, 8, (128, 128))


@pytest.mark.parametrize("name", ["chunk", "some heads", "left padding", "right padding"])
def test_stripes(name):
    call, b, sup = small(name), 16, 32
    assert fast_stripes.anchor_fits(call, b, sup)
    anchor = scores.anchor_max(call, b, sup)
    close(fast_stripes.anchor_max(call, b, sup), anchor)
    mean = scores.pool_queries(call, b)
    found = fast_stripes.stripes(call, mean, anchor - 6.0, b, sup)
    assert torch.equal(found, scores.stripes(call, anchor, 6.0, b, sup))
    assert found.any()


def test_half_inputs():
    call = small("grouped", dtype=torch.float16)
    columns, _ = fast.probe(call, *probe_rows(call, 24))
    close(columns, scores.probe(call, 24).columns, atol=2e-3, rtol=2e-2)
    found = fast_strided.strided(call, 8, SIZE)
    close(found, scores.strided(call, 8, SIZE), atol=2e-3, rtol=2e-2)


def random_scores(n=24):
    g = torch.Generator().manual_seed(0)
    s = torch.randint(0, 9, (2, 2, 3, n), generator=g) / 4
    s = torch.where(torch.rand(s.shape, generator=g) < 0.3, s + torch.rand(s.shape, generator=g), s)
    return s.masked_fill(torch.rand(s.shape, generator=g) < 0.3, -INF).to(DEVICE)


def test_prefix_by_number():
    s = random_scores()
    s[0, 0, 0] = -INF
    for k in (0, 7):
        number = torch.full((2, 2, 3, 1), float(k), device=DEVICE)
        number = torch.minimum(number, (s > -INF).sum(-1, keepdim=True).float())
        assert torch.equal(fast_select.prefix(s, number, False), select.top_k(s, k))
    # Negative scores too.
    assert torch.equal(fast_select.prefix(s - 1, number * 0 + 5, False), select.top_k(s - 1, 5))


def test_prefix_by_mass():
    p = select.probabilities(random_scores())
    total = p.clamp(min=0).sum(-1, keepdim=True)
    for share in (0.0, 0.77):
        assert torch.equal(fast_select.prefix(p, share * total, True), select.top_p(p, share))


def test_long_prefix():
    p = select.probabilities(random_scores()).flatten(2)[:, :, None]
    total = p.clamp(min=0).sum(-1, keepdim=True)
    for share in (0.0, 0.77):
        found = fast_select.long_prefix(p, share * total)
        assert torch.equal(found, select.global_top_p(p, share))


@pytest.mark.parametrize("share", [0.6, torch.tensor([0.0, 0.3, 1.0])])
def test_nucleus(share):
    """What is kept comes on top, what nobody sees never; odd keys have no say."""
    torch.manual_seed(1)
    logits = 3 * torch.randn(2, 3, 5, 40, device=DEVICE)
    logits[..., 30:] = -INF
    keys, rows = (torch.rand(2, 3, n, device=DEVICE) < 0.1 for n in (40, 5))
    kept = torch.rand(1, 1, 5, 40, device=DEVICE) < 0.05
    given = (keys, rows, kept, (16, 16))
    most = share.to(DEVICE) if isinstance(share, torch.Tensor) else torch.tensor([share]).to(DEVICE)
    found = fast_nucleus.nucleus(logits, most, *given).to_mask(40)
    judged = select.probabilities(logits.masked_fill(keys[..., None, :], -INF))
    expected = select.top_p(judged, share) | keys[..., None, :] | rows[..., None] | kept
    expected &= logits != -INF
    assert torch.equal(found, expected)
    assert torch.equal(select.nucleus(logits.cpu(), share, *(g.cpu() for g in given[:3]), given[3])
                       .to_mask(40), expected.cpu())  # fmt: skip
    assert 0.05 < found.float().mean() < 0.9


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", [(24, 8), (16, 32), (32, 1)])
def test_listed_pairs(name, size):
    call = small(name)
    nq, nk = call.tiles(size)
    g = torch.Generator().manual_seed(3)
    mask = (torch.rand(2, len(call.heads), nq, nk, generator=g) < 0.3).to(DEVICE)
    pairs = select.pair_counts(call, size)
    found = fast_select.listed_pairs(BlockIndex.from_mask(mask, size), call, call.n_k)
    assert torch.equal(found, (mask * pairs).sum(-1))
    dense = BlockIndex.dense(len(call.heads), nq, size, mask.device)
    found = fast_select.listed_pairs(dense, call, call.n_k)
    assert torch.equal(found, pairs.sum(-1).expand(1, len(call.heads), nq))
    assert int(found[0, 0].sum()) == select_stats._visible_pairs(call)


@pytest.mark.parametrize("n", [5, 40])
def test_compact(n):
    mask = random_scores(n) > 1
    mask[1, 1, 2] = False
    found, expected = fast_select.compact(mask, (8, 8)), BlockIndex.from_mask(mask, (8, 8))
    assert torch.equal(found.count, expected.count)
    assert torch.equal(found.start, expected.start)
    assert torch.equal(found.to_mask(n), mask)


@pytest.mark.parametrize(
    ("name", "tile", "share"),
    [("chunk", 32, 0.3), ("some heads", 24, 9), ("grouped", 64, 0.5)],
)
def test_tile_top_k(name, tile, share, monkeypatch):
    call = small(name)
    expected = scores.tile_top_k(call, tile, share, least=5)
    found = kv_groups(call)
    before = [call.q_start + t * tile for t in range(-(-call.n_q // tile))]
    take = [
        min(b, share if isinstance(share, int) else max(5, -int(-share * b // 1))) for b in before
    ]
    lse = dense_logits(call).logsumexp(-1)
    for scratch, known in ((2**20, None), (1, lse)):
        monkeypatch.setattr(fast_top, "SCRATCH_BYTES", scratch)
        index = fast_top.tile_top_k(call, found, tile, take, known)
        for g, (_, slots) in enumerate(found):
            want = expected.to_mask(call.n_k)[:, slots[0]]
            assert torch.equal(index.to_mask(call.n_k)[:, g], want)
            assert torch.equal(index.count[:, g], expected.count[:, slots[0]])

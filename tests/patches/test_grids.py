"""Grids, orders and bands against plain loops."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accelkit.kernels import select
from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import Geometry, Span
from accelkit.patches.parts import bits, coarse, grids, orders, patterns
from accelkit.patches.parts.grids import Visual
from accelkit.patches.sites import attention

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import planted

CPU = torch.device("cpu")
BOXES = [(3, 5, 7), (1, 6, 9), (2, 4, 3), (7, 1, 1), (1, 1, 1)]


def start_of(i: int, length: int, w: int, s: int) -> int:
    """The five lines of the definition, for one position."""
    left, right = w // 2, w // 2 + w % 2 - 1
    leader = min((i // s) * s + s // 2, length - 1)
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return start


@pytest.mark.parametrize("length", [1, 5, 7, 12])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_neighbourhood_is_its_definition(length: int, dilation: int):
    for w, s in itertools.product(range(1, length // dilation + 1), range(1, 4)):
        if s > w:
            continue
        found = grids.neighbourhood(length, w, s, dilation)
        for i in range(length):
            size = len(range(i % dilation, length, dilation))
            start = start_of(i // dilation, size, min(w, size), s)
            keys = {i % dilation + dilation * (start + j) for j in range(min(w, size))}
            assert set(found[i].nonzero().flatten().tolist()) == keys


def test_windows_keep_their_size_at_the_borders():
    assert (grids.neighbourhood(9, 4).sum(-1) == 4).all()
    assert grids.neighbourhood(9, 5)[0].tolist() == [True] * 5 + [False] * 4


def test_tile_shares_count_pairs_of_tokens():
    grid, tile = (3, 5, 4), (2, 2, 3)
    axes = tuple(grids.neighbourhood(n, w) for n, w in zip(grid, (2, 3, 2), strict=True))
    number, _, count = grids.cells(grid, tile)
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    expected = torch.zeros(count, count)
    for i, j in itertools.product(range(len(places)), repeat=2):
        if all(axes[a][places[i, a], places[j, a]] for a in range(3)):
            expected[number[i], number[j]] += 1
    size = number.bincount(minlength=count).float()
    shares = grids.tile_shares(axes, tile)
    torch.testing.assert_close(shares, expected / (size[:, None] * size))
    assert grids.visited(axes, tile) == pytest.approx(float((expected > 0).float().mean()))


@pytest.mark.parametrize(("w", "s", "tile"), [(12, 4, 4), (8, 8, 4), (9, 3, 2), (5, 1, 4)])
def test_simulator(w: int, s: int, tile: int):
    """Visited key tiles from the first and the last query of a tile."""
    length = 24
    visits = []
    for t in range(0, length, tile):
        first = start_of(t, length, w, s) // tile
        last = math.ceil((start_of(t + tile - 1, length, w, s) + w) / tile)
        visits.append(last - first)
    share = sum(visits) / len(visits) / (length / tile)
    one = torch.ones(1, 1, dtype=torch.bool)
    axes = (grids.neighbourhood(length, w, s), one, one)
    assert grids.visited(axes, (tile, 1, 1)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("grid", "padded"),
    [
        ((21, 45, 80), 1.067), ((21, 30, 52), 1.055), ((31, 22, 40), 1.126), ((33, 45, 80), 1.067),
        ((13, 30, 45), 1.094), ((16, 44, 80), 1.0), ((28, 30, 53), 1.035), ((1, 64, 64), 1.0),
    ],
)  # fmt: skip
def test_fitted_tiles(grid: grids.Grid, padded: float):
    """Padded work ÷ tokens of the usual geometries."""
    tile = grids.fit_tile(grid)
    slots = 128 * math.prod(math.ceil(n / t) for n, t in zip(grid, tile, strict=True))
    assert slots / math.prod(grid) == pytest.approx(padded, abs=5e-4)
    assert math.prod(tile) <= 128


def all_orders(where: Visual, block: int = 16):
    yield from orders._axes(where)
    for chunk in ((2, *where.grid[1:]), (where.grid[0], 2, 3), (2, 3, 2)):
        yield orders._chunked(where, chunk)[0]
    yield orders._hilbert(where)[0]
    for tile, dilation in (((2, 2, 3), (1, 1, 1)), ((1, 2, 2), (1, 2, 3))):
        yield orders._tiled(where, tile, dilation, block)[0]


@pytest.mark.parametrize("grid", BOXES)
@pytest.mark.parametrize(("start", "tail"), [(0, 0), (3, 0), (0, 5), (2, 1)])
def test_orders_are_permutations(grid: grids.Grid, start: int, tail: int):
    """Every token once; holes only beside tiles; text keeps its places where there are none."""
    where = Visual(start, grid, start + math.prod(grid) + tail)
    for ids in all_orders(where):
        real = ids[ids >= 0]
        assert torch.equal(real.sort().values, torch.arange(where.tokens))
        if len(ids) == where.tokens:
            assert torch.equal(ids[:start], torch.arange(start))
            assert torch.equal(ids[where.stop :], torch.arange(where.stop, where.tokens))
            assert torch.equal(ids[ids.argsort()], torch.arange(where.tokens))


def test_axis_orders_undo_one_another():
    """Third and last are each other's inverse, the others their own."""
    where = Visual(0, (3, 3, 3), 27)
    tables = orders._axes(where)
    for i, inverse in enumerate((0, 1, 5, 3, 4, 2)):
        assert torch.equal(tables[i][tables[inverse]], torch.arange(27))


@pytest.mark.parametrize("slowest", [(0, 1, 2), (2, 0, 1)])
def test_cells_in_blocks(slowest: grids.Grid):
    """Against the order itself: the cells of the tokens of each block."""
    where, cell, block = Visual(3, (2, 4, 5), 3 + 40 + 2), (1, 2, 3), 8
    found = grids.cells_in_blocks(where, cell, (1, 1, 1), block, slowest)
    number, _, count = grids.cells(where.grid, cell)
    assert found.shape == (6, count) and count == 8
    for n, ids in enumerate(orders._chunked(where, cell, (1, 1, 1), slowest)[0].split(block)):
        visual = ids[(ids >= where.start) & (ids < where.stop)] - where.start
        assert found[n].nonzero().flatten().tolist() == number[visual].unique().tolist()


def test_tiles_read_in_the_fewest_runs():
    """All columns, 3 of 9 rows and one frame: columns are the fastest axis, frames the slowest."""
    axes = tuple(grids.neighbourhood(n, w) for n, w in ((8, 1), (9, 3), (4, 4)))
    assert grids.narrow_first(axes, (1, 1, 1)) == (0, 1, 2)
    assert grids.narrow_first(axes[::-1], (1, 1, 1)) == (2, 1, 0)


def test_a_tile_fills_a_block():
    where = Visual(3, (2, 4, 6), 3 + 48 + 2)
    ids = orders._tiled(where, (2, 2, 3), (1, 1, 1), 16)[0].view(-1, 16)
    assert (ids[0] >= 0).sum() == 3 and (ids[-1] >= 0).sum() == 2  # text has blocks of its own
    for block in ids[1:-1]:
        at = block[block >= 0] - 3
        box = torch.stack([at // 24, at % 24 // 6, at % 6])
        assert len(at) == 12 and ((box.amax(1) - box.amin(1)) == torch.tensor([1, 1, 2])).all()


@pytest.mark.parametrize("grid", [(21, 45, 80), (13, 30, 45), (1, 64, 64)])
def test_the_curve_keeps_neighbours_together(grid: grids.Grid):
    """Runs of 128 tokens are about as compact as the best tile, and no step is far."""
    ids = orders._hilbert(Visual(0, grid, math.prod(grid)))[0]
    at = torch.stack([ids // (grid[1] * grid[2]), ids // grid[2] % grid[1], ids % grid[2]], -1)
    assert (at[1:] - at[:-1]).abs().sum(-1).max() <= 2
    runs = at[: len(at) // 128 * 128].view(-1, 128, 3).float()
    rms = (runs - runs.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    assert rms.mean() < (5.5 if grid[0] == 1 else 3.0)


@pytest.mark.parametrize(("start", "tail"), [(0, 0), (5, 0), (0, 3)])
@pytest.mark.parametrize("unit", [(16, 16), (4, 8)])
def test_frame_bands(start: int, tail: int, unit: tuple[int, int]):
    grid, widths = (4, 3, 5), [15, 2, -1, 0]
    where = Visual(start, grid, start + 60 + tail)
    frame = (torch.arange(60) // 15, torch.arange(60) % 15)
    distance = (frame[0][:, None] - frame[0]).abs()
    pairs = (frame[1][:, None] - frame[1]).abs() <= torch.tensor(widths)[distance]
    whole = torch.zeros(where.tokens, where.tokens)
    whole[start : start + 60, start : start + 60] = pairs.float()
    real = torch.zeros_like(whole)
    real[start : start + 60, start : start + 60] = 1

    def blocks(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % unit[1], 0, -x.shape[0] % unit[0]))
        return x.unflatten(1, (-1, unit[1])).sum(-1).unflatten(0, (-1, unit[0])).sum(1)

    for least in (0.0, 1 / 3):
        expected = blocks(whole) > least * blocks(real)
        assert torch.equal(grids.frame_bands(where, widths, unit, least), expected)


def test_half_width():
    """A band of that half width holds the density; the widths in frames of two usual videos."""
    n, w = 2000, grids.half_width(2000, 0.3)
    at = torch.arange(n)
    assert ((at[:, None] - at).abs() < w).float().mean() == pytest.approx(0.3, abs=2e-3)
    assert grids.half_width(75600, 0.3) / 3600 == pytest.approx(3.43, abs=0.01)
    hunyuan = 33 * 3600 + 256
    assert grids.half_width(hunyuan, 0.25 - 512 / hunyuan) / 3600 == pytest.approx(4.35, abs=0.01)


def test_where_visual_tokens_lie():
    call = planted.video(text_first=True)
    assert grids.visual(call) == Visual(planted.TEXT, planted.GRID, call.n_k)
    assert grids.visual(replace(call, causal=True)) is None
    assert grids.visual(replace(call, geometry=Geometry())) is None
    assert grids.visual(replace(call, q=call.q[:, :, 5:])) is None
    other = Geometry((Span("video", 0, 7),), planted.GRID)
    assert grids.visual(replace(call, geometry=other)) is None


def small_call(start: int, tail: int):
    grid = (3, 4, 5)
    n = start + 60 + tail
    q, k, v = planted.noise(n)
    call = planted.video_call(q, k, v, grid)
    spans = (Span("text", 0, start), Span("video", start, start + 60), Span("text", start + 60, n))
    return replace(call, geometry=Geometry(spans, grid)), Visual(start, grid, n)


@pytest.mark.parametrize(("start", "tail"), [(0, 0), (9, 0), (0, 7), (3, 4)])
def test_all_blocks_in_any_order_are_dense(start: int, tail: int):
    """Every permutation and every tile with its holes, in lists and as dense heads."""
    call, where = small_call(start, tail)
    expected = planted.dense(call)
    for ids in all_orders(where):
        made = orders.shared(call, ids[None].int())
        made = replace(made, whole=len(ids) == where.tokens)
        seen = attention.in_kernel_order(call, made)
        listed = patterns.listed(select.visible_blocks(seen, (16, 16)), seen, (16, 16))
        for index in (patterns.dense(seen, (16, 16)), listed):
            found = attention.Answer(seen, (index,), order=made, n_q=call.n_q)
            torch.testing.assert_close(attention.compute(found).out, expected, atol=1e-4, rtol=1e-4)


def test_heads_may_differ_in_their_order():
    call, where = small_call(4, 3)
    tables = orders.axes(where, CPU)
    made = orders.Order(tables, tables, torch.tensor([5, 0, 2, 4]), whole=True)
    seen = attention.in_kernel_order(call, made)
    index = BlockIndex.from_mask(torch.ones(1, 4, 5, 5, dtype=torch.bool), (16, 16))
    found = attention.Answer(seen, (index,), order=made, n_q=call.n_q)
    torch.testing.assert_close(
        attention.compute(found).out, planted.dense(call), atol=1e-4, rtol=1e-4
    )


def test_a_common_order_is_gathered_once():
    """Two groups of heads read the same rows."""
    call, where = small_call(0, 0)
    made = orders.transposed(call, where)
    some = [attention.in_kernel_order(call.take(h), orders.transposed(call.take(h), where))
            for h in ((0, 2), (1, 3))]  # fmt: skip
    assert some[0].q.data_ptr() == some[1].q.data_ptr()
    assert some[0].k.data_ptr() == some[1].k.data_ptr()
    assert made.q_table is orders.transposed(call, where).q_table


def test_bits_come_back():
    mask = torch.rand(2, 3, 5, 21, generator=torch.Generator().manual_seed(0)) > 0.6
    assert bits.pack(mask).shape[-1] == 3
    assert torch.equal(bits.unpack(bits.pack(mask), 21), mask)


def test_coarse_maps():
    """A row of cells sums to one in each order, and the map in raster order is the mean mass."""
    call, where = small_call(0, 0)
    p = planted.probabilities(call)
    lse = (call.q @ call.k[:, call.kv_of_head].transpose(-1, -2) * call.scale).logsumexp(-1)
    maps = coarse.maps(call, lse, where, cells=10, rows=60)
    assert maps.shape == (6, 4, 10, 10)
    torch.testing.assert_close(maps.sum(-1), torch.ones(6, 4, 10))
    expected = p[0].unflatten(2, (10, 6)).sum(-1).unflatten(1, (10, 6)).mean(2)
    torch.testing.assert_close(maps[0], expected, atol=1e-5, rtol=1e-5)

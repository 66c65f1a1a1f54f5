"""Key pyramids: all levels in one read of keys or values, from scores to lists in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels import pyramid
from accelkit.kernels._triton.select import (
    greatest,
    order_key,
    reaching,
    starts,
    thresholds,
    warps_of,
)
from accelkit.kernels._triton.tile import next_power_of_two, table
from accelkit.kernels.index import BlockIndex

_GROUPS = 16
"""Groups of eight tokens that a program averages."""


@triton.jit
def _row(
    X, ORDER, first, j: tl.constexpr, s_xn, n, group, d, D: tl.constexpr, IN_ORDER: tl.constexpr
):
    """Token j of each group of eight."""
    row = first + group * 8 + j
    inside = row < n
    if IN_ORDER:
        row = tl.load(ORDER + row, mask=inside, other=0)
    at = X + row.to(tl.int64)[:, None] * s_xn + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(
    OUT, x, first, begin, end, STEP: tl.constexpr, j: tl.constexpr, group, d, D: tl.constexpr
):
    """The j-th of STEP rows of each group, from row `first` of a level on, as far as it goes."""
    to = begin + first + group * STEP + j
    inside = (to < end)[:, None] & (d < D)[None, :]
    at = OUT + to.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_heads", "n", "first2", "first1", "first0", "rows"])
def _levels(
    X, ORDER, OUT, s_xb, s_xh, s_xn, n_heads, n, first2, first1, first0, rows,
    GROUPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    x0, out = X + b * s_xb + h * s_xh, OUT + bh.to(tl.int64) * rows * D
    group, d = tl.arange(0, GROUPS), tl.arange(0, BD)
    eighth = block * GROUPS
    all_of = tl.zeros([GROUPS, BD], tl.float32)
    for i in tl.static_range(2):
        half = tl.zeros([GROUPS, BD], tl.float32)
        for j in tl.static_range(2):
            even, odd = 4 * i + 2 * j, 4 * i + 2 * j + 1
            left = _row(x0, ORDER, eighth * 8, even, s_xn, n, group, d, D, IN_ORDER)
            right = _row(x0, ORDER, eighth * 8, odd, s_xn, n, group, d, D, IN_ORDER)
            _store(out, left, eighth * 8, first0, rows, 8, even, group, d, D)
            _store(out, right, eighth * 8, first0, rows, 8, odd, group, d, D)
            pair = left.to(tl.float32) + right.to(tl.float32)
            _store(out, pair / 2, eighth * 4, first1, first0, 4, 2 * i + j, group, d, D)
            half += pair
        _store(out, half / 4, eighth * 2, first2, first1, 2, i, group, d, D)
        all_of += half
    _store(out, all_of / 8, eighth, 0, first2, 1, 0, group, d, D)


def levels(x: Tensor, unit: int, order: Tensor | None = None) -> Tensor:
    """Tokens of x `[B, H, N, D]`, taken in an order int32 `[N]`, and their means as
    `kernels.pyramid` lays them out.
    """
    batch, heads, n, d = x.shape
    first = [f * unit for f in pyramid.firsts(n, unit)]
    out = x.new_empty((batch, heads, pyramid.rows(n, unit), d))
    if out.numel():
        with torch.cuda.device_of(x):
            _levels[(triton.cdiv(n, 8 * _GROUPS), batch * heads)](
                x, out if order is None else order, out, *x.stride()[:3], heads, n, first[2],
                first[1], first[0], out.shape[2], GROUPS=_GROUPS, D=d, BD=next_power_of_two(d),
                IN_ORDER=order is not None, num_warps=4,
            )  # fmt: skip
    return out


@triton.jit
def _spread(x, N: tl.constexpr, GROUP: tl.constexpr):
    """Each of N // GROUP values GROUP times."""
    return tl.broadcast_to(x[:, None], [N // GROUP, GROUP]).reshape(N)


@triton.jit
def _put(BLOCKS, done, chosen, first, most, N: tl.constexpr, EACH: tl.constexpr):
    """Append EACH entries from `first + EACH · i` on for every chosen i, as far as they are below
    `most`; how many are listed then.
    """
    i, place = tl.arange(0, N), done + (tl.cumsum(chosen, 0) - chosen) * EACH
    for j in tl.static_range(EACH):
        there = (chosen > 0) & (i * EACH + j < most)
        tl.store(BLOCKS + place + j, first + i * EACH + j, mask=there)
        done += tl.sum(there.to(tl.int32), 0)
    return done


@triton.jit
def _take(
    BLOCKS, done, level, n, first, WISH: tl.constexpr, N: tl.constexpr, BK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """List what can be read at a level; blocks that cannot move one down, listed ones out."""
    SPAN: tl.constexpr = UNIT << WISH
    GROUP: tl.constexpr = max(1, SPAN // BK)
    EACH: tl.constexpr = max(1, BK // SPAN)
    CELLS: tl.constexpr = N // GROUP
    finest = tl.min(level.reshape(CELLS, GROUP), 1)
    end = (tl.arange(0, CELLS) + 1) * (SPAN if SPAN > BK else BK)
    chosen = ((finest == WISH) & (end <= n)).to(tl.int32)
    done = _put(BLOCKS, done, chosen, first, CELLS * EACH, CELLS, EACH)
    level = tl.where(level == WISH, WISH - 1, level)
    return tl.where(_spread(chosen, N, GROUP) > 0, 4, level), done


@triton.jit(do_not_specialize=["n_heads", "nq", "nk", "n", "first2", "first1", "first0", "most"])
def _list(
    SCORES, KEPT, s_tb, s_th, s_tn, BLOCKS, COUNT, n_heads, nq, nk, n, first2, first1, first0, most,
    end0, end1, end2, end3, least,
    N: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, BY_ENERGY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    bh, tile = row // nq, row % nq
    b, h = bh // n_heads, bh % n_heads
    at = tl.arange(0, N)
    x = tl.load(SCORES + row * nk + at, mask=at < nk, other=-float("inf"))
    kept = KEPT + b * s_tb + h * s_th + tile * s_tn + at
    kept = tl.load(kept, mask=at < nk, other=0)
    real = x > -float("inf")
    one = real.to(tl.float32)
    value = tl.where(real, tl.maximum(x, 0.0), 0.0) if BY_ENERGY else one
    total = tl.sum(value, 0)
    whole = tl.zeros([N], tl.int32)
    if BY_ENERGY:
        number = tl.maximum(tl.ceil(least * tl.sum(one, 0) - 1e-4), 1.0)
        whole = tl.where((least > 0) & real, greatest(x, one, number), 0)
    key, which = order_key(x), tl.arange(0, 4)
    end = tl.where(which < 2, tl.where(which == 0, end0, end1), tl.where(which == 2, end2, end3))
    if BY_ENERGY:
        target = tl.where(end >= 1.0, float("inf"), end * total)
    else:
        target = tl.maximum(tl.ceil(end * total - 1e-4), 1.0)
    high = thresholds(key, value, target, 4)
    level = tl.zeros([N], tl.int32) + 4
    for i in tl.static_range(4):
        top = tl.sum(tl.where(which == i, high, 0), 0)
        wanted = tl.max(tl.where(which == i, target, 0.0), 0)
        level -= tl.where(real, reaching(key, value, top, wanted), 0) | whole
    level = tl.where((kept > 0) & (at < nk), 0, level)
    blocks, done = BLOCKS + row * most, 0
    level, done = _take(blocks, done, level, n, 0, 3, N, BK, UNIT)
    level, done = _take(blocks, done, level, n, first2, 2, N, BK, UNIT)
    level, done = _take(blocks, done, level, n, first1, 1, N, BK, UNIT)
    most_keys = (n + UNIT - 1) // UNIT
    done = _put(blocks, done, (level == 0).to(tl.int32), first0, most_keys, N, BK // UNIT)
    tl.store(COUNT + row, done)


def listed(
    scores: Tensor,
    ends: Sequence[float],
    kept: Tensor,
    tokens: int,
    size: tuple[int, int],
    unit: int,
    by_energy: bool,
    least: float,
) -> BlockIndex:
    """`kernels.select.pyramid`; a row of scores lies in registers."""
    batch, heads, nq, nk = scores.shape
    most, device, width = nk * (size[1] // unit), scores.device, max(16, next_power_of_two(nk))
    blocks = torch.empty(batch * heads * nq * most, dtype=torch.int32, device=device)
    count = torch.empty((batch, heads, nq), dtype=torch.int32, device=device)
    if kept.stride(-1) != 1:
        kept = kept.contiguous()
    if count.numel():
        _list[(count.numel(),)](
            scores.contiguous(), *table(kept.view(torch.uint8)[..., 0], count), blocks, count,
            heads, nq, nk, tokens, *pyramid.firsts(tokens, unit)[2::-1], most,
            *map(float, ends), least, N=width, BK=size[1], UNIT=unit, BY_ENERGY=by_energy,
            num_warps=warps_of(width),
        )  # fmt: skip
    first = starts(batch, heads, nq, most, device)
    return BlockIndex(first, count, blocks, (size[0], unit), pyramid=True)

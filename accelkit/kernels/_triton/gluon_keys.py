"""Attention over single keys for Hopper: `gluon_kernel` with another producer.

A list names rows of K and V anywhere, which the bulk copy engine cannot fetch. Four warps copy them
16 bytes at a time and asynchronously into the rings from which the same two consumer warpgroups
multiply; a copy announces itself when it has arrived. Tiles of a list are visited from its end,
where its ragged tail and the keys that not every row sees stand when keys ascend.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from accelkit.kernels._triton.gluon_kernel import (
    _barriers,
    _consume,
    _flat,
    _item,
    _load,
    _next,
    _place,
    _tiles,
)
from accelkit.kernels._triton.gluon_parts import gather, listed

WARPS = gl.constexpr(4)
"""Warps that copy keys."""


@gluon.jit
def _copy(T, key, n_k, step, tile, full, ROWS: gl.constexpr, D: gl.constexpr, BD: gl.constexpr):
    """Start copying rows of T into a tile; rows that are no keys and columns past D are zeros.
    `step` counts 16 bytes.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    d = gl.arange(0, BD, layout=gl.SliceLayout(0, layout))
    there = (key < n_k)[:, None]
    if D < BD:
        there = there & (d < D)[None, :]
    row = T + (gl.where(key < n_k, key, 0).to(gl.int64) * step * 8)[:, None]
    gather(_flat(tile, ROWS, BD), row + d[None, :], mask=there)
    async_copy.mbarrier_arrive(full, increment_count=False)  # by every thread, when it is there


@gluon.jit
def _produce(
    q_desc, K, V, ITEMS, LISTS, STARTS, Q_HEADS, KV_HEADS, n_items, n_k, s_kb, s_kh, s_kn,
    s_vb, s_vh, s_vn, q, k, v, places, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    BQ: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BD: gl.constexpr, BDV: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BM // 2
    PER_ROW: gl.constexpr = BQ // BM
    copied: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
    lane = gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    place, round = _place(0), 0
    row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, PER_ROW)
    hq, hk, start = gl.load(Q_HEADS + slot), gl.load(KV_HEADS + slot), gl.load(STARTS + row)
    n, count = _tiles(masked, clean, 1, BN)[1], clean * BN + masked
    later = listed(LISTS, start, (n - 1) * BN + lane, count, n_k)
    stage, phase = 0, 1
    while place < n_items:
        # As in `gluon_kernel`: what a row needs is asked for a row early, a tile's keys a tile.
        place = _place(round + 1)
        row, next_q_row, next_b, slot, masked, clean = _item(ITEMS, place, n_items, BM, PER_ROW)
        next_hq, next_hk = gl.load(Q_HEADS + slot), gl.load(KV_HEADS + slot)
        next_start = gl.load(STARTS + row)
        next_n, next_count = _tiles(masked, clean, 1, BN)[1], clean * BN + masked
        half = round % Q_STAGES
        k_at = K + (b.to(gl.int64) * s_kb + hk.to(gl.int64) * s_kh) * 8
        v_at = V + (b.to(gl.int64) * s_vb + hk.to(gl.int64) * s_vh) * 8
        for j in range(n):
            key = gl.convert_layout(later, copied)
            if j == n - 1:
                start, count = next_start, next_count
            tile = gl.where(j == n - 1, next_n - 1, n - 2 - j)
            later = listed(LISTS, start, tile * BN + lane, count, n_k)
            mbarrier.wait(k_empty.index(stage), phase)
            _copy(k_at, key, n_k, s_kn, k.index(stage), k_full.index(stage), BN, D, BD)
            if j == 0:
                mbarrier.wait(q_empty.index(half), ((round // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes * 2)
                _load(q_desc, [b, hq, q_row, 0], q_full.index(half), q.index(half * 2))
                _load(q_desc, [b, hq, q_row + ROWS, 0], q_full.index(half), q.index(half * 2 + 1))
            mbarrier.wait(v_empty.index(stage), phase)
            places.index(stage).store(key)
            mbarrier.arrive(v_full.index(stage))
            _copy(v_at, key, n_k, s_vn, v.index(stage), v_full.index(stage), BN, DV, BDV)
            stage, phase = _next(stage, phase, STAGES)
        q_row, b, hq, hk, n = next_q_row, next_b, next_hq, next_hk, next_n
        round += 1


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start"])
def key_gather(
    q_desc, K, V, o_desc, LSE, ITEMS, LISTS, STARTS, Q_HEADS, KV_HEADS, OUT_HEADS, s_kb,
    s_kh, s_kn, s_vb, s_vh, s_vn, s_lb, s_lh, s_ln, n_items, n_q, n_k, q_start, factor,
    BQ: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BD: gl.constexpr, BDV: gl.constexpr, LAYOUT_K: gl.constexpr, LAYOUT_V: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    """The kernel, with the arguments of `gluon_kernel.block_sparse`. ITEMS count clean tiles and
    masked keys, LISTS are the index's own, STARTS (int64) say where each row's list begins. Strides
    of K and V count 16 bytes.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2 * Q_STAGES, 1, 1, BM // 2, BD], q_desc.layout)
    k = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BN, BD], LAYOUT_K)
    v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, BN, BDV], LAYOUT_V)
    places = gl.allocate_shared_memory(
        gl.int32, [STAGES, BN], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    o = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, BM // 2, BDV], o_desc.layout)
    q_full, q_empty, turns = _barriers(Q_STAGES, 1), _barriers(Q_STAGES, 2), _barriers(2, 1)
    k_full, k_empty = _barriers(STAGES, 32 * WARPS), _barriers(STAGES, 2)
    v_full, v_empty = _barriers(STAGES, 32 * WARPS + 1), _barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, LSE, s_lb, s_lh, s_ln, 0, 0, n_items,
                n_q, n_k, q_start, 1, factor, q, k, v, places, o, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, turns, BQ, 1, BM, BN, BD, BDV, CAUSAL, True, STAGES, Q_STAGES,
                MODE, "",
            )),
            (_consume, (
                1, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, LSE, s_lb, s_lh, s_ln, 0, 0, n_items,
                n_q, n_k, q_start, 1, factor, q, k, v, places, o, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, turns, BQ, 1, BM, BN, BD, BDV, CAUSAL, True, STAGES, Q_STAGES,
                MODE, "",
            )),
            (_produce, (
                q_desc, K, V, ITEMS, LISTS, STARTS, Q_HEADS, KV_HEADS, n_items, n_k, s_kb, s_kh,
                s_kn, s_vb, s_vh, s_vn, q, k, v, places, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, BQ, BM, BN, D, DV, BD, BDV, STAGES, Q_STAGES,
            )),
        ],
        [4, WARPS],
        [208, 88] if BD + BDV <= 128 else [216, 72],
    )  # fmt: skip

"""Block-sparse attention for Hopper that drops tiles whose scores stay far below the running
maximum.

As `gluon_kernel`, with a second producer warp for V. Each consumer warpgroup votes on a tile for
its own 64 rows as soon as the scores are there; V is only loaded for tiles that somebody keeps.
The product with V of a kept tile follows the scores of the next tile, so that its load is under
way meanwhile. Tiles are visited in list order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from accelkit.kernels._triton.gluon_kernel import (
    _barriers,
    _flat,
    _hide,
    _item,
    _load,
    _next,
    _rounds,
    _softmax,
)

VOTES = gl.constexpr(4)
"""Votes under way: a consumer may be this many tiles ahead of the warp that loads V."""


@gluon.jit
def _produce_keys(
    q_desc, k_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, n_items, capacity, q, k, q_full, q_empty,
    k_full, k_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    ROWS: gl.constexpr = BM // 2
    stage, phase = 0, 1
    for round in range(_rounds(n_items)):
        row, q_row, b, slot, masked, clean = _item(ITEMS, round, True, BM, BQ // BM)
        hq, hk = gl.load(Q_HEADS + slot), gl.load(KV_HEADS + slot)
        at = LISTS + row.to(gl.int64) * capacity
        half = round % 2
        mbarrier.wait(q_empty.index(half), ((round // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes * 2)
        _load(q_desc, [b, hq, q_row, 0], q_full.index(half), q.index(half * 2))
        _load(q_desc, [b, hq, q_row + ROWS, 0], q_full.index(half), q.index(half * 2 + 1))
        for j in range(gl.maximum(masked + clean, 1) * R):
            block = gl.load(at + j // R, mask=masked + clean > 0, other=0)
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            k0 = block * BK + (j % R) * BN
            _load(k_desc, [b, hk, k0, 0], k_full.index(stage), k.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _flag(flags, at, layout: gl.constexpr):
    return gl.max(flags.index(at).load(layout), 0)


@gluon.jit
def _produce_values(
    v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, v, v_full, v_empty, flags, vote_full,
    vote_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    stage, phase = 0, 1
    vote, vote_phase = 0, 0
    for round in range(_rounds(n_items)):
        row, _, b, slot, masked, clean = _item(ITEMS, round, True, BM, BQ // BM)
        hk = gl.load(KV_HEADS + slot)
        at = LISTS + row.to(gl.int64) * capacity
        for j in range(gl.maximum(masked + clean, 1) * R):
            block = gl.load(at + j // R, mask=masked + clean > 0, other=0)
            mbarrier.wait(vote_full.index(vote), vote_phase)
            wanted = _flag(flags, vote * 2, one) + _flag(flags, vote * 2 + 1, one)
            mbarrier.arrive(vote_empty.index(vote))
            vote, vote_phase = _next(vote, vote_phase, VOTES)
            if wanted > 0:
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                k0 = block * BK + (j % R) * BN
                _load(v_desc, [b, hk, k0, 0], v_full.index(stage), v.index(stage))
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _consume(
    WHO: gl.constexpr, OUT, LSE, ITEMS, LISTS, OUT_HEADS, SKIP, s_ob, s_oh, s_on, s_lb, s_lh, s_ln,
    n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
    v_empty, flags, vote_full, vote_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DV: gl.constexpr,
    BD: gl.constexpr, BDV: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    ROWS: gl.constexpr = BM // 2
    dtype: gl.constexpr = v.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    zero = gl.zeros([ROWS, BN], gl.float32, sl)
    stage, phase = 0, 0
    v_stage, v_phase = 0, 0
    vote, vote_phase = 0, 0
    for round in range(_rounds(n_items)):
        row, q_row, b, slot, masked, clean = _item(ITEMS, round, True, BM, BQ // BM)
        ho = gl.load(OUT_HEADS + slot)
        least = gl.load(SKIP + slot) * 1.4426950408889634
        half = round % 2
        at = LISTS + row.to(gl.int64) * capacity
        n = gl.maximum(masked + clean, 1) * R
        rows = q_row + WHO * ROWS + gl.arange(0, ROWS, layout=s_row)
        # Tiles that end before `safe` need no element mask.
        safe, limit = n_k, rows * 0 + n_k
        if CAUSAL:
            safe = gl.minimum(n_k, q_start + q_row + WHO * ROWS + 1)
            limit = rows + q_start
        limit = gl.where(masked + clean > 0, limit, -1)
        if masked + clean == 0:
            safe = 0
        m = gl.full([ROWS], -1e30, gl.float32, s_row)  # finite: an empty row meets no inf − inf
        total = gl.zeros([ROWS], gl.float32, s_row)
        acc = gl.zeros([ROWS, BDV], gl.float32, ol)
        p16 = gl.zeros([ROWS, BN], dtype, pl)
        kept = 0
        own = _flat(q.index(half * 2 + WHO), ROWS, BD)
        mbarrier.wait(q_full.index(half), (round // 2) & 1)
        for j in range(n):
            k0 = gl.load(at + j // R, mask=masked + clean > 0, other=0) * BK + (j % R) * BN
            mbarrier.wait(k_full.index(stage), phase)
            s = warpgroup_mma(
                own, _flat(k.index(stage), BN, BD).permute((1, 0)), zero, use_acc=False,
                is_async=True,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            stage, phase = _next(stage, phase, STAGES)
            if k0 + BN > safe:
                s = _hide(s, k0, limit, n_k, BN, sl)
            peak = gl.max(s, 1) * factor
            votes = (rows < n_q) & (peak > -float("inf")) & ((peak - m >= least) | (m <= -1e30))
            # The first tile always counts, so that V of it is there for whoever needs it.
            keep = gl.maximum(gl.max(votes.to(gl.int32), 0), (j == 0).to(gl.int32))
            mbarrier.wait(vote_empty.index(vote), vote_phase ^ 1)
            flags.index(vote * 2 + WHO).store(gl.full([1], 0, gl.int32, one) + keep)
            mbarrier.arrive(vote_full.index(vote))
            if j > 0:
                before = (vote + VOTES - 1) % VOTES
                mbarrier.wait(
                    vote_full.index(before), gl.where(vote == 0, vote_phase ^ 1, vote_phase)
                )
                others = _flag(flags, before * 2 + 1 - WHO, one)
                if kept > 0:
                    mbarrier.wait(v_full.index(v_stage), v_phase)
                    acc = warpgroup_mma(
                        p16, _flat(v.index(v_stage), BN, BDV), acc, is_async=True
                    )  # fmt: skip
                    acc = warpgroup_mma_wait(0, deps=[acc])
                if kept + others > 0:
                    mbarrier.arrive(v_empty.index(v_stage))
                    v_stage, v_phase = _next(v_stage, v_phase, V_STAGES)
            vote, vote_phase = _next(vote, vote_phase, VOTES)
            if keep > 0:
                p, m, alpha, total = _softmax(s, m, total, factor)
                acc = acc * gl.convert_layout(alpha, o_row)[:, None]
                p16 = gl.convert_layout(p.to(dtype), pl)
            kept = keep
        mbarrier.arrive(q_empty.index(half))
        before = (vote + VOTES - 1) % VOTES
        mbarrier.wait(vote_full.index(before), gl.where(vote == 0, vote_phase ^ 1, vote_phase))
        others = _flag(flags, before * 2 + 1 - WHO, one)
        if kept > 0:
            mbarrier.wait(v_full.index(v_stage), v_phase)
            acc = warpgroup_mma(p16, _flat(v.index(v_stage), BN, BDV), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
        if kept + others > 0:
            mbarrier.arrive(v_empty.index(v_stage))
            v_stage, v_phase = _next(v_stage, v_phase, V_STAGES)
        alive = total > 0.0
        divisor = gl.where(alive, total, 1.0)
        lse = gl.where(alive, (m + gl.log2(divisor)) * 0.6931471805599453, -float("inf"))
        b64, h64 = b.to(gl.int64), ho.to(gl.int64)
        gl.store(LSE + b64 * s_lb + h64 * s_lh + rows.to(gl.int64) * s_ln, lse, mask=rows < n_q)
        acc = acc * gl.convert_layout(1.0 / divisor, o_row)[:, None]
        o_rows = q_row + WHO * ROWS + gl.arange(0, ROWS, layout=o_row)
        d = gl.arange(0, BDV, layout=gl.SliceLayout(0, ol))
        place = OUT + b64 * s_ob + h64 * s_oh + o_rows.to(gl.int64)[:, None] * s_on + d[None, :]
        gl.store(place, acc.to(dtype), mask=(o_rows < n_q)[:, None] & (d < DV)[None, :])


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start", "capacity"])
def skipping(
    q_desc, k_desc, v_desc, OUT, LSE, ITEMS, LISTS, Q_HEADS, KV_HEADS, OUT_HEADS, SKIP, s_ob, s_oh,
    s_on, s_lb, s_lh, s_ln, n_items, n_q, n_k, q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DV: gl.constexpr,
    BD: gl.constexpr, BDV: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """The kernel, with the arguments of `gluon_kernel.block_sparse` and SKIP, the natural-log
    threshold of each slot.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, BM // 2, BD], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, BD], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [V_STAGES, 1, 1, BN, BDV], v_desc.layout)
    flags = gl.allocate_shared_memory(
        gl.int32, [2 * VOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    q_full, q_empty = _barriers(2, 1), _barriers(2, 2)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_empty = _barriers(V_STAGES, 1), _barriers(V_STAGES, 2)
    vote_full, vote_empty = _barriers(VOTES, 2), _barriers(VOTES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, OUT, LSE, ITEMS, LISTS, OUT_HEADS, SKIP, s_ob, s_oh, s_on, s_lb, s_lh, s_ln,
                n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, flags, vote_full, vote_empty, BQ, BK, BM, BN, DV, BD,
                BDV, CAUSAL, STAGES, V_STAGES,
            )),
            (_consume, (
                1, OUT, LSE, ITEMS, LISTS, OUT_HEADS, SKIP, s_ob, s_oh, s_on, s_lb, s_lh, s_ln,
                n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full,
                k_empty, v_full, v_empty, flags, vote_full, vote_empty, BQ, BK, BM, BN, DV, BD,
                BDV, CAUSAL, STAGES, V_STAGES,
            )),
            (_produce_keys, (
                q_desc, k_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, n_items, capacity, q, k, q_full,
                q_empty, k_full, k_empty, BQ, BK, BM, BN, STAGES,
            )),
            (_produce_values, (
                v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, v, v_full, v_empty, flags,
                vote_full, vote_empty, BQ, BK, BM, BN, V_STAGES,
            )),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip

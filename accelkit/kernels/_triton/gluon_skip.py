"""Block-sparse attention for Hopper that drops tiles whose scores stay far below the running
maximum.

As `gluon_kernel`, but the producer warp loads Q and K only. Each consumer warpgroup votes on a tile
for its own 64 rows as soon as the scores are there, and loads V itself for a tile that it keeps.
The product with V of a kept tile comes with the next kept one, so that its load is hidden. Tiles
are visited in list order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from accelkit.kernels._triton.gluon_kernel import (
    TICKETS,
    _announce,
    _announced,
    _barriers,
    _finish,
    _flat,
    _hide,
    _item,
    _limits,
    _load,
    _next,
    _sync,
)


@gluon.jit
def _produce(
    q_desc, k_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, COUNTER, n_items, capacity, q, k, q_full,
    q_empty, k_full, k_empty, tickets, ticket_full, ticket_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    ROWS: gl.constexpr = BM // 2
    stage, phase = 0, 1
    place, round = gl.program_id(0), 0
    while place < n_items:
        next_place = gl.num_programs(0) + gl.atomic_add(COUNTER, 1, sem="relaxed")
        _announce(tickets, ticket_full, ticket_empty, round, next_place)
        row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, BQ // BM)
        hq, hk = gl.load(Q_HEADS + slot), gl.load(KV_HEADS + slot)
        at = LISTS + row.to(gl.int64) * capacity
        mbarrier.wait(q_empty, (round & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes * 2)
        _load(q_desc, [b, hq, q_row, 0], q_full, q.index(0))
        _load(q_desc, [b, hq, q_row + ROWS, 0], q_full, q.index(1))
        for j in range(gl.maximum((masked + clean) * R, 1)):
            block = gl.load(at + j // R, mask=masked + clean > 0, other=0)
            k0 = block * BK + (j % R) * BN
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            _load(k_desc, [b, hk, k0, 0], k_full.index(stage), k.index(stage))
            stage, phase = _next(stage, phase, STAGES)
        place, round = next_place, round + 1


@gluon.jit
def _any(votes, ballot):
    """Whether one of the 64 rows says yes; a warp's 16 rows answer together."""
    every: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    ballot.store(gl.max(votes.to(gl.int32).reshape([4, 16]), 1))
    return gl.max(ballot.load(every), 0)


@gluon.jit
def _times_v(p, v_tile, v_full, phase, acc, BN: gl.constexpr, BDV: gl.constexpr):
    mbarrier.wait(v_full, phase)
    acc = warpgroup_mma(p, _flat(v_tile, BN, BDV), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _consume(
    WHO: gl.constexpr, v_desc, o_desc, LSE, ITEMS, LISTS, KV_HEADS, OUT_HEADS, SKIP, s_lb, s_lh,
    s_ln, n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full, q_empty,
    k_full, k_empty, v_full, ballots, tickets, ticket_full, ticket_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    ROWS: gl.constexpr = BM // 2
    dtype: gl.constexpr = v.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    zero = gl.zeros([ROWS, BN], gl.float32, sl)
    own = _flat(q.index(WHO), ROWS, BD)
    stage, phase = 0, 0
    turn = 0  # V tiles asked for so far: they use two places in turns
    place, round = gl.program_id(0), 0
    while place < n_items:
        row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, BQ // BM)
        hk, ho = gl.load(KV_HEADS + slot), gl.load(OUT_HEADS + slot)
        least = gl.load(SKIP + slot) * 1.4426950408889634
        at = LISTS + row.to(gl.int64) * capacity
        rows = q_row + WHO * ROWS + gl.arange(0, ROWS, layout=s_row)
        limit = _limits(rows, masked + clean, n_k, q_start, CAUSAL)
        # Tiles that end before `safe` need no element mask.
        safe = n_k
        if CAUSAL:
            safe = gl.minimum(n_k, q_start + q_row + WHO * ROWS + 1)
        m = gl.full([ROWS], -1e30, gl.float32, s_row)  # finite: an empty row meets no inf − inf
        total = gl.zeros([ROWS], gl.float32, s_row)
        acc = gl.zeros([ROWS, BDV], gl.float32, ol)
        p16 = gl.zeros([ROWS, BN], dtype, pl)
        kept = 0
        mbarrier.wait(q_full, round & 1)
        for j in range((masked + clean) * R):
            k0 = gl.load(at + j // R) * BK + (j % R) * BN
            mbarrier.wait(k_full.index(stage), phase)
            s = warpgroup_mma(
                own, _flat(k.index(stage), BN, BD).permute((1, 0)), zero, use_acc=False,
                is_async=True,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            stage, phase = _next(stage, phase, STAGES)
            if k0 + BN > safe:
                s = _hide(s, k0, limit, BN, sl)
            peak = gl.max(s, 1) * factor
            votes = (rows < n_q) & (peak > -float("inf")) & ((peak - m >= least) | (m <= -1e30))
            if _any(votes, ballots.index(WHO)) > 0:
                now = WHO * 2 + turn % 2
                mbarrier.expect(v_full.index(now), v_desc.block_type.nbytes)
                _load(v_desc, [b, hk, k0, 0], v_full.index(now), v.index(now))
                if kept > 0:
                    before = WHO * 2 + (turn + 1) % 2
                    acc = _times_v(
                        p16, v.index(before), v_full.index(before), ((turn - 1) // 2) & 1, acc, BN,
                        BDV,
                    )  # fmt: skip
                m_new = gl.maximum(m, peak)
                p = gl.exp2(s * factor - m_new[:, None])
                alpha = gl.exp2(m - m_new)
                total = total * alpha + gl.sum(p, 1)
                acc = acc * gl.convert_layout(alpha, o_row)[:, None]
                m = m_new
                p16 = gl.convert_layout(p.to(dtype), pl)
                kept = 1
                turn += 1
        if masked + clean == 0:  # the producer loads one tile for an empty row
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.arrive(k_empty.index(stage))
            stage, phase = _next(stage, phase, STAGES)
        if kept > 0:
            before = WHO * 2 + (turn + 1) % 2
            acc = _times_v(
                p16, v.index(before), v_full.index(before), ((turn - 1) // 2) & 1, acc, BN, BDV
            )
        # The output leaves through the place of the queries, which are done with.
        _finish(
            o_desc, q.index(WHO), LSE, s_lb, s_lh, s_ln, b, ho, q_row + WHO * ROWS, rows, n_q, m,
            total, acc, ROWS, BDV, dtype,
        )  # fmt: skip
        tma.store_wait(0)
        _sync()
        mbarrier.arrive(q_empty)
        place, round = _announced(tickets, ticket_full, ticket_empty, round), round + 1


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start", "capacity"])
def skipping(
    q_desc, k_desc, v_desc, o_desc, LSE, ITEMS, LISTS, Q_HEADS, KV_HEADS, OUT_HEADS, COUNTER,
    SKIP, s_lb, s_lh, s_ln, n_items, n_q, n_k, q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The kernel, with the arguments of `gluon_kernel.block_sparse` and SKIP, the natural-log
    threshold of each slot.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BM // 2, BD], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, BD], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [4, 1, 1, BN, BDV], v_desc.layout)
    ballots = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, q_empty = _barriers(1, 1).index(0), _barriers(1, 2).index(0)
    k_full, k_empty, v_full = _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(4, 1)
    tickets = gl.allocate_shared_memory(
        gl.int32, [TICKETS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    ticket_full, ticket_empty = _barriers(TICKETS, 1), _barriers(TICKETS, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, v_desc, o_desc, LSE, ITEMS, LISTS, KV_HEADS, OUT_HEADS, SKIP, s_lb, s_lh,
                s_ln, n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full,
                q_empty, k_full, k_empty, v_full, ballots, tickets, ticket_full, ticket_empty, BQ,
                BK, BM, BN, BD, BDV, CAUSAL, STAGES,
            )),
            (_consume, (
                1, v_desc, o_desc, LSE, ITEMS, LISTS, KV_HEADS, OUT_HEADS, SKIP, s_lb, s_lh,
                s_ln, n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full,
                q_empty, k_full, k_empty, v_full, ballots, tickets, ticket_full, ticket_empty, BQ,
                BK, BM, BN, BD, BDV, CAUSAL, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, COUNTER, n_items, capacity, q, k,
                q_full, q_empty, k_full, k_empty, tickets, ticket_full, ticket_empty, BQ, BK, BM,
                BN, STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip

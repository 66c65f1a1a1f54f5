"""Block-sparse attention for Hopper that drops tiles whose scores stay far below the running
maximum.

As `gluon_kernel`, with one warp that copies Q and K and another for V. Each consumer warpgroup
votes on a tile for its own 64 rows as soon as the scores are there; V is copied when the first of
them keeps the tile. The product with V is started together with the next tile's scores, which cover
the copy. Tiles are visited in list order.

A vote is one instruction: a barrier of the processor that also tells everyone at it whether one
thread said yes, the V warp included. Such barriers say that a place for K is free, too: unlike an
arrival at an mbarrier they need no barrier of the warpgroup before.
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
    _barriers,
    _finish,
    _flat,
    _hide,
    _item,
    _limits,
    _load,
    _next,
    _place,
    _sync,
)
from accelkit.kernels._triton.gluon_parts import K_FREE, give, take

VOTE = gl.constexpr(14)
"""Processor barrier on which the first warpgroup votes, before that of the second."""
V_STAGES = gl.constexpr(2)
"""Places for V: what one warpgroup still multiplies, and what the other asks for."""


@gluon.jit
def _produce_k(
    q_desc, k_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, n_items, capacity, q, k, q_full,
    q_empty, k_full,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    ROWS: gl.constexpr = BM // 2
    stage, copied = 0, 0
    place, round = _place(0), 0
    while place < n_items:
        row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, BQ // BM)
        hq, hk = gl.load(Q_HEADS + slot), gl.load(KV_HEADS + slot)
        at = LISTS + row.to(gl.int64) * capacity
        mbarrier.wait(q_empty, (round & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes * 2)
        _load(q_desc, [b, hq, q_row, 0], q_full, q.index(0))
        _load(q_desc, [b, hq, q_row + ROWS, 0], q_full, q.index(1))
        for j in range((masked + clean) * R):
            k0 = gl.load(at + j // R) * BK + (j % R) * BN
            if copied >= STAGES:
                take(K_FREE + stage)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            _load(k_desc, [b, hk, k0, 0], k_full.index(stage), k.index(stage))
            stage, copied = (stage + 1) % STAGES, copied + 1
        place, round = _place(round + 1), round + 1
    for i in range(gl.minimum(copied, STAGES)):  # no barrier is left half full
        take(K_FREE + (copied - 1 - i) % STAGES)


@gluon.jit
def _listen(WHO: gl.constexpr):
    """Whether a warpgroup keeps the tile on which it votes here."""
    return gl.inline_asm_elementwise(
        f"{{ .reg .pred any; setp.ne.b32 any, $1, $1; bar.red.or.pred any, {VOTE + WHO}, 160, any;"
        " vote.sync.any.pred any, any, 0xffffffff; selp.b32 $0, 1, 0, any; }",
        "=r,r", [gl.program_id(0)], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _produce_v(
    v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, v, v_full,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    stage = 0
    place, round = _place(0), 0
    while place < n_items:
        row, _, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, BQ // BM)
        hk = gl.load(KV_HEADS + slot)
        at = LISTS + row.to(gl.int64) * capacity
        for j in range((masked + clean) * R):
            k0 = gl.load(at + j // R) * BK + (j % R) * BN
            full = v_full.index(stage)
            # Who votes on a tile is through with all products before, and the other was heard on
            # the last tile: nobody reads this place any more.
            first = _listen(0)
            if first > 0:
                mbarrier.expect(full, v_desc.block_type.nbytes)
                _load(v_desc, [b, hk, k0, 0], full, v.index(stage))
            second = _listen(1)
            if first == 0:
                if second > 0:
                    mbarrier.expect(full, v_desc.block_type.nbytes)
                    _load(v_desc, [b, hk, k0, 0], full, v.index(stage))
                else:
                    mbarrier.arrive(full)
            stage = (stage + 1) % V_STAGES
        place, round = _place(round + 1), round + 1


@gluon.jit
def _ballot(n, WHO: gl.constexpr):
    """Declare the predicate in which a thread holds its warpgroup's last vote: no tensor of one
    element per thread becomes a scalar without an exchange among threads.
    """
    gl.inline_asm_elementwise(
        f".reg .pred keeps{WHO}; mov.b32 $0, 0;", "=r,r", [n], gl.int32, False, 1
    )


@gluon.jit
def _vote(excess, WHO: gl.constexpr):
    """Whether one of the excesses over the threshold, two a thread, is not negative."""
    gl.inline_asm_elementwise(
        "{ .reg .pred a, b; setp.ge.f32 a, $2, 0f00000000; setp.ge.f32 b, $3, 0f00000000;"
        f" or.pred a, a, b; bar.red.or.pred keeps{WHO}, {VOTE + WHO}, 160, a;"
        " mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=f,=f,f,f", [excess], gl.float32, False, 2,
    )  # fmt: skip
    # All lanes hold the same; the second vote tells the compiler so.
    return gl.inline_asm_elementwise(
        f"{{ .reg .pred any; vote.sync.any.pred any, keeps{WHO}, 0xffffffff;"
        " selp.b32 $0, 1, 0, any; }",
        "=r,r", [gl.program_id(0)], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _times_v(p, v_tile, v_full, phase, acc, BN: gl.constexpr, BDV: gl.constexpr):
    mbarrier.wait(v_full, phase)
    acc = warpgroup_mma(p, _flat(v_tile, BN, BDV), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    return acc


@gluon.jit
def _consume(
    WHO: gl.constexpr, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, SKIP, s_lb, s_lh,
    s_ln, n_items, n_q, n_k, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full,
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
    _ballot(n_items, WHO)
    stage, phase, v_stage, v_phase = 0, 0, 0, 0
    place, round = _place(0), 0
    while place < n_items:
        row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, BQ // BM)
        ho = gl.load(OUT_HEADS + slot)
        least = gl.load(SKIP + slot) * 1.4426950408889634
        at = LISTS + row.to(gl.int64) * capacity
        rows = q_row + WHO * ROWS + gl.arange(0, ROWS, layout=s_row)
        limit = _limits(rows, masked + clean, n_k, q_start, CAUSAL)
        # Tiles that end before `safe` need no element mask.
        safe = n_k
        if CAUSAL:
            safe = gl.minimum(n_k, q_start + q_row + WHO * ROWS + 1)
        # Finite: an empty row meets no inf − inf. Rows behind the last keep no tile.
        m = gl.where(rows < n_q, -1e30, 1e30)
        total = gl.zeros([ROWS], gl.float32, s_row)
        acc = gl.zeros([ROWS, BDV], gl.float32, ol)
        p16 = gl.zeros([ROWS, BN], dtype, pl)
        kept, last_stage, last_phase = 0, 0, 0
        n = (masked + clean) * R
        block = gl.load(at, mask=n > 0, other=0)
        mbarrier.wait(q_full, round & 1)
        mbarrier.wait(k_full.index(stage), phase, pred=n > 0)
        for j in range(n):
            k0 = block * BK + (j % R) * BN
            k_stage = stage
            stage, phase = _next(stage, phase, STAGES)
            scores = warpgroup_mma(
                own, _flat(k.index(k_stage), BN, BD).permute((1, 0)), zero, use_acc=False,
                is_async=True,
            )  # fmt: skip
            # What the next tile needs is asked and awaited while the products run.
            if kept > 0:
                mbarrier.wait(v_full.index(last_stage), last_phase)
                sums = warpgroup_mma(p16, _flat(v.index(last_stage), BN, BDV), acc, is_async=True)
                block = gl.load(at + (j + 1) // R, mask=j + 1 < n, other=0)
                mbarrier.wait(k_full.index(stage), phase, pred=j + 1 < n)
                s, acc, p16 = warpgroup_mma_wait(0, deps=[scores, sums, p16])
            else:
                block = gl.load(at + (j + 1) // R, mask=j + 1 < n, other=0)
                mbarrier.wait(k_full.index(stage), phase, pred=j + 1 < n)
                s = warpgroup_mma_wait(0, deps=[scores])
            give(K_FREE + k_stage)
            if k0 + BN > safe:
                s = _hide(s, k0, limit, BN, sl)
            # Maxima of what each of a row's four threads holds: enough to vote.
            peaks = gl.max(gl.max(s.reshape([ROWS, BN // 8, 4, 2]), 3), 1) * factor
            least_peak = gl.convert_layout(m + least, gl.SliceLayout(1, peaks.type.layout))
            keep = _vote(peaks - least_peak[:, None], WHO)
            if keep > 0:
                m_new = gl.maximum(m, gl.convert_layout(gl.max(peaks, 1), s_row))
                p = gl.exp2(s * factor - m_new[:, None])
                alpha = gl.exp2(m - m_new)
                total = total * alpha + gl.sum(p, 1)
                acc = acc * gl.convert_layout(alpha, o_row)[:, None]
                m = m_new
                p16 = gl.convert_layout(p.to(dtype), pl)
            kept, last_stage, last_phase = keep, v_stage, v_phase
            v_stage, v_phase = _next(v_stage, v_phase, V_STAGES)
        if kept > 0:
            acc = _times_v(
                p16, v.index(last_stage), v_full.index(last_stage), last_phase, acc, BN, BDV
            )
        # The output leaves through the place of the queries, which are done with.
        _finish(
            o_desc, q.index(WHO), LSE, s_lb, s_lh, s_ln, b, ho, q_row + WHO * ROWS, rows, n_q, m,
            total, acc, ROWS, BDV, dtype,
        )  # fmt: skip
        tma.store_wait(0)
        _sync()
        mbarrier.arrive(q_empty)
        place, round = _place(round + 1), round + 1


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start", "capacity"])
def skipping(
    q_desc, k_desc, v_desc, o_desc, LSE, ITEMS, LISTS, Q_HEADS, KV_HEADS, OUT_HEADS,
    SKIP, s_lb, s_lh, s_ln, n_items, n_q, n_k, q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The kernel, with the arguments of `gluon_kernel.block_sparse` and SKIP, the natural-log
    threshold of each slot.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, BM // 2, BD], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, BD], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [V_STAGES, 1, 1, BN, BDV], v_desc.layout)
    q_full, q_empty = _barriers(1, 1).index(0), _barriers(1, 2).index(0)
    k_full, v_full = _barriers(STAGES, 1), _barriers(V_STAGES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, SKIP, s_lb, s_lh, s_ln, n_items, n_q, n_k,
                q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, BQ, BK, BM,
                BN, BD, BDV, CAUSAL, STAGES,
            )),
            (_consume, (
                1, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, SKIP, s_lb, s_lh, s_ln, n_items, n_q, n_k,
                q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, BQ, BK, BM,
                BN, BD, BDV, CAUSAL, STAGES,
            )),
            (_produce_k, (
                q_desc, k_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, n_items, capacity, q, k,
                q_full, q_empty, k_full, BQ, BK, BM, BN, STAGES,
            )),
            (_produce_v, (
                v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, v, v_full, BQ, BK, BM, BN,
            )),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )  # fmt: skip

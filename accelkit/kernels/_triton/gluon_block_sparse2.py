"""Block-sparse attention forward for Hopper, in warps of different trades.

A producer warp reads the lists and copies Q, K and V tiles into shared memory; two consumer
warpgroups of 64 query rows each multiply them and take turns, so that one's softmax runs under the
other's products. A program stays on its multiprocessor and walks over rows, longest first, so that
the producer is already loading the next row while the consumers finish this one.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
FIELDS = gl.constexpr(8)


@gluon.jit
def _rounds(n_items):
    """How many items this program serves; `_turn` says which."""
    pid, width = gl.program_id(0), gl.num_programs(0)
    full = n_items // width
    place = pid
    if full % 2 == 1:
        place = width - 1 - pid
    return full + (place < n_items - full * width).to(gl.int32)


@gluon.jit
def _place(round):
    """The item of a round. Odd rounds run backwards: who had the longest row gets the shortest."""
    pid, width = gl.program_id(0), gl.num_programs(0)
    place = pid
    if round % 2 == 1:
        place = width - 1 - pid
    return round * width + place


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, ITEMS, LISTS, n_items, capacity, q, k, v, q_full, q_empty, k_full,
    k_empty, v_full, v_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    PER_ROW: gl.constexpr = BQ // BM
    HALF: gl.constexpr = BM // 2
    stage, phase = 0, 1
    for round in range(_rounds(n_items)):
        place = _place(round)
        item = ITEMS + (place // PER_ROW).to(gl.int64) * FIELDS
        row, b = gl.load(item), gl.load(item + 2)
        q_row = gl.load(item + 1) + (place % PER_ROW) * BM
        hq, hk = gl.load(item + 3), gl.load(item + 4)
        n = gl.maximum(gl.load(item + 6) + gl.load(item + 7), 1) * R
        at = LISTS + row.to(gl.int64) * capacity
        slot = round % 2
        mbarrier.wait(q_empty.index(slot), ((round // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes * 2)
        _load(q_desc, [b, hq, q_row, 0], q_full.index(slot), q.index(slot * 2))
        _load(q_desc, [b, hq, q_row + HALF, 0], q_full.index(slot), q.index(slot * 2 + 1))
        for j in range(n):
            k0 = gl.load(at + j // R) * BK + (j % R) * BN
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            _load(k_desc, [b, hk, k0, 0], k_full.index(stage), k.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            _load(v_desc, [b, hk, k0, 0], v_full.index(stage), v.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _flat(tile, ROWS: gl.constexpr, D: gl.constexpr):
    return tile.reshape([ROWS, D])


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _describe(ITEMS, round, there, BM: gl.constexpr, PER_ROW: gl.constexpr):
    """Row, first query, batch, output head, masked and clean blocks of a round's item."""
    place = _place(round)
    item = ITEMS + (place // PER_ROW).to(gl.int64) * FIELDS
    row, first = gl.load(item, there, 0), gl.load(item + 1, there, 0)
    b, ho = gl.load(item + 2, there, 0), gl.load(item + 5, there, 0)
    masked, clean = gl.load(item + 6, there, 0), gl.load(item + 7, there, 0)
    return row, first + (place % PER_ROW) * BM, b, ho, masked, clean


@gluon.jit
def _hide(s, k0, limit, n_k, BN: gl.constexpr, layout: gl.constexpr):
    col = k0 + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    seen = (col < n_k)[None, :] & (col[None, :] <= limit[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _softmax(s, m, total, factor):
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, alpha, total * alpha + gl.sum(p, 1)


@gluon.jit
def _products(
    q, k_tile, v_tile, p, acc, zero, k_full, k_empty, k_phase, k_there, v_full, v_empty, v_phase,
    my_turn, next_turn, turn, MODE: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr,
):  # fmt: skip
    """Scores of the next tile, and the product of the present probabilities with V under way.

    "turns": both are started, then both are awaited; the other warpgroup's softmax covers their
    time. "lag": the scores come first, and their softmax runs under the second product.
    """
    mbarrier.wait(k_full, k_phase, pred=k_there)
    if MODE == "turns":
        mbarrier.wait(my_turn, turn)
    s = warpgroup_mma(
        q, _flat(k_tile, BN, D).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full, v_phase)
    if MODE == "turns":
        acc = warpgroup_mma(p, _flat(v_tile, BN, DV), acc, is_async=True)
        mbarrier.arrive(next_turn)
        s, acc = warpgroup_mma_wait(0, deps=[s, acc])
        mbarrier.arrive(k_empty, pred=k_there)
        mbarrier.arrive(v_empty)
    else:
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty, pred=k_there)
        acc = warpgroup_mma(p, _flat(v_tile, BN, DV), acc, is_async=True)
    return s, acc


@gluon.jit
def _finished(acc, v_empty, MODE: gl.constexpr):
    if MODE == "lag":
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty)
    return acc


@gluon.jit
def _consume(
    WHO: gl.constexpr, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_q,
    n_k, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    turns,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, STAGES: gl.constexpr,
    MODE: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    PER_ROW: gl.constexpr = BQ // BM
    ROWS: gl.constexpr = BM // 2
    dtype: gl.constexpr = v.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    mine, other = turns.index(WHO), turns.index(1 - WHO)
    zero = gl.zeros([ROWS, BN], gl.float32, sl)
    stage, phase, turn = 0, 0, 1 - WHO
    rounds = _rounds(n_items)
    row, q_row, b, ho, masked, clean = _describe(ITEMS, 0, rounds > 0, BM, PER_ROW)
    block = gl.load(LISTS + row.to(gl.int64) * capacity, mask=masked + clean > 0, other=0)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(
        _flat(q.index(WHO), ROWS, D), _flat(k.index(0), BN, D).permute((1, 0)), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0))
    for round in range(rounds):
        more = round + 1 < rounds
        next_row, next_q_row, next_b, next_ho, next_masked, next_clean = _describe(
            ITEMS, round + 1, more, BM, PER_ROW
        )
        slot = round % 2
        at = LISTS + row.to(gl.int64) * capacity
        n = gl.maximum(masked + clean, 1) * R
        rows = q_row + WHO * ROWS + gl.arange(0, ROWS, layout=s_row)
        limit = rows * 0 + n_k
        if CAUSAL:
            limit = rows + q_start
        limit = gl.where(masked + clean > 0, limit, -1)
        m = gl.full([ROWS], -1e30, gl.float32, s_row)  # finite: an empty row meets no inf − inf
        total = gl.zeros([ROWS], gl.float32, s_row)
        acc = gl.zeros([ROWS, DV], gl.float32, ol)
        s = _hide(s, block * BK, limit, n_k, BN, sl)
        p, m, alpha, total = _softmax(s, m, total, factor)
        p16 = gl.convert_layout(p.to(dtype), pl)
        own = _flat(q.index(slot * 2 + WHO), ROWS, D)
        first_clean = 1
        if EXTRA_MASKED:
            first_clean = gl.maximum(masked * R, 1)
            for j in range(1, first_clean):
                k0 = gl.load(at + j // R) * BK + (j % R) * BN
                k_stage, k_phase = _next(stage, phase, STAGES)
                s, acc = _products(
                    own, k.index(k_stage), v.index(stage), p16, acc, zero, k_full.index(k_stage),
                    k_empty.index(k_stage), k_phase, True, v_full.index(stage), v_empty.index(stage), phase,
                    mine, other, turn, MODE, BN, D, DV,
                )  # fmt: skip
                s = _hide(s, k0, limit, n_k, BN, sl)
                p, m, alpha, total = _softmax(s, m, total, factor)
                acc = _finished(acc, v_empty.index(stage), MODE)
                acc = acc * gl.convert_layout(alpha, o_row)[:, None]
                p16 = gl.convert_layout(p.to(dtype), pl)
                stage, phase, turn = k_stage, k_phase, turn ^ 1
        for j in range(first_clean, n):
            k_stage, k_phase = _next(stage, phase, STAGES)
            s, acc = _products(
                own, k.index(k_stage), v.index(stage), p16, acc, zero, k_full.index(k_stage),
                k_empty.index(k_stage), k_phase, True, v_full.index(stage), v_empty.index(stage), phase,
                mine, other, turn, MODE, BN, D, DV,
            )  # fmt: skip
            p, m, alpha, total = _softmax(s, m, total, factor)
            acc = _finished(acc, v_empty.index(stage), MODE)
            acc = acc * gl.convert_layout(alpha, o_row)[:, None]
            p16 = gl.convert_layout(p.to(dtype), pl)
            stage, phase, turn = k_stage, k_phase, turn ^ 1
        # The last product of this row goes with the first scores of the next.
        block = gl.load(
            LISTS + next_row.to(gl.int64) * capacity, mask=next_masked + next_clean > 0, other=0
        )
        next_slot = (round + 1) % 2
        mbarrier.wait(q_full.index(next_slot), ((round + 1) // 2) & 1, pred=more)
        k_stage, k_phase = _next(stage, phase, STAGES)
        s, acc = _products(
            _flat(q.index(next_slot * 2 + WHO), ROWS, D), k.index(k_stage), v.index(stage), p16,
            acc, zero, k_full.index(k_stage), k_empty.index(k_stage), k_phase, more,
            v_full.index(stage), v_empty.index(stage), phase, mine, other, turn, MODE, BN, D, DV,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(slot))
        acc = _finished(acc, v_empty.index(stage), MODE)
        stage, phase, turn = k_stage, k_phase, turn ^ 1
        alive = total > 0.0
        safe = gl.where(alive, total, 1.0)
        lse = gl.where(alive, (m + gl.log2(safe)) * 0.6931471805599453, -float("inf"))
        b64, h64 = b.to(gl.int64), ho.to(gl.int64)
        gl.store(LSE + b64 * s_lb + h64 * s_lh + rows.to(gl.int64) * s_ln, lse, mask=rows < n_q)
        acc = acc * gl.convert_layout(1.0 / safe, o_row)[:, None]
        o_rows = q_row + WHO * ROWS + gl.arange(0, ROWS, layout=o_row)
        d = gl.arange(0, DV, layout=gl.SliceLayout(0, ol))
        place = OUT + b64 * s_ob + h64 * s_oh + o_rows.to(gl.int64)[:, None] * s_on + d[None, :]
        gl.store(place, acc.to(dtype), mask=(o_rows < n_q)[:, None] & (d < DV)[None, :])
        row, q_row, b, ho = next_row, next_q_row, next_b, next_ho
        masked, clean = next_masked, next_clean


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start", "capacity"])
def _block_sparse(
    q_desc, k_desc, v_desc, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items,
    n_q, n_k, q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, STAGES: gl.constexpr,
    MODE: gl.constexpr,
):  # fmt: skip
    q = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, BM // 2, D], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BN, DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_q, n_k,
                q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turns, BQ, BK, BM, BN, D, DV, CAUSAL, EXTRA_MASKED, STAGES, MODE,
            )),
            (_consume, (
                1, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_q, n_k,
                q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turns, BQ, BK, BM, BN, D, DV, CAUSAL, EXTRA_MASKED, STAGES, MODE,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, ITEMS, LISTS, n_items, capacity, q, k, v, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, BQ, BK, BM, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], kind)


def descriptor(t: torch.Tensor, rows: int) -> TensorDescriptor:
    box = [1, 1, rows, t.shape[3]]
    return TensorDescriptor(
        t, list(t.shape), list(t.stride()), box, layout(rows, t.shape[3], t.dtype)
    )


def run(launch, work, *, stages: int = 2, mode: str = "turns", bn: int = 128, grid=132):
    (bq, bk), bm = launch.index.size, 128
    d, dv = launch.q.shape[3], launch.v.shape[3]
    one = bk == bn
    if launch.causal:
        covered = launch.n_k % bk == 0 or launch.n_k >= launch.q_start + launch.n_q
        one = one and covered and bk % bq == 0 and launch.q_start % bq == 0
    n_items = work.items.shape[0] * (bq // bm)
    return _block_sparse[(min(n_items, grid),)](
        descriptor(launch.q, bm // 2), descriptor(launch.k, bn), descriptor(launch.v, bn),
        launch.out, launch.lse, work.items, work.lists, *launch.out.stride()[:3], *launch.lse.stride(),
        n_items, launch.n_q, launch.n_k, launch.q_start, work.capacity,
        launch.scale * 1.4426950408889634,
        BQ=bq, BK=bk, BM=bm, BN=bn, D=d, DV=dv, CAUSAL=launch.causal, EXTRA_MASKED=not one,
        STAGES=stages, MODE=mode, num_warps=4,
    )  # fmt: skip

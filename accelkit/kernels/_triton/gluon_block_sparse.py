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
def _hide(s, k0, limit, n_k, BN: gl.constexpr, layout: gl.constexpr):
    col = k0 + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    seen = (col < n_k)[None, :] & (col[None, :] <= limit[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _consume(
    WHO: gl.constexpr, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_q,
    n_k, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    turns,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    PER_ROW: gl.constexpr = BQ // BM
    HALF: gl.constexpr = BM // 2
    dtype: gl.constexpr = v.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    stage, phase = 0, 0
    turn = 1 - WHO
    for round in range(_rounds(n_items)):
        place = _place(round)
        item = ITEMS + (place // PER_ROW).to(gl.int64) * FIELDS
        row, b = gl.load(item), gl.load(item + 2)
        q_row = gl.load(item + 1) + (place % PER_ROW) * BM
        ho, masked, clean = gl.load(item + 5), gl.load(item + 6), gl.load(item + 7)
        at = LISTS + row.to(gl.int64) * capacity
        n = gl.maximum(masked + clean, 1) * R
        m0 = q_row + WHO * HALF
        rows = m0 + gl.arange(0, HALF, layout=s_row)
        limit = rows * 0 + n_k
        if CAUSAL:
            limit = rows + q_start
        limit = gl.where(masked + clean > 0, limit, -1)
        slot = round % 2
        mine = _flat(q.index(slot * 2 + WHO), HALF, D)
        m = gl.full([HALF], -1e30, gl.float32, s_row)
        total = gl.zeros([HALF], gl.float32, s_row)
        acc = gl.zeros([HALF, DV], gl.float32, ol)
        zero = gl.zeros([HALF, BN], gl.float32, sl)
        mbarrier.wait(q_full.index(slot), (round // 2) & 1)
        lead = 0
        if EXTRA_MASKED:
            lead = gl.maximum(masked * R - 1, 0)
            for j in range(lead):
                k0 = gl.load(at + j // R) * BK + (j % R) * BN
                mbarrier.wait(k_full.index(stage), phase)
                s = warpgroup_mma(mine, _flat(k.index(stage), BN, D).permute((1, 0)), zero,
                                  use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                s = _hide(s, k0, limit, n_k, BN, sl)
                m_new = gl.maximum(m, gl.max(s, 1) * factor)
                alpha = gl.exp2(m - m_new)
                p = gl.exp2(s * factor - m_new[:, None])
                total = total * alpha + gl.sum(p, 1)
                acc = acc * gl.convert_layout(alpha, o_row)[:, None]
                m = m_new
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(gl.convert_layout(p.to(dtype), pl),
                                    _flat(v.index(stage), BN, DV), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
        k0 = gl.load(at + lead // R, mask=masked + clean > 0, other=0) * BK + (lead % R) * BN
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(mine, _flat(k.index(stage), BN, D).permute((1, 0)), zero,
                          use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage))
        s = _hide(s, k0, limit, n_k, BN, sl)
        m_new = gl.maximum(m, gl.max(s, 1) * factor)
        alpha = gl.exp2(m - m_new)
        p = gl.exp2(s * factor - m_new[:, None])
        total = total * alpha + gl.sum(p, 1)
        acc = acc * gl.convert_layout(alpha, o_row)[:, None]
        m = m_new
        p16 = gl.convert_layout(p.to(dtype), pl)
        for j in range(lead + 1, n):
            v_stage, v_phase = stage, phase
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            mbarrier.wait(k_full.index(stage), phase)
            if PINGPONG:
                mbarrier.wait(turns.index(WHO), turn)
                turn ^= 1
            s = warpgroup_mma(mine, _flat(k.index(stage), BN, D).permute((1, 0)), zero,
                              use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            if PINGPONG == 2:
                acc = warpgroup_mma(p16, _flat(v.index(v_stage), BN, DV), acc, is_async=True)
                mbarrier.arrive(turns.index(1 - WHO))
                s, acc = warpgroup_mma_wait(0, deps=[s, acc])
                mbarrier.arrive(k_empty.index(stage))
                mbarrier.arrive(v_empty.index(v_stage))
            else:
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                acc = warpgroup_mma(p16, _flat(v.index(v_stage), BN, DV), acc, is_async=True)
                if PINGPONG:
                    mbarrier.arrive(turns.index(1 - WHO))
            m_new = gl.maximum(m, gl.max(s, 1) * factor)
            p = gl.exp2(s * factor - m_new[:, None])
            alpha = gl.exp2(m - m_new)
            total = total * alpha + gl.sum(p, 1)
            m = m_new
            if PINGPONG != 2:
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(v_stage))
            acc = acc * gl.convert_layout(alpha, o_row)[:, None]
            p16 = gl.convert_layout(p.to(dtype), pl)
        mbarrier.arrive(q_empty.index(slot))
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p16, _flat(v.index(stage), BN, DV), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        alive = total > 0.0
        safe = gl.where(alive, total, 1.0)
        lse = gl.where(alive, (m + gl.log2(safe)) * 0.6931471805599453, -float("inf"))
        keep = rows < n_q
        b64, h64 = b.to(gl.int64), ho.to(gl.int64)
        gl.store(LSE + b64 * s_lb + h64 * s_lh + rows.to(gl.int64) * s_ln, lse, mask=keep)
        acc = acc * gl.convert_layout(1.0 / safe, o_row)[:, None]
        o_rows = m0 + gl.arange(0, HALF, layout=o_row)
        d = gl.arange(0, DV, layout=gl.SliceLayout(0, ol))
        place = OUT + b64 * s_ob + h64 * s_oh + o_rows.to(gl.int64)[:, None] * s_on + d[None, :]
        gl.store(place, acc.to(dtype), mask=(o_rows < n_q)[:, None] & (d < DV)[None, :])


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start", "capacity"])
def _block_sparse(
    q_desc, k_desc, v_desc, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items,
    n_q, n_k, q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, STAGES: gl.constexpr,
    PINGPONG: gl.constexpr,
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
                v_empty, turns, BQ, BK, BM, BN, D, DV, CAUSAL, EXTRA_MASKED, STAGES, PINGPONG,
            )),
            (_consume, (
                1, OUT, LSE, ITEMS, LISTS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_q, n_k,
                q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, turns, BQ, BK, BM, BN, D, DV, CAUSAL, EXTRA_MASKED, STAGES, PINGPONG,
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


def run(launch, work, *, stages: int = 2, pingpong: int = 1, bn: int = 128, grid=132):
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
        STAGES=stages, PINGPONG=pingpong, num_warps=4,
    )  # fmt: skip

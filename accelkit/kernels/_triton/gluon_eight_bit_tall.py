"""The 8-bit kernel for rows that are read in tall units: three consumer groups instead of two.

Each warpgroup of 64 query rows goes strictly from scores to softmax to PV; what covers its waiting
are the other two. That leaves 160 registers a thread: PV is added up in two halves of the head.
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

from accelkit.kernels._triton.gluon_eight_bit import (
    _MAGIC,
    _ROWS,
    _SIZES,
    _key0,
    _pack,
    _place,
    _produce,
    _rounds,
    _scaled,
    _scores,
    _softmax,
    _sums,
    _unpack,
    arguments,
)
from accelkit.kernels._triton.gluon_kernel import _barriers, _item, _next
from accelkit.kernels._triton.gluon_parts import normalised
from accelkit.kernels._triton.lower import Work
from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import Operands

ROWS = 192
"""Query rows of an item: 64 for each of three groups."""
_GROUPS = gl.constexpr(3)
_FULL = gl.constexpr(8.0)


@gluon.jit
def _halves(
    packed, v, stage, acc0, acc1, before, none, BN: gl.constexpr, D: gl.constexpr, pl: gl.constexpr
):
    """Both halves of the sums, after P · V has been added to what they were."""
    values = v.index(stage).reshape([D, BN])
    p = _unpack(packed, v.dtype, pl)
    pv = warpgroup_mma(
        p, values.slice(0, D // 2, 0).permute((1, 0)), none, use_acc=False, is_async=True
    )
    pv, packed = warpgroup_mma_wait(0, deps=[pv, packed])
    p = _unpack(packed, v.dtype, pl)
    pw = warpgroup_mma(
        p, values.slice(D // 2, D // 2, 0).permute((1, 0)), none, use_acc=False, is_async=True
    )
    acc0 = acc0 * before[:, None] + pv
    pw, packed = warpgroup_mma_wait(0, deps=[pw, packed])
    acc1 = acc1 * before[:, None] + pw
    return acc0, acc1


@gluon.jit
def _step(
    mine, k, v, stage, phase, k_full, k_empty, v_full, v_empty, c, hidden, k0, limit, m, total,
    acc0, acc1, zero, none, BN: gl.constexpr, D: gl.constexpr, INT: gl.constexpr,
    sl: gl.constexpr, o_row: gl.constexpr, pl: gl.constexpr,
):  # fmt: skip
    """One tile, from scores to sums; of a partly hidden one the hidden scores become −inf."""
    mbarrier.wait(k_full.index(stage), phase)
    s = _scores(mine, k, stage, zero, BN, D)
    s = warpgroup_mma_wait(0, deps=[s]).to(gl.float32, bitcast=True)
    mbarrier.arrive(k_empty.index(stage))
    if hidden:
        col = k0 + gl.arange(0, BN, layout=gl.SliceLayout(0, sl))
        s = gl.where(col[None, :] <= limit[:, None], s, -float("inf"))
    p, m_new = _softmax(s, c, m, _FULL, INT)
    alpha = gl.exp2(m - m_new)
    total = _scaled(total, alpha) + _sums(p, BN)
    packed = _pack(p, BN, v.dtype)
    before = gl.convert_layout(alpha, o_row)
    mbarrier.wait(v_full.index(stage), phase)
    acc0, acc1 = _halves(packed, v, stage, acc0, acc1, before, none, BN, D, pl)
    mbarrier.arrive(v_empty.index(stage))
    return m_new, total, acc0, acc1


@gluon.jit
def _consume(
    WHO: gl.constexpr, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS,
    KV_HEADS, OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k, n_kb,
    q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
    SMOOTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    INT: gl.constexpr = k.dtype == gl.int8
    s_type: gl.constexpr = gl.int32 if INT else gl.float32
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 32])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 4)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    stage, phase = 0, 0
    zero = gl.full([_ROWS, BN], _MAGIC if INT else 0, s_type, sl)
    none = gl.zeros([_ROWS, D // 2], gl.float32, ol)
    for round in range(_rounds(n_items)):
        row, m0, b, slot, masked, clean = _item(
            ITEMS, _place(round), n_items, _GROUPS * _ROWS, BQ // (_GROUPS * _ROWS)
        )
        b64, h64 = b.to(gl.int64), slot.to(gl.int64)
        hk = gl.load(KV_HEADS + slot)
        at = row.to(gl.int64) * capacity
        n = (masked + clean) * R
        rows = m0 + WHO * _ROWS + gl.arange(0, _ROWS, layout=s_row)
        limit = rows * 0 + n_k - 1
        if CAUSAL:
            limit = gl.minimum(limit, rows + q_start)
        q_at = (b64 * n_heads + h64) * n_q
        by_row = gl.load(Q_SCALE + q_at + rows, mask=rows < n_q, other=0.0) * factor
        scales = K_SCALE + (b64 * n_kv + hk) * n_kb
        m = gl.full([_ROWS], -1e30, gl.float32, s_row)
        total = _sums(gl.zeros([_ROWS, BN], gl.float32, sl), BN)
        acc0 = gl.zeros([_ROWS, D // 2], gl.float32, ol)
        acc1 = gl.zeros([_ROWS, D // 2], gl.float32, ol)
        side = round % 2
        mine = q.index(side * _GROUPS + WHO).reshape([_ROWS, D])
        mbarrier.wait(q_full.index(side), (round // 2) & 1)
        lead = gl.maximum(masked * R, 1)
        next_k0 = _key0(LISTS, at, 0, BK, BN)
        for j in range(n):
            k0 = next_k0
            next_k0 = _key0(LISTS, at, gl.minimum(j + 1, n - 1), BK, BN)
            # Not zero: what is hidden would not stay −inf.
            c = gl.maximum(by_row * gl.load(scales + k0 // BN), 1e-37)
            m, total, acc0, acc1 = _step(
                mine, k, v, stage, phase, k_full, k_empty, v_full, v_empty, c, j < lead, k0, limit,
                m, total, acc0, acc1, zero, none, BN, D, INT, sl, o_row, pl,
            )  # fmt: skip
            stage, phase = _next(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(side))
        ho = gl.load(OUT_HEADS + slot)
        total1 = gl.convert_layout(gl.sum(total, 1), s_row)
        m -= _FULL
        if SMOOTH:
            m += gl.load(SHIFT + q_at + rows, mask=rows < n_q, other=0.0) * 1.4426950408889634
        o_rows = m0 + WHO * _ROWS + gl.arange(0, _ROWS, layout=o_row)
        d = gl.arange(0, D // 2, layout=gl.SliceLayout(0, ol))
        mass = gl.convert_layout(total1, o_row)[:, None]
        place = OUT + b64 * s_ob + ho.to(gl.int64) * s_oh + o_rows.to(gl.int64)[:, None] * s_on
        for half in gl.static_range(2):
            acc = acc0 if half == 0 else acc1
            channel = (b64 * n_kv + hk) * D + d + half * (D // 2)
            acc = acc * gl.load(V_SCALE + channel)[None, :]
            acc += mass * gl.load(V_MEAN + channel)[None, :]
            acc = normalised(acc, LSE, s_lb, s_lh, s_ln, b, ho, rows, n_q, m, total1)
            gl.store(
                place + (d + half * (D // 2))[None, :],
                acc.to(OUT.dtype.element_ty),
                mask=(o_rows < n_q)[:, None],
            )


@gluon.jit(do_not_specialize=_SIZES)
def _eight_bit_tall(
    q_desc, k_desc, v_desc, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS,
    KV_HEADS, OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k, n_kb,
    q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, CAUSAL:
    gl.constexpr, SMOOTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q = gl.allocate_shared_memory(q_desc.dtype, [2 * _GROUPS, 1, 1, _ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, D, BN], v_desc.layout)
    q_full, q_empty = _barriers(2, 1), _barriers(2, _GROUPS)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, _GROUPS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, _GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, BQ, BK, BN, D, CAUSAL, SMOOTH, STAGES,
            )),
            (_consume, (
                1, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, BQ, BK, BN, D, CAUSAL, SMOOTH, STAGES,
            )),
            (_consume, (
                2, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, k_empty, v_full,
                v_empty, BQ, BK, BN, D, CAUSAL, SMOOTH, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, q, k, v, q_full,
                q_empty, k_full, k_empty, v_full, v_empty, BQ, BK, BN, True, STAGES, _GROUPS,
            )),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def run(launch: Launch, ops: Operands, work: Work) -> None:
    """Start the kernel over lowered work of units that 192 rows divide; V is fp8."""
    programs, found, constants = arguments(launch, ops, work, ROWS)
    _eight_bit_tall[(programs,)](*found, **constants, num_warps=4)

"""Attention forward with fp8 QK and fp8 PV for Hopper: scores in half precision.

Scores of e4m3 operands within ±16 stay below 2¹⁵ for heads of 128, so the tensor cores may add them
up in fp16: two to a register, which leaves room for the scores of two tiles. Those of the next tile
and the product with V of the one before are under way while a tile goes through its softmax, and
that too works on pairs. Scales are powers of two (`kernels.quantize`), so that a row's factor is
exact in fp16. All else is as in `gluon_eight_bit`.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from accelkit.kernels._triton.gluon_eight_bit import (
    _ROWS,
    _in_order,
    _key0,
    _place,
    _rounds,
    _scaled,
    _unpack,
    describe,
)
from accelkit.kernels._triton.gluon_kernel import _barriers, _item, _next
from accelkit.kernels._triton.gluon_parts import load, normalised
from accelkit.kernels._triton.lower import Work
from accelkit.kernels._triton.tile import LOG2E, one_masked
from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import Operands

_K_FREE = gl.constexpr(3)
"""Processor barrier of the first place for K; those of the others follow. Triton uses 0 to 2."""
_V_FREE = gl.constexpr(7)
_STAGES = gl.constexpr(4)
_TURNS = gl.constexpr(False)


@gluon.jit
def _give(barrier):
    """A warpgroup is through with a place. Threads: two warpgroups and the copying warp."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 288; mov.b32 $0, 0;", "=r,r", [barrier], gl.int32, False, 1
    )


@gluon.jit
def _take(barrier):
    """The copying warp waits until both warpgroups have given a place."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 288; mov.b32 $0, 0;", "=r,r", [barrier], gl.int32, False, 1
    )


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, q, k, v, q_full, q_empty,
    k_full, v_full, BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    stage, copied = 0, 0
    for round in range(_rounds(n_items)):
        row, m0, b, slot, masked, clean = _item(
            ITEMS, _place(round), n_items, 2 * _ROWS, BQ // (2 * _ROWS)
        )
        hk = gl.load(KV_HEADS + slot)
        at = row.to(gl.int64) * capacity
        side = round % 2
        mbarrier.wait(q_empty.index(side), ((round // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(side), q_desc.block_type.nbytes * 2)
        load(q_desc, [b, slot, m0, 0], q_full.index(side), q.index(side * 2))
        load(q_desc, [b, slot, m0 + _ROWS, 0], q_full.index(side), q.index(side * 2 + 1))
        for j in range((masked + clean) * R):
            k0 = _key0(LISTS, at, j, BK, BN)
            if copied >= _STAGES:
                _take(_K_FREE + stage)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load(k_desc, [b, hk, k0, 0], k_full.index(stage), k.index(stage))
            if copied >= _STAGES:
                _take(_V_FREE + stage)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            load(v_desc, [b, hk, 0, k0], v_full.index(stage), v.index(stage))
            stage, copied = (stage + 1) % _STAGES, copied + 1
    for i in range(gl.minimum(copied, _STAGES)):  # no barrier is left half full
        _take(_K_FREE + (copied - 1 - i) % _STAGES)
        _take(_V_FREE + (copied - 1 - i) % _STAGES)


@builtin
def _registers(product, _semantic=None):
    """The tensor of a product that nobody has waited for. A wait over fp16 would take its registers
    apart before it, and the assembler then lets no two products overlap.
    """
    return gl.tensor(product.handle, product.type.tensor_type)


@gluon.jit
def _scores(mine, k, stage, none, BN: gl.constexpr, D: gl.constexpr):
    """Start a product of scores: pairs, to be read after a wait for them."""
    keys = k.index(stage).reshape([BN, D]).permute((1, 0))
    return _pairs(_registers(warpgroup_mma(mine, keys, none, use_acc=False, is_async=True)))


@gluon.jit
def _product(bits, v, stage, none, BN: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    values = v.index(stage).reshape([D, BN]).permute((1, 0))
    p = _unpack(bits, v.dtype, layout)
    return warpgroup_mma(p, values, none, use_acc=False, is_async=True)


@gluon.jit
def _greater(a, b):
    return gl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, True, 1)


@gluon.jit
def _sum(a, b):
    return gl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, True, 1
    )


@gluon.jit
def _pairs(x):
    """Neighbours in fp16 as one integer, [rows, pairs]."""
    bits = x.to(gl.int16, bitcast=True).reshape([x.shape[0], x.shape[1] // 2, 2])
    low, high = bits.split()
    return (high.to(gl.int32) << 16) | (low.to(gl.int32) & 0xFFFF)


@gluon.jit
def _halves(x):
    """Both numbers of a pair, fp32."""
    low = x.to(gl.int16).to(gl.float16, bitcast=True)
    high = (x >> 16).to(gl.int16).to(gl.float16, bitcast=True)
    return low.to(gl.float32), high.to(gl.float32)


@gluon.jit
def _twice(x, layout: gl.constexpr):
    """A number for each row as a pair of equal ones."""
    bits = x.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return gl.convert_layout(bits | (bits << 16), gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def _maxima(s, c, m, BN: gl.constexpr):
    """Maxima with a tile: numbers that fp16 holds, so that P stays below 448."""
    top = gl.reduce(s.reshape([_ROWS, BN // 8, 4]), 1, _greater)
    low, high = _halves(gl.reduce(top, 1, _greater))
    top = gl.convert_layout(gl.maximum(low, high), m.type.layout)
    return gl.maximum(m, (top * c).to(gl.float16).to(gl.float32))


@gluon.jit
def _powers(s, c, m):
    """2^(s · c - m + 8) of pairs."""
    layout: gl.constexpr = s.type.layout
    x = gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3; ex2.approx.f16x2 $0, $0;", "=&r,r,r,r",
        [s, _twice(c, layout), _twice(gl.minimum(8.0 - m, 60000.0), layout)], gl.int32, True, 1,
    )  # fmt: skip
    return x


@gluon.jit
def _sums(p, BN: gl.constexpr):
    """Row sums as the four threads of a row hold them, [rows, 4] fp32: joined once, at the end."""
    low, high = _halves(gl.reduce(p.reshape([_ROWS, BN // 8, 4]), 1, _sum))
    return low + high


@gluon.jit
def _pack(p, BN: gl.constexpr):
    """Four probabilities as one integer, in the token order in which V is stored."""
    p = p.reshape([_ROWS, BN // 16, 2, 4]).permute((0, 1, 3, 2))
    low, high = p.split()
    bits = gl.inline_asm_elementwise(
        "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f16x2 a, $1;"
        " cvt.rn.satfinite.e4m3x2.f16x2 b, $2; mov.b32 $0, {a, b};}",
        "=r,r,r", [low, high], gl.uint32, True, 1,
    )  # fmt: skip
    return bits.reshape([_ROWS, BN // 4])


@gluon.jit
def _after(x):
    """`x`, by way of a load that never happens (no maximum is infinite): what follows from it stays
    behind the products that were started before.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.eq.f32 p, $1, 0f7f800000;"
        " mov.f32 $0, $1; @p ld.volatile.shared.f32 $0, [a];}",
        "=f,f", [x], gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _softmax(s, c, m, m_new, total, BN: gl.constexpr):
    """P of a tile in fp8, new sums, and the factor to what was before."""
    alpha = gl.exp2(m - m_new)
    p = _powers(s, c, m_new)
    total = _scaled(total, alpha) + _sums(p, BN)
    return _pack(p, BN), alpha, total


@gluon.jit
def _hide(s, k0, limit, n_k, BN: gl.constexpr):
    """Pairs with -inf for keys that a row does not see."""
    layout: gl.constexpr = s.type.layout
    col = k0 + 2 * gl.arange(0, BN // 2, layout=gl.SliceLayout(0, layout))
    end = gl.convert_layout(gl.minimum(limit, n_k - 1), gl.SliceLayout(1, layout))[:, None]
    s = gl.where(col[None, :] <= end, s, (s & -65536) | 0xFC00)
    return gl.where(col[None, :] < end, s, (s & 0xFFFF) | -67108864)


@gluon.jit
def _factor(by_row, scales, k0, BN: gl.constexpr):
    """The rows' factor for a tile, within what fp16 holds; never nought, which times -inf is NaN."""
    c = by_row * gl.load(scales + k0 // BN)
    return gl.minimum(gl.maximum(c, 5.9604644775390625e-08), 32768.0)


@gluon.jit
def _consume(
    WHO: gl.constexpr, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS,
    KV_HEADS, OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k, n_kb,
    q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, turns,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, SMOOTH: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 4)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    stage, phase, turn = 0, 0, 1 - WHO
    no_scores = gl.zeros([_ROWS, BN], gl.float16, sl)
    none = gl.zeros([_ROWS, D], gl.float32, ol)
    for round in range(_rounds(n_items)):
        row, m0, b, slot, masked, clean = _item(
            ITEMS, _place(round), n_items, 2 * _ROWS, BQ // (2 * _ROWS)
        )
        b64, h64 = b.to(gl.int64), slot.to(gl.int64)
        hk, ho = gl.load(KV_HEADS + slot), gl.load(OUT_HEADS + slot)
        at = row.to(gl.int64) * capacity
        n = (masked + clean) * R
        rows = m0 + WHO * _ROWS + gl.arange(0, _ROWS, layout=s_row)
        limit = rows * 0 + n_k
        if CAUSAL:
            limit = rows + q_start
        q_at = (b64 * n_heads + h64) * n_q
        by_row = gl.load(Q_SCALE + q_at + rows, mask=rows < n_q, other=0.0) * factor
        scales = K_SCALE + (b64 * n_kv + hk) * n_kb
        m = gl.full([_ROWS], -1e30, gl.float32, s_row)
        alpha = gl.full([_ROWS], 1.0, gl.float32, s_row)
        total = _sums(_pairs(no_scores), BN)
        acc = gl.zeros([_ROWS, D], gl.float32, ol)
        side = round % 2
        mine = q.index(side * 2 + WHO).reshape([_ROWS, D])
        mbarrier.wait(q_full.index(side), (round // 2) & 1)
        if n > 0:
            lead = 0
            if EXTRA_MASKED:
                lead = gl.maximum(masked * R - 1, 0)
                for j in range(lead):
                    k0 = _key0(LISTS, at, j, BK, BN)
                    mbarrier.wait(k_full.index(stage), phase)
                    s = _scores(mine, k, stage, no_scores, BN, D)
                    s = warpgroup_mma_wait(0, deps=[s])
                    _give(_K_FREE + stage)
                    s = _hide(s, k0, limit, n_k, BN)
                    c = _factor(by_row, scales, k0, BN)
                    m_new = _maxima(s, c, m, BN)
                    bits, alpha, total = _softmax(s, c, m, m_new, total, BN)
                    m = m_new
                    mbarrier.wait(v_full.index(stage), phase)
                    pv = _product(bits, v, stage, none, BN, D, pl)
                    pv, bits = warpgroup_mma_wait(0, deps=[pv, bits])
                    _give(_V_FREE + stage)
                    acc = acc * gl.convert_layout(alpha, o_row)[:, None] + pv
                    stage, phase = _next(stage, phase, _STAGES)
            # The last tile with masked keys, and the scores of the first one without.
            k0 = _key0(LISTS, at, lead, BK, BN)
            mbarrier.wait(k_full.index(stage), phase)
            s = _scores(mine, k, stage, no_scores, BN, D)
            s = warpgroup_mma_wait(0, deps=[s])
            _give(_K_FREE + stage)
            s = _hide(s, k0, limit, n_k, BN)
            c = _factor(by_row, scales, k0, BN)
            m_new = _maxima(s, c, m, BN)
            bits, alpha, total = _softmax(s, c, m, m_new, total, BN)
            m = m_new
            v_stage, v_phase = stage, phase
            stage, phase = _next(stage, phase, _STAGES)
            if lead + 1 < n:
                k0 = _key0(LISTS, at, lead + 1, BK, BN)
                c = _factor(by_row, scales, k0, BN)
                mbarrier.wait(k_full.index(stage), phase)
                s = _scores(mine, k, stage, no_scores, BN, D)
                s = warpgroup_mma_wait(0, deps=[s])
                _give(_K_FREE + stage)
                stage, phase = _next(stage, phase, _STAGES)
                # Where a tile lies is read two tiles early, its scale one.
                k0 = _key0(LISTS, at, gl.minimum(lead + 2, n - 1), BK, BN)
                for j in range(lead + 2, n):
                    following = _factor(by_row, scales, k0, BN)
                    k0 = _key0(LISTS, at, gl.minimum(j + 1, n - 1), BK, BN)
                    mbarrier.wait(k_full.index(stage), phase)
                    ahead = _scores(mine, k, stage, no_scores, BN, D)
                    m_new = _maxima(s, c, m, BN)
                    mbarrier.wait(v_full.index(v_stage), v_phase)
                    pv = _product(bits, v, v_stage, none, BN, D, pl)
                    before = gl.convert_layout(alpha, o_row)
                    m_new = _after(m_new)
                    if _TURNS:
                        mbarrier.wait(turns.index(WHO), turn)
                    packed, alpha, total = _softmax(s, c, m, m_new, total, BN)
                    total, m = _in_order(total), m_new
                    if _TURNS:
                        mbarrier.arrive(turns.index(1 - WHO))
                        turn ^= 1
                    pv, bits, ahead = warpgroup_mma_wait(0, deps=[pv, bits, ahead])
                    _give(_K_FREE + stage)
                    _give(_V_FREE + v_stage)
                    acc = acc * before[:, None] + pv
                    s, bits, c = ahead, packed, following
                    stage, phase = _next(stage, phase, _STAGES)
                    v_stage, v_phase = _next(v_stage, v_phase, _STAGES)
                mbarrier.wait(v_full.index(v_stage), v_phase)
                pv = _product(bits, v, v_stage, none, BN, D, pl)
                before = gl.convert_layout(alpha, o_row)
                m_new = _maxima(s, c, m, BN)
                packed, alpha, total = _softmax(s, c, m, m_new, total, BN)
                m = m_new
                pv, bits = warpgroup_mma_wait(0, deps=[pv, bits])
                _give(_V_FREE + v_stage)
                acc = acc * before[:, None] + pv
                bits = packed
                v_stage, v_phase = _next(v_stage, v_phase, _STAGES)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            pv = _product(bits, v, v_stage, none, BN, D, pl)
            pv, bits = warpgroup_mma_wait(0, deps=[pv, bits])
            _give(_V_FREE + v_stage)
            acc = acc * gl.convert_layout(alpha, o_row)[:, None] + pv
        mbarrier.arrive(q_empty.index(side))
        total = gl.convert_layout(gl.sum(total, 1), s_row)
        m -= 8.0
        if SMOOTH:
            m += gl.load(SHIFT + q_at + rows, mask=rows < n_q, other=0.0) * 1.4426950408889634
        o_rows = m0 + WHO * _ROWS + gl.arange(0, _ROWS, layout=o_row)
        d = gl.arange(0, D, layout=gl.SliceLayout(0, ol))
        channel = (b64 * n_kv + hk) * D + d
        mass = gl.convert_layout(total, o_row)[:, None]
        acc = acc * gl.load(V_SCALE + channel)[None, :]
        acc += mass * gl.load(V_MEAN + channel)[None, :]
        acc = normalised(acc, LSE, s_lb, s_lh, s_ln, b, ho, rows, n_q, m, total)
        place = OUT + b64 * s_ob + ho.to(gl.int64) * s_oh + o_rows.to(gl.int64)[:, None] * s_on
        gl.store(place + d[None, :], acc.to(OUT.dtype.element_ty), mask=(o_rows < n_q)[:, None])


_SIZES = ["n_items", "n_heads", "n_kv", "n_q", "n_k", "n_kb", "q_start", "capacity"]


@gluon.jit(do_not_specialize=_SIZES)
def _fp8(
    q_desc, k_desc, v_desc, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS,
    KV_HEADS, OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k, n_kb,
    q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, SMOOTH: gl.constexpr,
):  # fmt: skip
    q = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, _ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [_STAGES, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [_STAGES, 1, 1, D, BN], v_desc.layout)
    q_full, q_empty, turns = _barriers(2, 1), _barriers(2, 2), _barriers(2, 1)
    k_full, v_full = _barriers(_STAGES, 1), _barriers(_STAGES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, turns,
                BQ, BK, BN, D, CAUSAL, EXTRA_MASKED, SMOOTH,
            )),
            (_consume, (
                1, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, turns,
                BQ, BK, BN, D, CAUSAL, EXTRA_MASKED, SMOOTH,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, q, k, v, q_full,
                q_empty, k_full, v_full, BQ, BK, BN,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def run(launch: Launch, ops: Operands, work: Work) -> None:
    """Start the kernel over lowered work."""
    (bq, bk), d, bn = launch.index.size, launch.q.shape[3], ops.block
    n_items = work.items.shape[0] * (bq // 128)
    processors = torch.cuda.get_device_properties(launch.q.device).multi_processor_count
    _fp8[(min(n_items, processors),)](
        describe(ops.q, (64, d)), describe(ops.k, (bn, d)), describe(ops.v, (d, bn)),
        launch.out, launch.lse, ops.q_scale, ops.k_scale, ops.v_scale, ops.v_mean,
        ops.q_scale if ops.shift is None else ops.shift, work.items, work.lists, launch.kv_heads,
        launch.out_heads, *launch.out.stride()[:3], *launch.lse.stride(), n_items, launch.heads,
        ops.k.shape[1], launch.n_q, launch.n_k, ops.k_scale.shape[2],
        launch.q_start, work.capacity, launch.scale * LOG2E,
        BQ=bq, BK=bk, BN=bn, D=d, CAUSAL=launch.causal, EXTRA_MASKED=not one_masked(launch, bn),
        SMOOTH=ops.shift is not None, num_warps=4,
    )  # fmt: skip

"""Block-sparse attention forward in 8 bits for Hopper, in warps of different trades.

A producer warp reads the lists and copies Q, K and V tiles into shared memory; two consumer
warpgroups of 64 query rows each multiply them. A softmax runs under the PV of the tile before. It
starts when the scores are there ("lag"), or, with fp8 QK and 16-bit PV, together with them, the
groups taking turns: whichever was measured to be faster. With fp8 PV a group starts its
exponentials when the other is nearly through with its own, and PV is added up while the next scores
are on their way. A program stays on its multiprocessor and walks over rows, longest first. Scales,
the factor 2⁸ of P and fresh accumulators are those of `eight_bit`.

Int8 scores are added up from the integer that is the float 1.5 · 2²³: the sums, whole numbers below
2²², are floats without a conversion.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from accelkit.kernels._triton.gluon_eight_parts import (
    _ROWS,
    _V_FREE,
    _await_turn,
    _in_order,
    _in_turn,
    _key0,
    _pass_turn,
    _place,
    _produce,
    _rounds,
)
from accelkit.kernels._triton.gluon_kernel import _barriers, _item, _next
from accelkit.kernels._triton.gluon_parts import K_FREE, give, normalised
from accelkit.kernels._triton.lower import Work
from accelkit.kernels._triton.tile import LOG2E, one_masked
from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import Operands

_MAGIC = gl.constexpr(0x4B400000)
_MAGIC_VALUE = gl.constexpr(12582912.0)  # the same bits as fp32: 1.5 · 2²³


@gluon.jit
def _hide(s, k0, limit, n_k, BN: gl.constexpr, layout: gl.constexpr):
    col = k0 + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    seen = (col < n_k)[None, :] & (col[None, :] <= limit[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _part(x, narrow: gl.constexpr):
    high = (x >> narrow.primitive_bitwidth).to(narrow)
    return gl.join(x.to(narrow), high).reshape([x.shape[0], x.shape[1] * 2])


@gluon.jit
def _pack(p, BN: gl.constexpr, DTYPE: gl.constexpr):
    """Probabilities as integers that a wait can hold; for fp8 in the token order in which V is
    stored, so that no value changes its thread.
    """
    if DTYPE.primitive_bitwidth == 8:
        low, high = p.reshape([_ROWS, BN // 16, 2, 4, 2]).permute((0, 1, 3, 4, 2)).split()
        a, b = low.split()
        c, d = high.split()
        bits = gl.inline_asm_elementwise(
            "{.reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 y, $4, $3; mov.b32 $0, {x, y};}",
            "=r,f,f,f,f", [a, b, c, d], gl.uint32, True, 1,
        ).reshape([_ROWS, BN // 4])  # fmt: skip
    else:
        bits = p.to(DTYPE).to(gl.int16, bitcast=True)
    return bits


@gluon.jit
def _unpack(bits, DTYPE: gl.constexpr, layout: gl.constexpr):
    if DTYPE.primitive_bitwidth == 8:
        bits = _part(_part(bits, gl.uint16), gl.uint8)
    return gl.convert_layout(bits.to(DTYPE, bitcast=True), layout)


@gluon.jit
def _scores(mine, k, stage, zero, BN: gl.constexpr, D: gl.constexpr):
    keys = k.index(stage).reshape([BN, D]).permute((1, 0))
    INT: gl.constexpr = zero.dtype == gl.int32
    return warpgroup_mma(mine, keys, zero, use_acc=INT, is_async=True)


@gluon.jit
def _logits(s, c, INT: gl.constexpr):
    """Scores of a tile as base-2 logits; `c` is the rows' factor."""
    s = s.to(gl.float32, bitcast=True)
    if INT:
        s -= _MAGIC_VALUE
    return s * c[:, None]


@gluon.jit
def _greater(a, b):
    """The greater of both numbers of two pairs."""
    return gl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, True, 1)


@gluon.jit
def _top(s, m):
    """Row maxima by instructions that compare three numbers, of integers or of pairs in fp16 (which
    holds the sums, `quantize.TOP`): a maximum need not be exact to stand for its row.
    """
    if s.dtype == gl.int32:
        top = gl.max(s, 1).to(gl.float32, bitcast=True) - _MAGIC_VALUE
    else:
        BN: gl.constexpr = s.shape[1]
        low, high = s.reshape([_ROWS, BN // 2, 2]).split()
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, True, 1
        )
        pairs = gl.reduce(pairs.reshape([_ROWS, BN // 8, 4]), 1, _greater)
        pairs = gl.reduce(pairs, 1, _greater)
        low = pairs.to(gl.int16).to(gl.float16, bitcast=True)
        high = (pairs >> 16).to(gl.int16).to(gl.float16, bitcast=True)
        top = gl.convert_layout(gl.maximum(low.to(gl.float32), high.to(gl.float32)), m.type.layout)
    return top


@gluon.jit
def _maxima(s, c, m, FULL: gl.constexpr, INT: gl.constexpr):
    """Maxima with a wholly visible tile, their factor to the ones before, and what the exponents
    lie above: one multiplication for each score.
    """
    m_new = gl.maximum(m, _top(s, m) * c)
    below = m_new - FULL
    if INT:
        below += _MAGIC_VALUE * c
    return m_new, gl.exp2(m - m_new), below


@gluon.jit
def _product(packed, v, stage, acc, BN: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """Start P · V: on top of `acc` in 16 bits, from zero in 8."""
    p = _unpack(packed, v.dtype, layout)
    if v.dtype.primitive_bitwidth == 8:
        values = v.index(stage).reshape([D, BN]).permute((1, 0))
        out = warpgroup_mma(p, values, acc, use_acc=False, is_async=True)
    else:
        out = warpgroup_mma(p, v.index(stage).reshape([BN, D]), acc, is_async=True)
    return out


@gluon.jit
def _added(acc, alpha, pv, PV8: gl.constexpr):
    """What has been added up so far, after `pv` has arrived."""
    if PV8:
        pv = acc * alpha[:, None] + pv
    return pv


@gluon.jit
def _sums(p, BN: gl.constexpr):
    """Row sums as the four threads of a row hold them, [rows, 4]: joined once, at the end."""
    return gl.sum(gl.sum(p.reshape([_ROWS, BN // 8, 4, 2]), 3), 1)


@gluon.jit
def _sums_like(p, total, BN: gl.constexpr):
    """Row sums of a part of a tile in the layout of those of a whole one."""
    return gl.convert_layout(_sums(p, BN), total.type.layout)


@gluon.jit
def _scaled(total, alpha):
    return total * gl.convert_layout(alpha, gl.SliceLayout(1, total.type.layout))[:, None]


@gluon.jit
def _masked(
    mine, k, stage, zero, c, k0, limit, n_k, m, total,
    BN: gl.constexpr, D: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """A tile of which keys may be hidden: its probabilities, the maxima and sums with it, and the
    maxima's factor to the ones before.
    """
    s = warpgroup_mma_wait(0, deps=[_scores(mine, k, stage, zero, BN, D)])
    give(K_FREE + stage)
    sl: gl.constexpr = zero.type.layout  # Triton 3.6 hands no layout on but by such a name
    x = _hide(_logits(s, c, zero.dtype == gl.int32), k0, limit, n_k, BN, sl)
    m_new = gl.maximum(m, gl.max(x, 1))
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(x - (m_new - FULL)[:, None])
    return p, m_new, alpha, _scaled(total, alpha) + _sums(p, BN)


@gluon.jit
def _read(
    packed, v, stage, acc, alpha, base, BN: gl.constexpr, D: gl.constexpr, layout: gl.constexpr
):
    """What has been added up with a tile's values, its keys' probabilities being `packed`."""
    pv = _product(packed, v, stage, base, BN, D, layout)
    pv, packed = warpgroup_mma_wait(0, deps=[pv, packed])
    give(_V_FREE + stage)
    return _added(acc, alpha, pv, v.dtype.primitive_bitwidth == 8)


@gluon.jit
def _consume(
    WHO: gl.constexpr, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS,
    KV_HEADS, OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k, n_kb,
    q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, PV8: gl.constexpr,
    CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, SMOOTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    INT: gl.constexpr = k.dtype == gl.int8
    FULL: gl.constexpr = 8.0 if PV8 else 0.0
    s_type: gl.constexpr = gl.int32 if INT else gl.float32
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if PV8 else 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 4 if PV8 else 2)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    stage, phase = 0, 0
    if WHO == 1:
        _pass_turn(0)
    LAG: gl.constexpr = PV8 or INT
    zero = gl.full([_ROWS, BN], _MAGIC if INT else 0, s_type, sl)
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
        total = _sums(gl.zeros([_ROWS, BN], gl.float32, sl), BN)
        alpha = gl.zeros([_ROWS], gl.float32, s_row)
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
                    c = by_row * gl.load(scales + k0 // BN)
                    mbarrier.wait(k_full.index(stage), phase)
                    p, m, alpha, total = _masked(
                        mine, k, stage, zero, c, k0, limit, n_k, m, total, BN, D, FULL
                    )
                    mbarrier.wait(v_full.index(stage), phase)
                    packed = _pack(p, BN, v.dtype)
                    before = gl.convert_layout(alpha, o_row)
                    base = none if PV8 else acc * before[:, None]
                    acc = _read(packed, v, stage, acc, before, base, BN, D, pl)
                    stage, phase = _next(stage, phase, STAGES)
            k0 = _key0(LISTS, at, lead, BK, BN)
            c = by_row * gl.load(scales + k0 // BN)
            mbarrier.wait(k_full.index(stage), phase)
            p, m, alpha, total = _masked(
                mine, k, stage, zero, c, k0, limit, n_k, m, total, BN, D, FULL
            )
            packed = _pack(p, BN, v.dtype)
            # Where a tile lies is read two tiles early, its scale one.
            k0 = _key0(LISTS, at, gl.minimum(lead + 1, n - 1), BK, BN)
            scale = gl.load(scales + k0 // BN)
            k0 = _key0(LISTS, at, gl.minimum(lead + 2, n - 1), BK, BN)
            pv, before = none, gl.full([_ROWS], 1.0, gl.float32, o_row)
            if LAG:
                then, then_phase = _next(stage, phase, STAGES)
                mbarrier.wait(k_full.index(then), then_phase, pred=lead + 1 < n)
            for j in range(lead + 1, n):
                v_stage, v_phase = stage, phase
                stage, phase = _next(stage, phase, STAGES)
                c = by_row * scale
                if not PV8:
                    before = gl.convert_layout(alpha, o_row)
                base = none if PV8 else acc * before[:, None]
                if not LAG:
                    mbarrier.wait(k_full.index(stage), phase)
                    mbarrier.wait(v_full.index(v_stage), v_phase)
                    _await_turn(WHO)
                s = _scores(mine, k, stage, zero, BN, D)
                if not LAG:
                    pv = _product(packed, v, v_stage, base, BN, D, pl)
                    _pass_turn(1 - WHO)
                if PV8:  # the tile before the last is added up while the scores are on their way
                    acc = _added(acc, before, pv, PV8)
                    before = gl.convert_layout(alpha, o_row)
                scale = gl.load(scales + k0 // BN)
                k0 = _key0(LISTS, at, gl.minimum(j + 2, n - 1), BK, BN)
                if LAG:
                    # What is asked of barriers, these values and the next keys, is asked while the
                    # scores are on their way: an answer takes long even if it is yes.
                    mbarrier.wait(v_full.index(v_stage), v_phase)
                    then, then_phase = _next(stage, phase, STAGES)
                    mbarrier.wait(k_full.index(then), then_phase, pred=j + 1 < n)
                    s = warpgroup_mma_wait(0, deps=[s])
                    give(K_FREE + stage)
                    pv = _product(packed, v, v_stage, base, BN, D, pl)
                else:
                    s = warpgroup_mma_wait(1, deps=[s])
                m, alpha, below = _maxima(s, c, m, FULL, INT)
                if PV8:  # exponentials of one group, then of the other
                    below = _in_turn(below, WHO)
                p = gl.exp2(s.to(gl.float32, bitcast=True) * c[:, None] - below[:, None])
                if PV8:  # the turn goes on before the last of the exponentials
                    first, second = p.reshape([_ROWS, 2, BN // 2]).permute((0, 2, 1)).split()
                    total = _scaled(total, alpha) + _sums_like(first, total, BN // 2)
                    total = _in_order(total)
                    _pass_turn(1 - WHO)
                    total += _sums_like(second, total, BN // 2)
                else:
                    total = _scaled(total, alpha) + _sums(p, BN)
                following = _pack(p, BN, v.dtype)
                if PV8 or not INT:  # the assembler keeps int8 with 16 bits in order by itself
                    total = _in_order(total)
                pv, packed = warpgroup_mma_wait(0, deps=[pv, packed])
                if not LAG:
                    give(K_FREE + stage)
                give(_V_FREE + v_stage)
                if not PV8:
                    acc = _added(acc, before, pv, PV8)
                packed = following
            if PV8:
                acc = _added(acc, before, pv, PV8)
            mbarrier.wait(v_full.index(stage), phase)
            before = gl.convert_layout(alpha, o_row)
            base = none if PV8 else acc * before[:, None]
            acc = _read(packed, v, stage, acc, before, base, BN, D, pl)
            stage, phase = _next(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(side))
        total = gl.convert_layout(gl.sum(total, 1), s_row)
        m -= FULL
        if SMOOTH:
            m += gl.load(SHIFT + q_at + rows, mask=rows < n_q, other=0.0) * 1.4426950408889634
        o_rows = m0 + WHO * _ROWS + gl.arange(0, _ROWS, layout=o_row)
        d = gl.arange(0, D, layout=gl.SliceLayout(0, ol))
        if PV8:
            channel = (b64 * n_kv + hk) * D + d
            mass = gl.convert_layout(total, o_row)[:, None]
            acc = acc * gl.load(V_SCALE + channel)[None, :]
            acc += mass * gl.load(V_MEAN + channel)[None, :]
        acc = normalised(acc, LSE, s_lb, s_lh, s_ln, b, ho, rows, n_q, m, total)
        place = OUT + b64 * s_ob + ho.to(gl.int64) * s_oh + o_rows.to(gl.int64)[:, None] * s_on
        gl.store(place + d[None, :], acc.to(OUT.dtype.element_ty), mask=(o_rows < n_q)[:, None])
    if WHO == 0:
        _await_turn(0)


_SIZES = ["n_items", "n_heads", "n_kv", "n_q", "n_k", "n_kb", "q_start", "capacity"]


@gluon.jit(do_not_specialize=_SIZES)
def _eight_bit(
    q_desc, k_desc, v_desc, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS,
    KV_HEADS, OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k, n_kb,
    q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, PV8: gl.constexpr,
    CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, SMOOTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    v_box: gl.constexpr = [STAGES, 1, 1, D, BN] if PV8 else [STAGES, 1, 1, BN, D]
    q = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, _ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, v_box, v_desc.layout)
    q_full, q_empty = _barriers(2, 1), _barriers(2, 2)
    k_full, v_full = _barriers(STAGES, 1), _barriers(STAGES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, BQ, BK,
                BN, D, PV8, CAUSAL, EXTRA_MASKED, SMOOTH, STAGES,
            )),
            (_consume, (
                1, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, ITEMS, LISTS, KV_HEADS,
                OUT_HEADS, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, n_items, n_heads, n_kv, n_q, n_k,
                n_kb, q_start, capacity, factor, q, k, v, q_full, q_empty, k_full, v_full, BQ, BK,
                BN, D, PV8, CAUSAL, EXTRA_MASKED, SMOOTH, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, ITEMS, LISTS, KV_HEADS, n_items, capacity, q, k, v, q_full,
                q_empty, k_full, v_full, BQ, BK, BN, PV8, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


_FORMS = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
}


def describe(t: torch.Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """What the copy engine needs to know to read tiles `box` of the last two dimensions."""
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, *box], _FORMS[t.dtype])
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, *box], layout)


def stages(pv8: bool) -> int:
    """Tiles of K and of V that shared memory holds at a time."""
    return 4 if pv8 else 3


def run(launch: Launch, ops: Operands, work: Work) -> None:
    """Start the kernel over lowered work."""
    (bq, bk), d, pv8 = launch.index.size, launch.q.shape[3], ops.v_scale is not None
    bn, some, n_items = ops.block, ops.q_scale, work.items.shape[0] * (bq // 128)
    processors = torch.cuda.get_device_properties(launch.q.device).multi_processor_count
    _eight_bit[(min(n_items, processors),)](
        describe(ops.q, (64, d)), describe(ops.k, (bn, d)),
        describe(ops.v, (d, bn) if pv8 else (bn, d)),
        launch.out, launch.lse, ops.q_scale, ops.k_scale,
        *(some if t is None else t for t in (ops.v_scale, ops.v_mean, ops.shift)),
        work.items, work.lists, launch.kv_heads,
        launch.out_heads, *launch.out.stride()[:3], *launch.lse.stride(), n_items, launch.heads,
        ops.k.shape[1], launch.n_q, launch.n_k, ops.k_scale.shape[2],
        launch.q_start, work.capacity, launch.scale * LOG2E,
        BQ=bq, BK=bk, BN=bn, D=d, PV8=pv8, CAUSAL=launch.causal,
        EXTRA_MASKED=not one_masked(launch, bn), SMOOTH=ops.shift is not None,
        STAGES=stages(pv8), num_warps=4,
    )  # fmt: skip

"""Block-sparse attention forward in 8 bits for Hopper, in warps of different trades.

A producer warp reads the lists and copies Q, K and V tiles into shared memory; two consumer
warpgroups of 64 query rows each multiply them. A softmax runs under the PV of the tile before. It
starts when the scores are there ("lag"), or, with fp8 QK and 16-bit PV, together with them, the
groups taking turns: whichever was measured to be faster. With fp8 PV a group starts its
exponentials when the other has half of its own, and PV is added up while the next scores are on
their way. A program stays on its multiprocessor and walks over rows, longest first. Scales, the
factor 2⁸ of P and fresh accumulators are those of `eight_bit`.

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
    _produce,
)
from accelkit.kernels._triton.gluon_kernel import _barriers, _item, _next, _place
from accelkit.kernels._triton.gluon_parts import K_FREE, give, normalised
from accelkit.kernels._triton.lower import Work
from accelkit.kernels._triton.tile import LOG2E, one_masked
from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import Operands

_MAGIC = gl.constexpr(0x4B400000)
_NEVER = gl.constexpr(-0x800000)  # the bits of −inf
_MAGIC_VALUE = gl.constexpr(12582912.0)  # the same bits as fp32: 1.5 · 2²³


@gluon.jit
def _hide(s, k0, limit, n_k, BN: gl.constexpr):
    """Scores with −inf where row and key do not see each other, in the bits of integers too."""
    col = k0 + gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
    seen = (col < n_k)[None, :] & (col[None, :] <= limit[:, None])
    NEVER: gl.constexpr = _NEVER if s.dtype == gl.int32 else -float("inf")
    return gl.where(seen, s, NEVER)


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
def _softmax(
    s, c, m, total, WHO: gl.constexpr, BN: gl.constexpr, PV8: gl.constexpr, DTYPE: gl.constexpr
):
    """Probabilities of a tile, packed, with maxima, their factor to the ones before, and sums."""
    INT: gl.constexpr = s.dtype == gl.int32
    m, alpha, below = _maxima(s, c, m, 8.0 if PV8 else 0.0, INT)
    if PV8:  # exponentials of one group, then of the other
        below = _in_turn(below, WHO)
    p = gl.exp2(s.to(gl.float32, bitcast=True) * c[:, None] - below[:, None])
    if PV8:  # the turn goes on when half of the exponentials are there
        first, second = p.reshape([_ROWS, 2, BN // 2]).permute((0, 2, 1)).split()
        total = _scaled(total, alpha) + _sums_like(first, total, BN // 2)
        total = _in_order(total)
        _pass_turn(1 - WHO)
        total += _sums_like(second, total, BN // 2)
    else:
        total = _scaled(total, alpha) + _sums(p, BN)
    packed = _pack(p, BN, DTYPE)
    if PV8 or not INT:  # the assembler keeps int8 with 16 bits in order by itself
        total = _in_order(total)
    return packed, alpha, m, total


@gluon.jit
def _step(
    WHO: gl.constexpr, mine, k, v, there, stage, phase, v_stage, v_phase, k_full, v_full, zero,
    none, packed, acc, pv, before, alpha, m, total, c, k0, limit, hidden, n_k,
    BN: gl.constexpr, D: gl.constexpr, PV8: gl.constexpr, pl: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of a tile with the product of the tile before. `m` and `total` are the
    tile's row's, all others up to `alpha` those of the product's.
    """
    LAG: gl.constexpr = PV8 or zero.dtype == gl.int32
    o_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    if not PV8:
        before = gl.convert_layout(alpha, o_row)
    base = none if PV8 else acc * before[:, None]
    mbarrier.wait(k_full.index(stage), phase, pred=there)
    if not LAG:
        mbarrier.wait(v_full.index(v_stage), v_phase)
        _await_turn(WHO)
    s = _scores(mine, k, stage, zero, BN, D)
    if not LAG:
        pv = _product(packed, v, v_stage, base, BN, D, pl)
        _pass_turn(1 - WHO)
    if PV8:  # the tile before the last is added up while the scores are on their way
        acc = _added(acc, before, pv, PV8)
        before = gl.convert_layout(alpha, o_row)
    if LAG:
        s = warpgroup_mma_wait(0, deps=[s])
        if there:
            give(K_FREE + stage)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        pv = _product(packed, v, v_stage, base, BN, D, pl)
    else:
        s = warpgroup_mma_wait(1, deps=[s])
    if hidden:
        s = _hide(s, k0, limit, n_k, BN)
    following, alpha, m, total = _softmax(s, c, m, total, WHO, BN, PV8, v.dtype)
    pv, packed = warpgroup_mma_wait(0, deps=[pv, packed])
    if not LAG and there:
        give(K_FREE + stage)
    give(_V_FREE + v_stage)
    if not PV8:
        acc = pv
    return following, acc, pv, before, alpha, m, total


@gluon.jit
def _facts(
    Q_SCALE, K_SCALE, LISTS, KV_HEADS, row, m0, b, slot, masked, clean, n_heads, n_kv, n_q, n_kb,
    capacity, factor, BK: gl.constexpr, BN: gl.constexpr, EXTRA_MASKED: gl.constexpr,
    WHO: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of a row: its KV head and list, scales of its keys and its queries, and where its first tile
    and the first after the masked ones lie.
    """
    at = row.to(gl.int64) * capacity
    hk = gl.load(KV_HEADS + slot)
    scales = K_SCALE + (b.to(gl.int64) * n_kv + hk) * n_kb
    rows = m0 + WHO * _ROWS + gl.arange(0, _ROWS, layout=layout)
    q_at = (b.to(gl.int64) * n_heads + slot) * n_q
    by_row = gl.load(Q_SCALE + q_at + rows, mask=rows < n_q, other=1.0) * factor
    entries, first = masked + clean, 1
    if EXTRA_MASKED:
        first = gl.maximum(masked * (BK // BN), 1)
    k0 = _key0(LISTS, at, 0, entries, BK, BN)
    last = gl.maximum(entries * (BK // BN), 1) - 1
    k1 = _key0(LISTS, at, gl.minimum(first, last), entries, BK, BN)
    return hk, at, scales, by_row, k0, k1


@gluon.jit
def _limits(rows, entries, n_k, q_start, CAUSAL: gl.constexpr):
    """Last key of each row; none where the row has no entries."""
    limit = rows * 0 + n_k
    if CAUSAL:
        limit = rows + q_start
    return gl.where(entries > 0, limit, -1)


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
    PER_ROW: gl.constexpr = BQ // (2 * _ROWS)
    s_type: gl.constexpr = gl.int32 if INT else gl.float32
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if PV8 else 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 4 if PV8 else 2)
    s_row: gl.constexpr = gl.SliceLayout(1, sl)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    stage, phase = 0, 0
    if WHO == 1:
        _pass_turn(0)
    zero = gl.full([_ROWS, BN], _MAGIC if INT else 0, s_type, sl)
    none = gl.zeros([_ROWS, D], gl.float32, ol)
    lane = WHO * _ROWS + gl.arange(0, _ROWS, layout=s_row)
    place, round = _place(0), 0
    row, m0, b, slot, masked, clean = _item(ITEMS, place, n_items, 2 * _ROWS, PER_ROW)
    hk, at, scales, by_row, k0, k1 = _facts(
        Q_SCALE, K_SCALE, LISTS, KV_HEADS, row, m0, b, slot, masked, clean, n_heads, n_kv, n_q,
        n_kb, capacity, factor, BK, BN, EXTRA_MASKED, WHO, s_row,
    )  # fmt: skip
    c, scale = by_row * gl.load(scales + k0 // BN), gl.load(scales + k1 // BN)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = _scores(q.index(WHO).reshape([_ROWS, D]), k, 0, zero, BN, D)
    s = warpgroup_mma_wait(0, deps=[s])
    give(K_FREE)
    if (masked > 0) | (clean == 0):
        limit = _limits(m0 + lane, masked + clean, n_k, q_start, CAUSAL)
        s = _hide(s, k0, limit, n_k, BN)
    m = gl.full([_ROWS], -1e30, gl.float32, s_row)
    nothing = _sums(gl.zeros([_ROWS, BN], gl.float32, sl), BN)
    packed, alpha, m, total = _softmax(s, c, m, nothing, WHO, BN, PV8, v.dtype)
    while place < n_items:
        place = _place(round + 1)
        more = place < n_items
        next_row, next_m0, next_b, next_slot, next_masked, next_clean = _item(
            ITEMS, place, n_items, 2 * _ROWS, PER_ROW
        )
        entries, n = masked + clean, gl.maximum((masked + clean) * R, 1)
        limit = _limits(m0 + lane, entries, n_k, q_start, CAUSAL)
        side = round % 2
        mine = q.index(side * 2 + WHO).reshape([_ROWS, D])
        acc, pv, before = none, none, gl.full([_ROWS], 1.0, gl.float32, o_row)
        first = 1
        if EXTRA_MASKED:
            first = gl.maximum(masked * R, 1)
            for j in range(1, first):
                k0 = _key0(LISTS, at, j, entries, BK, BN)
                c = by_row * gl.load(scales + k0 // BN)
                v_stage, v_phase = stage, phase
                stage, phase = _next(stage, phase, STAGES)
                packed, acc, pv, before, alpha, m, total = _step(
                    WHO, mine, k, v, True, stage, phase, v_stage, v_phase, k_full, v_full, zero,
                    none, packed, acc, pv, before, alpha, m, total, c, k0, limit, True, n_k, BN, D,
                    PV8, pl,
                )  # fmt: skip
        # Where a tile lies is read two tiles early, its scale one.
        k0 = _key0(LISTS, at, gl.minimum(first + 1, n - 1), entries, BK, BN)
        for j in range(first, n):
            v_stage, v_phase = stage, phase
            stage, phase = _next(stage, phase, STAGES)
            c = by_row * scale
            scale = gl.load(scales + k0 // BN)
            k0 = _key0(LISTS, at, gl.minimum(j + 2, n - 1), entries, BK, BN)
            packed, acc, pv, before, alpha, m, total = _step(
                WHO, mine, k, v, True, stage, phase, v_stage, v_phase, k_full, v_full, zero, none,
                packed, acc, pv, before, alpha, m, total, c, k0, limit, False, n_k, BN, D, PV8, pl,
            )  # fmt: skip
        # The last product of this row goes with the first tile of the next.
        mbarrier.arrive(q_empty.index(side))
        side = (round + 1) % 2
        hk, at, scales, by_row, k0, k1 = _facts(
            Q_SCALE, K_SCALE, LISTS, KV_HEADS, next_row, next_m0, next_b, next_slot, next_masked,
            next_clean, n_heads, n_kv, n_q, n_kb, capacity, factor, BK, BN, EXTRA_MASKED, WHO,
            s_row,
        )  # fmt: skip
        limit = _limits(next_m0 + lane, next_masked + next_clean, n_k, q_start, CAUSAL)
        mbarrier.wait(q_full.index(side), ((round + 1) // 2) & 1, pred=more)
        if PV8:
            acc = _added(acc, before, pv, PV8)
        before = gl.convert_layout(alpha, o_row)
        mbarrier.wait(v_full.index(stage), phase)
        base = none if PV8 else acc * before[:, None]
        pv = _product(packed, v, stage, base, BN, D, pl)
        v_stage = stage
        stage, phase = _next(stage, phase, STAGES)
        mbarrier.wait(k_full.index(stage), phase, pred=more)
        s = _scores(q.index(side * 2 + WHO).reshape([_ROWS, D]), k, stage, zero, BN, D)
        c, scale = by_row * gl.load(scales + k0 // BN), gl.load(scales + k1 // BN)
        pv, packed = warpgroup_mma_wait(1, deps=[pv, packed])
        give(_V_FREE + v_stage)
        acc = _added(acc, before, pv, PV8)
        ho, hk = gl.load(OUT_HEADS + slot), gl.load(KV_HEADS + slot)
        _finish(
            OUT, LSE, V_SCALE, V_MEAN, SHIFT, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, b, slot, hk, ho,
            m0 + lane, n_heads, n_kv, n_q, m, total, acc, D, PV8, SMOOTH,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=[s])
        if more:
            give(K_FREE + stage)
        if (next_masked > 0) | (next_clean == 0):
            s = _hide(s, k0, limit, n_k, BN)
        m = gl.full([_ROWS], -1e30, gl.float32, s_row)
        packed, alpha, m, total = _softmax(s, c, m, nothing, WHO, BN, PV8, v.dtype)
        m0, b, slot = next_m0, next_b, next_slot
        masked, clean = next_masked, next_clean
        round += 1
    if WHO == 0:
        _await_turn(0)


@gluon.jit
def _finish(
    OUT, LSE, V_SCALE, V_MEAN, SHIFT, s_ob, s_oh, s_on, s_lb, s_lh, s_ln, b, slot, hk, ho, rows,
    n_heads, n_kv, n_q, m, total, acc, D: gl.constexpr, PV8: gl.constexpr,
    SMOOTH: gl.constexpr,
):  # fmt: skip
    """Normalise and store a row."""
    o_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    b64 = b.to(gl.int64)
    total = gl.convert_layout(gl.sum(total, 1), m.type.layout)
    m -= 8.0 if PV8 else 0.0
    if SMOOTH:
        q_at = (b64 * n_heads + slot) * n_q
        m += gl.load(SHIFT + q_at + rows, mask=rows < n_q, other=0.0) * 1.4426950408889634
    d = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))
    if PV8:
        channel = (b64 * n_kv + hk) * D + d
        mass = gl.convert_layout(total, o_row)[:, None]
        acc = acc * gl.load(V_SCALE + channel)[None, :]
        acc += mass * gl.load(V_MEAN + channel)[None, :]
    acc = normalised(acc, LSE, s_lb, s_lh, s_ln, b, ho, rows, n_q, m, total)
    o_rows = gl.convert_layout(rows, o_row)
    place = OUT + b64 * s_ob + ho.to(gl.int64) * s_oh + o_rows.to(gl.int64)[:, None] * s_on
    gl.store(place + d[None, :], acc.to(OUT.dtype.element_ty), mask=(o_rows < n_q)[:, None])


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

"""From scores to probabilities in 8 bits, in the registers of a warpgroup of the Hopper kernel.

Int8 scores are added up from the integer that is the float 1.5 · 2²³: the sums, whole numbers below
2²², are floats without a conversion.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from accelkit.kernels._triton.gluon_eight_parts import _ROWS, _in_order, _in_turn, _pass_turn

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

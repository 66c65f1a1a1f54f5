"""8-bit operands in two passes over K and V (sums, then values) and one over Q.

Scales and values come out of the same operations as in `kernels.quantize.reference`, none fused
with the next or divided in a hurry: of equal inputs both forms make equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.tile import next_power_of_two
from accelkit.kernels.quantize import DTYPE, TOP, V_TOP, Operands, Rounding

_LEAST = tl.constexpr(1e-20)


@triton.jit
def _eight(y, INT: tl.constexpr):
    """Scaled values as 8 bits; adding 1.5 · 2²³ rounds to whole numbers, halves to even."""
    if INT:
        out = ((y + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        out = y.to(tl.float8e4nv)
    return out


@triton.jit(do_not_specialize=["heads", "n", "chunks"])
def _sums(
    K, V, SUMS, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, heads, n, chunks,
    ROWS: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Per chunk of tokens: sum of k, or sum of v and greatest |v|, of fp32 [3, BD]."""
    chunk, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    d = tl.arange(0, BD)
    out = SUMS + (bh.to(tl.int64) * chunks + chunk) * 3 * BD + d
    total = tl.zeros([ROWS, BD], tl.float32)
    if tl.program_id(2) + FIRST == 0:
        for i in tl.static_range(STEPS):
            rows = (chunk * STEPS + i) * ROWS + tl.arange(0, ROWS)
            at = K + b * s_kb + h * s_kh + rows.to(tl.int64)[:, None] * s_kn + d[None, :]
            inside = (rows < n)[:, None] & (d < D)[None, :]
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, tl.sum(total, 0))
    else:
        top = tl.zeros([ROWS, BD], tl.float32)
        for i in tl.static_range(STEPS):
            rows = (chunk * STEPS + i) * ROWS + tl.arange(0, ROWS)
            at = V + b * s_vb + h * s_vh + rows.to(tl.int64)[:, None] * s_vn + d[None, :]
            inside = (rows < n)[:, None] & (d < DV)[None, :]
            v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            total += v
            top = tl.maximum(top, tl.abs(v))
        tl.store(out + BD, tl.sum(total, 0))
        tl.store(out + 2 * BD, tl.max(top, 0))


@triton.jit(do_not_specialize=["n", "chunks"])
def _facts(
    SUMS, K_MEAN, V_MEAN, V_SCALE, n, chunks,
    ROWS: tl.constexpr, BD: tl.constexpr, TOP: tl.constexpr, SMOOTH: tl.constexpr,
    PV8: tl.constexpr,
):  # fmt: skip
    """Means of K and V and the scale of V's channels, fp32 [BD], from the sums of a head."""
    bh = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    k_sum = tl.zeros([ROWS, BD], tl.float32)
    v_sum = tl.zeros([ROWS, BD], tl.float32)
    v_top = tl.zeros([ROWS, BD], tl.float32)
    for i in range(0, chunks, ROWS):
        rows = i + tl.arange(0, ROWS)
        at = SUMS + (bh * chunks + rows[:, None]) * 3 * BD + d[None, :]
        inside = (rows < chunks)[:, None]
        if SMOOTH:
            k_sum += tl.load(at, mask=inside, other=0.0)
        if PV8:
            v_sum += tl.load(at + BD, mask=inside, other=0.0)
            v_top = tl.maximum(v_top, tl.load(at + 2 * BD, mask=inside, other=0.0))
    v_mean = tl.sum(v_sum, 0) / n
    tl.store(K_MEAN + bh * BD + d, tl.sum(k_sum, 0) / n)
    tl.store(V_MEAN + bh * BD + d, v_mean)
    scale = tl.maximum((tl.max(v_top, 0) + tl.abs(v_mean)) / TOP, _LEAST)
    tl.store(V_SCALE + bh * BD + d, scale)


@triton.jit(do_not_specialize=["heads", "n", "blocks"])
def _keys(
    K, K_MEAN, K8, K_SCALE, s_kb, s_kh, s_kn, heads, n, blocks,
    BLOCK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr,
    INT: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = block * BLOCK + tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None]
    d = tl.arange(0, BD)
    inside = (rows < n)[:, None] & (d < D)[None, :]
    k = tl.load(K + b * s_kb + h * s_kh + at * s_kn + d[None, :], mask=inside, other=0.0)
    k = k.to(tl.float32)
    if SMOOTH:
        mean = tl.load(K_MEAN + bh * WIDE + d, mask=d < D, other=0.0)
        k = tl.where(inside, k - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0) * (1.0 / TOP), _LEAST)
    k8 = _eight(k * tl.div_rn(1.0, scale), INT)
    tl.store(K8 + (bh * n + at) * D + d[None, :], k8, mask=inside)
    tl.store(K_SCALE + bh * blocks + block, scale)


@triton.jit(do_not_specialize=["heads", "n"])
def _values(
    V, V_MEAN, V_SCALE, V8, s_vb, s_vh, s_vn, heads, n, n_out,
    ROWS: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """V transposed, each 16 tokens in the order of `kernels.quantize.grouped`."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    d = tl.arange(0, BD)
    inside = (rows < n)[:, None] & (d < DV)[None, :]
    at = V + b * s_vb + h * s_vh + rows.to(tl.int64)[:, None] * s_vn + d[None, :]
    v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(V_MEAN + bh * WIDE + d, mask=d < DV, other=0.0)
    scale = 1.0 / tl.load(V_SCALE + bh * WIDE + d, mask=d < DV, other=1.0)
    v = tl.where(inside, (v - mean[None, :]) * scale[None, :], 0.0).to(tl.float8e4nv)
    out = V8 + (bh * DV + d.to(tl.int64)[:, None]) * n_out + place[None, :]
    tl.store(out, v.T, mask=(d < DV)[:, None] & (place < n_out)[None, :])


@triton.jit(do_not_specialize=["heads", "kv_heads", "n"])
def _queries(
    Q, K_MEAN, Q8, Q_SCALE, SHIFT, Q_HEADS, KV_HEADS, s_qb, s_qh, s_qn, heads, kv_heads, n, scale,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr,
    INT: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, slot = bh // heads, bh % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows.to(tl.int64)[:, None]
    d = tl.arange(0, BD)
    inside = (rows < n)[:, None] & (d < D)[None, :]
    head = tl.load(Q_HEADS + slot).to(tl.int64)
    q = tl.load(Q + b * s_qb + head * s_qh + at * s_qn + d[None, :], mask=inside, other=0.0)
    q = q.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(q), 1) * (1.0 / TOP), _LEAST)
    q8 = _eight(q * tl.div_rn(1.0, top)[:, None], INT)
    tl.store(Q8 + (bh * n + at) * D + d[None, :], q8, mask=inside)
    tl.store(Q_SCALE + bh * n + rows, top, mask=rows < n)
    if SMOOTH:
        kv = b * kv_heads + tl.load(KV_HEADS + slot)
        mean = tl.load(K_MEAN + kv * WIDE + d, mask=d < D, other=0.0)
        tl.store(SHIFT + bh * n + rows, tl.sum(q * mean[None, :], 1) * scale, mask=rows < n)


def quantize(q: Tensor, k: Tensor, v: Tensor, how: Rounding) -> Operands:
    """`kernels.quantize.quantize` in a few launches."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (batch, _, n_q, d), (_, kv, n, dv) = q.shape, v.shape
    slots, pv8, device = how.q_heads.numel(), how.pv == "fp8", q.device
    qk, block, smooth_k = how.qk, how.block, how.smooth_k
    bd, bdv = (max(16, next_power_of_two(x)) for x in (d, dv))
    count, wide = triton.cdiv(n, block), max(bd, bdv)
    fp32 = {"dtype": torch.float32, "device": device}
    facts = torch.empty((3, batch, kv, wide), **fp32)  # mean of k, mean of v, scale of v
    with torch.cuda.device_of(q):
        if smooth_k or pv8:
            rows, steps = 64, 8
            chunks = triton.cdiv(n, rows * steps)
            sums = torch.empty((batch, kv, chunks, 3, wide), **fp32)
            _sums[(chunks, batch * kv, smooth_k + pv8)](
                k, v, sums, *k.stride()[:3], *v.stride()[:3], kv, n, chunks, ROWS=rows,
                STEPS=steps, D=d, DV=dv, BD=wide, FIRST=1 - smooth_k, num_warps=8,
            )  # fmt: skip
            _facts[(batch * kv,)](
                sums, *facts, n, chunks, ROWS=16, BD=wide, TOP=V_TOP, SMOOTH=smooth_k, PV8=pv8,
                num_warps=4,
            )  # fmt: skip
        k8 = torch.empty((batch, kv, n, d), dtype=DTYPE[qk], device=device)
        k_scale = torch.empty((batch, kv, count), **fp32)
        _keys[(count, batch * kv)](
            k, facts[0], k8, k_scale, *k.stride()[:3], kv, n, count, BLOCK=block, D=d, BD=bd,
            WIDE=wide, TOP=TOP[qk], INT=qk == "int8", SMOOTH=smooth_k, num_warps=8,
            enable_fp_fusion=False,
        )  # fmt: skip
        v8 = v
        if pv8:
            v8 = torch.empty((batch, kv, dv, count * block), dtype=DTYPE["fp8"], device=device)
            _values[(triton.cdiv(count * block, 64), batch * kv)](
                v, facts[1], facts[2], v8, *v.stride()[:3], kv, n, count * block, ROWS=64, DV=dv,
                BD=bdv, WIDE=wide, num_warps=4,
            )  # fmt: skip
        q8 = torch.empty((batch, slots, n_q, d), dtype=DTYPE[qk], device=device)
        q_scale = torch.empty((batch, slots, n_q), **fp32)
        shift = torch.empty_like(q_scale) if smooth_k else None
        _queries[(triton.cdiv(n_q, 64), batch * slots)](
            q, facts[0], q8, q_scale, q_scale if shift is None else shift, how.q_heads,
            how.kv_heads, *q.stride()[:3], slots, kv, n_q, how.scale, ROWS=64, D=d, BD=bd,
            WIDE=wide, TOP=TOP[qk], INT=qk == "int8", SMOOTH=smooth_k, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    v_mean, v_scale = (facts[1, ..., :dv], facts[2, ..., :dv]) if pv8 else (None, None)
    return Operands(q8, q_scale, k8, k_scale, shift, v8, v_scale, v_mean, block)

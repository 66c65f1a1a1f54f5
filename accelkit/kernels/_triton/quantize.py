"""8-bit operands in two passes over K and V (sums, then values) and one over Q."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.tile import next_power_of_two
from accelkit.kernels.quantize import DTYPE, TOP, Operands

_LEAST = tl.constexpr(1e-20)


@triton.jit
def _eight(y, INT: tl.constexpr):
    """Scaled values as 8 bits; adding 1.5 · 2²³ rounds to whole numbers, halves to even."""
    if INT:
        out = ((y + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        out = y.to(tl.float8e4nv)
    return out


@triton.jit(do_not_specialize=["n", "chunks"])
def _sums(
    K, V, SUMS, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, heads, n, chunks,
    ROWS: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    SMOOTH: tl.constexpr, PV8: tl.constexpr,
):  # fmt: skip
    """Per chunk of tokens: sum of k, sum of v, greatest |v|, fp32 [3, BD]."""
    chunk, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    d = tl.arange(0, BD)
    k_sum = tl.zeros([ROWS, BD], tl.float32)
    v_sum = tl.zeros([ROWS, BD], tl.float32)
    v_top = tl.zeros([ROWS, BD], tl.float32)
    for i in range(STEPS):
        rows = (chunk * STEPS + i) * ROWS + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None]
        inside = (rows < n)[:, None]
        if SMOOTH:
            k = tl.load(K + b * s_kb + h * s_kh + at * s_kn + d[None, :],
                        mask=inside & (d < D)[None, :], other=0.0)  # fmt: skip
            k_sum += k.to(tl.float32)
        if PV8:
            v = tl.load(V + b * s_vb + h * s_vh + at * s_vn + d[None, :],
                        mask=inside & (d < DV)[None, :], other=0.0).to(tl.float32)  # fmt: skip
            v_sum += v
            v_top = tl.maximum(v_top, tl.abs(v))
    out = SUMS + (bh.to(tl.int64) * chunks + chunk) * 3 * BD + d
    tl.store(out, tl.sum(k_sum, 0))
    tl.store(out + BD, tl.sum(v_sum, 0))
    tl.store(out + 2 * BD, tl.max(v_top, 0))


@triton.jit(do_not_specialize=["n", "n_out", "blocks"])
def _keys(
    K, V, K_MEAN, V_MEAN, V_SCALE, K8, K_SCALE, V8, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, heads, n,
    n_out, blocks,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    TOP: tl.constexpr, INT: tl.constexpr, SMOOTH: tl.constexpr, PV8: tl.constexpr,
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
        mean = tl.load(K_MEAN + bh * D + d, mask=d < D, other=0.0)
        k = tl.where(inside, k - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0) / TOP, _LEAST)
    tl.store(K8 + (bh * n + at) * D + d[None, :], _eight(k / scale, INT), mask=inside)
    tl.store(K_SCALE + bh * blocks + block, scale)
    if PV8:
        e = tl.arange(0, BDV)
        inside = (rows < n)[:, None] & (e < DV)[None, :]
        v = tl.load(V + b * s_vb + h * s_vh + at * s_vn + e[None, :], mask=inside, other=0.0)
        v_mean = tl.load(V_MEAN + bh * DV + e, mask=e < DV, other=0.0)
        v_scale = tl.load(V_SCALE + bh * DV + e, mask=e < DV, other=1.0)
        v = tl.where(inside, (v.to(tl.float32) - v_mean[None, :]) / v_scale[None, :], 0.0)
        v = tl.trans(v).reshape(BDV, BLOCK // 16, 2, 4, 2).permute(0, 1, 3, 2, 4)
        v = v.reshape(BDV, BLOCK).to(tl.float8e4nv)
        place = (bh * DV + e.to(tl.int64)[:, None]) * n_out + rows[None, :]
        tl.store(V8 + place, v, mask=(e < DV)[:, None])


@triton.jit(do_not_specialize=["n"])
def _queries(
    Q, K_MEAN, Q8, Q_SCALE, SHIFT, Q_HEADS, KV_HEADS, s_qb, s_qh, s_qn, heads, kv_heads, n, scale,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TOP: tl.constexpr, INT: tl.constexpr,
    SMOOTH: tl.constexpr,
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
    top = tl.maximum(tl.max(tl.abs(q), 1) / TOP, _LEAST)
    tl.store(Q8 + (bh * n + at) * D + d[None, :], _eight(q / top[:, None], INT), mask=inside)
    tl.store(Q_SCALE + bh * n + rows, top, mask=rows < n)
    if SMOOTH:
        kv = b * kv_heads + tl.load(KV_HEADS + slot)
        mean = tl.load(K_MEAN + kv * D + d, mask=d < D, other=0.0)
        tl.store(SHIFT + bh * n + rows, tl.sum(q * mean[None, :], 1) * scale, mask=rows < n)


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk: str,
    pv: str,
    smooth_k: bool,
    block: int,
    scale: float,
    q_heads: Tensor,
    kv_heads: Tensor,
) -> Operands:
    """`kernels.quantize.quantize` in three launches."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (batch, _, n_q, d), (_, kv, n, dv) = q.shape, v.shape
    slots, pv8, device = q_heads.numel(), pv == "fp8", q.device
    bd, bdv = (max(16, next_power_of_two(x)) for x in (d, dv))
    count = triton.cdiv(n, block)
    fp32 = {"dtype": torch.float32, "device": device}
    mean = shift = v_mean = v_scale = None
    with torch.cuda.device_of(q):
        if smooth_k or pv8:
            rows, steps, wide = 32, 32, max(bd, bdv)
            chunks = triton.cdiv(n, rows * steps)
            sums = torch.empty((batch, kv, chunks, 3, wide), **fp32)
            _sums[(chunks, batch * kv)](
                k, v, sums, *k.stride()[:3], *v.stride()[:3], kv, n, chunks, ROWS=rows,
                STEPS=steps, D=d, DV=dv, BD=wide, SMOOTH=smooth_k, PV8=pv8, num_warps=4,
            )  # fmt: skip
            if smooth_k:
                mean = sums[:, :, :, 0, :d].sum(2) / n
            if pv8:
                v_mean = sums[:, :, :, 1, :dv].sum(2) / n
                v_scale = (sums[:, :, :, 2, :dv].amax(2) + v_mean.abs()) / TOP["fp8"]
                v_scale = v_scale.clamp_(min=1e-20)
        k8 = torch.empty((batch, kv, n, d), dtype=DTYPE[qk], device=device)
        k_scale = torch.empty((batch, kv, count), **fp32)
        v8 = v
        if pv8:
            v8 = torch.empty((batch, kv, dv, count * block), dtype=DTYPE["fp8"], device=device)
        some = k_scale
        _keys[(count, batch * kv)](
            k, v, *(some if t is None else t for t in (mean, v_mean, v_scale)), k8, k_scale, v8,
            *k.stride()[:3], *v.stride()[:3], kv, n, count * block, count, BLOCK=block, D=d, DV=dv,
            BD=bd, BDV=bdv, TOP=TOP[qk], INT=qk == "int8", SMOOTH=smooth_k, PV8=pv8, num_warps=8,
        )  # fmt: skip
        q8 = torch.empty((batch, slots, n_q, d), dtype=DTYPE[qk], device=device)
        q_scale = torch.empty((batch, slots, n_q), **fp32)
        if smooth_k:
            shift = torch.empty_like(q_scale)
        _queries[(triton.cdiv(n_q, 64), batch * slots)](
            q, some if mean is None else mean, q8, q_scale, some if shift is None else shift,
            q_heads, kv_heads, *q.stride()[:3], slots, kv, n_q, scale, ROWS=64, D=d, BD=bd,
            TOP=TOP[qk], INT=qk == "int8", SMOOTH=smooth_k, num_warps=4,
        )  # fmt: skip
    return Operands(q8, q_scale, k8, k_scale, shift, v8, v_scale, v_mean, block)

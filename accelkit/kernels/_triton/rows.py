"""Attention of a few rows over all keys and under some masks, in one read of keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.scores import LOG2E, padded_width
from accelkit.kernels._triton.tile import precision
from accelkit.kernels.index import Inputs, ceil_div, device_ids

MOST_ROWS, MOST_MASKS = 64, 2
_PROGRAMS = 528
"""Four for each multiprocessor of a large GPU: keys are cut into as many pieces as that takes."""


@triton.jit
def _weighed(p, seen, v, acc, total, alpha, DTYPE: tl.constexpr, PREC: tl.constexpr):
    p = tl.where(seen, p, 0.0)
    acc = tl.dot(p.to(DTYPE), v, acc * alpha[:, None], input_precision=PREC, out_dtype=tl.float32)
    return acc, total * alpha + tl.sum(p, 1)


@triton.jit
def _keep(ACC, TOTAL, part, acc, total, lane, d, R: tl.constexpr, BDV: tl.constexpr):
    tl.store(ACC + (part * R + lane)[:, None] * BDV + d[None, :], acc)
    tl.store(TOTAL + part * R + lane, total)


@triton.jit(do_not_specialize=["n_heads", "n_rows", "n_k", "per", "n_parts"])
def _masked_rows(
    Q, K, V, HEADS, KV_HEADS, ROWS, MASKS, ACC, TOTAL, TOP,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    n_heads, n_rows, n_k, per, n_parts, factor,
    R: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, N_MASKS: tl.constexpr, DTYPE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    part, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    lane, col = tl.arange(0, R), tl.arange(0, BN)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    row = tl.load(ROWS + lane, mask=lane < n_rows, other=0)
    q0 = Q + b * s_qb + tl.load(HEADS + h).to(tl.int64) * s_qh
    inside = (lane < n_rows)[:, None] & (d < D)[None, :]
    q = tl.load(q0 + row[:, None] * s_qn + d[None, :], mask=inside, other=0.0)
    kv = tl.load(KV_HEADS + h).to(tl.int64)
    k0, v0 = K + b * s_kb + kv * s_kh, V + b * s_vb + kv * s_vh
    top = tl.full([R], -1e30, tl.float32)
    acc, total = tl.zeros([R, BDV], tl.float32), tl.zeros([R], tl.float32)
    acc1, total1, acc2, total2 = acc, total, acc, total
    for j in range(part * per, tl.minimum((part + 1) * per, n_k), BN):
        key = (j + col).to(tl.int64)
        there = key < n_k
        k_at = k0 + key[:, None] * s_kn + d[None, :]
        k = tl.load(k_at, mask=there[:, None] & (d < D)[None, :], other=0.0)
        v_at = v0 + key[:, None] * s_vn + dv[None, :]
        v = tl.load(v_at, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        s = tl.dot(q, k.T, out_dtype=tl.float32, input_precision=PREC) * factor
        s = tl.where(there[None, :], s, -float("inf"))
        now = tl.maximum(top, tl.max(s, 1))
        alpha, p, top = tl.exp2(top - now), tl.exp2(s - now[:, None]), now
        acc, total = _weighed(p, there[None, :], v, acc, total, alpha, DTYPE, PREC)
        mask = MASKS + lane.to(tl.int64)[:, None] * n_k + key[None, :]
        real = (lane < n_rows)[:, None] & there[None, :]
        seen = tl.load(mask, mask=real, other=0) > 0
        acc1, total1 = _weighed(p, seen, v, acc1, total1, alpha, DTYPE, PREC)
        if N_MASKS > 1:
            step = n_rows.to(tl.int64) * n_k
            seen = tl.load(mask + step, mask=real, other=0) > 0
            acc2, total2 = _weighed(p, seen, v, acc2, total2, alpha, DTYPE, PREC)
    mine = bh.to(tl.int64) * n_parts + part
    tl.store(TOP + mine * R + lane, top)
    _keep(ACC, TOTAL, mine * (N_MASKS + 1), acc, total, lane, dv, R, BDV)
    _keep(ACC, TOTAL, mine * (N_MASKS + 1) + 1, acc1, total1, lane, dv, R, BDV)
    if N_MASKS > 1:
        _keep(ACC, TOTAL, mine * (N_MASKS + 1) + 2, acc2, total2, lane, dv, R, BDV)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _join(
    ACC, TOTAL, TOP, OUT, n_rows, n_parts, R: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    which, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane, d, each = tl.arange(0, R), tl.arange(0, BDV), tl.arange(0, MOST)
    of = tl.num_programs(0)
    tops = TOP + (bh * n_parts + each)[:, None] * R + lane[None, :]
    top = tl.max(tl.load(tops, mask=(each < n_parts)[:, None], other=-float("inf")), 0)
    acc, total = tl.zeros([R, BDV], tl.float32), tl.zeros([R], tl.float32)
    for i in range(0, n_parts):
        part = bh * n_parts + i
        weight = tl.exp2(tl.load(TOP + part * R + lane) - top)
        at = (part * of + which) * R + lane
        total += tl.load(TOTAL + at) * weight
        acc += tl.load(ACC + at[:, None] * BDV + d[None, :]) * weight[:, None]
    out = OUT + ((bh * of + which) * n_rows + lane)[:, None] * DV + d[None, :]
    keep = (lane < n_rows)[:, None] & (d < DV)[None, :]
    tl.store(out, acc / tl.maximum(total, 1e-30)[:, None], mask=keep)


def masked_rows(call: Inputs, rows: Tensor, masks: Tensor) -> Tensor:
    """`kernels.scores.masked_rows` without key mask, fp32 `[B, H, 1 + masks, R, Dv]`; R up to
    `MOST_ROWS`, masks up to `MOST_MASKS`.
    """
    batch, heads, device = call.q.shape[0], len(call.heads), call.q.device
    d, dv, number = call.q.shape[3], call.v.shape[3], len(masks) + 1
    wide = call.q.dtype == torch.float32
    r, bd, bdv = max(16, padded_width(len(rows))), padded_width(d), padded_width(dv)
    bn, stages = (128, 2) if not wide and max(bd, bdv) <= 128 else (64, 2)
    parts = max(1, min(_PROGRAMS // (batch * heads), ceil_div(call.n_k, 2 * bn)))
    per = ceil_div(ceil_div(call.n_k, parts), bn) * bn
    parts = ceil_div(call.n_k, per)
    acc = torch.empty((batch * heads * parts, number, r, bdv), dtype=torch.float32, device=device)
    total = torch.empty(acc.shape[:3], dtype=torch.float32, device=device)
    top = torch.empty((batch * heads * parts, r), dtype=torch.float32, device=device)
    out = torch.empty((batch, heads, number, len(rows), dv), dtype=torch.float32, device=device)
    _masked_rows[(parts, batch * heads)](
        call.q, call.k, call.v, device_ids(call.heads, device), call.kv_of_head.int(), rows,
        masks.view(torch.uint8), acc, total, top, *call.q.stride()[:3], *call.k.stride()[:3],
        *call.v.stride()[:3], heads, len(rows), call.n_k, per, parts, call.scale * LOG2E,
        R=r, BN=bn, D=d, DV=dv, BD=bd, BDV=bdv, N_MASKS=number - 1,
        DTYPE=getattr(tl, str(call.v.dtype).removeprefix("torch.")),
        PREC=precision(call.q.dtype), num_warps=8, num_stages=stages,
    )  # fmt: skip
    _join[(number, batch * heads)](
        acc, total, top, out, len(rows), parts, R=r, DV=dv, BDV=bdv,
        MOST=max(2, triton.next_power_of_2(parts)), num_warps=4,
    )  # fmt: skip
    return out

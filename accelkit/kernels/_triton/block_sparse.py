"""Block-sparse attention forward.

One program per query tile, longest rows first. Partly visible blocks come first and get element
masks; the main loop over wholly visible blocks has none. It carries the probabilities of the
previous tile, bit-cast to integers so that they stay in registers, and multiplies them with V while
the next scores are computed: softmax can overlap the products. With `skip` a plain loop visits the
blocks in list order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from accelkit.kernels._triton.listed import key0, masked, opened, tables, weighed
from accelkit.kernels._triton.lower import Work, lower
from accelkit.kernels._triton.tile import (
    LOG2E,
    Tile,
    add_bias,
    common_refusal,
    describable,
    finish,
    next_power_of_two,
    power_of_two_part,
    precision,
    query_tile,
    row_limits,
)
from accelkit.kernels._triton.tuned import shared_memory, tuned
from accelkit.kernels.launch import Launch


@triton.jit
def _rows_at(
    T,
    b,
    h,
    n0,
    n,
    s_b,
    s_h,
    s_n,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows n0 … n0 + ROWS of head (b, h), [ROWS, BD], zeros outside."""
    if TMA:
        tile = T.load([b.to(tl.int32), h, n0, 0]).reshape(ROWS, BD)
    else:
        at, d = n0 + tl.arange(0, ROWS), tl.arange(0, BD)
        base = T + b.to(tl.int64) * s_b + h.to(tl.int64) * s_h
        inside = (at < n)[:, None] & (d < D)[None, :]
        tile = tl.load(base + at.to(tl.int64)[:, None] * s_n + d[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _bits(p, like: tl.constexpr):
    """Probabilities in the dtype of V, as integers."""
    if like == tl.float32:
        bits = p.to(tl.int32, bitcast=True)
    else:
        bits = p.to(like).to(tl.int16, bitcast=True)
    return bits


@triton.jit(do_not_specialize=["n_q", "n_k", "q_start", "capacity"])
def _block_sparse(
    Q, K, V, OUT, LSE, LISTS, ITEMS, Q_HEADS, KV_HEADS, OUT_HEADS, Q_POS, K_POS, BIAS, SKIP,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on, s_lb, s_lh, s_ln,
    s_qpb, s_qph, s_qpn, s_kpb, s_kph, s_kpn, s_bb, s_bh, s_bn,
    n_q, n_k, q_start, capacity, factor,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, DTYPE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_Q_POS: tl.constexpr, HAS_K_POS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXTRA_MASKED: tl.constexpr, HAS_SKIP: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, slot, m0, rows, keep, at, n_masked, n = opened(ITEMS, n_q, capacity, BQ, BK, BM, BN, PER_ROW)
    hq, hk, ho = tl.load(Q_HEADS + slot), tl.load(KV_HEADS + slot), tl.load(OUT_HEADS + slot)
    b64, h64 = b.to(tl.int64), slot.to(tl.int64)
    limit = row_limits(
        Q_POS, b64 * s_qpb + h64 * s_qph, s_qpn, rows, n_q, q_start, CAUSAL, HAS_Q_POS
    )
    kp_at, bias_at = b64 * s_kpb + h64 * s_kph, b64 * s_bb + h64 * s_bh
    R: tl.constexpr = BK // BN
    cols = tl.arange(0, BN)

    q = _rows_at(Q, b, hq, m0, n_q, s_qb, s_qh, s_qn, BM, D, BD, TMA)
    m = tl.full([BM], -1e30, tl.float32)  # finite, so that an empty row meets no inf − inf
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)

    if HAS_SKIP:
        least = tl.load(SKIP + slot) * 1.4426950408889634
        for j in tl.range(0, n, num_stages=STAGES):
            k0 = key0(LISTS, at, j, BK, BN)
            k = _rows_at(K, b, hk, k0, n_k, s_kb, s_kh, s_kn, BN, D, BD, TMA)
            v = _rows_at(V, b, hk, k0, n_k, s_vb, s_vh, s_vn, BN, DV, BDV, TMA)
            s = tl.dot(q, k.T, input_precision=PREC, out_dtype=tl.float32) * factor
            s = masked(s, k0 + cols, limit, n_k, BIAS, bias_at, s_bn, K_POS, kp_at, s_kpn,
                       HAS_BIAS, HAS_K_POS)  # fmt: skip
            peak = tl.max(s, 1)
            votes = keep & (peak > -float("inf")) & ((peak - m >= least) | (m <= -1e30))
            if tl.max(votes.to(tl.int32), 0) > 0:
                m_new = tl.maximum(m, peak)
                alpha = tl.exp2(m - m_new)
                p = tl.exp2(s - m_new[:, None])
                total = total * alpha + tl.sum(p, 1)
                acc = tl.dot(
                    p.to(DTYPE), v, acc * alpha[:, None], input_precision=PREC, out_dtype=tl.float32
                )
                m = m_new
    else:
        limit = tl.where(n > 0, limit, -1)
        # All masked tiles but the last; that one opens the pipelined part below.
        lead = tl.maximum(n_masked - 1, 0)
        if EXTRA_MASKED:
            for j in tl.range(0, lead, num_stages=1):
                k0 = key0(LISTS, at, j, BK, BN)
                k = _rows_at(K, b, hk, k0, n_k, s_kb, s_kh, s_kn, BN, D, BD, TMA)
                s = tl.dot(q, k.T, input_precision=PREC, out_dtype=tl.float32) * factor
                s = masked(s, k0 + cols, limit, n_k, BIAS, bias_at, s_bn, K_POS, kp_at, s_kpn,
                           HAS_BIAS, HAS_K_POS)  # fmt: skip
                p, m, alpha, total = weighed(s, m, total, 0.0)
                v = _rows_at(V, b, hk, k0, n_k, s_vb, s_vh, s_vn, BN, DV, BDV, TMA)
                acc = tl.dot(
                    p.to(DTYPE), v, acc * alpha[:, None], input_precision=PREC, out_dtype=tl.float32
                )
        v0 = tl.load(LISTS + at + lead // R, mask=n > 0, other=0) * BK + (lead % R) * BN
        k = _rows_at(K, b, hk, v0, n_k, s_kb, s_kh, s_kn, BN, D, BD, TMA)
        s = tl.dot(q, k.T, input_precision=PREC, out_dtype=tl.float32) * factor
        s = masked(s, v0 + cols, limit, n_k, BIAS, bias_at, s_bn, K_POS, kp_at, s_kpn,
                   HAS_BIAS, HAS_K_POS)  # fmt: skip
        p, m, alpha, total = weighed(s, m, total, 0.0)
        acc = acc * alpha[:, None]
        carried = _bits(p, DTYPE)
        for j in tl.range(lead + 1, n, num_stages=STAGES):
            k0 = key0(LISTS, at, j, BK, BN)
            k = _rows_at(K, b, hk, k0, n_k, s_kb, s_kh, s_kn, BN, D, BD, TMA)
            v = _rows_at(V, b, hk, v0, n_k, s_vb, s_vh, s_vn, BN, DV, BDV, TMA)
            s = tl.dot(q, k.T, input_precision=PREC, out_dtype=tl.float32)
            acc = tl.dot(
                carried.to(DTYPE, bitcast=True), v, acc, input_precision=PREC, out_dtype=tl.float32
            )
            if HAS_BIAS:
                s = add_bias(s * factor, k0 + cols, BIAS, bias_at, s_bn, n_k, HAS_BIAS)
                p, m, alpha, total = weighed(s, m, total, 0.0)
            else:
                m_new = tl.maximum(m, tl.max(s, 1) * factor)
                p = tl.exp2(s * factor - m_new[:, None])
                alpha = tl.exp2(m - m_new)
                total = total * alpha + tl.sum(p, 1)
                m = m_new
            acc = acc * alpha[:, None]
            carried = _bits(p, DTYPE)
            v0 = k0
        v = _rows_at(V, b, hk, v0, n_k, s_vb, s_vh, s_vn, BN, DV, BDV, TMA)
        acc = tl.dot(
            carried.to(DTYPE, bitcast=True), v, acc, input_precision=PREC, out_dtype=tl.float32
        )

    out_at, lse_at = b64 * s_ob + ho.to(tl.int64) * s_oh, b64 * s_lb + ho.to(tl.int64) * s_lh
    finish(OUT, LSE, out_at, lse_at, s_on, s_ln, rows, keep, m, total, acc, DV, BDV)


def choose_tile(
    size: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    skip: bool,
    device: torch.device | None = None,
) -> Tile | None:
    """Tile for units `size` at padded head size `width` on a device (CUDA's present one by
    default), or None where the unit does not fit a tile.
    """
    device = device or torch.device("cuda")
    wide = dtype == torch.float32
    most_m = 64 if wide or width == 64 else 128
    most_n = 128 if width <= 128 else 64
    if wide:
        most_n = 64 if width <= 64 else 32
    if skip:  # whole units as far as they fit, so that the rule means the same as in the reference
        most_m, most_n = (128, 128) if width <= 128 and not wide else (most_m, most_n)
    elif shared_memory(device) < 160_000 and width > 64:
        most_m, most_n = min(most_m, 64), min(most_n, 64)
    rows = query_tile(size[0], most_m)
    bn = power_of_two_part(size[1], most_n)
    if rows is None or bn < 16:
        return None
    known = None if skip or wide else tuned("triton", device, width, (rows[0], bn))
    warps, stages = known or (8 if rows[0] * max(bn, width) > 8192 else 4, 2)
    return Tile(rows[0], bn, rows[1], warps, stages)


def refusal(launch: Launch) -> str | None:
    """Why this kernel cannot serve a launch, or None."""
    reason = common_refusal(launch)
    if reason is None and _tile(launch) is None:
        reason = f"units of {launch.index.size} tokens do not divide into tiles of 16 or more"
    return reason


def _tile(launch: Launch) -> Tile | None:
    q, width = launch.q, max(16, next_power_of_two(max(launch.q.shape[3], launch.v.shape[3])))
    return choose_tile(launch.index.size, width, q.dtype, launch.skip is not None, q.device)


def block_sparse(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`."""
    skip = launch.skip is not None
    tile = _tile(launch)
    assert tile is not None  # refused before
    with torch.cuda.device_of(launch.q):
        run(launch, lower(launch, in_order=skip), tile)


def run(launch: Launch, work: Work, tile: Tile) -> None:
    """Start the kernel over lowered work with a given tile."""
    (bq, bk), q, k, v = launch.index.size, launch.q, launch.k, launch.v
    d, dv = q.shape[3], v.shape[3]
    bd, bdv = (max(16, next_power_of_two(n)) for n in (d, dv))
    # Narrower tiles of V beside wide ones of K gave wrong results on a Hopper card (Triton 3.6).
    bdv = max(bdv, min(bd, 64))
    tma = all(describable(t) for t in (q, k, v))
    tensors = (q, k, v)
    if tma:
        boxes = ((tile.bm, bd), (tile.bn, bd), (tile.bn, bdv))
        tensors = tuple(
            TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, *box])
            for t, box in zip((q, k, v), boxes, strict=True)
        )
    pointers, steps, there = tables(launch, tile.bn, work.items)
    _block_sparse[(work.items.shape[0] * tile.per_row,)](
        *tensors, launch.out, launch.lse, work.lists, work.items, launch.q_heads,
        launch.kv_heads, launch.out_heads, *pointers,
        launch.skip if launch.skip is not None else work.items,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *launch.out.stride()[:3],
        *launch.lse.stride(), *steps,
        launch.n_q, launch.n_k, launch.q_start, work.capacity,
        launch.scale * LOG2E,
        BQ=bq, BK=bk, BM=tile.bm, BN=tile.bn, PER_ROW=tile.per_row, D=d, DV=dv, BD=bd, BDV=bdv,
        DTYPE=getattr(tl, str(v.dtype).removeprefix("torch.")), **there,
        HAS_SKIP=launch.skip is not None, TMA=tma,
        PREC=precision(q.dtype), STAGES=tile.stages, num_warps=tile.warps,
        num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip

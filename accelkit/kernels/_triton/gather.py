"""Attention over gathered keys: index rows hold key positions, loaded row by row through pointers.

One program per query tile, longest lists first. Every tile is masked by position, which costs
little here because the positions are in registers anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accelkit.kernels._triton.lower import longest_first
from accelkit.kernels._triton.tile import (
    LOG2E,
    add_bias,
    common_refusal,
    finish,
    hide,
    next_power_of_two,
    precision,
    query_tile,
    row_limits,
    table,
)
from accelkit.kernels.launch import Launch


@triton.jit(do_not_specialize=["n_tiles", "n_q", "n_k", "q_start"])
def _gather(
    Q, K, V, OUT, LSE, START, COUNT, BLOCKS, ORDER, TILES, Q_HEADS, KV_HEADS, OUT_HEADS, Q_POS,
    K_POS, BIAS,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on, s_lb, s_lh, s_ln,
    s_ib, s_ih, s_ir, s_qpb, s_qph, s_qpn, s_kpb, s_kph, s_kpn, s_bb, s_bh, s_bn,
    n_heads, n_tiles, n_q, n_k, q_start, factor,
    BQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, DTYPE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_Q_POS: tl.constexpr, HAS_K_POS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = tl.load(ORDER + pid // PER_ROW)
    slot, b = (row // n_tiles) % n_heads, row // (n_tiles * n_heads)
    tile = tl.load(TILES + row % n_tiles).to(tl.int32)
    hq = tl.load(Q_HEADS + slot).to(tl.int64)
    hk, ho = tl.load(KV_HEADS + slot).to(tl.int64), tl.load(OUT_HEADS + slot).to(tl.int64)
    b64, h64 = b.to(tl.int64), slot.to(tl.int64)
    m0 = tile * BQ + (pid % PER_ROW) * BM
    rows = m0 + tl.arange(0, BM)
    keep = (rows < n_q) & (rows < tile * BQ + BQ)
    limit = row_limits(
        Q_POS, b64 * s_qpb + h64 * s_qph, s_qpn, rows, n_q, q_start, CAUSAL, HAS_Q_POS
    )
    kp_at, bias_at = b64 * s_kpb + h64 * s_kph, b64 * s_bb + h64 * s_bh
    at = b64 * s_ib + h64 * s_ih + tile.to(tl.int64) * s_ir
    start, count = tl.load(START + at), tl.load(COUNT + at)
    # A dense row reads 0, 1, 2, … up to its last visible key.
    end = n_k
    if CAUSAL and not HAS_Q_POS and not HAS_K_POS:
        end = tl.minimum(n_k, q_start + m0 + BM)
    n = tl.where(count < 0, end, count)
    listed = tl.maximum(count, 0)

    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    q_ptr = Q + b64 * s_qb + hq * s_qh + rows.to(tl.int64)[:, None] * s_qn + d[None, :]
    q = tl.load(q_ptr, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    k_base, v_base = K + b64 * s_kb + hk * s_kh, V + b64 * s_vb + hk * s_vh
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    for j in tl.range(0, n, BN, num_stages=STAGES):
        lane = j + tl.arange(0, BN)
        key = tl.load(BLOCKS + start + lane, mask=lane < listed, other=-1)
        key = tl.where((count < 0) & (lane < n), lane, key)
        real = (key >= 0) & (key < n_k)
        col = tl.where(real, key, n_k)  # outside: hidden below
        at_key = tl.where(real, key, 0).to(tl.int64)
        k = tl.load(
            k_base + at_key[:, None] * s_kn + d[None, :],
            mask=real[:, None] & (d < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_base + at_key[:, None] * s_vn + dv[None, :],
            mask=real[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        s = tl.dot(q, k.T, input_precision=PREC, out_dtype=tl.float32) * factor
        s = add_bias(s, col, BIAS, bias_at, s_bn, n_k, HAS_BIAS)
        s = hide(s, col, limit, K_POS, kp_at, s_kpn, n_k, HAS_K_POS)
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(
            p.to(DTYPE), v, acc * alpha[:, None], input_precision=PREC, out_dtype=tl.float32
        )
        m = m_new
    out_at, lse_at = b64 * s_ob + ho * s_oh, b64 * s_lb + ho * s_lh
    finish(OUT, LSE, out_at, lse_at, s_on, s_ln, rows, keep, m, total, acc, DV, BDV)


def refusal(launch: Launch) -> str | None:
    """Why this kernel cannot serve a launch, or None."""
    return common_refusal(launch)


def gather(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`. `skip` is refused before it comes here."""
    index, q, k, v = launch.index, launch.q, launch.k, launch.v
    d, dv = q.shape[3], v.shape[3]
    width = max(16, next_power_of_two(max(d, dv)))
    wide = q.dtype == torch.float32
    bm, per_row = query_tile(index.size[0], 64 if wide or width > 128 else 128) or (0, 0)
    bn = 32 if wide or width > 128 else 64
    tiles = launch.tiles
    count = index.count if launch.rows is None else index.count[:, :, tiles]
    count = count.expand(launch.batch, -1, -1).reshape(-1)
    with torch.cuda.device_of(q):
        order = longest_first(torch.where(count < 0, launch.n_k, count))
        start, whole = index.start, index.count
        if start.stride() != whole.stride():
            start, whole = start.contiguous(), whole.contiguous()
        steps = [0 if n == 1 else s for s, n in zip(start.stride(), start.shape, strict=True)]
        bias = launch.bias if isinstance(launch.bias, torch.Tensor) else None
        q_pos, k_pos, bias_table = (
            table(launch.q_pos, order),
            table(launch.k_pos, order),
            table(bias, order),
        )
        _gather[(order.numel() * per_row,)](
            q, k, v, launch.out, launch.lse, start, whole, index.blocks if index.blocks.numel() else
            order,
            order, tiles, launch.q_heads, launch.kv_heads, launch.out_heads, q_pos[0], k_pos[0],
            bias_table[0],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *launch.out.stride()[:3],
            *launch.lse.stride(),
            *steps, *q_pos[1:], *k_pos[1:], *bias_table[1:],
            launch.heads, tiles.numel(), launch.n_q, launch.n_k, launch.q_start, launch.scale *
            LOG2E,
            BQ=index.size[0], BM=bm, BN=bn, PER_ROW=per_row, D=d, DV=dv,
            BD=max(16, next_power_of_two(d)), BDV=max(16, next_power_of_two(dv)),
            DTYPE=getattr(tl, str(v.dtype).removeprefix("torch.")), CAUSAL=launch.causal,
            HAS_Q_POS=launch.q_pos is not None, HAS_K_POS=launch.k_pos is not None, HAS_BIAS=bias is
            not None,
            PREC=precision(q.dtype), STAGES=2 if width > 128 else 3,
            num_warps=8 if bm == 128 else 4, num_stages=2 if width > 128 else 3,
            enable_fp_fusion=True,
        )  # fmt: skip

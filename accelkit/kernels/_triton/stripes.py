"""AnchorAttention's two estimates: the anchor of a row block, and the keys that come near it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.scores import padded_width
from accelkit.kernels._triton.tile import precision
from accelkit.kernels.index import Inputs, ceil_div, device_ids


@triton.jit(do_not_specialize=["n_heads", "n_q", "n_k", "nb", "q_start"])
def _anchor(
    Q, K, Q_HEADS, KV_HEADS, MASK, OUT, s_qb, s_qh, s_qn, s_qd, s_kb, s_kh, s_kn, s_kd, s_mb,
    n_heads, n_q, n_k, nb, q_start, scale,
    BLOCK: tl.constexpr, SUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, HAS_MASK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    tile, bh = nb - 1 - tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    lane, d = tl.arange(0, BM), tl.arange(0, BD)
    row = tile * BLOCK + lane
    real = (lane < BLOCK) & (row < n_q)
    place = row + q_start
    q_at = row.to(tl.int64)[:, None] * s_qn + d[None, :] * s_qd
    q0 = Q + b * s_qb + tl.load(Q_HEADS + h).to(tl.int64) * s_qh
    q = tl.load(q0 + q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    k0 = K + b * s_kb + tl.load(KV_HEADS + h).to(tl.int64) * s_kh
    begin = (tile * BLOCK + q_start) // SUP * SUP
    end = tl.minimum(tl.minimum(tile * BLOCK + BLOCK, n_q) + q_start, n_k)
    m = tl.full([BM], -float("inf"), tl.float32)
    # The first keys, where they lie outside the superblock; then the superblock.
    for part in tl.static_range(2):
        first = 0 if part == 0 else begin
        stop = tl.minimum(begin, BLOCK) if part == 0 else end
        for j in range(first, stop, BN):
            col = j + tl.arange(0, BN)
            inside = col < stop
            k_at = col.to(tl.int64)[None, :] * s_kn + d[:, None] * s_kd
            k = tl.load(k0 + k_at, mask=(d < D)[:, None] & inside[None, :], other=0.0)
            s = tl.dot(q, k, out_dtype=tl.float32, input_precision=PREC) * scale
            if HAS_MASK:
                inside = inside & (tl.load(MASK + b * s_mb + col, mask=inside, other=0) != 0)
            seen = inside[None, :] & (col[None, :] <= place[:, None])
            m = tl.maximum(m, tl.max(tl.where(seen, s, -float("inf")), 1))
    if HAS_MASK:
        real = real & (tl.load(MASK + b * s_mb + place, mask=real, other=0) != 0)
    counts = real & (m > -float("inf"))
    total, number = tl.sum(tl.where(counts, m, 0.0), 0), tl.sum(counts.to(tl.int32), 0)
    mean = tl.where(number > 0, total / tl.maximum(number, 1), float("inf"))
    tl.store(OUT + bh.to(tl.int64) * nb + tile, mean)


def anchor_fits(call: Inputs, block: int, superblock: int) -> bool:
    """Whether each row block lies in one superblock and rows and keys share their padding."""
    own = call.key_mask is None or call.q_start + call.n_q == call.n_k
    return own and block <= 128 and superblock % block == 0 and call.q_start % block == 0


def anchor_max(call: Inputs, block: int, superblock: int) -> Tensor:
    """`kernels.scores.anchor_max`, one program per row block."""
    (batch, _, n_q, d), heads, device = call.q.shape, len(call.heads), call.q.device
    nb = ceil_div(n_q, block)
    out = torch.empty((batch, heads, nb), dtype=torch.float32, device=device)
    q_heads, mask = device_ids(call.heads, device), call.key_mask
    _anchor[(nb, batch * heads)](
        call.q, call.k, q_heads, call.kv_of_head.int(),
        q_heads if mask is None else mask.contiguous().view(torch.uint8), out,
        *call.q.stride(), *call.k.stride(), 0 if mask is None else call.n_k,
        heads, n_q, call.n_k, nb, call.q_start, call.scale,
        BLOCK=block, SUP=superblock, BM=max(16, triton.next_power_of_2(block)),
        BN=64, D=d, BD=padded_width(d), HAS_MASK=mask is not None,
        PREC=precision(call.q.dtype), num_warps=8 if block > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_heads", "n_k", "nb", "ns", "s0"])
def _stripes(
    QM, K, KV_HEADS, LEAST, MASK, OUT, s_kb, s_kh, s_kn, s_kd, s_mb,
    n_heads, n_k, nb, ns, s0, scale,
    BLOCK: tl.constexpr, SUP: tl.constexpr, PER: tl.constexpr, PP: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, HAS_MASK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    # Heads run fastest: those of a KV group find its keys in the cache.
    bh, tile, sup = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    col, d, lane = tile * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, PP)
    begin = (s0 + sup) * SUP
    if tile * BN < begin:
        block = sup * PER + lane
        real = (lane < PER) & (block < nb)
        line = bh.to(tl.int64) * nb + block
        q_at = line[:, None] * D + d[None, :]
        q = tl.load(QM + q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
        k0 = K + b * s_kb + tl.load(KV_HEADS + h).to(tl.int64) * s_kh
        inside = (col >= BLOCK) & (col < begin) & (col < n_k)
        k_at = col.to(tl.int64)[None, :] * s_kn + d[:, None] * s_kd
        k = tl.load(k0 + k_at, mask=(d < D)[:, None] & inside[None, :], other=0.0)
        s = tl.dot(q, k, out_dtype=tl.float32, input_precision=PREC) * scale
        least = tl.load(LEAST + line, mask=real, other=float("inf"))
        near = tl.max((s >= least[:, None]).to(tl.int32), 0) > 0
        if HAS_MASK:
            inside = inside & (tl.load(MASK + b * s_mb + col, mask=inside, other=0) != 0)
        out = (bh.to(tl.int64) * ns + sup) * n_k + col
        tl.store(OUT + out, (near & inside).to(tl.uint8), mask=inside)


def stripes(call: Inputs, mean: Tensor, least: Tensor, block: int, superblock: int) -> Tensor:
    """`kernels.scores.stripes` from mean queries `[B, H, nq, D]` and least logits `[B, H, nq]`.
    Mean queries are rounded to the dtype of the keys.
    """
    (batch, heads, nb, d), n_k, device = mean.shape, call.n_k, call.q.device
    ns, per, bn = ceil_div(call.n_q, superblock), superblock // block, 128
    out = torch.zeros((batch, heads, ns, n_k), dtype=torch.bool, device=device)
    kv, mask = call.kv_of_head.int(), call.key_mask
    _stripes[(batch * heads, ceil_div(n_k, bn), ns)](
        mean.to(call.k.dtype).contiguous(), call.k, kv, least.float().contiguous(),
        kv if mask is None else mask.contiguous().view(torch.uint8), out.view(torch.uint8),
        *call.k.stride(), 0 if mask is None else n_k,
        heads, n_k, nb, ns, call.q_start // superblock, call.scale,
        BLOCK=block, SUP=superblock, PER=per, PP=max(16, triton.next_power_of_2(per)), BN=bn,
        D=d, BD=padded_width(d), HAS_MASK=mask is not None, PREC=precision(call.k.dtype),
        num_warps=4,
    )  # fmt: skip
    return out

"""The strided (antidiagonal) score of XAttention: one pass over the products, then a rescaled sum.

Plain positions only; what is permuted goes to the torch twin in `kernels/scores_blocks.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.scores import LOG2E, SCRATCH_BYTES, head_table, padded_width
from accelkit.kernels._triton.tile import precision
from accelkit.kernels.index import Inputs, ceil_div


@triton.jit(
    do_not_specialize=[
        "n_heads", "first", "n_q", "n_k", "n_cells", "width", "q_start", "t0", "n_tiles",
    ]
)  # fmt: skip
def _strided(
    Q, K, Q_HEADS, KV_HEADS, PART, TOP, NORM, s_qb, s_qh, s_qn, s_qd, s_kb, s_kh, s_kn, s_kd,
    n_heads, first, n_q, n_k, n_cells, width, q_start, t0, n_tiles, factor,
    S: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile, bh = n_tiles - 1 - tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), first + bh % n_heads
    lane, d = tile * BM + tl.arange(0, BM), tl.arange(0, DK)
    cell = t0 * BM + lane
    end = n_cells
    limit = tl.minimum(cell * S + S - 1, n_q - 1) + q_start
    if CAUSAL:
        last = tl.minimum((t0 + tile + 1) * BM * S, n_q) - 1 + q_start
        end = tl.minimum(n_cells, last // S + 1)
    q0 = Q + b * s_qb + tl.load(Q_HEADS + h).to(tl.int64) * s_qh
    k0 = K + b * s_kb + tl.load(KV_HEADS + h).to(tl.int64) * s_kh
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BN], tl.float32)
    line = bh.to(tl.int64) * (n_tiles * BM) + lane
    PIECES: tl.constexpr = S * (BD // DK)
    # One flat loop over key tiles and pieces of the long inner dimension keeps the loads in flight.
    for i in tl.range(0, tl.cdiv(end, BN) * PIECES, num_stages=STAGES):
        j, piece = i // PIECES, i % PIECES
        s, d0 = piece // (BD // DK), (piece % (BD // DK)) * DK
        q_row, k_row = cell * S + (S - 1 - s), (j * BN + tl.arange(0, BN)) * S + s
        q_at = q_row.to(tl.int64)[:, None] * s_qn + (d0 + d)[None, :] * s_qd
        k_at = k_row.to(tl.int64)[None, :] * s_kn + (d0 + d)[:, None] * s_kd
        q = tl.load(q0 + q_at, mask=(q_row < n_q)[:, None] & (d0 + d < D)[None, :], other=0.0)
        k = tl.load(k0 + k_at, mask=(d0 + d < D)[:, None] & (k_row < n_k)[None, :], other=0.0)
        acc = tl.dot(q, k, acc, out_dtype=tl.float32, input_precision=PREC)
        if piece == PIECES - 1:
            key = j * BN + tl.arange(0, BN)
            seen = (cell * S < n_q)[:, None] & (key < n_cells)[None, :]
            if CAUSAL:
                seen = seen & ((key * S)[None, :] <= limit[:, None])
            x = tl.where(seen, acc * factor, -float("inf"))
            top = tl.maximum(m, tl.max(x, 1))
            safe = tl.where(top > -float("inf"), top, 0.0)
            p = tl.exp2(x - safe[:, None])
            l = l * tl.exp2(m - safe) + tl.sum(p, 1)
            m = top
            sums = tl.sum(tl.reshape(p, [BM, BN // C, C]), 2)
            block = j * (BN // C) + tl.arange(0, BN // C)
            tl.store(PART + line[:, None] * width + block[None, :], sums)
            tl.store(TOP + line * (width // (BN // C)) + j, safe)
            acc = tl.zeros([BM, BN], tl.float32)
    norm = tl.where(l > 0.0, m + tl.log2(tl.where(l > 0.0, l, 1.0)), float("inf"))
    tl.store(NORM + line, norm)


@triton.jit(
    do_not_specialize=[
        "n_heads", "n_all", "first", "n_q", "nq", "nk", "n_cells", "width", "q_start", "t0",
        "n_rows", "b0",
    ]
)  # fmt: skip
def _strided_sums(
    PART, TOP, NORM, OUT,
    n_heads, n_all, first, n_q, nq, nk, n_cells, width, q_start, t0, n_rows, b0,
    S: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, PP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, KB: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tile, bh = b0 + tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), first + bh % n_heads
    lane = tl.arange(0, PP)
    cell = tile * PER + lane
    local = cell - t0 * BM
    real = (lane < PER) & (local < n_rows) & (cell * S < n_q)
    line = bh.to(tl.int64) * n_rows + local
    norm = tl.load(NORM + line, mask=real, other=float("inf"))
    # Key tiles that the row's program has visited; beyond them nothing was written.
    visited = tl.zeros([PP], tl.int32) + tl.cdiv(n_cells, BN)
    if CAUSAL:
        last = tl.minimum((cell // BM + 1) * BM * S, n_q) - 1 + q_start
        visited = tl.cdiv(tl.minimum(n_cells, last // S + 1), BN)
    out = ((b * n_all + h) * nq + tile) * nk
    for j in range(0, nk, KB):
        block = j + tl.arange(0, KB)
        step = block // (BN // C)
        ok = real[:, None] & (step[None, :] < visited[:, None])
        part = tl.load(PART + line[:, None] * width + block[None, :], mask=ok, other=0.0)
        top_at = line[:, None] * (width // (BN // C)) + step[None, :]
        top = tl.load(TOP + top_at, mask=ok, other=0.0)
        mass = tl.where(ok, part * tl.exp2(top - norm[:, None]), 0.0)
        tl.store(OUT + out + block, tl.sum(mass, 0), mask=block < nk)


def strided_fits(stride: int, size: tuple[int, int]) -> bool:
    """Whether blocks hold a power of two of cells and a tile of cells holds whole blocks."""
    cells = size[1] // stride
    return cells & (cells - 1) == 0 and cells <= 64 and 128 % (size[0] // stride) == 0


def strided(
    call: Inputs,
    stride: int,
    size: tuple[int, int],
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """`kernels.scores.strided`; blocks that are not visible hold zeros.

    Block sums of each cell row relative to its running maximum go to scratch, a second launch
    rescales and adds them: one pass over the products. `tile` is (cells of q, cells of k, inner
    dimension, warps, stages).
    """
    half = call.q.element_size() == 2
    tile = tile or ((128, 256, 64, 8, 4) if half else (128, 64, 32, 8, 2))
    bm, bn, dk, warps, stages = tile
    (nq, nk), (batch, _, _, d), heads = call.tiles(size), call.q.shape, len(call.heads)
    device, cells = call.q.device, size[1] // stride
    n_cells, tiles = ceil_div(call.n_k, stride), ceil_div(ceil_div(call.n_q, stride), bm)
    width = ceil_div(n_cells, bn) * (bn // cells)
    bd = padded_width(d)
    dk = min(dk, bd)
    # Whole heads as far as they fit, else runs of tiles of one head.
    row_bytes = 4 * batch * width * bm
    rows = max(1, min(tiles, SCRATCH_BYTES // row_bytes))
    some = max(1, min(heads, SCRATCH_BYTES // (row_bytes * rows)))
    part = torch.empty(batch * some * rows * bm * width, dtype=torch.float32, device=device)
    top = torch.empty(part.numel() // (bn // cells), dtype=torch.float32, device=device)
    norm = torch.empty(batch * some * rows * bm, dtype=torch.float32, device=device)
    out = torch.empty((batch, heads, nq, nk), dtype=torch.float32, device=device)
    q_heads, kv_heads = head_table(call.heads, device), call.kv_of_head.int()
    per = size[0] // stride
    for first in range(0, heads, some):
        n = min(some, heads - first)
        for t0 in range(0, tiles, rows):
            m = min(rows, tiles - t0)
            _strided[(m, batch * n)](
                call.q, call.k, q_heads, kv_heads, part, top, norm,
                *call.q.stride(), *call.k.stride(), n, first, call.n_q, call.n_k, n_cells, width,
                call.q_start, t0, m, call.scale / stride * LOG2E, S=stride, C=cells, BM=bm, BN=bn,
                DK=dk, D=d, BD=bd, CAUSAL=call.causal, PREC=precision(call.q.dtype),
                STAGES=stages, num_warps=warps,
            )  # fmt: skip
            b0, b1 = t0 * bm // per, min(nq, (t0 + m) * bm // per)
            _strided_sums[(b1 - b0, batch * n)](
                part, top, norm, out, n, heads, first, call.n_q, nq, nk, n_cells, width,
                call.q_start, t0, m * bm, b0, S=stride, C=cells, PER=per,
                PP=max(2, triton.next_power_of_2(per)), BM=bm, BN=bn, KB=64, CAUSAL=call.causal,
                num_warps=4,
            )  # fmt: skip
    return out

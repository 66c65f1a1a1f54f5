"""The strided (antidiagonal) score of XAttention: one pass over the products, then a rescaled sum.

Every tile of queries wants every cell of keys, so the products wait for the second-level cache;
int8 cells are half as long and multiply twice as fast. Plain positions only; what is permuted goes
to the torch twin in `kernels/scores_blocks.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from accelkit.kernels._triton.scores import LOG2E, SCRATCH_BYTES, padded_width
from accelkit.kernels._triton.tile import describable, precision
from accelkit.kernels.index import Inputs, ceil_div, device_ids


@triton.jit(do_not_specialize=["n_heads", "n", "n_cells"])
def _round_cells(
    X, HEADS, MEAN, OUT, SCALE, s_xb, s_xh, s_xn, n_heads, n, n_cells,
    S: tl.constexpr, CELLS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    part, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    row, d = part * CELLS * S + tl.arange(0, CELLS * S), tl.arange(0, BD)
    wide = (d < D)[None, :]
    at = X + b * s_xb + tl.load(HEADS + h).to(tl.int64) * s_xh + row.to(tl.int64)[:, None] * s_xn
    x = tl.load(at + d[None, :], mask=(row < n)[:, None] & wide, other=0.0).to(tl.float32)
    if CENTRED:
        x -= tl.load(MEAN + bh.to(tl.int64) * D + d, mask=d < D, other=0.0)[None, :]
    cell = tl.reshape(x, [CELLS, S * BD])
    top = tl.maximum(tl.max(tl.abs(cell), 1), 1e-20)
    x = tl.reshape(cell * (127.0 / top)[:, None], [CELLS * S, BD])
    x = (x + tl.where(x < 0.0, -0.5, 0.5)).to(tl.int8)
    line = bh.to(tl.int64) * n_cells * S + row
    tl.store(OUT + line[:, None] * D + d[None, :], x, mask=(row < n_cells * S)[:, None] & wide)
    number = part * CELLS + tl.arange(0, CELLS)
    at = SCALE + bh.to(tl.int64) * n_cells + number
    tl.store(at, top * (1.0 / 127.0), mask=number < n_cells)


@triton.jit(
    do_not_specialize=[
        "n_heads", "n_kv", "first", "n_q", "n_cells", "width", "q_start", "t0", "n_tiles",
    ]
)  # fmt: skip
def _strided(
    Q, K, Q_SCALE, K_SCALE, Q_HEADS, KV_HEADS, PART, TOP, NORM,
    n_heads, n_kv, first, n_q, n_cells, width, q_start, t0, n_tiles, factor,
    S: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr,
    BD: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    tile, bh = n_tiles - 1 - tl.program_id(0), tl.program_id(1)
    b, h = bh // n_heads, first + bh % n_heads
    hq, hk = tl.load(Q_HEADS + h), tl.load(KV_HEADS + h)
    c0, lane = (t0 + tile) * BM, tile * BM + tl.arange(0, BM)
    cell = c0 + tl.arange(0, BM)
    row_factor = tl.zeros([BM], tl.float32) + factor
    if INT8:
        hq = bh % n_heads  # of the heads at hand
        q_cells = tl.cdiv(n_q, S)
        at = Q_SCALE + bh.to(tl.int64) * q_cells + cell
        row_factor *= tl.load(at, mask=cell < q_cells, other=0.0)
    end = n_cells
    limit = tl.minimum(cell * S + S - 1, n_q - 1) + q_start
    if CAUSAL:
        last = tl.minimum((t0 + tile + 1) * BM * S, n_q) - 1 + q_start
        end = tl.minimum(n_cells, last // S + 1)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    line = bh.to(tl.int64) * (n_tiles * BM) + lane
    PARTS: tl.constexpr = BD // DK
    # Key tiles that every cell row sees wholly come first and need no masks.
    clean = tl.minimum(n_cells, (c0 * S + S - 1 + q_start) // S + 1 if CAUSAL else n_cells) // BN
    clean = tl.where((c0 + BM) * S <= n_q, clean, 0)
    for part in tl.static_range(2):
        first_tile = 0 if part == 0 else clean
        last_tile = clean if part == 0 else tl.cdiv(end, BN)
        for j in range(first_tile, last_tile):
            acc = tl.zeros([BM, BN], tl.int32 if INT8 else tl.float32)
            for piece in tl.range(0, S * PARTS, num_stages=STAGES):
                s, d0 = piece // PARTS, (piece % PARTS) * DK
                q = Q.load([b, hq, S - 1 - s, c0, d0]).reshape(BM, DK)
                k = K.load([b, hk, s, j * BN, d0]).reshape(BN, DK)
                acc = tl.dot(
                    q, k.T, acc, input_precision=PREC, out_dtype=tl.int32 if INT8 else tl.float32
                )
            key = j * BN + tl.arange(0, BN)
            if INT8:
                k_scale = K_SCALE + (b.to(tl.int64) * n_kv + hk) * n_cells
                k_scale = tl.load(k_scale + key, mask=key < n_cells, other=0.0)
                acc = acc.to(tl.float32) * k_scale[None, :]
            if part == 0:
                top = tl.maximum(m, tl.max(acc, 1) * row_factor)
                safe = top
                p = tl.exp2(acc * row_factor[:, None] - top[:, None])
            else:
                seen = (cell * S < n_q)[:, None] & (key < n_cells)[None, :]
                if CAUSAL:
                    seen = seen & ((key * S)[None, :] <= limit[:, None])
                x = tl.where(seen, acc * row_factor[:, None], -float("inf"))
                top = tl.maximum(m, tl.max(x, 1))
                safe = tl.where(top > -float("inf"), top, 0.0)
                p = tl.exp2(x - safe[:, None])
            l = l * tl.exp2(m - safe) + tl.sum(p, 1)
            m = top
            sums = tl.sum(tl.reshape(p, [BM, BN // C, C]), 2)
            block = j * (BN // C) + tl.arange(0, BN // C)
            tl.store(PART + line[:, None] * width + block[None, :], sums)
            tl.store(TOP + line * (width // (BN // C)) + j, safe)
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
    seen = tl.minimum((tile + 1) * PER * S, n_q) - 1 + q_start
    for j in range(0, nk, KB):
        block = j + tl.arange(0, KB)
        step = block // (BN // C)
        ok = real[:, None] & (step[None, :] < visited[:, None])
        part = tl.load(PART + line[:, None] * width + block[None, :], mask=ok, other=0.0)
        top_at = line[:, None] * (width // (BN // C)) + step[None, :]
        top = tl.load(TOP + top_at, mask=ok, other=0.0)
        mass = tl.where(ok, part * tl.exp2(top - norm[:, None]), 0.0)
        mass = tl.sum(mass, 0)
        if CAUSAL:
            mass = tl.where(block * (C * S) <= seen, mass, -float("inf"))
        tl.store(OUT + out + block, mass, mask=block < nk)


def strided_fits(call: Inputs, stride: int, size: tuple[int, int], int8: bool = False) -> bool:
    """Whether blocks hold a power of two of cells, a tile of cells holds whole blocks, and rows are
    multiples of sixteen bytes.
    """
    cells, d = size[1] // stride, call.q.shape[3]
    even = d * (1 if int8 else call.q.element_size()) % 16 == 0
    if int8 and (d < 32 or stride & (stride - 1) != 0):
        return False
    return cells & (cells - 1) == 0 and cells <= 64 and 128 % (size[0] // stride) == 0 and even


def _planes(x: Tensor, stride: int, box: list[int]) -> TensorDescriptor:
    """Rows of a cell as planes, `[B, H, stride, cells, D]`: what a product of two cells reads of
    one of them is then a plain tile. Ragged ends are padded with zeros.
    """
    if x.shape[2] % stride or not describable(x):
        x = pad(x, (0, 0, 0, -x.shape[2] % stride)).contiguous()
    b, h, n, d = x.stride()
    shape = [*x.shape[:2], stride, x.shape[2] // stride, x.shape[3]]
    return TensorDescriptor(x, shape, [b, h, n, stride * n, d], [1, 1, 1, *box])


def _rounded(x: Tensor, heads: Tensor, stride: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 `[B, H, cells · stride, D]` and the scale of each cell, fp32 `[B, H, cells]`."""
    (batch, _, n, d), count = x.shape, heads.numel()
    x = x if x.stride(3) == 1 else x.contiguous()
    cells = ceil_div(n, stride)
    out = torch.empty((batch, count, cells * stride, d), dtype=torch.int8, device=x.device)
    scale = torch.empty((batch, count, cells), dtype=torch.float32, device=x.device)
    some = max(1, 64 // stride)
    _round_cells[(ceil_div(cells, some), batch * count)](
        x, heads, out if mean is None else mean, out, scale, *x.stride()[:3], count, n, cells,
        S=stride, CELLS=some, D=d, BD=padded_width(d), CENTRED=mean is not None, num_warps=4,
    )  # fmt: skip
    return out, scale


def strided(
    call: Inputs,
    stride: int,
    size: tuple[int, int],
    tile: tuple[int, int, int, int, int] | None = None,
    int8: bool = False,
) -> Tensor:
    """`kernels.scores.strided` of a call that `strided_fits`.

    Block sums of each cell row relative to its running maximum go to scratch, a second launch
    rescales and adds them: one pass over the products. `tile` is (cells of q, cells of k, inner
    dimension, warps, stages).
    """
    if int8:
        usual = (128, 256, 128, 8, 3)
    else:
        usual = (128, 256, 64, 8, 4) if call.q.element_size() == 2 else (128, 64, 32, 8, 3)
    tile = tile or usual
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
    q_heads, kv_heads = device_ids(call.heads, device), call.kv_of_head.int()
    per = size[0] // stride
    q, k, q_scale, k_scale = call.q, call.k, norm, norm
    if int8:
        every = device_ids(tuple(range(k.shape[1])), device)
        k, k_scale = _rounded(k, every, stride, k.mean(2, dtype=torch.float32))
    k_cells = _planes(k, stride, [bn, dk])
    for first in range(0, heads, some):
        n = min(some, heads - first)
        if int8:
            q, q_scale = _rounded(call.q, q_heads[first : first + n], stride, None)
        q_cells = _planes(q, stride, [bm, dk])
        for t0 in range(0, tiles, rows):
            m = min(rows, tiles - t0)
            _strided[(m, batch * n)](
                q_cells, k_cells, q_scale, k_scale, q_heads, kv_heads, part, top, norm,
                n, k.shape[1], first, call.n_q, n_cells, width, call.q_start, t0, m,
                call.scale / stride * LOG2E, S=stride, C=cells, BM=bm, BN=bn, DK=dk, BD=bd,
                CAUSAL=call.causal, PREC=precision(call.q.dtype), STAGES=stages, INT8=int8,
                num_warps=warps,
            )  # fmt: skip
            b0, b1 = t0 * bm // per, min(nq, (t0 + m) * bm // per)
            _strided_sums[(b1 - b0, batch * n)](
                part, top, norm, out, n, heads, first, call.n_q, nq, nk, n_cells, width,
                call.q_start, t0, m * bm, b0, S=stride, C=cells, PER=per,
                PP=max(2, triton.next_power_of_2(per)), BM=bm, BN=bn, KB=64, CAUSAL=call.causal,
                num_warps=4,
            )  # fmt: skip
    return out

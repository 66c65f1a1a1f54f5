"""Estimators: pooling, every row × mean key, the probe of the last rows.

Plain positions only; what is permuted goes to the torch twins in `kernels/scores_*.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.tile import precision
from accelkit.kernels.index import Inputs, ceil_div, device_ids

LOG2E = 1.4426950408889634
SCRATCH_BYTES = 512 * 2**20


def padded_width(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


@triton.jit(do_not_specialize=["n_heads", "n", "nb"])
def _pool(
    X, HEADS, PLACES, BEGIN, OUT, s_xb, s_xh, s_xn, s_xd, s_pb, s_ph, s_pn, n_heads, n, nb,
    BLOCK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    HAS_PLACES: tl.constexpr, HAS_BEGIN: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    d = tl.arange(0, BD)
    x0 = X + b * s_xb + tl.load(HEADS + h).to(tl.int64) * s_xh
    first, size = block * BLOCK, BLOCK
    if HAS_BEGIN:
        first = tl.load(BEGIN + block)
        size = tl.load(BEGIN + block + 1) - first
    total, count = tl.zeros([BD], tl.float32), 0
    for i in range(0, size, BM):
        at = i + tl.arange(0, BM)
        row = (first + at).to(tl.int64)
        real = (at < size) & (row < n)
        if HAS_PLACES:
            place = tl.load(PLACES + b * s_pb + h * s_ph + row * s_pn, mask=real, other=-1)
            real = real & (place >= 0)
        inside = real[:, None] & (d < D)[None, :]
        x = tl.load(x0 + row[:, None] * s_xn + d[None, :] * s_xd, mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
        count += tl.sum(real.to(tl.int32), 0)
    mean = total / tl.maximum(count, 1)
    tl.store(OUT + (bh.to(tl.int64) * nb + block) * D + d, mean, mask=d < D)


def pool(
    x: Tensor,
    block: int,
    heads: tuple[int, ...] | Tensor | None,
    places: Tensor | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """Block means of some heads of x `[B, Hx, N, D]`, fp32 `[B, H, nb, D]`; one read, no copies.
    Tokens with a place (`[B|1, H|1, N]`) of −1 do not count. `begin` int32 `[nb + 1]`: blocks of
    different lengths, from one number to the next.
    """
    if not isinstance(heads, Tensor):
        heads = device_ids(tuple(range(x.shape[1])) if heads is None else heads, x.device)
    batch, _, n, d = x.shape
    nb = ceil_div(n, block) if begin is None else begin.numel() - 1
    out = torch.empty((batch, heads.numel(), nb, d), dtype=torch.float32, device=x.device)
    steps = (0, 0, 0)
    if places is not None:
        pairs = zip(places.stride(), places.shape, strict=True)
        steps = tuple(0 if number == 1 else step for step, number in pairs)
    _pool[(nb, batch * heads.numel())](
        x, heads, out if places is None else places, heads if begin is None else begin, out,
        *x.stride(), *steps, heads.numel(), n, nb, BLOCK=block,
        BM=min(128, max(16, triton.next_power_of_2(block))), D=d, BD=padded_width(d),
        HAS_PLACES=places is not None, HAS_BEGIN=begin is not None, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_heads", "n_q", "nk", "nkp", "nq", "q_start"])
def _rows_by_mean(
    Q, KM, HEADS, OUT, TOP, s_qb, s_qh, s_qn, s_qd, n_heads, n_q, nk, nkp, nq, q_start, factor,
    BQ: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    tile, bh = nq - 1 - tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    lane, d = tl.arange(0, BM), tl.arange(0, BD)
    row = tile * BQ + lane
    real = (lane < BQ) & (row < n_q)
    q0 = Q + b * s_qb + tl.load(HEADS + h).to(tl.int64) * s_qh
    inside = real[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * s_qn + d[None, :] * s_qd
    q = tl.load(q0 + at, mask=inside, other=0.0)
    limit = tl.where(real, row + q_start, -1)
    end = nk
    if CAUSAL:
        end = tl.minimum(nk, (q_start + tl.minimum(tile * BQ + BQ, n_q) - 1) // BK + 1)
    line = (bh.to(tl.int64) * nq + tile) * nkp
    for j in range(0, end, BN):
        block = j + tl.arange(0, BN)
        k_at = (bh.to(tl.int64) * nk + block)[None, :] * D + d[:, None]
        k = tl.load(KM + k_at, mask=(d < D)[:, None] & (block < nk)[None, :], other=0.0)
        s = tl.dot(q, k, out_dtype=tl.float32, input_precision=PREC) * factor
        seen = real[:, None] & (block < nk)[None, :]
        if CAUSAL:
            seen = seen & ((block * BK)[None, :] <= limit[:, None])
        s = tl.where(seen, s, -float("inf"))
        top = tl.max(tl.max(s, 1), 0)
        p = tl.sum(tl.exp2(s - tl.where(top > -float("inf"), top, 0.0)), 0)
        tl.store(OUT + line + block, p, mask=block < nkp)
        tl.store(TOP + line // BN + j // BN, top)


def rows_by_block_mean(call: Inputs, size: tuple[int, int], keys: Tensor) -> Tensor:
    """`kernels.scores.rows_by_block_mean` with mean keys `[B, H, nk, D]`, rounded to q's dtype.
    Blocks that are not visible hold anything.
    """
    (nq, nk), batch, heads = call.tiles(size), call.q.shape[0], len(call.heads)
    bn, d = 64, call.q.shape[3]
    nkp = ceil_div(nk, bn) * bn
    bm = max(16, triton.next_power_of_2(size[0]))
    # Tiles above the diagonal are not visited: zeros, with a maximum that wipes them out.
    out = call.q.new_zeros((batch, heads, nq, nkp), dtype=torch.float32)
    top = call.q.new_full((batch, heads, nq, nkp // bn), -float("inf"), dtype=torch.float32)
    _rows_by_mean[(nq, batch * heads)](
        call.q, keys.to(call.q.dtype).contiguous(), device_ids(call.heads, call.q.device), out, top,
        *call.q.stride(), heads, call.n_q, nk, nkp, nq, call.q_start, call.scale * LOG2E,
        BQ=size[0], BM=bm, BK=size[1], BN=bn, D=d, BD=padded_width(d), CAUSAL=call.causal,
        PREC=precision(call.q.dtype), num_warps=8 if bm >= 128 else 4, num_stages=2,
    )  # fmt: skip
    greatest = top.amax(-1, keepdim=True)
    share = torch.exp2(top - greatest.masked_fill(greatest == -float("inf"), 0.0))
    return out.unflatten(-1, (-1, bn)).mul_(share[..., None]).flatten(-2)[..., :nk]


@triton.jit(do_not_specialize=["n_heads", "n_k", "n_tiles", "first"])
def _probe_logits(
    Q, K, KV_HEADS, LIMIT, MASK, S, M, L, s_kb, s_kh, s_kn, s_kd, s_lb, s_mb,
    n_heads, n_all, first, n_k, n_tiles, factor,
    R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    HAS_MASK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    # Heads run fastest: those of a KV group find its keys in the cache.
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, d, col = tl.arange(0, RP), tl.arange(0, BD), tile * BN + tl.arange(0, BN)
    q_at = ((b * n_all + first + h) * R + row)[:, None] * D + d[None, :]
    q = tl.load(Q + q_at, mask=(row < R)[:, None] & (d < D)[None, :], other=0.0)
    k0 = K + b * s_kb + tl.load(KV_HEADS + first + h).to(tl.int64) * s_kh
    k_at = col.to(tl.int64)[None, :] * s_kn + d[:, None] * s_kd
    k = tl.load(k0 + k_at, mask=(d < D)[:, None] & (col < n_k)[None, :], other=0.0)
    s = tl.dot(q, k, out_dtype=tl.float32, input_precision=PREC) * factor
    limit = tl.load(LIMIT + b * s_lb + row, mask=row < R, other=-1)
    seen = (col < n_k)[None, :] & (col[None, :] <= limit[:, None])
    if HAS_MASK:
        real = tl.load(MASK + b * s_mb + col, mask=col < n_k, other=0)
        seen = seen & (real != 0)[None, :]
    s = tl.where(seen, s, -float("inf"))
    line = (b * n_heads + h) * R + row
    s_at = line.to(tl.int64)[:, None] * n_k + col[None, :]
    tl.store(S + s_at, s, mask=(row < R)[:, None] & (col < n_k)[None, :])
    m = tl.max(s, 1)
    safe = tl.where(m > -float("inf"), m, 0.0)
    part = ((b * n_heads + h) * n_tiles + tile) * R + row
    tl.store(M + part, m, mask=row < R)
    tl.store(L + part, tl.sum(tl.exp2(s - safe[:, None]), 1), mask=row < R)


@triton.jit(do_not_specialize=["n_heads", "first", "n_k"])
def _probe_sums(
    S, NORM, LIMIT, COLUMNS, DIAGONALS, s_lb, n_heads, n_all, first, n_k,
    R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, col = tl.arange(0, RP), tile * BN + tl.arange(0, BN)
    line = (b * n_heads + h) * R + row
    norm = tl.load(NORM + line, mask=row < R, other=float("inf"))
    limit = tl.load(LIMIT + b * s_lb + row, mask=row < R, other=-1)
    s0 = S + line.to(tl.int64)[:, None] * n_k
    inside = (row < R)[:, None] & (col < n_k)[None, :]
    s = tl.load(s0 + col[None, :], mask=inside, other=-float("inf"))
    out = (b * n_all + first + h) * n_k + col
    tl.store(COLUMNS + out, tl.sum(tl.exp2(s - norm[:, None]), 0), mask=col < n_k)
    # The same logits along the offset: key = position of the row − offset.
    key = limit[:, None] - col[None, :]
    s = tl.load(s0 + key, mask=inside & (key >= 0) & (key < n_k), other=-float("inf"))
    tl.store(DIAGONALS + out, tl.sum(tl.exp2(s - norm[:, None]), 0), mask=col < n_k)


def probe(call: Inputs, q: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and diagonals, fp32 `[B, H, Nk]`, of rows q `[B, H, R, D]` at positions `limit`
    `[B|1, 1, R]`. Two passes over logits that are kept for a few heads at a time; no atomics.
    """
    (batch, heads, r, d), n_k, device = q.shape, call.n_k, q.device
    bn = 128
    n_tiles = ceil_div(n_k, bn)
    rp = max(16, triton.next_power_of_2(r))
    warps = 8 if rp > 64 else 4  # a tile of 128 × 128 does not fit the registers of four
    some = max(1, min(heads, SCRATCH_BYTES // (4 * batch * r * n_k)))
    scratch = torch.empty(batch * some * r * n_k, dtype=torch.float32, device=device)
    columns, diagonals = torch.empty((2, batch, heads, n_k), dtype=torch.float32, device=device)
    q, limit = q.contiguous(), limit.to(torch.int32)[:, 0].contiguous()
    s_limit = limit.stride(0) if limit.shape[0] > 1 else 0
    mask = limit if call.key_mask is None else call.key_mask.contiguous().view(torch.uint8)
    kv = call.kv_of_head.int()
    number = (limit >= 0).sum(-1).clamp(min=1).log2().view(-1, 1, 1)
    for first in range(0, heads, some):
        n = min(some, heads - first)
        m, l = torch.empty((2, batch, n, n_tiles, r), dtype=torch.float32, device=device)
        _probe_logits[(n, n_tiles, batch)](
            q, call.k, kv, limit, mask, scratch, m, l, *call.k.stride(), s_limit,
            mask.stride(0) if call.key_mask is not None and batch > 1 else 0,
            n, heads, first, n_k, n_tiles, call.scale * LOG2E, R=r, RP=rp, BN=bn, D=d,
            BD=padded_width(d), HAS_MASK=call.key_mask is not None, PREC=precision(q.dtype),
            num_warps=warps,
        )  # fmt: skip
        top = m.amax(2, keepdim=True)
        safe = top.masked_fill(top == -float("inf"), 0.0)
        total = (torch.exp2(m - safe) * l).sum(2)
        # Dividing by the number of rows is a shift of the norm.
        norm = safe[:, :, 0] + total.log2() + number
        norm = torch.where(total > 0, norm, float("inf"))
        _probe_sums[(n, n_tiles, batch)](
            scratch, norm, limit, columns, diagonals, s_limit, n, heads, first, n_k,
            R=r, RP=rp, BN=bn, num_warps=warps,
        )  # fmt: skip
    return columns, diagonals


@triton.jit(do_not_specialize=["n_heads", "n", "nb"])
def _alike(
    X, HEADS, PLACES, CENTRE, OUT, MEANS, s_xb, s_xh, s_xn, s_xd, s_pb, s_pn, n_heads, n, nb,
    factor,
    BLOCK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    HAS_PLACES: tl.constexpr, HAS_CENTRE: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    d = tl.arange(0, BD)
    x0 = X + b * s_xb + tl.load(HEADS + h).to(tl.int64) * s_xh
    centre = tl.zeros([BD], tl.float32)
    if HAS_CENTRE:
        centre = tl.load(CENTRE + bh.to(tl.int64) * D + d, mask=d < D, other=0.0)
    total, plain, count = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), 0
    for i in range(0, BLOCK, BM):
        at = i + tl.arange(0, BM)
        row = (block * BLOCK + at).to(tl.int64)
        real = (at < BLOCK) & (row < n)
        if HAS_PLACES:
            real = real & (tl.load(PLACES + b * s_pb + row * s_pn, mask=real, other=-1) >= 0)
        inside = real[:, None] & (d < D)[None, :]
        x = tl.load(x0 + row[:, None] * s_xn + d[None, :] * s_xd, mask=inside, other=0.0)
        x = tl.where(inside, x.to(tl.float32) - centre[None, :], 0.0)
        if not HAS_CENTRE:
            plain += tl.sum(x, 0)
        weight = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
        total += tl.sum(x * weight[:, None], 0)
        count += tl.sum(real.to(tl.int32), 0)
    alike = tl.sum(total * total, 0) / (count * count).to(tl.float32)
    tl.store(OUT + bh.to(tl.int64) * nb + block, tl.where(count > 0, alike, 1.0))
    if not HAS_CENTRE:
        mean = plain / tl.maximum(count, 1) * factor
        tl.store(MEANS + (bh.to(tl.int64) * nb + block) * D + d, mean, mask=d < D)


def self_similarity(
    x: Tensor,
    block: int,
    heads: tuple[int, ...] | Tensor,
    places: Tensor | None,
    centre: Tensor | None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Self-similarity of the blocks of some heads of x `[B, Hx, N, D]`, fp32 `[B, H, nb]`, and
    `factor` times their means `[B, H, nb, D]`, in one read. Tokens with a place (`[B|1, 1, N]`) of
    −1 do not count; `centre` fp32 `[B, H, D]` is taken off first, and no means are given then.
    """
    ids = heads if isinstance(heads, Tensor) else device_ids(tuple(heads), x.device)
    (batch, _, n, d), nb = x.shape, ceil_div(x.shape[2], block)
    out = torch.empty((batch, ids.numel(), nb), dtype=torch.float32, device=x.device)
    means = None if centre is not None else out.new_empty((*out.shape, d))
    steps = (0, 0)
    if places is not None:
        steps = (places.stride(0) if places.shape[0] > 1 else 0, places.stride(2))
    _alike[(nb, batch * ids.numel())](
        x, ids, out if places is None else places, out if centre is None else centre.contiguous(),
        out, out if means is None else means, *x.stride(), *steps, ids.numel(), n, nb, factor,
        BLOCK=block, BM=min(128, max(16, triton.next_power_of_2(block))), D=d, BD=padded_width(d),
        HAS_PLACES=places is not None, HAS_CENTRE=centre is not None, num_warps=2,
    )  # fmt: skip
    return out, means


@triton.jit(do_not_specialize=["n_heads", "n_q", "n_k", "nk", "q_start"])
def _mass(
    Q, K, HEADS, KV_HEADS, TILES, LSE, OUT, s_qb, s_qh, s_qn, s_qd, s_kb, s_kh, s_kn, s_kd,
    s_lb, s_lh, s_ln, n_heads, n_q, n_k, nk, q_start, factor,
    BQ: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.load(TILES + tl.program_id(0)), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    lane, d, col = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    row = tile * BQ + lane
    real = (lane < BQ) & (row < n_q)
    q0 = Q + b * s_qb + tl.load(HEADS + h).to(tl.int64) * s_qh
    q_at = row.to(tl.int64)[:, None] * s_qn + d[None, :] * s_qd
    q = tl.load(q0 + q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    lse = tl.load(LSE + b * s_lb + h * s_lh + row.to(tl.int64) * s_ln, mask=real, other=0.0)
    # Rows outside weigh nothing; the mean over the tile is a shift of the exponent.
    rows = tl.minimum(n_q - tile * BQ, BQ).to(tl.float32)
    shift = tl.where(real & (lse > -float("inf")), lse * 1.4426950408889634 + tl.log2(rows),
                     float("inf"))  # fmt: skip
    k0 = K + b * s_kb + tl.load(KV_HEADS + h).to(tl.int64) * s_kh
    line = (bh.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * nk
    PER: tl.constexpr = BN // BK
    end = n_k
    if CAUSAL:
        end = tl.minimum(n_k, q_start + (tile + 1) * BQ)
    for j in tl.range(0, end, BN, num_stages=STAGES):
        key = j + col
        k_at = key.to(tl.int64)[None, :] * s_kn + d[:, None] * s_kd
        k = tl.load(k0 + k_at, mask=(d < D)[:, None] & (key < n_k)[None, :], other=0.0)
        s = tl.dot(q, k, out_dtype=tl.float32, input_precision=PREC) * factor
        p = tl.where((key < n_k)[None, :], tl.exp2(s - shift[:, None]), 0.0)
        if CAUSAL:
            p = tl.where(key[None, :] <= q_start + row[:, None], p, 0.0)
        mass = tl.sum(tl.sum(p, 0).reshape(PER, BK), 1)
        block = j // BK + tl.arange(0, PER)
        tl.store(OUT + line + block, mass, mask=block < nk)


def mass_fits(call: Inputs, size: tuple[int, int]) -> bool:
    """Whether `block_mass` serves a call: no padding or positions, powers of two."""
    plain = call.q_pos is None and call.k_pos is None and call.key_mask is None
    bq, bk = size
    return (
        plain and bq <= 128 and 16 <= bk <= 128
        and bq & (bq - 1) == 0 and bk & (bk - 1) == 0
    )  # fmt: skip


def block_mass(
    call: Inputs, lse: Tensor, size: tuple[int, int], tiles: Tensor | None = None
) -> Tensor:
    """`kernels.scores.block_mass` over all query tiles or some, fp32 `[B, H, len(tiles), nk]`: a
    second pass of attention without V, its softmax already known.
    """
    (nq, nk), batch, heads = call.tiles(size), call.q.shape[0], len(call.heads)
    d, wide, device = call.q.shape[3], call.q.dtype == torch.float32, call.q.device
    at = torch.arange(nq, device=device) if tiles is None else tiles
    shape = (batch, heads, at.numel(), nk)
    out = (torch.zeros if call.causal else torch.empty)(shape, dtype=torch.float32, device=device)
    bm, bn = max(16, size[0]), max(size[1], 64 if wide else 128)
    _mass[(at.numel(), batch * heads)](
        call.q, call.k, device_ids(call.heads, device), call.kv_of_head.int(), at.int(), lse, out,
        *call.q.stride(), *call.k.stride(), *lse.stride(), heads, call.n_q, call.n_k, nk,
        call.q_start, call.scale * LOG2E, BQ=size[0], BM=bm, BK=size[1], BN=bn, D=d,
        BD=padded_width(d), CAUSAL=call.causal, PREC=precision(call.q.dtype),
        STAGES=2 if wide else 3, num_warps=8 if bm == 128 else 4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n_heads", "n_q", "n_k", "nq", "nk"])
def _sampled_max(
    Q, K, HEADS, KV_HEADS, Q_PLACES, K_PLACES, K_ORDER, PEAKS, OUT, s_qb, s_qh, s_qn,
    s_kb, s_kh, s_kn, n_heads, n_q, n_k, nq, nk, factor,
    BQ: tl.constexpr, BK: tl.constexpr, TQ: tl.constexpr, PQ: tl.constexpr, TK: tl.constexpr,
    PK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    part, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    M: tl.constexpr = TQ * PQ
    lane, col, d = tl.arange(0, M), tl.arange(0, TK * PK), tl.arange(0, BD)
    row = tl.minimum((part * TQ + lane // PQ) * BQ + tl.load(Q_PLACES + lane % PQ), n_q - 1)
    q0 = Q + b * s_qb + tl.load(HEADS + h).to(tl.int64) * s_qh
    q_at = row.to(tl.int64)[:, None] * s_qn + d[None, :]
    q = tl.load(q0 + q_at, mask=(d < D)[None, :], other=0.0)
    k0 = K + b * s_kb + tl.load(KV_HEADS + h).to(tl.int64) * s_kh
    place = tl.load(K_PLACES + col % PK)
    # A program's own scratch: peaks first, since their maximum is known only at the end.
    peaks = PEAKS + (bh.to(tl.int64) * tl.num_programs(0) + part) * nk * M
    top = tl.full([M], -float("inf"), tl.float32)
    for j in tl.range(0, nk, TK, num_stages=STAGES):
        key = tl.minimum((j + col // PK) * BK + place, n_k - 1)
        if IN_ORDER:
            key = tl.load(K_ORDER + key)
        k_at = key.to(tl.int64)[:, None] * s_kn + d[None, :]
        k = tl.load(k0 + k_at, mask=(d < D)[None, :], other=0.0)
        s = tl.dot(q, k.T, out_dtype=tl.float32, input_precision=PREC)
        peak = (tl.max(s.reshape(M, TK, PK), 2) * factor).to(PEAKS.dtype.element_ty)
        block = j + tl.arange(0, TK)
        real = (block < nk)[None, :]
        tl.store(peaks + block[None, :] * M + lane[:, None], peak, mask=real)
        top = tl.maximum(top, tl.max(tl.where(real, peak.to(tl.float32), -float("inf")), 1))
    tl.debug_barrier()
    tile = part * TQ + tl.arange(0, TQ)
    line = (bh.to(tl.int64) * nq + tile) * nk
    for j in range(0, nk, CHUNK):
        block = j + tl.arange(0, CHUNK)
        at = peaks + block[None, :] * M + lane[:, None]
        peak = tl.load(at, mask=(block < nk)[None, :], other=-float("inf")).to(tl.float32)
        best = tl.max(tl.exp(peak - top[:, None]).reshape(TQ, PQ, CHUNK), 1)
        there = (tile < nq)[:, None] & (block < nk)[None, :]
        tl.store(OUT + line[:, None] + block[None, :], best, mask=there)


def sampled_max(
    call: Inputs,
    size: tuple[int, int],
    q_places: Tensor,
    k_places: Tensor,
    key_order: Tensor | None = None,
) -> Tensor:
    """`kernels.scores.sampled_max` at the given places of a block, int32, powers of two of them up
    to 128.
    """
    (nq, nk), batch, heads = call.tiles(size), call.q.shape[0], len(call.heads)
    d, device, wide = call.q.shape[3], call.q.device, call.q.dtype == torch.float32
    pq, pk = q_places.numel(), k_places.numel()
    tq, tk = 128 // pq, max(1, 64 // pk)
    parts = ceil_div(nq, tq)
    out = torch.empty((batch, heads, nq, nk), dtype=torch.float32, device=device)
    q_heads, kv = device_ids(call.heads, device), call.kv_of_head
    some = max(1, SCRATCH_BYTES // (2 * batch * parts * nk * tq * pq))
    for i in range(0, heads, some):
        mine = min(some, heads - i)
        found = out if mine == heads else out.new_empty((batch, mine, nq, nk))
        peaks = torch.empty(batch * mine * parts * nk * tq * pq, dtype=torch.float16, device=device)
        _sampled_max[(parts, batch * mine)](
            call.q, call.k, q_heads[i:], kv[i:], q_places, k_places,
            k_places if key_order is None else key_order, peaks, found,
            *call.q.stride()[:3], *call.k.stride()[:3], mine, call.n_q, call.n_k, nq, nk,
            call.scale, BQ=size[0], BK=size[1], TQ=tq, PQ=pq, TK=tk, PK=pk, D=d,
            BD=padded_width(d), CHUNK=32, PREC=precision(call.q.dtype),
            STAGES=2 if wide else 3, IN_ORDER=key_order is not None, num_warps=4,
        )  # fmt: skip
        if found is not out:
            out[:, i : i + mine] = found
    return out

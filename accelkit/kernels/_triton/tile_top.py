"""Kascade's lists: exact attention mass of every key, pooled over a tile of queries and the heads
that share their keys, and the best keys before each tile.

Two launches for a stretch of tiles: the first keeps the masses in scratch, the second finds the
least mass that is taken by sixteenths of the range of bit patterns, and writes ascending ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from accelkit.kernels._triton.scores import LOG2E, SCRATCH_BYTES, padded_width
from accelkit.kernels._triton.tile import describable, precision
from accelkit.kernels.index import BlockIndex, Inputs, ceil_div, device_ids
from accelkit.kernels.positions import in_place


@triton.jit(do_not_specialize=["n_q", "n_k", "q_start", "t0", "n_tiles", "n_groups", "n_slots"])
def _mass(
    Q, K, LSE, SLOTS, Q_HEADS, KV_HEADS, MASS, s_qb, s_qh, s_qn, s_qd,
    n_q, n_k, q_start, t0, n_tiles, n_groups, n_slots, factor,
    TILE: tl.constexpr, TP: tl.constexpr, PER: tl.constexpr, ROUNDS: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HAS_LSE: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    t, bg = n_tiles - 1 - tl.program_id(0), tl.program_id(1)
    b, g = bg // n_groups, bg % n_groups
    tile = t0 + t
    lane, d, cols = tl.arange(0, PER * TP), tl.arange(0, BD), tl.arange(0, BN)
    row = tile * TILE + lane % TP
    before = tl.minimum(q_start + tile * TILE, n_k)
    end = tl.minimum(q_start + tl.minimum(tile * TILE + TILE, n_q), n_k)
    hk = tl.load(KV_HEADS + g)
    line = MASS + (bg.to(tl.int64) * n_tiles + t) * n_k
    for turn in range(0, ROUNDS):
        slot = tl.load(SLOTS + (g * ROUNDS + turn) * PER + lane // TP)
        real = (lane % TP < TILE) & (row < n_q) & (slot >= 0)
        head = tl.load(Q_HEADS + slot, mask=real, other=0).to(tl.int64)
        at = b.to(tl.int64) * s_qb + head * s_qh + row.to(tl.int64) * s_qn
        inside = real[:, None] & (d < D)[None, :]
        q = tl.load(Q + at[:, None] + d[None, :] * s_qd, mask=inside, other=0.0)
        if HAS_LSE:
            at = (b.to(tl.int64) * n_slots + slot) * n_q + row
            norm = tl.load(LSE + at, mask=real, other=float("inf")) * 1.4426950408889634
        else:
            m = tl.full([PER * TP], -1e30, tl.float32)
            l = tl.zeros([PER * TP], tl.float32)
            for j in tl.range(0, before // BN * BN, BN, num_stages=STAGES):
                k = K.load([b, hk, j, 0]).reshape(BN, BD)
                s = tl.dot(q, k.T, out_dtype=tl.float32, input_precision=PREC)
                top = tl.maximum(m, tl.max(s, 1) * factor)
                l = l * tl.exp2(m - top) + tl.sum(tl.exp2(s * factor - top[:, None]), 1)
                m = top
            for j in tl.range(before // BN * BN, end, BN, num_stages=1):
                k = K.load([b, hk, j, 0]).reshape(BN, BD)
                s = tl.dot(q, k.T, out_dtype=tl.float32, input_precision=PREC) * factor
                seen = (j + cols < end)[None, :] & ((j + cols)[None, :] <= (row + q_start)[:, None])
                s = tl.where(seen, s, -float("inf"))
                top = tl.maximum(m, tl.max(s, 1))
                l = l * tl.exp2(m - top) + tl.sum(tl.exp2(s - top[:, None]), 1)
                m = top
            norm = tl.where(real, m + tl.log2(tl.where(l > 0.0, l, 1.0)), float("inf"))
        # Keys × rows, so that what is summed over the rows stays within a warp.
        for j in tl.range(0, before, BN, num_stages=STAGES):
            k = K.load([b, hk, j, 0]).reshape(BN, BD)
            s = tl.dot(k, q.T, out_dtype=tl.float32, input_precision=PREC)
            p = tl.sum(tl.exp2(s * factor - norm[None, :]), 1)
            key = j + cols
            if ROUNDS > 1:
                p += tl.load(line + key, mask=(key < before) & (turn > 0), other=0.0)
            tl.store(line + key, p, mask=key < before)


@triton.jit(do_not_specialize=["n_q", "n_k", "q_start", "t0", "n_tiles", "nt"])
def _best(
    MASS, TAKE, START, LISTS, n_q, n_k, q_start, t0, n_tiles, nt,
    TILE: tl.constexpr, WAYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    t, bg = n_tiles - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = t0 + t
    n = tl.minimum(q_start + tile * TILE, n_k)
    take = tl.load(TAKE + tile)
    out = LISTS + tl.load(START + bg * nt + tile)
    line = MASS + (bg * n_tiles + t) * n_k
    lane, way = tl.arange(0, CHUNK), tl.arange(0, WAYS)
    # Masses are not negative: their bits are ordered like them. The limit sought is the least one
    # with fewer than `take` keys above it.
    low, high = n * 0, n * 0 + 0x7F7FFFFF
    for _ in range(0, 8):
        step = (high - low) // WAYS + 1
        limits = tl.minimum(low + step * way, high)
        above = tl.zeros([WAYS, CHUNK], tl.int32)
        for j in range(0, n, CHUNK):
            bits = tl.load(line + j + lane, mask=j + lane < n, other=0.0).to(tl.int32, bitcast=True)
            bits = tl.where(j + lane < n, bits, -1)
            above += (bits[None, :] > limits[:, None]).to(tl.int32)
        few = tl.sum(above, 1) < take
        high = tl.min(tl.where(few, limits, high), 0)
        low = tl.minimum(tl.max(tl.where(few, low, limits + 1), 0), high)
    count = tl.zeros([CHUNK], tl.int32)
    for j in range(0, n, CHUNK):
        bits = tl.load(line + j + lane, mask=j + lane < n, other=0.0).to(tl.int32, bitcast=True)
        count += ((j + lane < n) & (bits > high)).to(tl.int32)
    room = take - tl.sum(count, 0)  # for keys at the limit, in ascending order
    done, tied = 0, 0
    for j in range(0, n, CHUNK):
        bits = tl.load(line + j + lane, mask=j + lane < n, other=0.0).to(tl.int32, bitcast=True)
        equal = ((j + lane < n) & (bits == high)).to(tl.int32)
        fits = tied + tl.cumsum(equal, 0) <= room
        keep = (((j + lane < n) & (bits > high)) | ((equal > 0) & fits)).to(tl.int32)
        tl.store(out + done + tl.cumsum(keep, 0) - 1, j + lane, mask=keep > 0)
        done += tl.sum(keep, 0)
        tied += tl.sum(equal, 0)
    for j in range(0, TILE, CHUNK):  # the tile's own
        mine = n + j + lane
        inside = (j + lane < TILE) & (mine < n_k)
        tl.store(out + take + j + lane, mine, mask=inside)


def fits(call: Inputs, tile: int) -> bool:
    """Whether keys lie plainly and a tile of one head fits a program."""
    return call.causal and in_place(call) and tile <= 128 and describable(call.k)


def tile_top_k(
    call: Inputs,
    groups: Sequence[tuple[int, Sequence[int]]],
    tile: int,
    take: Sequence[int],
    lse: Tensor | None,
) -> BlockIndex:
    """`kernels.scores.tile_top_k` with `take[t]` keys before tile t, one list for each of `groups`:
    `(KV head, its slots)`.
    """
    (batch, _, n_q, d), n_k, device = call.q.shape, call.n_k, call.q.device
    nt, padded = ceil_div(n_q, tile), triton.next_power_of_2(tile)
    bd, bn = padded_width(d), 128 if call.q.element_size() == 2 else 32
    per = max(1, 128 // padded)
    rounds = max(ceil_div(len(slots), per) for _, slots in groups)
    filled = [[*slots, *[-1] * (rounds * per - len(slots))] for _, slots in groups]
    table = device_ids(tuple(s for slots in filled for s in slots), device)
    kv_heads = device_ids(tuple(kv for kv, _ in groups), device)
    q_heads, takes = device_ids(call.heads, device), device_ids(tuple(take), device)
    begin = call.q_start + torch.arange(nt, device=device, dtype=torch.int32) * tile
    count = takes + (n_k - begin).clamp(0, tile)
    room = sum(take) + min(nt * tile, max(0, n_k - call.q_start))
    row = torch.arange(batch * len(groups), device=device)[:, None]
    start = row * room + (count.cumsum(0) - count)
    lists = torch.empty(batch * len(groups) * room, dtype=torch.int32, device=device)
    some = max(1, min(nt, SCRATCH_BYTES // (4 * batch * len(groups) * n_k)))
    mass = torch.empty(batch * len(groups) * some * n_k, dtype=torch.float32, device=device)
    keys = TensorDescriptor(call.k, list(call.k.shape), list(call.k.stride()), [1, 1, bn, bd])
    lse = None if lse is None else lse.float().contiguous()
    for t0 in range(0, nt, some):
        n = min(some, nt - t0)
        grid = (n, batch * len(groups))
        _mass[grid](
            call.q, keys, mass if lse is None else lse, table, q_heads, kv_heads, mass,
            *call.q.stride(), n_q, n_k, call.q_start, t0, n, len(groups), len(call.heads),
            call.scale * LOG2E, TILE=tile, TP=padded, PER=per, ROUNDS=rounds, BN=bn, D=d, BD=bd,
            HAS_LSE=lse is not None, PREC=precision(call.q.dtype), STAGES=2, num_warps=8,
        )  # fmt: skip
        _best[grid](
            mass, takes, start, lists, n_q, n_k, call.q_start, t0, n, nt,
            TILE=tile, WAYS=16, CHUNK=1024, num_warps=8,
        )  # fmt: skip
    shape = (batch, len(groups), nt)
    return BlockIndex(start.view(shape), count.expand(shape).contiguous(), lists, (tile, 1))

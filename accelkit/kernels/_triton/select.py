"""Selection without sorting, compaction without scans over the whole map, and what a list counts.

The greatest entries of a row up to a number or a mass are those above a threshold; it is found by
bisection over the bit patterns of fp32, which are ordered like the numbers. Entries equal to the
threshold are taken in ascending order, as a stable sort would.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels.index import BlockIndex, Inputs, ceil_div

_WIDE = 1 << 22
"""Entries from which the thresholds cost more than the passes that they save."""


@triton.jit
def _compact(MASK, BLOCKS, COUNT, nk, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    done = 0
    for j in range(0, nk, CHUNK):
        at = j + tl.arange(0, CHUNK)
        chosen = tl.load(MASK + row * nk + at, mask=at < nk, other=0).to(tl.int32)
        tl.store(BLOCKS + row * nk + done + tl.cumsum(chosen, 0) - 1, at, mask=chosen > 0)
        done += tl.sum(chosen, 0)
    tl.store(COUNT + row, done)


def compact(mask: Tensor, size: tuple[int, int]) -> BlockIndex:
    """`BlockIndex.from_mask` in one launch; places behind a row's count stay unwritten."""
    batch, heads, nq, nk = mask.shape
    rows, device = batch * heads * nq, mask.device
    mask = mask.contiguous()
    blocks = torch.empty(rows * nk, dtype=torch.int32, device=device)
    count = torch.empty((batch, heads, nq), dtype=torch.int32, device=device)
    if mask.numel():
        chunk = min(1024, max(16, triton.next_power_of_2(nk)))
        warps = 4 if chunk > 256 else 1
        _compact[(rows,)](mask.view(torch.uint8), blocks, count, nk, CHUNK=chunk, num_warps=warps)
    else:
        count.zero_()
    return BlockIndex(starts(batch, heads, nq, nk, device), count, blocks, size)


@lru_cache(maxsize=64)
def starts(batch: int, heads: int, nq: int, nk: int, device: torch.device) -> Tensor:
    """Where lists of at most nk blocks begin, int64 `[B, H, nq]`; the same tensor for all calls."""
    with torch.inference_mode(False):
        first = torch.arange(batch * heads * nq, device=device, dtype=torch.int64) * nk
        return first.view(batch, heads, nq)


@triton.jit
def order_key(x):
    """Integers ordered like the numbers."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _half(low, high, middle, fits):
    """The half of a range of thresholds that the least fitting one lies in."""
    return tl.where(fits, low, tl.minimum(middle + 1, high)), tl.where(fits, middle, high)


@triton.jit
def greatest(x, value, target):
    """Which entries of a row are the greatest ones whose values reach a target together, int32."""
    key = order_key(x)
    # Least threshold with less than the target above it. Without a target it stays above all.
    low, high = tl.min(key, 0) - 1, tl.max(key, 0) + 1
    for _ in range(32):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = tl.sum(tl.where(key > middle, value, 0.0), 0)
        low, high = _half(low, high, middle, above < target)
    return reaching(key, value, high, target)


@triton.jit
def thresholds(key, value, target, T: tl.constexpr):
    """The threshold of `greatest` for each of T targets, in as many rounds as for one."""
    low = tl.zeros([T], tl.int32) + (tl.min(key, 0) - 1)
    high = tl.zeros([T], tl.int32) + (tl.max(key, 0) + 1)
    for _ in range(32):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = tl.sum(tl.where(key[None, :] > middle[:, None], value[None, :], 0.0), 1)
        low, high = _half(low, high, middle, above < target)
    return high


@triton.jit
def reaching(key, value, high, target):
    """Entries above a threshold, and of those at it as many as the target asks for, int32."""
    above = tl.sum(tl.where(key > high, value, 0.0), 0)
    tied = (key == high).to(tl.int32)
    before = (tl.cumsum(tied, 0) - 1).to(tl.float32) * value
    return tl.where(key > high, 1, tl.where(above + before < target, tied, 0))


def warps_of(width: int) -> int:
    """Warps of a program that holds a row in registers: one alone needs no barriers, and other
    programs fill the multiprocessor.
    """
    return 1 if width <= 2048 else 8


@triton.jit
def _prefix(SCORES, TARGET, OUT, n, BY_MASS: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, N)
    x = tl.load(SCORES + row * n + at, mask=at < n, other=-float("inf"))
    real = x > -float("inf")
    value = tl.where(real, tl.maximum(x, 0.0), 0.0) if BY_MASS else real.to(tl.float32)
    keep = tl.where(real, greatest(x, value, tl.load(TARGET + row)), 0)
    tl.store(OUT + row * n + at, keep.to(tl.uint8), mask=at < n)


def prefix(scores: Tensor, target: Tensor, by_mass: bool) -> Tensor:
    """Greatest entries of each row of fp32 `[…, n]` until their number or sum reaches `target`
    `[…, 1]`; bool `[…, n]`. −inf entries are never taken. n up to a few thousand: a row lies in
    registers.
    """
    scores, n = scores.float().contiguous(), scores.shape[-1]
    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    width = max(16, triton.next_power_of_2(n))
    if out.numel():
        _prefix[(scores.numel() // n,)](
            scores, target.float().contiguous(), out.view(torch.uint8), n,
            BY_MASS=by_mass, N=width, num_warps=warps_of(width),
        )  # fmt: skip
    return out


@triton.jit
def _limit(low, high, i, WAYS: tl.constexpr):
    """Threshold i of WAYS between two keys."""
    return low + (high.to(tl.int64) - low) * i // WAYS


@triton.jit
def _narrowed(PART, GOAL, row, low, high, n_chunks, WAYS: tl.constexpr, CHUNKS: tl.constexpr):
    """The range between the last threshold with too much above it and the first with less."""
    way, chunk = tl.arange(0, WAYS), tl.arange(0, CHUNKS)
    at = (row * WAYS + way)[:, None] * n_chunks + chunk[None, :]
    mass = tl.sum(tl.load(PART + at, mask=chunk[None, :] < n_chunks, other=0.0).to(tl.float64), 1)
    first = tl.sum((mass >= tl.load(GOAL + row)).to(tl.int32), 0)  # rising along the thresholds
    below = tl.where(first > 0, _limit(low, high, first - 1, WAYS) + 1, low)
    top = tl.where(first < WAYS, _limit(low, high, first, WAYS), high)
    return tl.minimum(below, top).to(tl.int32), top.to(tl.int32)


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _mass_above(
    SCORES, GOAL, BEFORE, PART_BEFORE, RANGE, PART, TIED, n, n_chunks, FIRST: tl.constexpr,
    WAYS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What lies above each threshold of a chunk. Every program narrows the range by what all chunks
    found in the pass before: that takes less time than a launch between the passes.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low, high = n * 0, n * 0 + 0x7F7FFFFF  # the greatest finite number
    if not FIRST:
        low, high = tl.load(BEFORE + row * 2), tl.load(BEFORE + row * 2 + 1)
        low, high = _narrowed(PART_BEFORE, GOAL, row, low, high, n_chunks, WAYS, CHUNKS)
    if chunk == 0:
        tl.store(RANGE + row * 2, low)
        tl.store(RANGE + row * 2 + 1, high)
    way = tl.arange(0, WAYS)
    limit = _limit(low, high, way, WAYS).to(tl.int32)[:, None]
    mass, tied = tl.zeros([WAYS, STEP], tl.float32), tl.zeros([STEP], tl.int32)
    for j in range(0, CHUNK, STEP):
        at = chunk * CHUNK + j + tl.arange(0, STEP)
        x = tl.load(SCORES + row * n + at, mask=at < n, other=-float("inf"))
        key = order_key(x)
        mass += tl.where(key[None, :] > limit, tl.maximum(x, 0.0)[None, :], 0.0)
        tied += (key == high).to(tl.int32)
    tl.store(PART + (row * WAYS + way) * n_chunks + chunk, tl.sum(mass, 1))
    tl.store(TIED + row * n_chunks + chunk, tl.sum(tied, 0))


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _take(
    SCORES, RANGE, PART, TIED, GOAL, OUT, n, n_chunks, WAYS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    mine, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, chunk = mine * CHUNK + tl.arange(0, CHUNK), tl.arange(0, CHUNKS)
    x = tl.load(SCORES + row * n + at, mask=at < n, other=-float("inf"))
    value, key = tl.maximum(x, 0.0), order_key(x)
    goal, high = tl.load(GOAL + row), tl.load(RANGE + row * 2 + 1)
    inside = chunk < n_chunks
    part = tl.load(PART + row * WAYS * n_chunks + chunk, mask=inside, other=0.0)
    tied = tl.load(TIED + row * n_chunks + chunk, mask=inside & (chunk < mine), other=0)
    same = (key == high).to(tl.int32)
    before = tl.sum(tied, 0) + tl.cumsum(same, 0) - same
    mass = tl.sum(part.to(tl.float64), 0) + before.to(tl.float64) * value
    keep = tl.where(key > high, 1, tl.where(mass < goal, same, 0))
    keep = tl.where(x > -float("inf"), keep, 0) * (goal > 0).to(tl.int32)
    tl.store(OUT + row * n + at, keep.to(tl.uint8), mask=at < n)


def long_prefix(scores: Tensor, target: Tensor) -> Tensor:
    """`prefix` by mass for long rows: a few thresholds a pass, no sort.

    Scores are fp32 `[…, n]`, non-negative or −inf; sums are kept in fp64.
    """
    n = scores.shape[-1]
    flat, goal = scores.float().reshape(-1, n).contiguous(), target.reshape(-1).double()
    rows, device = flat.shape[0], flat.device
    # 2³¹ keys are narrowed to one, three or four bits a pass; the last pass looks at what is left.
    ways, passes, chunk = (16, 9, 2048) if flat.numel() < _WIDE else (8, 12, 8192)
    n_chunks = triton.cdiv(n, chunk)
    part = torch.empty((passes, rows, ways, n_chunks), dtype=torch.float32, device=device)
    tied = torch.empty((rows, n_chunks), dtype=torch.int32, device=device)
    bounds = torch.empty((passes, rows, 2), dtype=torch.int32, device=device)
    out = torch.empty(flat.shape, dtype=torch.bool, device=device)
    sizes = {
        "WAYS": ways, "CHUNK": chunk, "CHUNKS": max(2, triton.next_power_of_2(n_chunks)),
        "num_warps": 4 if chunk < 8192 else 8,
    }  # fmt: skip
    for i in range(passes):
        _mass_above[(n_chunks, rows)](
            flat, goal, bounds[i - 1], part[i - 1], bounds[i], part[i], tied, n, n_chunks,
            FIRST=i == 0, STEP=256, **sizes,
        )  # fmt: skip
    _take[(n_chunks, rows)](
        flat, bounds[-1], part[-1], tied, goal, out.view(torch.uint8), n, n_chunks, **sizes
    )
    return out.view(scores.shape)


@triton.jit
def _below(x, keys):
    """Sum of min(u, keys) over 0 ≤ u < x."""
    x = tl.maximum(x, 0)
    m = tl.minimum(x, keys)
    return m * (m - 1) // 2 + (x - m) * keys


@triton.jit(do_not_specialize=["n_tiles", "n_blocks", "n_q", "n_k", "q_start", "bq", "bk"])
def _listed(
    START, COUNT, BLOCKS, OUT, n_tiles, n_blocks, n_q, n_k, q_start, bq, bk,
    CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = row % n_tiles
    start, count = tl.load(START + row), tl.load(COUNT + row)
    n = tl.where(count < 0, n_blocks, count)
    rows = tl.minimum(n_q - tile * bq, bq)
    total = tl.zeros([CHUNK], tl.int64)
    for j in range(0, n, CHUNK):
        lane = j + tl.arange(0, CHUNK)
        block = tl.load(BLOCKS + start + lane, mask=lane < count, other=0)
        block = tl.where(count < 0, lane, block)
        real = (lane < n) & (block >= 0) & (block < n_blocks)
        keys = tl.minimum(n_k - block * bk, bk).to(tl.int64)
        if CAUSAL:
            first = q_start + tile * bq + 1 - block.to(tl.int64) * bk
            pairs = _below(first + rows, keys) - _below(first, keys)
        else:
            pairs = rows * keys
        total += tl.where(real, pairs, 0)
    tl.store(OUT + row, tl.sum(total, 0))


def listed_pairs(index: BlockIndex, call: Inputs, keys: int) -> Tensor:
    """Visible query-key pairs in the listed blocks of each row, int64 `[B|1, H, nq]`, where blocks
    count through `keys` keys. Plain positions.
    """
    start, count = index.start.contiguous(), index.count.contiguous()
    out = torch.empty(count.shape, dtype=torch.int64, device=count.device)
    (bq, bk), nq, nk = index.size, count.shape[-1], ceil_div(keys, index.size[1])
    chunk = min(1024, max(16, triton.next_power_of_2(nk)))
    blocks = index.blocks if index.blocks.numel() else count
    _listed[(count.numel(),)](
        start, count, blocks, out, nq, nk, call.n_q, keys, call.q_start, bq, bk,
        CAUSAL=call.causal, CHUNK=chunk, num_warps=4 if chunk > 256 else 1,
    )  # fmt: skip
    return out

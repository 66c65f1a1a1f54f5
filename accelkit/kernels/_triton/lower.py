"""From `BlockIndex` rows to lists that a kernel can run: clipped, partly visible blocks first, rows
by length.

Everything stays on the device: no host reads, lists by capacity (rows × key blocks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.tile import next_power_of_two, table
from accelkit.kernels.index import BlockIndex, ceil_div
from accelkit.kernels.launch import END, FAR, Launch

_KEEP_BYTES = 16 * 2**20
_CACHE_BYTES = 16 * 2**20
_BINS = tl.constexpr(2047)
"""Lengths that are told apart: with the tiles they fill 31 bits."""
_TILES = tl.constexpr(2**20)
"""Query tiles of a head that are told apart."""
_CHUNK = 128
"""Most entries of a list, or rows, that are looked at together."""
_ROWS = 8
"""Rows of a head that a program puts in order."""
FIELDS = tl.constexpr(6)


@dataclass(frozen=True)
class Work:
    """Row r = (b, slot, t) has `counts[0, r]` masked then `counts[1, r]` clean block ids at
    `lists[r · capacity]`; `counts[2, r]` is its key among the rows of its section.

    `items` (int32 `[rows, 6]`) are the rows in the order in which they should run: row, first
    query, batch, slot, masked blocks, clean blocks.
    """

    lists: Tensor
    counts: Tensor
    items: Tensor
    capacity: int


_SIZES = [
    "n_heads", "n_tiles", "n_blocks", "n_q", "n_k", "q_start", "step", "n_kv", "section", "bq",
    "bk", *(f"s_{t}{d}" for t in "ikq" for d in "bhn"),
]  # fmt: skip
"""Lists are read from where they begin, wherever that is: Triton would compile the same once more
for every length and unit.
"""


@triton.jit
def _row(START, COUNT, TILES, s_ib, s_ih, s_ir, n_heads, n_tiles):
    """What a program lowers: its row, batch, slot and query tile, and where its list lies."""
    pid = tl.program_id(0).to(tl.int64)
    h, b = (pid // n_tiles) % n_heads, pid // (n_tiles * n_heads)
    tile = tl.load(TILES + pid % n_tiles)
    at = b * s_ib + h * s_ih + tile * s_ir
    return pid, b, h, tile, tl.load(START + at), tl.load(COUNT + at)


@triton.jit
def _counted(COUNTS, KV_HEADS, pid, b, h, masked, clean, length, n_tiles, n_kv, section):
    """Store what a row has, and what it is put in order by among those of its section: less runs
    earlier. Sections run from the last to the first, and lengths fall in one and rise in the next,
    so that what runs at one time is alike where sections meet; short rows come at the end of all.
    Rows of one length that begin together read the same keys at the same time, which the cache then
    holds.
    """
    # Exponent and seven leading bits of the length: exact to 256, then in steps of 1/128.
    steps = length.to(tl.float32).to(tl.int32, bitcast=True) >> 16
    steps = tl.minimum(tl.maximum(steps - 16255, 0), _BINS - 1)
    rising = (b * n_kv + tl.load(KV_HEADS + h)) // section % 2
    steps = tl.where(rising == 0, _BINS - 1 - steps, steps)
    rows = tl.num_programs(0)
    tl.store(COUNTS + pid, masked)
    tl.store(COUNTS + rows + pid, clean)
    tl.store(COUNTS + 2 * rows + pid, steps.to(tl.int32) * _TILES + (pid % n_tiles).to(tl.int32))


@triton.jit(do_not_specialize=_SIZES)
def _lower(
    START, COUNT, BLOCKS, TILES, K_FIRST, K_LAST, Q_LOW, Q_HIGH, LISTS, COUNTS, KV_HEADS,
    s_ib, s_ih, s_in, s_kb, s_kh, s_kn, s_qb, s_qh, s_qn,
    n_heads, n_tiles, n_blocks, n_q, n_k, q_start, step, n_kv, section, bq, bk,
    CAUSAL: tl.constexpr, PLAIN: tl.constexpr, IN_ORDER: tl.constexpr, APART: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    pid, b, h, tile, start, count = _row(
        START, COUNT, TILES, s_ib, s_ih, s_in, n_heads, n_tiles
    )  # fmt: skip
    listed = tl.maximum(count, 0)
    n = tl.where(count < 0, n_blocks, count)
    if PLAIN:
        low = q_start + tile * bq
        high = q_start + tl.minimum((tile + 1) * bq, n_q) - 1
        if not CAUSAL:
            low = low * 0 + 2147483646
            high = low
    else:
        rows = b * s_qb + h * s_qh + tile * s_qn
        low, high = tl.load(Q_LOW + rows).to(tl.int64), tl.load(Q_HIGH + rows).to(tl.int64)
    n_masked, n_clean = 0, 0
    # The first round counts, the second writes: the clean part begins where the masked part ends,
    # or the masked part stands apart behind `n_blocks` places for the clean one.
    for round in tl.static_range(2):
        put_masked = n_blocks if APART and round == 1 else 0
        put_clean = n_masked if round == 1 and not APART else 0
        for j in range(0, n, CHUNK):
            lane = j + tl.arange(0, CHUNK)
            block = tl.load(BLOCKS + start + lane, mask=lane < listed, other=0)
            block = tl.where(count < 0, lane, block)
            real = (lane < n) & (block >= 0) & (block < n_blocks)
            if PLAIN:
                first = block.to(tl.int64) * bk
                last = tl.where(first + bk > n_k, 2147483647, first + bk - 1)
            else:
                keys = b * s_kb + h * s_kh + block * s_kn
                first = tl.load(K_FIRST + keys, mask=real, other=0).to(tl.int64)
                last = tl.load(K_LAST + keys, mask=real, other=0).to(tl.int64)
            seen = real & (first <= high)
            if IN_ORDER:
                clean = seen & (first < 0)
            else:
                clean = seen & (last <= low)
            masked = seen & (clean == 0)
            both = masked.to(tl.int32) + (clean.to(tl.int32) << 16)  # counted in one go
            if round == 1:
                base, before = LISTS + pid * step, tl.cumsum(both, 0)
                tl.store(base + put_masked + (before & 65535) - 1, block, mask=masked)
                tl.store(base + put_clean + (before >> 16) - 1, block, mask=clean)
            both = tl.sum(both, 0)
            put_masked += both & 65535
            put_clean += both >> 16
        if round == 0:
            n_masked, n_clean = put_masked, put_clean
    length = n_masked + n_clean
    _counted(
        COUNTS, KV_HEADS, pid, b, h, n_masked, n_clean, length, n_tiles, n_kv, section
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "n_heads", "n_tiles", "n_kv", "section", "bq"])
def _place(
    COUNTS, TILES, KV_HEADS, ITEMS, batch, n_heads, n_tiles, n_kv, section, bq,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Put some rows of a head where they run: behind all sections that come earlier and all rows of
    their own with a lesser key. Counted, without atomics: a program that starts again changes
    nothing.
    """
    head = tl.program_id(1)
    tile, lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    real, row = tile < n_tiles, head * n_tiles + tile
    b, h = head // n_heads, head % n_heads
    masked, clean = COUNTS + row, COUNTS + batch * n_heads * n_tiles + row
    KEYS = COUNTS + 2 * batch * n_heads * n_tiles
    key = tl.load(KEYS + row, mask=real, other=0)
    first = (b * n_kv + tl.load(KV_HEADS + h)) // section * section
    last = tl.minimum((first + section - 1) // n_kv, batch - 1)
    earlier, less = (batch - 1 - last) * n_heads * n_tiles, tl.zeros([ROWS, CHUNK], tl.int32)
    for other_b in range(first // n_kv, last + 1):
        for other_h in range(0, n_heads):
            group = other_b * n_kv + tl.load(KV_HEADS + other_h)
            if group >= first + section:
                earlier += n_tiles
            elif group >= first:
                other = other_b * n_heads + other_h
                most = key  # of equal lengths those of earlier heads come first, then by tile
                if other < head:
                    most = (key // _TILES + 1) * _TILES
                elif other > head:
                    most = key // _TILES * _TILES
                for j in range(0, n_tiles, CHUNK):
                    at = KEYS + other * n_tiles + j + lane
                    theirs = tl.load(at, mask=j + lane < n_tiles, other=2147483647)
                    less += (theirs[None, :] < most[:, None]).to(tl.int32)
    place = earlier + tl.sum(less, 1)
    item = ITEMS + place.to(tl.int64) * FIELDS
    tl.store(item, row, mask=real)
    first = tl.load(TILES + tile, mask=real, other=0) * bq
    tl.store(item + 1, first.to(tl.int32), mask=real)
    tl.store(item + 2, (tile * 0 + b), mask=real)
    tl.store(item + 3, (tile * 0 + h), mask=real)
    tl.store(item + 4, tl.load(masked, mask=real), mask=real)
    tl.store(item + 5, tl.load(clean, mask=real), mask=real)


def lower(launch: Launch, *, in_order: bool = False) -> Work:
    """Lower a launch's index. `in_order` keeps the visiting order and calls every block masked (for
    skipping).

    Work over plain positions and all rows depends only on the index and the geometry and is kept on
    the index, so layers and steps that reuse an index lower it once.
    """
    plain = launch.q_pos is None and launch.k_pos is None
    if not plain or launch.rows is not None:
        return _lower_now(launch, plain, in_order)
    cache, key = (
        launch.index.lowered,
        (launch.batch, launch.n_q, launch.n_k, launch.causal, launch.q_start, in_order),
    )
    work = cache.get(key)
    if work is None:
        work = _lower_now(launch, plain, in_order)
        if work.lists.numel() * 4 <= _KEEP_BYTES:
            cache[key] = work
    return work


def lists_of(launch: Launch, apart: int = 0) -> tuple[Tensor, Tensor]:
    """Lists and counts of each row as in `Work`. With `apart` a row has `key_blocks` places for
    clean blocks and then so many for masked ones.
    """
    rows = launch.batch * launch.heads * launch.tiles.numel()
    counts = torch.empty((3, rows), dtype=torch.int32, device=launch.q.device)
    return _fill_lists(launch, counts, _section(launch), True, False, apart), counts


def _lower_now(launch: Launch, plain: bool, in_order: bool) -> Work:
    return _ordered(launch, lambda c, section: _fill_lists(launch, c, section, plain, in_order))


def _ordered(launch: Launch, fill: Callable[[Tensor, int], Tensor]) -> Work:
    """Work in the order in which it should run; `fill` writes counts of its rows by the KV heads of
    a section and returns the lists.
    """
    device, tiles, section = launch.q.device, launch.tiles, _section(launch)
    n, heads = tiles.numel(), launch.batch * launch.heads
    assert n <= _TILES.value
    counts = torch.empty((3, heads * n), dtype=torch.int32, device=device)
    items = torch.empty((heads * n, FIELDS.value), dtype=torch.int32, device=device)
    lists = fill(counts, section)
    _place[(ceil_div(n, _ROWS), heads)](
        counts, tiles, launch.kv_heads, items, launch.batch, launch.heads, n, launch.k.shape[1],
        section, launch.index.size[0], ROWS=_ROWS, CHUNK=_CHUNK, num_warps=2,
    )  # fmt: skip
    return Work(lists, counts, items, launch.key_blocks)


def _fill_lists(
    launch: Launch, counts: Tensor, section: int, plain: bool, in_order: bool, apart: int = 0
) -> Tensor:
    """Write each row's list and counts."""
    index, tiles, rows = launch.index, launch.tiles, counts.shape[1]
    capacity = launch.key_blocks
    step = capacity + apart
    lists = torch.empty(rows * step, dtype=torch.int32, device=counts.device)
    bounds = (index.start,) * 4 if plain else (*launch.key_bounds(), *launch.row_bounds())
    keys, queries = (table(None if plain else t, index.start)[1:] for t in bounds[::2])
    start, count, steps = _strided(index)
    chunk = min(_CHUNK, max(16, next_power_of_two(capacity)))
    assert END == 2147483646 and FAR == END + 1  # as written in the kernel
    _lower[(rows,)](
        start, count, index.blocks if index.blocks.numel() else tiles, tiles,
        *bounds, lists, counts, launch.kv_heads, *steps, *keys, *queries,
        launch.heads, tiles.numel(), capacity, launch.n_q, launch.n_k, launch.q_start, step,
        launch.k.shape[1], section, *index.size,
        CAUSAL=launch.causal, PLAIN=plain, IN_ORDER=in_order, APART=apart > 0, CHUNK=chunk,
        num_warps=1,
    )  # fmt: skip
    return lists


def _strided(index: BlockIndex) -> tuple[Tensor, Tensor, list[int]]:
    """Starts and counts of the rows, and the strides that they have in common."""
    start, count = index.start, index.count
    if start.stride() != count.stride():
        start, count = start.contiguous(), count.contiguous()
    steps = [0 if n == 1 else s for s, n in zip(start.stride(), start.shape, strict=True)]
    return start, count, steps


def _section(launch: Launch) -> int:
    """KV heads of a section: rows that run at one time should read keys and values
    that stay in the second-level cache.
    """
    kept = launch.n_k * (launch.k.shape[3] + launch.v.shape[3]) * launch.k.element_size()
    return max(1, _CACHE_BYTES // max(kept, 1))


@triton.jit(do_not_specialize=["n_tiles", "n_q", "n_k", "q_start", "n_kv", "section"])
def _lower_keys(
    START, COUNT, BLOCKS, TILES, STARTS, COUNTS, KV_HEADS,
    s_ib, s_ih, s_ir, n_heads, n_tiles, n_q, n_k, q_start, n_kv, section,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid, b, h, tile, start, count = _row(
        START, COUNT, TILES, s_ib, s_ih, s_ir, n_heads, n_tiles
    )  # fmt: skip
    low, end = n_k - 1, n_k
    if CAUSAL:
        low = tl.minimum(low, (q_start + tile * BQ).to(tl.int32))
        end = tl.minimum(end, (q_start + tl.minimum((tile + 1) * BQ, n_q)).to(tl.int32))
    n = tl.where(count < 0, end, count)
    clean = n // BN
    if count < 0:
        clean = tl.minimum(clean, (low + 1) // BN)
    for j in range(0, count, CHUNK):
        lane = j + tl.arange(0, CHUNK)
        key = tl.load(BLOCKS + start + lane, mask=lane < count, other=0)
        hidden = (key < 0) | (key > low)
        clean = tl.minimum(clean, tl.min(tl.where(hidden, lane // BN, clean), 0))
    masked = n - clean * BN
    tl.store(STARTS + pid, tl.where(count < 0, -1, start))
    length = clean + tl.cdiv(masked, BN)
    _counted(COUNTS, KV_HEADS, pid, b, h, masked, clean, length, n_tiles, n_kv, section)


def lower_keys(launch: Launch, bn: int) -> tuple[Work, Tensor]:
    """Work over lists of single keys, and where each row's list begins (int64, −1: every key).

    `lists` are the index's own. `clean` counts the tiles of `bn` keys at the beginning of a list
    that every query of the row sees whole, `masked` the keys behind them.
    """
    index, device = launch.index, launch.q.device
    key = ("keys", launch.batch, launch.n_q, launch.n_k, launch.causal, launch.q_start, bn)
    if launch.rows is None and (known := index.lowered.get(key)) is not None:
        return known
    tiles, lists = launch.tiles, index.blocks
    rows = launch.batch * launch.heads * tiles.numel()
    starts = torch.empty(rows, dtype=torch.int64, device=device)
    start, count, steps = _strided(index)
    if not lists.numel():
        lists = tiles.int()

    def fill(counts: Tensor, section: int) -> Tensor:
        _lower_keys[(rows,)](
            start, count, lists, tiles, starts, counts, launch.kv_heads, *steps, launch.heads,
            tiles.numel(), launch.n_q, launch.n_k, launch.q_start, launch.k.shape[1], section,
            BQ=index.size[0], BN=bn, CAUSAL=launch.causal, CHUNK=1024, num_warps=4,
        )  # fmt: skip
        return lists

    found = _ordered(launch, fill), starts
    if launch.rows is None:
        index.lowered[key] = found
    return found


def longest_first(length: Tensor) -> Tensor:
    """Row ids by descending length, int32. Equal rows keep their order, so neighbours share K and V
    in the cache.
    """
    return length.argsort(descending=True, stable=True).to(torch.int32)

"""The torch path that really skips work on a CPU.

Blocks that all queries of a tile see wholly go through torch's fused CPU attention without a mask:
first those that a run of neighbouring tiles shares, read by the whole run in one piece, then what
is left of each tile. Rows with lists of equal length share a call. Tiles over the keys at their own
positions are causal calls; other blocks that some query sees only in part come last and with a
mask. Pieces are joined by LSE (`cpu_rows`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels.cpu_rows import Lists, Piece, Rows, fused, join, take, wide
from accelkit.kernels.index import ALL, ceil_div
from accelkit.kernels.launch import Launch

_TALL_ROWS = (1024, 256)
"""Heights of the runs of tiles that read what they share in one piece. The fused kernel works on
32, 64 or 256 rows at a time, depending on how many it is given."""

_TALL_KEYS = 512
"""A shared piece with fewer keys than this is not worth its join."""

_EVEN_KEYS = 64
"""Lists of blocks smaller than this are cut to a multiple of it, so that buckets stay few and well
filled.
"""

_SQUARE_KEYS = 16
"""Tiles over their own blocks are causal calls if a block has at least so many keys."""


def refusal(launch: Launch) -> str | None:
    """Why this path cannot serve a launch, or None."""
    if launch.q.device.type != "cpu":
        return f"the bucketed path is for the CPU and the tensors are on {launch.q.device}"
    if launch.skip is not None:
        return "skip visits tiles one after another, which only the reference does on this device"
    if launch.qk != "native":
        return "8-bit products gain nothing on a CPU; the reference rounds as they would"
    return None


def attend_listed(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`; any unit size, every option but `skip`."""
    plain = launch.rows is None and launch.q_pos is None and launch.k_pos is None
    whole = (launch.index.count == ALL).all(-1).all(0)  # [H]
    if not plain or isinstance(launch.bias, Tensor):
        whole = torch.zeros_like(whole)
    dense, listed = whole.nonzero().flatten(), (~whole).nonzero().flatten()
    if dense.numel():
        _dense(launch, dense)
    if listed.numel():
        _listed(launch, listed)


def _dense(launch: Launch, slots: Tensor) -> None:
    """Heads that read every visible block, straight through the fused kernel."""
    q = _wide(launch, take(launch.q, launch.q_heads[slots]))
    if not launch.causal:
        _write_dense(launch, slots, 0, _over_keys(launch, slots, q, launch.n_k))
        return
    # The kernel deals out runs of rows, and late rows have more to do. Where heads do not divide
    # among the threads, bands of rows do: their triangles are alike, and so are the rows of one
    # band over the keys before it.
    threads = torch.get_num_threads()
    bands = threads // math.gcd(q.shape[0] * q.shape[1], threads)
    band = launch.n_q // bands // _TALL_ROWS[1] * _TALL_ROWS[1]
    if band < _TALL_ROWS[0] or launch.q_start + launch.n_q > launch.n_k:
        bands, band = 1, launch.n_q
    _bands(launch, slots, q, 0, bands, band)
    if bands * band < launch.n_q:
        _bands(launch, slots, q, bands * band, 1, launch.n_q - bands * band)


def _bands(launch: Launch, slots: Tensor, q: Tensor, first: int, bands: int, band: int) -> None:
    """Causal dense heads, from row `first` on: `bands` bands of `band` rows."""
    start = min(launch.q_start + first, launch.n_k)

    def cut(t: Tensor, begin: int) -> Tensor:
        return t[:, :, begin : begin + bands * band].unflatten(2, (bands, -1)).flatten(0, 1)

    triangles = None
    if start < launch.n_k:
        own = slice(start, start + bands * band)
        k, v = _keys(launch, launch.kv_heads[slots], own)
        triangles = fused(cut(q, first), cut(k, 0), cut(v, 0), launch.scale, causal=True)
    for n in range(bands):
        pieces: list[Piece] = []
        edge, row = start + n * band, first + n * band
        if triangles is not None:
            out, lse = (t[:, n].unflatten(0, q.shape[:2]) for t in triangles)
            pieces.append((out, lse))
        if edge:
            pieces.append(_over_keys(launch, slots, q[:, :, row : row + band], edge))
        if len(pieces) == 2:  # half precisions are joined in fp32 and rounded once
            exact = torch.promote_types(q.dtype, torch.float32)
            pieces = [(out.to(exact), lse) for out, lse in pieces]
            join(*pieces[0], *pieces[1])
        _write_dense(launch, slots, row, pieces[0])


def _over_keys(launch: Launch, slots: Tensor, q: Tensor, count: int) -> Piece:
    """Rows `[B, S, n, D]` of some heads over the first `count` keys, all of which they see. Few
    rows of heads that share keys are one run: the kernel works on more of them at a time.
    """
    heads, (lines, rows) = launch.kv_heads[slots], q.shape[1:3]
    shared = torch.unique_consecutive(heads)
    group = lines // len(shared)
    fold = rows < _TALL_ROWS[0] and torch.equal(heads, shared.repeat_interleave(group))
    if fold:
        q, heads = q.unflatten(1, (len(shared), group)).flatten(2, 3), shared
    out, lse = fused(q, *_keys(launch, heads, slice(0, count)), launch.scale)
    if fold:
        out, lse = (t.unflatten(2, (group, rows)).flatten(1, 2) for t in (out, lse))
    return out, lse


def _keys(launch: Launch, heads: Tensor, some: slice) -> tuple[Tensor, Tensor]:
    """Some keys and values of KV heads, as wide as each other and as the queries."""
    k, v = (_wide(launch, take(t[:, :, some], heads)) for t in (launch.k, launch.v))
    return k, v


def _wide(launch: Launch, t: Tensor) -> Tensor:
    """`[…, N, D]` with as many columns as the wider of q and v."""
    return wide(t, t.shape[2], max(launch.q.shape[3], launch.v.shape[3]))


def _write_dense(launch: Launch, slots: Tensor, row: int, piece: Piece) -> None:
    """Rows from `row` on of some heads `[B, S, n, D]`."""
    out, lse = piece
    rows = slice(row, row + out.shape[2])
    for slot, head in enumerate(launch.out_heads[slots].tolist()):
        # several times as fast as all at once by their ids
        launch.out[:, head, rows] = out[:, slot, :, : launch.v.shape[3]]
        launch.lse[:, head, rows] = lse[:, slot]


def _listed(launch: Launch, slots: Tensor) -> None:
    """Sparse heads, stage by stage."""
    bk, nk, tiles = launch.index.size[1], launch.key_blocks, launch.tiles.numel()
    heights = _heights(launch)
    rows = Rows(launch, slots, max(heights))
    clean, masked = _seen(launch, slots)  # bool [B · S, tiles, nk]
    own = _own_square(launch)
    complete = None if own is None else (masked | ~own).all(-1)
    if complete is not None and complete.any():
        rows.squares(complete)
        masked = masked & ~complete[..., None]
    # Tiles that fill up a run agree to everything.
    clean = pad(clean, (0, 0, 0, rows.tiles - tiles), value=True)
    for height in heights:
        shared = clean.unflatten(1, (-1, height)).all(2)
        shared[:, ceil_div(tiles, height) :] = False
        if height > 1:
            found = Lists.of(shared.flatten(0, 1), ceil_div(_EVEN_KEYS, bk), _TALL_KEYS // bk)
        else:
            found = Lists.of(shared.flatten(0, 1), ceil_div(_EVEN_KEYS, bk))
        rows.pieces(found, height)
        if len(found.blocks):
            taken = found.mask(nk).view_as(shared)
            clean &= ~taken.repeat_interleave(height, 1)
    masked |= clean[:, :tiles]
    if masked.any():
        rows.hidden(Lists.of(pad(masked, (0, 0, 0, rows.tiles - tiles)).flatten(0, 1)))
    rows.write()


def _heights(launch: Launch) -> tuple[int, ...]:
    """Tiles in the runs that share pieces, falling; the last are single tiles."""
    if launch.rows is not None or isinstance(launch.bias, Tensor):
        return (1,)
    some = (rows // launch.index.size[0] for rows in _TALL_ROWS)
    return (*(n for n in some if 1 < n <= launch.tiles.numel()), 1)


def _seen(launch: Launch, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Listed blocks that all queries of a tile see wholly, and those that need a mask, both bool
    `[B · S, tiles, nk]`.
    """
    index, tiles, nk = launch.index, launch.tiles, launch.key_blocks
    lists = replace(
        index, start=index.start[:, slots][:, :, tiles], count=index.count[:, slots][:, :, tiles]
    )
    listed = lists.to_mask(nk).expand(launch.batch, -1, -1, -1)

    def own(t: Tensor) -> Tensor:
        return t if t.shape[1] == 1 else t[:, slots]

    low, high = (own(t)[:, :, tiles, None] for t in launch.row_bounds())
    first, last = (own(t)[:, :, None] for t in launch.key_bounds())
    seen = listed & (first <= high)
    clean = torch.zeros_like(seen) if isinstance(launch.bias, Tensor) else seen & (last <= low)
    return clean.flatten(0, 1), (seen & ~clean).flatten(0, 1)


def _own_square(launch: Launch) -> Tensor | None:
    """Blocks at the tile's own positions, bool `[tiles, nk]`, where these are the only ones that
    its queries may see in part, and as a triangle.
    """
    (bq, bk), end = launch.index.size, launch.q_start + launch.n_q
    plain = launch.causal and launch.q_pos is None and launch.k_pos is None
    if not plain or isinstance(launch.bias, Tensor) or bk < _SQUARE_KEYS or bq % bk:
        return None
    if launch.q_start % bq or launch.n_k < end:
        return None
    first = launch.tiles[:, None] + launch.q_start // bq
    block = torch.arange(launch.key_blocks)
    return (block * bk // bq == first) & (block * bk < end)

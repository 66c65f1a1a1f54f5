"""Masks → lists, and vertical and slash lines → block masks and column lists."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels import dispatch
from accelkit.kernels.index import BlockIndex, Inputs, ceil_div
from accelkit.kernels.positions import (
    bounds,
    key_places,
    need_causal_order,
    row_limits,
    row_places,
    sees_all,
    visible_blocks,
)
from accelkit.kernels.pyramid import LEVELS


def compact(mask: Tensor, size: tuple[int, int]) -> BlockIndex:
    """`BlockIndex.from_mask` by the fastest way on the mask's device. No host synchronisation."""
    if dispatch.fast_device(mask):
        from accelkit.kernels._triton import select as fast

        return fast.compact(mask, size)
    return BlockIndex.from_mask(mask, size)


@dataclass(frozen=True)
class Runs:
    """Which of some runs of keys, one behind the other, each key block touches: those from `begin`
    up to `end` (int32 `[nk]`), at most `most` of them.
    """

    begin: Tensor
    end: Tensor
    most: int

    def blocks(self, chosen: Tensor) -> Tensor:
        """Blocks that touch a chosen run: bool `[…, nk]` of bool `[…, runs]`."""
        before = pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))
        return before[..., self.end.long()] > before[..., self.begin.long()]


def compact_runs(
    call: Inputs, chosen: Tensor, runs: Runs, kept: Tensor, size: tuple[int, int]
) -> BlockIndex:
    """Lists of the visible blocks that touch a chosen run (bool `[B, H, nq, runs]`) and of those of
    `kept` (bool `[B|1, H|1, nq, nk]`). On a GPU all of it is one launch, if every row sees all.
    """
    if sees_all(call) and dispatch.fast_device(chosen):
        from accelkit.kernels._triton import runs as fast

        return fast.compact(chosen, runs, kept, size)
    return compact((runs.blocks(chosen) & visible_blocks(call, size)) | kept, size)


def compact_levels(levels: Tensor, tokens: int, size: tuple[int, int], unit: int) -> BlockIndex:
    """Lists over a key pyramid from a level for each block: int8 `[B|1, H, nq, nk]`, 0 … 3, −1 is
    left out.

    `size` is the block `(bq, bk)` of the levels. An entry is `unit` keys or means, `unit ·
    2**level` tokens. One that spans several blocks is taken where none of them asks for a finer
    level; elsewhere, and at the ragged end, its blocks move one level down. So no block is read
    more coarsely than asked for, and no block less.
    """
    (bq, bk), wish, masks = size, levels, []
    for level in reversed(range(1, LEVELS)):
        span = unit << level
        group = max(1, span // bk)
        cell = pad(wish, (0, -wish.shape[-1] % group), value=-1).unflatten(-1, (-1, group))
        mask = torch.where(cell < 0, LEVELS, cell).amin(-1) == level
        end = torch.arange(1, mask.shape[-1] + 1, device=levels.device) * max(span, bk)
        mask &= end <= tokens
        cell = torch.where(cell == level, level - 1, cell)
        wish = torch.where(mask[..., None], -1, cell).flatten(-2)[..., : levels.shape[-1]]
        mask = mask.repeat_interleave(max(1, bk // span), -1)
        masks.append(mask[..., : tokens // span])
    masks.append((wish == 0).repeat_interleave(bk // unit, -1)[..., : ceil_div(tokens, unit)])
    return replace(compact(torch.cat(masks, -1), (bq, unit)), pyramid=True)


def lines(call: Inputs, columns: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """Blocks on chosen block columns and block diagonals (FlexPrefill, 2502.20766), bool
    `[B, H, nq, nk]`.

    `columns` bool `[B, H, nk]`; `offsets` bool `[B, H, n]`: offset `o` marks, for each block row of
    keys that the tile's own positions fall in, the block `o` before it.
    """
    need_causal_order(call, "lines")
    nk, bk = call.tiles(size)[1], size[1]
    low, high = bounds(row_places(call), size[0])
    block = torch.arange(nk, device=columns.device)
    mask = columns[..., None, :]
    n = offsets.shape[-1]
    # A tile whose q_start is not aligned lies across two block rows or more.
    for step in range(ceil_div(size[0] - 1, bk) + 1):
        row = torch.minimum(low[0, 0] // bk + step, high[0, 0] // bk)
        offset = row[:, None] - block
        inside = (offset >= 0) & (offset < n)
        mask = mask | (offsets[..., offset.clamp(0, n - 1)] & inside)
    return mask & visible_blocks(call, size)


def vertical_slash(
    call: Inputs, columns: Tensor, offsets: Tensor, size: tuple[int, int] = (64, 64)
) -> tuple[BlockIndex, BlockIndex]:
    """MInference's vertical-slash index (2407.02490) as two disjoint pieces: blocks that cover the
    slash windows, and the single columns `(size[0], 1)` outside those blocks.

    `columns` int `[B, H, n_v]` are key ids, `offsets` int `[B, H, n_s]` distances query − key; −1
    entries are skipped, repetitions count once. Offset `o` touches keys `[R − o, E − o)` for a tile
    of rows at positions `[R, E)`: every block that such a window overlaps is taken, so the cover is
    block aligned and contains the paper's windows. Offset 0 is always in. Ids ascend, no key twice;
    later columns of the tile's own rows are left to the element mask.
    """
    need_causal_order(call, "vertical_slash")
    blocks = _slash_blocks(call, offsets, size)
    n_k, bk = call.n_k, size[1]
    ids = torch.where((columns >= 0) & (columns < n_k), columns, n_k).long().sort(-1).values
    fresh = ids < n_k
    fresh[..., 1:] &= ids[..., 1:] != ids[..., :-1]
    ids = ids.clamp(max=n_k - 1)
    real = (key_places(call) >= 0).expand(*ids.shape[:2], -1)
    fresh &= real.gather(-1, ids)
    _, limit = bounds(row_limits(call), size[0])
    keep = fresh[..., None, :] & (ids[..., None, :] <= limit[..., :, None])
    covered = blocks.gather(
        -1, (ids // bk)[..., None, :].expand(*ids.shape[:2], blocks.shape[2], -1)
    )
    listed = compact(keep & ~covered, (size[0], 1))
    # The compacted ids are places in a row's column list; put the columns in their stead.
    places = listed.blocks.view(*keep.shape).long()
    keys = ids[..., None, :].expand_as(keep).gather(-1, places.clamp(0, max(ids.shape[-1] - 1, 0)))
    rest = BlockIndex(listed.start, listed.count, keys.int().flatten(), (size[0], 1))
    return compact(blocks, size), rest


def _slash_blocks(call: Inputs, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """Blocks that overlap a slash window of their tile, bool `[B, H, nq, nk]`."""
    bq, bk = size
    n_q, device = call.n_q, offsets.device
    nq, nk = call.tiles(size)
    n = call.q_start + n_q
    inside = (offsets >= 0) & (offsets < n)
    present = torch.zeros((*offsets.shape[:2], n + 1), dtype=torch.int32, device=device)
    present.scatter_(-1, torch.where(inside, offsets, n).long(), 1)
    present[..., 0], present[..., n] = 1, 0
    # before[o]: chosen offsets below o. Block c of tile t is on the line of o for
    # R − (c + 1)·bk < o < E − c·bk.
    before = torch.nn.functional.pad(present.cumsum(-1, dtype=torch.int32), (1, 0))
    tile = torch.arange(nq, device=device)
    row, end = call.q_start + tile * bq, call.q_start + (tile * bq + bq).clamp(max=n_q)
    key = torch.arange(nk, device=device) * bk
    least = (row[:, None] - key - bk + 1).clamp(0, n)
    most = (end[:, None] - key).clamp(0, n)
    mask = before[..., most] > before[..., least]
    return mask & visible_blocks(call, size)

"""Patterns: indices that follow from geometry alone. The caller keeps them per geometry.

The lists are built for one head and shared by all (stride-0 starts and counts), per sequence only
where padding differs. Units are `(bq, bk)` in tokens; a block is listed if any row of the tile may
see any of its keys, so patterns round outwards to blocks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accelkit.errors import InvalidInputError
from accelkit.kernels.index import BlockIndex, Inputs, ceil_div
from accelkit.kernels.positions import bounds, key_places, row_places
from accelkit.kernels.select import compact, force
from accelkit.patches.call import AttentionCall
from accelkit.patches.parts import grids, keep
from accelkit.patches.parts.grids import WHOLE, Axes, Grid, Visual

PARTLY = 0.25
"""Share of the pairs of a block from which it is worth computing."""


def share(index: BlockIndex, heads: int) -> BlockIndex:
    """One head's rows for all heads, as views."""
    return replace(
        index, start=index.start.expand(-1, heads, -1), count=index.count.expand(-1, heads, -1)
    )


def _index(mask: Tensor, call: Inputs, unit: tuple[int, int]) -> BlockIndex:
    """A mask as lists for all heads, with no visible row left empty."""
    mask = force(mask, call, unit, sink=0, local=0)
    index = compact(mask, unit)
    return share(index, len(call.heads)) if index.heads == 1 else index


def listed(mask: Tensor, call: AttentionCall, unit: tuple[int, int]) -> BlockIndex:
    """A mask bool `[nq, nk]` (or `[B|1, H|1, nq, nk]`) as lists, with text rows and columns dense
    and no visible row left empty.
    """
    mask = mask.to(call.q.device)
    mask = mask if mask.ndim == 4 else mask[None, None]
    return _index(keep.text(mask, call, unit), call, unit)


def boxes(
    call: AttentionCall,
    where: Visual,
    axes: Axes,
    tile: Grid,
    block: int,
    *,
    dilation: Grid = WHOLE,
    slowest: Grid | None = None,
) -> BlockIndex:
    """Lists of boxes of tokens, as `axes` say for each axis (bool `[L, L]`), by whole tiles; text
    reads and is read by all.

    With `slowest`, for `orders.tiled` with it, a tile reads every block that its boxes touch.
    Without, for `orders.chunked`, blocks drift against tiles, and a block runs if over a quarter of
    its pairs are in the boxes.
    """
    share = grids.tile_shares(axes, tile, dilation)
    if slowest is not None:
        lead, count = ceil_div(where.start, block), share.shape[0]
        held = grids.cells_in_blocks(where, tile, dilation, block, slowest)
        mask = torch.ones(call.tiles((block, block)), dtype=torch.bool)
        text = torch.ones(call.n_k, dtype=torch.bool)
        text[where.start : where.stop] = False
        at = torch.arange(call.n_k) // block
        mask[lead : lead + count] = (share > 0).float() @ held.T.float() > 0
        mask[:, at[text]] = True
        return _index(mask[None, None].to(call.q.device), call, (block, block))
    held = grids.tokens_of_cells(where, tile, dilation, block)  # [blocks, tiles]
    tokens = held.sum(-1)
    mask = held @ share @ held.T > PARTLY * tokens[:, None] * tokens
    return listed(mask, call, (block, block))


def window(
    call: Inputs,
    sink_tokens: int,
    window_tokens: int,
    unit: tuple[int, int] = (128, 128),
    *,
    last_rows: int = 0,
) -> BlockIndex:
    """Sinks and a sliding window (StreamingLLM, 2309.17453): the query at position p reads the
    first `sink_tokens` real keys and positions `(p − window_tokens, p]`, both sides where the call
    is not causal. The last `last_rows` query rows read everything (Tri-shape, MInference). Raises
    `InvalidInputError` for a window without a token.
    """
    if window_tokens < 1 or sink_tokens < 0:
        raise InvalidInputError(
            f"window: sink_tokens {sink_tokens} and window_tokens {window_tokens}; expected at "
            "least 0 and 1, since every query reads itself"
        )
    first, final = bounds(key_places(call), unit[1])
    low, high = bounds(row_places(call), unit[0])
    first, final = first[..., None, :].long(), final[..., None, :]
    low, high = low[..., :, None], high[..., :, None].long()
    ahead = 0 if call.causal else window_tokens - 1
    mask = (final > low - window_tokens) & (first <= high + ahead)
    if sink_tokens:
        mask = mask | (first < first.amin(-1, keepdim=True) + sink_tokens)
    if last_rows:
        tile = torch.arange(mask.shape[-2], device=mask.device)
        mask = mask | ((tile + 1) * unit[0] > call.n_q - last_rows)[:, None]
    return _index(keep.text(mask, call, unit), call, unit)


def power_of_two(
    call: Inputs, unit: tuple[int, int] = (256, 256), local_blocks: int = 5, sink_blocks: int = 1
) -> BlockIndex:
    """PowerAttention (2503.03588): block distances below `local_blocks` and all powers of two, and
    the first `sink_blocks`. A token's information travels 2ⁿ blocks in n layers.

    Distances count in key blocks, from every key block that the tile's own positions fall in. Both
    sides where the call is not causal.
    """
    (_, nk), bk = call.tiles(unit), unit[1]
    low, high = bounds(row_places(call), unit[0])
    low, high = low[..., :, None] // bk, high[..., :, None] // bk
    block = torch.arange(nk, device=call.q.device)
    reach = int(max(nk, (call.q_start + call.n_q) // bk + 1)) + 1
    allowed = torch.arange(reach + 1, device=call.q.device)
    allowed = (allowed < local_blocks) | ((allowed & (allowed - 1)) == 0) & (allowed > 0)
    before = torch.nn.functional.pad(allowed.cumsum(0), (1, 0))

    def some(least: Tensor, most: Tensor) -> Tensor:
        """Whether a distance in least … most is allowed."""
        least, most = least.clamp(0, reach), most.clamp(-1, reach)
        return before[(most + 1).clamp(min=0)] > before[torch.minimum(least, most + 1).clamp(min=0)]

    mask = some(low - block, high - block)
    if not call.causal:
        mask = mask | some(block - high, block - low)
    mask = force(mask, call, unit, sink=sink_blocks, local=0)
    return _index(mask, call, unit)


def nothing(call: Inputs, unit: tuple[int, int] = (128, 128)) -> BlockIndex:
    """No block at all: the heads give zeros."""
    mask = torch.zeros(1, 1, *call.tiles(unit), dtype=torch.bool, device=call.q.device)
    return share(compact(mask, unit), len(call.heads))


def dense(call: Inputs, unit: tuple[int, int] = (128, 128)) -> BlockIndex:
    """Every visible block, without a list (`count == ALL`)."""
    return BlockIndex.dense(len(call.heads), call.tiles(unit)[0], unit, call.q.device)

"""In which order a tile visits its key blocks, and which visits a softmax skip would drop.

Skipping compares a block with what the row has seen before, so the order decides how much is
skipped: where attention mass usually lies should come first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels.index import BlockIndex, Inputs
from accelkit.kernels.positions import (
    groups,
    hide,
    key_head,
    key_places,
    logits,
    per_slot,
    row_limits,
    take_heads,
    visible_blocks,
    voting_rows,
)


def sink_then_newest(call: Inputs, size: tuple[int, int]) -> BlockIndex:
    """Every visible block, the first one and then from the diagonal back. Heads share the lists."""
    visible = visible_blocks(call, size)  # [B|1, H|1, nq, nk]
    nk = visible.shape[-1]
    block = torch.arange(nk, dtype=torch.int32, device=visible.device)
    rank = visible.cumsum(-1, dtype=torch.int32)
    count = rank[..., -1].contiguous()
    place = torch.where(rank > 1, count[..., None] - rank + 1, 0)
    place = torch.where(visible, place, count[..., None] + block - rank)  # hidden ones behind
    blocks = torch.empty_like(place).scatter_(-1, place.long(), block.expand_as(place))
    start = torch.arange(count.numel(), device=count.device).view_as(count) * nk
    wide = (-1, len(call.heads), -1)
    return BlockIndex(start.expand(wide), count.expand(wide), blocks.flatten(), size)


def peak_gaps(call: Inputs, index: BlockIndex, rows: Sequence[int]) -> Tensor:
    """By how many nats a block's logits rise over everything visited before it, greatest over the
    rows of the tile: fp32 `[B, H, len(rows), longest row]` in visiting order.

    A skip at λ drops exactly the visits with a gap under `ln λ` (they never move the running
    maximum, for λ ≤ 1). First visits are +inf, places behind a row's end NaN. Padding rows do not
    vote. `rows` are query tiles.
    """
    bq, bk = index.size
    places, limit, votes = key_places(call), row_limits(call), voting_rows(call)
    if votes is not None:
        limit = torch.where(votes, limit, -1)
    batch, heads = call.q.shape[0], len(call.heads)
    chosen = torch.as_tensor(list(rows), device=call.q.device)
    start = index.start[:, :, chosen].expand(batch, heads, -1)
    count = index.count[:, :, chosen].expand(batch, heads, -1)
    step = torch.arange(call.tiles(index.size)[1], device=call.q.device)
    at = (start[..., None] + step).clamp(max=max(index.blocks.numel() - 1, 0))
    listed = step < count[..., None]
    blocks = torch.where(listed, index.blocks[at].long(), 0)
    gaps = call.q.new_zeros(blocks.shape, dtype=torch.float32)
    for kv, slots in groups(call):
        k, of = key_head(call, kv), [call.heads[s] for s in slots]
        for i, tile in enumerate(rows):
            r = slice(tile * bq, min((tile + 1) * bq, call.n_q))
            s = logits(take_heads(call.q[:, :, r], of).to(k.dtype), k, call.scale)
            hide(s, per_slot(limit, slots)[..., r], per_slot(places, slots))
            s = pad(s, (0, -call.n_k % bk), value=-float("inf")).unflatten(-1, (-1, bk)).amax(-1)
            order = blocks[:, slots, i][:, :, None].expand_as(s)
            peak = s.gather(-1, order)
            before = pad(peak.cummax(-1).values[..., :-1], (1, 0), value=-float("inf"))
            # A row that sees nothing of a block has no vote: −inf − −inf would be NaN.
            rise = torch.where(peak == -float("inf"), peak, peak - before)
            gaps[:, slots, i] = rise.amax(2)
    return gaps.masked_fill_(~listed, float("nan"))

"""Estimators that look at single keys: the probe of the last rows, stripes, top keys of a tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import InvalidInputError
from accelkit.kernels import dispatch
from accelkit.kernels.index import BlockIndex, Inputs, ceil_div, device_ids
from accelkit.kernels.positions import (
    END,
    FAR,
    bounds,
    groups,
    hide,
    in_order,
    key_head,
    key_places,
    logits,
    need_causal_order,
    per_slot,
    row_limits,
    row_places,
    row_shares,
    softmax_,
    take_heads,
    voting_rows,
)
from accelkit.kernels.scores_pooled import pool_keys, pool_queries


@dataclass(frozen=True)
class Probe:
    """Where the newest query rows look, averaged over the rows: columns and diagonals, fp32
    `[B, H, Nk]`. Both sum to one (causal; other calls have keys on negative offsets, which
    `diagonals` leaves out). Offset `o` = query position − key position.
    """

    columns: Tensor
    diagonals: Tensor

    def blocks(self, bk: int) -> Tensor:
        """Mass of each key block, fp32 `[B, H, ceil(Nk / bk)]`."""
        return _sum_pool(self.columns, bk)

    def offset_blocks(self, block: int) -> Tensor:
        """Mass of each run of `block` offsets, newest first, fp32 `[B, H, ceil(Nk / block)]`."""
        return _sum_pool(self.diagonals, block)


def _sum_pool(x: Tensor, block: int) -> Tensor:
    return pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def probe_rows(call: Inputs, rows: int) -> tuple[Tensor, Tensor]:
    """The last `rows` query rows of the call and their positions.

    Returns q `[B, H, R, D]` and int32 `[B|1, H|1, R]`, R = min(rows, Nq). With right padding each
    sequence has its own last rows; where it has fewer, −1 marks rows that do not count.
    """
    n, votes, place = min(rows, call.n_q), voting_rows(call), row_places(call)
    newest = slice(call.n_q - n, call.n_q)
    if call.q_pos is not None or votes is None:
        return take_heads(call.q[:, :, newest], call.heads), place[..., newest]
    # Ids of the real rows in order behind those of the padding rows; the last n of them.
    ids = torch.arange(call.n_q, device=call.q.device)
    ids = torch.where(votes[:, 0], ids + call.n_q, ids).sort(-1).values[:, newest]
    real, ids = ids >= call.n_q, ids % call.n_q
    q = take_heads(call.q, call.heads)
    at = ids[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    place = place.expand(ids.shape[0], -1, -1).gather(2, ids[:, None])
    return q.gather(2, at), torch.where(real[:, None], place, -1)


def probe(call: Inputs, rows: int = 64) -> Probe:
    """Exact softmax of the last `rows` query rows, mean over the rows (FlexPrefill, 2502.20766;
    MInference, 2407.02490; PBS-Attn, 2510.21270).

    The corner is causal row by row. Keys keep their place in `columns`; `diagonals` use positions
    where rows or keys were permuted. A row that sees nothing does not count.
    """
    q, at = probe_rows(call, rows)
    limit = at if call.causal else torch.where(at < 0, -1, END)
    plain = in_order(call)
    if plain and call.causal and dispatch.fast_device(call.q) and q.shape[2] <= 128:
        from accelkit.kernels._triton import scores as fast

        return Probe(*fast.probe(call, q, limit))
    places = key_places(call)
    shape = (call.q.shape[0], len(call.heads), call.n_k)
    columns, diagonals = (call.q.new_zeros(shape, dtype=torch.float32) for _ in range(2))
    # Where rows and keys lie in order, all rows see what the first one sees.
    free = 0
    if plain and call.causal and call.key_mask is None:
        free = min(call.n_k, call.q_start + call.n_q - q.shape[2] + 1)
    for kv, slots in groups(call):
        k, row_limit = key_head(call, kv), per_slot(limit, slots)
        s = hide(
            logits(take_heads(q, slots).to(k.dtype), k, call.scale),
            row_limit,
            per_slot(places, slots),
            free,
        )
        p = softmax_(s)
        p /= (row_limit >= 0).sum(-1).clamp(min=1)[..., None, None]
        columns[:, slots] = p.sum(2)
        if plain:
            diagonals[:, slots] = _diagonals(p, per_slot(at, slots))
        else:
            diagonals[:, slots] = _scattered(p, per_slot(at, slots), per_slot(places, slots))
    return Probe(columns, diagonals)


def _diagonals(p: Tensor, at: Tensor) -> Tensor:
    """Sums of `[B, g, R, N]` along `o = at[r] − j`, positions `at` `[B|1, 1, R]` rising by one."""
    b, g, r, n = p.shape
    # Row i of the skewed view begins i places further: equal offsets stand in one column.
    wide = pad(p, (r, r))
    w = n + 2 * r
    skew = wide.as_strided((b, g, r, n + r), (g * r * w, r * w, w + 1, 1)).sum(2)
    # Column c of row i is key c + i − r, so its offset is at[0] + r − c.
    offset = torch.arange(n, device=p.device)
    c = at[..., -1:].long() + 1 - offset  # at[0] + r = at[-1] + 1
    inside = (c >= 0) & (c < n + r)
    c = c.clamp(0, n + r - 1).expand(b, g, n)
    return torch.where(inside, skew.gather(-1, c), 0.0)


def _scattered(p: Tensor, at: Tensor, places: Tensor) -> Tensor:
    """The same for permuted rows and keys, by position."""
    n = p.shape[-1]
    offset = at[..., :, None] - places[..., None, :]
    inside = (offset >= 0) & (offset < n) & (places >= 0)[..., None, :]
    offset = torch.where(inside, offset, n).long().expand_as(p).flatten(2)
    out = p.new_zeros((*p.shape[:2], n + 1))
    return out.scatter_add_(-1, offset, p.flatten(2))[..., :n]


def pooled_probe(call: Inputs, rows: int, block: int) -> Tensor:
    """Logits of the mean of the last `rows` query rows and mean keys, fp32 `[B, H, nk]`, −inf for
    blocks that the last row does not see. FlexPrefill compares its softmax with `Probe.blocks`.
    """
    q, place = probe_rows(call, rows)
    limit = place if call.causal else torch.where(place < 0, -1, END)
    real = (place >= 0)[..., None]
    mean = (q.float() * real).sum(2) / real.sum(2).clamp(min=1)
    s = torch.einsum("bhd,bhnd->bhn", mean * call.scale, pool_keys(call, block))
    first, _ = bounds(key_places(call), block)
    return s.masked_fill_(first > limit.amax(-1, keepdim=True), -float("inf"))


def _anchor_keys(call: Inputs, first: int, start: int, stop: int) -> slice | Tensor:
    """Keys `[0, first)` and `[start, stop)` without repetition."""
    start, stop = min(start, call.n_k), min(stop, call.n_k)
    if start <= first:
        return slice(0, max(stop, min(first, call.n_k)))
    device = call.k.device
    return torch.cat([torch.arange(first, device=device), torch.arange(start, stop, device=device)])


def anchor_max(call: Inputs, block: int = 128, superblock: int = 2048) -> Tensor:
    """Greatest logit of each row over the first `block` keys and its own superblock, mean over the
    rows of each row block: fp32 `[B, H, ceil(Nq / block)]`, natural units.

    The anchor of AnchorAttention (2505.23520). Superblocks are runs of `superblock` positions, so
    chunked prefill sees the same ranges as a whole one.
    """
    need_causal_order(call, "anchor_max")
    if dispatch.fast_device(call.q):
        from accelkit.kernels._triton import stripes as fast

        if fast.anchor_fits(call, block, superblock):
            return fast.anchor_max(call, block, superblock)
    places, limit, votes = key_places(call), row_limits(call), voting_rows(call)
    row_max = call.q.new_zeros((call.q.shape[0], len(call.heads), call.n_q), dtype=torch.float32)
    for kv, slots in groups(call):
        k, at = key_head(call, kv), [call.heads[s] for s in slots]
        for r, begin in _superblocks(call, superblock):
            keys = _anchor_keys(call, block, begin, call.q_start + r.stop)
            s = logits(take_heads(call.q[:, :, r], at).to(k.dtype), k[:, keys], call.scale)
            hide(s, per_slot(limit, slots)[..., r], per_slot(places, slots)[..., keys])
            row_max[:, slots, r] = s.amax(-1)
            del s  # its room is for the next superblock
    counts = row_max > -float("inf")
    if votes is not None:
        counts &= votes
    total = _sum_pool(torch.where(counts, row_max, 0.0), block)
    number = _sum_pool(counts, block)
    mean = total / number.clamp(min=1)
    return mean.masked_fill_(number == 0, float("inf"))


def _superblocks(call: Inputs, superblock: int) -> list[tuple[slice, int]]:
    """Query rows of each superblock and the position at which it begins."""
    first = call.q_start // superblock
    last = (call.q_start + call.n_q - 1) // superblock
    out = []
    for i in range(first, last + 1):
        begin = i * superblock
        rows = slice(max(begin - call.q_start, 0), min(begin + superblock - call.q_start, call.n_q))
        out.append((rows, begin))
    return out


def stripes(
    call: Inputs,
    anchor: Tensor,
    theta: float | Tensor = 12.0,
    block: int = 128,
    superblock: int = 2048,
) -> Tensor:
    """Keys that some row block of a superblock scores within `theta` of its anchor, bool
    `[B, H, ns, Nk]` (AnchorAttention, 2505.23520).

    A key between the first `block` keys and the superblock is kept if
    `mean(q) · k · scale + theta ≥ anchor` for any row block. `anchor` is fp32 `[B, H, nq]` from
    `anchor_max`, or the mean LSE of the anchor piece; `theta` (nats) may be fp32 `[H]`. The ranges
    are disjoint and complete: the anchor piece owns `[0, block)` and the superblock, stripes only
    what lies between. Row `s` of the result serves query rows `[s · superblock, …)`:
    `BlockIndex.from_mask(mask, (superblock, 1))`. Raises `InvalidInputError` where `q_start` is no
    multiple of `superblock`, or that none of `block`.
    """
    need_causal_order(call, "stripes")
    if superblock % block or call.q_start % superblock:
        raise InvalidInputError(
            f"stripes: q_start {call.q_start} and block {block} do not fit superblocks of "
            f"{superblock}"
        )
    q, places = pool_queries(call, block), key_places(call)
    if isinstance(theta, Tensor):
        theta = theta.to(q.device).view(1, -1, 1)
    if dispatch.fast_device(call.q) and superblock // block <= 128:
        from accelkit.kernels._triton import stripes as fast

        return fast.stripes(call, q, anchor - theta, block, superblock)
    least = (anchor - theta)[..., None]
    per = superblock // block
    spans = _superblocks(call, superblock)
    mask = call.q.new_zeros((q.shape[0], q.shape[1], len(spans), call.n_k), dtype=torch.bool)
    for kv, slots in groups(call):
        k = key_head(call, kv)
        for i, (_, begin) in enumerate(spans):
            if begin <= block:
                continue
            rows, keys = slice(i * per, (i + 1) * per), slice(block, begin)
            s = logits(take_heads(q, slots)[:, :, rows].to(k.dtype), k[:, keys], call.scale)
            near = (s >= take_heads(least, slots)[:, :, rows]).any(2)
            mask[:, slots, i, keys] = near & (per_slot(places, slots)[..., keys] >= 0)
    return mask


def _tile_mass(call: Inputs, rows: slice, lse: Tensor | None) -> Tensor:
    """Post-softmax attention summed over the query heads of each KV head and over some rows, fp32
    `[B, G, Nk]`, G = KV heads among the call's heads in `groups` order; 0 for keys that no row
    sees. `lse` as in `block_mass`.
    """
    seen, votes, found = (row_limits(call), key_places(call)), voting_rows(call), []
    for kv, slots in groups(call):
        p = row_shares(call, key_head(call, kv), slots, rows, seen, lse)
        if votes is not None:
            p = p * per_slot(votes, slots)[..., rows, None]
        found.append(pad(p.sum((1, 2)), (0, call.n_k - p.shape[-1])))
    return torch.stack(found, 1)


def tile_top_k(
    call: Inputs, tile: int, k: int | float, *, least: int = 128, lse: Tensor | None = None
) -> BlockIndex:
    """The keys before each query tile that get most attention from it, one list per KV head and
    tile: a `BlockIndex` of unit `(tile, 1)` (Kascade; `microsoft/kascade`).

    `k` is a count, or a fraction of the keys before the tile with at least `least` keys (Kascade's
    rolling prefill). Behind them come the tile's own keys, which the element mask makes causal. Ids
    ascend, no key comes twice. Query heads of a KV group share their list.
    """
    need_causal_order(call, "tile_top_k")
    places, found = key_places(call), groups(call)
    batch, device = call.q.shape[0], call.q.device
    nt = ceil_div(call.n_q, tile)
    before = [min(call.q_start + t * tile, call.n_k) for t in range(nt)]
    take = [min(b, k if isinstance(k, int) else max(least, -int(-k * b // 1))) for b in before]
    group = {slot: g for g, (_, slots) in enumerate(found) for slot in slots}
    at = device_ids(tuple(group[slot] for slot in range(len(call.heads))), device, torch.int64)
    if dispatch.fast_device(call.q):
        from accelkit.kernels._triton import tile_top as fast

        if fast.fits(call, tile):
            index = fast.tile_top_k(call, found, tile, take, lse)
            return replace(index, start=index.start[:, at], count=index.count[:, at])
    lists = torch.zeros((batch, len(found), nt, max(take) + tile), dtype=torch.int32, device=device)
    counts = torch.zeros((batch, len(found), nt), dtype=torch.int32, device=device)
    for t in range(nt):
        n = take[t]
        ids = torch.zeros((batch, len(found), 0), dtype=torch.int64, device=device)
        if n:
            rows = slice(t * tile, min((t + 1) * tile, call.n_q))
            mass = _tile_mass(call, rows, lse)[..., : before[t]]
            mass = mass.masked_fill(places[..., : before[t]] < 0, -1.0)
            best = mass.topk(n, -1)
            # Padding sorts behind the real keys and is left out of the count.
            ids = torch.where(best.values >= 0, best.indices, FAR).sort(-1).values
        mine = torch.arange(before[t], min(before[t] + tile, call.n_k), device=device)
        mine = torch.where(places[..., mine] >= 0, mine, FAR)
        ids = torch.cat([ids, mine.expand(batch, len(found), -1)], -1)
        if call.key_mask is not None:
            ids = ids.sort(-1).values
        real = ids < END
        lists[:, :, t, : ids.shape[-1]] = torch.where(real, ids, 0).int()
        counts[:, :, t] = real.sum(-1, dtype=torch.int32)
    width = lists.shape[-1]
    starts = torch.arange(counts.numel(), device=device).view_as(counts) * width
    return BlockIndex(starts[:, at], counts[:, at], lists.flatten(), (tile, 1))


def masked_rows(call: Inputs, rows: Tensor, masks: Tensor) -> Tensor:
    """Attention of a few query rows over all keys and under each of some masks, fp32
    `[B, H, 1 + M, R, Dv]`; the exact one comes first.

    `rows` int64 `[R]` are places, `masks` bool `[M, R, Nk]`. Every row sees a key of every mask.
    """
    if call.key_mask is None and dispatch.fast_device(call.q):
        from accelkit.kernels._triton import rows as fast

        if len(rows) <= fast.MOST_ROWS and len(masks) in range(1, fast.MOST_MASKS + 1):
            return fast.masked_rows(call, rows, masks)
    mha = call.q.shape[1] == call.k.shape[1]
    k, v = (take_heads(x, call.heads) if mha else x[:, call.kv_of_head] for x in (call.k, call.v))
    wide = torch.float32 if call.q.device.type == "cpu" else call.q.dtype
    q = take_heads(call.q, call.heads).index_select(2, rows).to(wide)
    s = torch.matmul(q * call.scale, k.to(wide).transpose(-1, -2))
    if call.key_mask is not None:
        s = s.masked_fill(~call.key_mask[:, None, None], -float("inf"))
    p = s.softmax(-1)
    # All of them side by side, so that the values are read once.
    every = torch.cat([torch.ones_like(masks[:1]), masks]).to(wide)  # [1 + M, R, Nk]
    weight = (p[:, :, None] * every).flatten(2, 3)
    total = weight.sum(-1, keepdim=True, dtype=torch.float32)
    out = torch.matmul(weight, v.to(wide)).float() / total.clamp(min=1e-30)
    return out.unflatten(2, (-1, len(rows)))

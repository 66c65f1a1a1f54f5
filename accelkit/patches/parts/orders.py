"""Orders: permutations of tokens taken before blocking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import InvalidInputError
from accelkit.kernels.index import Inputs, device_ids
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import Order
from accelkit.patches.parts import grids
from accelkit.patches.parts.grids import WHOLE, Grid, Visual


def segments(call: Inputs, importance: Tensor, segment: int) -> Tensor:
    """Keys sorted by descending importance inside segments of `segment` tokens (PBS-Attn,
    2510.21270): int32 `[B, H, Nk]`, the original key at each place.

    `importance` is fp32 `[B, H, Nk]`. Segments keep their order, so whatever lies in an earlier
    segment stays in the past. The incomplete last segment comes as it is; padding goes to the
    end of its segment. Equal keys keep their order.
    """
    n = call.n_k
    whole = n // segment * segment
    if call.key_mask is not None:
        importance = importance.masked_fill(~call.key_mask[:, None], -float("inf"))
    ids = torch.arange(n, device=importance.device).expand(importance.shape)
    if not whole:
        return ids.int()
    cells = importance[..., :whole].unflatten(-1, (-1, segment))
    order = cells.argsort(dim=-1, descending=True, stable=True)
    base = torch.arange(0, whole, segment, device=importance.device)[:, None]
    return torch.cat([(order + base).flatten(-2), ids[..., whole:]], -1).int()


AXES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
"""The six orders of frames, rows and columns, slowest first: FHW, FWH, HWF, HFW, WHF, WFH."""
TOKEN_MAJOR = 2
"""HWF: all frames of a place lie together."""


def axes(where: Visual, device: torch.device) -> Tensor:
    """The six orders of the axes, int32 `[6, N]`; other tokens keep their places (PAROAttention,
    2506.16054).
    """
    return _on(device, _axes, where)


def transposed(call: AttentionCall, where: Visual) -> Order:
    """Frame-major → token-major: all frames of a place lie together."""
    return shared(call, _on(call.q.device, _transposed, where))


def chunked(call: AttentionCall, where: Visual, chunk: Grid, dilation: Grid = WHOLE) -> Order:
    """Chunks of neighbouring tokens one after the other, ragged at the borders (VMoBA,
    2506.23858). Other tokens keep their places.
    """
    return shared(call, _on(call.q.device, _chunked, where, chunk, dilation))


def hilbert(call: AttentionCall, where: Visual) -> Order:
    """Along a space-filling curve: neighbours in the list are neighbours on the grid, for boxes of
    any size. Other tokens keep their places.
    """
    return shared(call, along_curve(call, where))


def along_curve(call: AttentionCall, where: Visual) -> Tensor:
    """The table of `hilbert`, int32 `[1, N]`."""
    return _on(call.q.device, _hilbert, where)


def tiled(
    call: AttentionCall, where: Visual, tile: Grid, dilation: Grid, block: int, slowest: Grid
) -> Order:
    """Each tile of queries in a block of its own, with holes (−1) where a tile has fewer tokens;
    text before and after is filled up to whole blocks. Tiles of keys come one after the other from
    the `slowest` axis on, without holes.
    """
    device = call.q.device
    keys = shared(call, _on(device, _chunked, where, tile, dilation, slowest))
    queries = _on(device, _tiled, where, tile, dilation, block)
    return replace(keys, q_table=queries, whole=False, whole_keys=True)


def shared(call: AttentionCall, table: Tensor) -> Order:
    """One permutation `[1, N]` of all tokens, for queries and keys of all heads."""
    return Order(table, table, device_ids((0,) * len(call.heads), table.device), whole=True)


@lru_cache(maxsize=128)
def _on(device: torch.device, make: Callable[..., Tensor], *args: Any) -> Tensor:
    """Tables stay on the device: building or copying one in every call would cost more than it."""
    with torch.inference_mode(False):
        return make(*args).to(device=device, dtype=torch.int32)


def _around(where: Visual, visual: Tensor) -> Tensor:
    """Visual tokens in an order `[…, n]` (ids from 0), all others at their places."""
    lead = torch.arange(where.start).expand(*visual.shape[:-1], -1)
    tail = torch.arange(where.stop, where.tokens).expand(*visual.shape[:-1], -1)
    return torch.cat([lead, visual + where.start, tail], -1)


def _axes(where: Visual) -> Tensor:
    ids = torch.arange(where.count).view(where.grid)
    return _around(where, torch.stack([ids.permute(p).flatten() for p in AXES]))


def _transposed(where: Visual) -> Tensor:
    return _axes(where)[TOKEN_MAJOR, None]


def _chunked(
    where: Visual, chunk: Grid, dilation: Grid = WHOLE, slowest: Grid = grids.RASTER
) -> Tensor:
    number, slot, _ = grids.cells(where.grid, chunk, dilation, slowest)
    return _around(where, (number * prod(chunk) + slot).argsort()[None])


def _tiled(where: Visual, tile: Grid, dilation: Grid, block: int) -> Tensor:
    if prod(tile) > block:
        raise InvalidInputError(f"tile {tile} has {prod(tile)} tokens, a block only {block}")
    number, slot, count = grids.cells(where.grid, tile, dilation)
    tiles = torch.full((count * block,), -1)
    tiles[number * block + slot] = torch.arange(where.count) + where.start
    ends = torch.arange(where.start), torch.arange(where.stop, where.tokens)
    lead, tail = (pad(t, (0, -t.numel() % block), value=-1) for t in ends)
    return torch.cat([lead, tiles, tail])[None]


def _hilbert(where: Visual) -> Tensor:
    places: list[tuple[int, int, int]] = []
    a, b, c = ((axis, where.grid[axis]) for axis in sorted(range(3), key=lambda x: -where.grid[x]))
    _curve((0, 0, 0), a, b, c, places)
    f, y, x = torch.tensor(places).T
    return _around(where, ((f * where.grid[1] + y) * where.grid[2] + x)[None])


Side = tuple[int, int]  # an axis and a signed length along it


def _curve(
    p: tuple[int, int, int], a: Side, b: Side, c: Side, out: list[tuple[int, int, int]]
) -> None:
    """Walk a box from its corner p to the far end of side a, visiting every point.

    A long box is cut across a. Otherwise the walk makes a U: up the near half along b, over the
    top along a, down the far half. Each part is a box with the same task.
    """
    if abs(b[1]) < abs(c[1]):
        b, c = c, b
    w, h = abs(a[1]), abs(b[1])
    if h == 1:
        out.extend(_moved(p, (a[0], i if a[1] > 0 else -i)) for i in range(w))
    elif 2 * w > 3 * h:
        near, far = _halves(a)
        _curve(p, near, b, c, out)
        _curve(_moved(p, near), far, b, c, out)
    elif w == 1:
        _curve(p, b, c, a, out)
    else:
        (near, far), (low, high) = _halves(a), _halves(b)
        _curve(p, low, near, c, out)
        _curve(_moved(p, low), a, high, c, out)
        corner = _moved(_moved(p, _last(a)), _last(low))
        _curve(corner, _back(low), _back(far), c, out)


def _moved(p: tuple[int, int, int], by: Side) -> tuple[int, int, int]:
    at = list(p)
    at[by[0]] += by[1]
    return at[0], at[1], at[2]


def _halves(side: Side) -> tuple[Side, Side]:
    """Two parts, the first of even length where it can be, so that the walk closes up."""
    n, sign = abs(side[1]), 1 if side[1] > 0 else -1
    half = n // 2 + (n // 2 % 2 if n > 2 else 0)
    return (side[0], sign * half), (side[0], sign * (n - half))


def _last(side: Side) -> Side:
    """To the last point along a side."""
    return side[0], side[1] - (1 if side[1] > 0 else -1)


def _back(side: Side) -> Side:
    return side[0], -side[1]

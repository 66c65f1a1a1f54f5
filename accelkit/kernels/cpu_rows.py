"""Pieces of attention on a CPU: runs of query tiles over gathered key blocks, joined by LSE.

Every piece goes through torch's fused CPU attention, which wants one number of keys for all rows of
a call: runs with lists of equal length share one. What a call has computed is joined at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels.index import ceil_div
from accelkit.kernels.launch import FAR, Launch

_CHUNK_BYTES = 8 * 2**20
"""Gathered K and V (and mask) of one fused call: fewer calls, as far as caches hold them."""

_LEAST_TRIANGLE = 64
"""Rows below which a causal square is computed whole."""

_OWN_CALL = 8192
"""Numbers of a run from which on its join is a call of its own: indices cost more."""

_HIDDEN = -1e30
"""Added to the logits of invisible pairs. Finite, because a fully hidden stretch would give NaN
with −inf.
"""

Piece = tuple[Tensor, Tensor]
"""Output `[…, rows, Dv]` and natural-log LSE `[…, rows]` of some rows."""


def fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> Piece:
    """Fused attention `[R, H, n, D]` → out and natural-log LSE. Its causal mask is aligned to the
    first key.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


def join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Join a piece into another, in place; −inf marks rows that a piece left empty, whose output
    must be finite.
    """
    out.lerp_(more, share_of(more_lse, lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


def share_of(more_lse: Tensor, lse: Tensor) -> Tensor:
    """What a piece weighs in its join with another."""
    return torch.sigmoid(more_lse - lse).masked_fill_(more_lse == -math.inf, 0.0)


def triangle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Piece:
    """Causal attention of as many rows as keys, `[R, 1, n, D]`. The fused kernel computes the whole
    square: triangles are halved as long as the square left out is worth its join.
    """
    rows, half = q.shape[2], q.shape[2] // 2
    if rows % 2 or half < _LEAST_TRIANGLE:
        return fused(q, k, v, scale, causal=True)
    exact = torch.promote_types(q.dtype, torch.float32)
    halves = [t.reshape(-1, 1, half, t.shape[3]) for t in (q, k, v)]
    out, lse = triangle(halves[0], halves[1], halves[2], scale)
    out, lse = out.to(exact).reshape(-1, 2, half, q.shape[3]), lse.reshape(-1, 2, half)
    below, below_lse = fused(q[:, :, half:], k[:, :, :half], v[:, :, :half], scale)
    join(out[:, 1], lse[:, 1], below[:, 0].to(exact), below_lse[:, 0])
    return out.view(-1, 1, rows, q.shape[3]), lse.view(-1, 1, rows)


def wide(t: Tensor, rows: int, width: int) -> Tensor:
    """`[…, N, D]` with zeros behind its rows and columns. Zeros behind the narrower of q, k and v
    change no score; the fused kernel wants one head size.
    """
    n, d = t.shape[-2:]
    return t if (n, d) == (rows, width) else pad(t, (0, width - d, 0, rows - n))


def take(t: Tensor, heads: Tensor) -> Tensor:
    """`t[:, heads]`, without a copy where heads are neighbours or one and the same."""
    ids = heads.tolist()
    if ids == list(range(ids[0], ids[0] + len(ids))):
        return t[:, ids[0] : ids[0] + len(ids)]
    if len(set(ids)) == 1:
        return t[:, ids[:1]].expand(-1, len(ids), -1, -1)
    return torch.stack([t[:, h] for h in ids], 1)  # several times as fast as by an index


@dataclass(frozen=True)
class Lists:
    """Block ids of the rows of a mask `[R, nk]` that have any, the longest row first: of row
    `rows[i]` (int64, as all of them) `count[i]` ids, rising, one row behind the other.
    """

    rows: Tensor
    count: Tensor
    line: Tensor
    """Of each id the i of its row."""
    blocks: Tensor

    @staticmethod
    def of(mask: Tensor) -> Lists:
        """The rows of a bool mask."""
        count = mask.sum(-1)
        rows = count.argsort(descending=True, stable=True)[: int((count > 0).sum())]
        return Lists(rows, count[rows], *mask[rows].nonzero(as_tuple=True))

    def chunks(self, bytes_per_block: int, even: bool = True) -> Iterator[tuple[slice, int, slice]]:
        """Rows of similar length, of equal length if `even`, that share a call: which they are, the
        length of the longest and the place of their ids.
        """
        lengths = self.count.tolist()
        first = place = 0
        while first < len(lengths):
            longest = lengths[first]
            most = first + max(1, _CHUNK_BYTES // (longest * bytes_per_block))
            least = longest if even else max(1, longest // 2)
            last = first + 1
            while last < min(most, len(lengths)) and lengths[last] >= least:
                last += 1
            end = place + sum(lengths[first:last])
            yield slice(first, last), longest, slice(place, end)
            first, place = last, end


def cut(mask: Tensor, even: int, least: int) -> Tensor:
    """A mask `[…, nk]` without what is beyond a multiple of `even` in each row, and without rows
    shorter than `least`.
    """
    count = mask.sum(-1, keepdim=True)
    count = count // even * even
    count.masked_fill_(count < least, 0)
    return mask & (mask.cumsum(-1, dtype=torch.int32) <= count if even > 1 else count > 0)


class Rows:
    """The rows `(b, slot, tile)` of sparse heads: queries, and what was computed so far.

    Tiles are filled up to whole runs of the tallest height; rows that exist only for that stay
    empty. At height h, run r holds the rows `h · r … h · r + h − 1`, in one piece of memory.
    """

    def __init__(self, launch: Launch, slots: Tensor, tallest: int) -> None:
        (bq, bk), self.launch, self.slots = launch.index.size, launch, slots
        self.tiles = ceil_div(launch.tiles.numel(), tallest) * tallest
        self.width = max(launch.q.shape[3], launch.v.shape[3])
        self.dtype = torch.promote_types(launch.q.dtype, torch.float32)
        q = take(launch.q, launch.q_heads[slots])
        whole = self.tiles if launch.rows is None else launch.index.rows
        q = wide(q, whole * bq, self.width).unflatten(2, (-1, bq))
        if launch.rows is not None:
            q = q[:, :, launch.rows]
        self.q = q.reshape(-1, bq, self.width)
        whole = max(1, bq // bk)  # blocks are filled up to whole squares of a tile
        blocks = ceil_div(launch.key_blocks, whole) * whole
        k, v = (wide(t, blocks * bk, self.width) for t in (launch.k, launch.v))
        self.k, self.v = (t.reshape(-1, bk * self.width) for t in (k, v))
        self.key_bytes = 2 * self.width * k.element_size()
        kv = launch.kv_heads[slots].long()
        self.kv = (torch.arange(launch.batch)[:, None] * launch.k.shape[1] + kv).flatten()
        self.base = (self.kv * blocks).repeat_interleave(self.tiles)
        self.found: Piece | None = None

    def squares(self, own: Tensor) -> None:
        """First of all: tiles over the keys at their own positions, as triangles, where `own`
        (bool `[B · S, tiles]`) says so.
        """
        bq, tiles = self.q.shape[1], self.launch.tiles
        first = self.launch.q_start // bq
        places = tiles + first if self.launch.rows is not None else slice(first, first + len(tiles))
        heads = self.launch.batch * self.launch.k.shape[1]
        k, v = (t.view(heads, -1, 1, bq, self.width) for t in (self.k, self.v))
        q = self.q.unflatten(0, (-1, self.tiles))
        self.found = (
            self.q.new_empty(self.q.shape, dtype=self.dtype),
            self.q.new_empty(self.q.shape[:2], dtype=self.dtype),
        )
        out, lse = (t.unflatten(0, (-1, self.tiles)) for t in self.found)
        out[:, len(tiles) :], lse[:, len(tiles) :] = 0.0, -math.inf
        for line, kv in enumerate(self.kv.tolist()):
            some = q[line, : len(tiles), None]
            one = triangle(some, k[kv, places], v[kv, places], self.launch.scale)
            out[line, : len(tiles)], lse[line, : len(tiles)] = (t[:, 0] for t in one)
        if not own.all():
            out[:, : len(tiles)].masked_fill_(~own[..., None, None], 0.0)
            lse[:, : len(tiles)].masked_fill_(~own[..., None], -math.inf)

    def pieces(self, lists: Lists, height: int = 1) -> None:
        """Runs of tiles over the blocks of their lists, which all their queries see wholly."""
        queries = self.q.view(-1, height * self.q.shape[1], self.width)
        blocks = lists.blocks + self.base[lists.rows * height][lists.line]
        for rows, _, ids in lists.chunks(self.key_bytes * self.launch.index.size[1]):
            at = lists.rows[rows]
            k, v = (
                t.view(len(at), 1, -1, self.width) for t in self._gathered(blocks[ids], len(at))
            )
            out, lse = (
                t[:, 0] for t in fused(_some(queries, at)[:, None], k, v, self.launch.scale)
            )
            self._put(at, out, lse)

    def hidden(self, lists: Lists) -> None:
        """Tiles over blocks that some of their queries do not see."""
        bq, bk = self.launch.index.size
        masks = _Hidden(self.launch, self.slots, self.tiles)
        size = (self.key_bytes + bq * self.dtype.itemsize) * bk
        for rows, longest, ids in lists.chunks(size, even=False):
            # Shorter rows of a chunk repeat block 0 behind their own, hidden.
            at = lists.rows[rows]
            own = torch.arange(longest) < lists.count[rows, None]
            blocks = torch.zeros(own.shape, dtype=torch.int64)
            blocks[own] = lists.blocks[ids]
            mask, blind = masks.mask(at, blocks, own, self.dtype)
            k, v = self._gathered((blocks + self.base[at, None]).flatten(), len(at))
            k, v = (t.view(len(at), 1, -1, self.width) for t in (k, v))
            q = _some(self.q, at)[:, None]
            out, lse = (t[:, 0] for t in fused(q, k, v, self.launch.scale, mask=mask[:, None]))
            out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -math.inf)
            self._put(at, out, lse)

    def _gathered(self, blocks: Tensor, rows: int) -> list[Tensor]:
        """Keys and values of the blocks of some rows: where they lie if they are neighbours, else
        copied.
        """
        first, n = int(blocks[0]), blocks.numel()
        if rows == 1 and int(blocks[-1]) - first == n - 1:
            return [t[first : first + n] for t in (self.k, self.v)]
        return [t.index_select(0, blocks) for t in (self.k, self.v)]

    def _put(self, at: Tensor, out: Tensor, lse: Tensor) -> None:
        """Join pieces of the runs `at`, each listed once, while caches hold them."""
        if self.found is None:
            nothing = torch.full(self.q.shape[:2], -math.inf, dtype=self.dtype)
            self.found = torch.zeros_like(self.q, dtype=self.dtype), nothing
        found, found_lse = (t.view(-1, *lse.shape[1:], *t.shape[2:]) for t in self.found)
        out, before = out.to(self.dtype), found_lse.index_select(0, at)
        if out[0].numel() < _OWN_CALL:
            some = found.index_select(0, at)
            join(some, before, out, lse)
            found.index_copy_(0, at, some)
        else:
            share = share_of(lse, before)[..., None]
            for run, more, weight in zip(at.tolist(), out, share, strict=True):
                found[run].lerp_(more, weight)
            torch.logaddexp(before, lse, out=before)
        found_lse.index_copy_(0, at, before)

    def write(self) -> None:
        """Hand the results to the launch."""
        launch, bq = self.launch, self.q.shape[1]
        lines = (launch.batch, len(self.slots), -1)
        place: Any = slice(0, launch.n_q)
        inside: Any = place
        if launch.rows is not None:
            at = (launch.rows[:, None] * bq + torch.arange(bq)).flatten()
            inside = at < launch.n_q
            place = at[inside]
        heads = launch.out_heads[self.slots].tolist()
        if self.found is None:
            for head in heads:
                launch.out[:, head, place], launch.lse[:, head, place] = 0.0, -math.inf
            return
        out, lse = self.found[0].view(*lines, self.width), self.found[1].view(lines)
        for slot, head in enumerate(heads):
            launch.out[:, head, place] = out[:, slot, inside, : launch.v.shape[3]].to(
                launch.out.dtype
            )
            launch.lse[:, head, place] = lse[:, slot, inside].to(launch.lse.dtype)


def _some(t: Tensor, rows: Tensor) -> Tensor:
    """`t[rows]`; a single row where it lies."""
    return t[int(rows) :][:1] if len(rows) == 1 else t.index_select(0, rows)


def _pick(table: Tensor, batch: Tensor, slot: Tensor, place: Tensor) -> Tensor:
    """Entries (or rows) of a `[B|1, H|1, n, …]` table; flat lookups, which are far faster than
    three indices.
    """
    if table.shape[1] > 1:
        place = place + slot * table.shape[2]
    if table.shape[0] > 1:
        place = place + batch * (table.shape[1] * table.shape[2])
    return table.flatten(0, 2).index_select(0, place.flatten()).unflatten(0, place.shape)


class _Hidden:
    """Additive masks for blocks that are visible in part."""

    def __init__(self, launch: Launch, slots: Tensor, width: int) -> None:
        (bq, bk), self.slots, self.width = launch.index.size, slots, width
        self.tiles = pad(launch.tiles, (0, width - launch.tiles.numel()))
        tail = launch.key_blocks * bk - launch.n_k
        limits = pad(launch.row_positions(), (0, launch.index.rows * bq - launch.n_q), value=-1)
        self.limits = limits.unflatten(-1, (-1, bq))
        self.places = pad(launch.key_positions(), (0, tail), value=-1).unflatten(-1, (-1, bk))
        self.bias = launch.bias
        if isinstance(self.bias, Tensor):
            self.bias = pad(self.bias, (0, tail)).unflatten(-1, (-1, bk))

    def mask(
        self, rows: Tensor, blocks: Tensor, own: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Mask `[R, bq, C · bk]` of rows over the blocks `[R, C]`, and which queries see nothing at
        all `[R, bq]`.
        """
        line, tile = rows // self.width, self.tiles[rows % self.width]
        batch, slot = line // self.slots.numel(), self.slots[line % self.slots.numel()]
        at = (batch[:, None], slot[:, None], blocks)
        place = torch.where(own[..., None], _pick(self.places, *at), -1).flatten(1)[
            :, None
        ]  # [R, 1, C · bk]
        place = place.masked_fill(place < 0, FAR)
        seen = place <= _pick(self.limits, batch, slot, tile)[..., None]
        if not isinstance(self.bias, Tensor):
            return torch.where(seen, 0.0, _HIDDEN).to(dtype), ~seen.any(-1)
        bias = _pick(self.bias, *at).flatten(1)[:, None]
        seen = seen & (bias > -math.inf)
        return torch.where(seen, bias, _HIDDEN).to(dtype), ~seen.any(-1)

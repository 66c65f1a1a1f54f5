"""Pieces of attention on a CPU: runs of query tiles over gathered key blocks, joined by LSE.

Every piece goes through torch's fused CPU attention, which wants one number of keys for all rows of
a call: runs with lists of equal length share one. What a stage has computed is laid out in the
order of the tiles once, and joined in one pass over all of them.
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
    share = torch.sigmoid(more_lse - lse).masked_fill_(more_lse == -math.inf, 0.0)  # of `more`
    out.lerp_(more, share[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


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
    """Ragged rows of block ids: row r is `blocks[first[r] : first[r] + count[r]]`."""

    blocks: Tensor
    first: Tensor
    count: Tensor

    @staticmethod
    def of(mask: Tensor, even: int = 1, least: int = 0) -> Lists:
        """The rows of a mask `[R, nk]`, cut to a multiple of `even` blocks, none shorter than
        `least`.
        """
        row, block = mask.nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(mask))
        if even > 1 or least > 1:
            rank = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
            count = count // even * even
            count[count < least] = 0
            block = block[rank < count[row]]
        return Lists(block, count.cumsum(0) - count, count)

    def by_length(self) -> tuple[Tensor, Tensor]:
        """The rows that list anything, the longest first, and their blocks one behind the other."""
        order = self.count.argsort(descending=True, stable=True)
        order = order[: int((self.count > 0).sum())]
        count = self.count[order]
        place = (self.first[order] - (count.cumsum(0) - count)).repeat_interleave(count)
        return order, self.blocks[place + torch.arange(place.numel())]

    def mask(self, nk: int) -> Tensor:
        """The rows as a mask again."""
        found = torch.zeros((len(self.count), nk), dtype=torch.bool)
        row = torch.repeat_interleave(torch.arange(len(self.count)), self.count)
        found[row, self.blocks] = True
        return found


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
        # Pieces of a stage one behind the other, and behind them an empty one. The memory serves
        # all stages: fresh memory costs more than what is written there.
        self.stage = self._memory(self.tiles * len(self.kv) + tallest, launch.q.dtype)
        self.laid: Piece | None = None

    def _memory(self, rows: int, dtype: torch.dtype) -> Piece:
        bq = self.launch.index.size[0]
        lse = torch.promote_types(dtype, torch.float32)
        return torch.empty((rows, bq, self.width), dtype=dtype), torch.empty((rows, bq), dtype=lse)

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
        self.found = self._memory(len(self.q), self.dtype)
        out, lse = (t.unflatten(0, (-1, self.tiles)) for t in self.found)
        out[:, len(tiles) :], lse[:, len(tiles) :] = 0.0, -math.inf
        for line, kv in enumerate(self.kv.tolist()):
            some = q[line, : len(tiles), None]
            one = fused(some, k[kv, places], v[kv, places], self.launch.scale, causal=True)
            out[line, : len(tiles)], lse[line, : len(tiles)] = (t[:, 0] for t in one)
        if not own.all():
            out[:, : len(tiles)].masked_fill_(~own[..., None, None], 0.0)
            lse[:, : len(tiles)].masked_fill_(~own[..., None], -math.inf)

    def pieces(self, lists: Lists, height: int = 1) -> None:
        """Runs of tiles over the blocks of their lists, which all their queries see wholly."""
        queries = self.q.view(-1, height * self.q.shape[1], self.width)
        order, blocks = lists.by_length()
        source = torch.full((len(queries),), -1)
        source[order] = torch.arange(len(order))
        blocks += self.base[order * height].repeat_interleave(lists.count[order])
        done = begin = 0
        for at, count in _chunks(lists.count, self.key_bytes * self.launch.index.size[1]):
            rows, end = at.numel(), begin + at.numel() * count
            k, v = (t.view(rows, 1, -1, self.width) for t in self._gathered(blocks[begin:end]))
            q = queries.index_select(0, order[done : done + rows])[:, None]
            out, lse = fused(q, k, v, self.launch.scale)
            done, begin = self._put(done, out[:, 0], lse[:, 0]), end
        self._join_stage(done, source)

    def hidden(self, lists: Lists) -> None:
        """Tiles over blocks that some of their queries do not see."""
        bq, bk = self.launch.index.size
        masks = _Hidden(self.launch, self.slots, self.tiles)
        size = (self.key_bytes + bq * self.dtype.itemsize) * bk
        source, done = torch.full((len(self.q),), -1), 0
        for at, count in _chunks(lists.count, size, even=False):
            # Shorter rows of a chunk repeat block 0 behind their own, hidden.
            own = torch.arange(count) < lists.count[at, None]
            place = lists.first[at, None] + torch.arange(count)
            blocks = lists.blocks[place.clamp_(max=len(lists.blocks) - 1)].where(own, 0)
            mask, blind = masks.mask(at, blocks, own, self.dtype)
            k, v = self._gathered((blocks + self.base[at, None]).flatten())
            k, v = (t.view(len(at), 1, -1, self.width) for t in (k, v))
            q = self.q.index_select(0, at)[:, None]
            out, lse = (t[:, 0] for t in fused(q, k, v, self.launch.scale, mask=mask[:, None]))
            source[at] = torch.arange(done, done + len(at))
            out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -math.inf)
            done = self._put(done, out, lse)
        self._join_stage(done, source)

    def _gathered(self, blocks: Tensor) -> list[Tensor]:
        """Keys and values of some blocks: where they lie if they are neighbours, else copied."""
        first, n = int(blocks[0]), blocks.numel()
        if int(blocks[-1]) - first == n - 1 and bool((blocks.diff() == 1).all()):
            return [t[first : first + n] for t in (self.k, self.v)]
        return [t.index_select(0, blocks) for t in (self.k, self.v)]

    def _put(self, done: int, out: Tensor, lse: Tensor) -> int:
        """Runs behind the `done` ones of a stage; how many there are now."""
        end = done + len(out)
        for memory, found in zip(self.stage, (out, lse), strict=True):
            memory.view(-1, *found.shape[1:])[done:end] = found
        return end

    def _join_stage(self, done: int, source: Tensor) -> None:
        """Join a stage: run i of its height is `source[i]` of the `done` ones, −1 for none."""
        if not done:
            return
        height = len(self.q) // len(source)
        out, lse = (t.view(-1, height * t.shape[1], *t.shape[2:]) for t in self.stage)
        out[done], lse[done] = 0.0, -math.inf
        source = source.where(source >= 0, done)
        laid = self.laid if self.laid is not None else self._memory(len(self.q), self.dtype)
        for memory, found in zip(laid, (out, lse), strict=True):
            at = memory.view(-1, *found.shape[1:])
            if found.dtype == at.dtype:
                torch.index_select(found, 0, source, out=at)
            else:
                at.copy_(found.index_select(0, source))
        if self.found is None:
            self.found = laid
        else:
            self.laid = laid
            join(*self.found, *laid)

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


def _chunks(count: Tensor, bytes_per_block: int, even: bool = True) -> Iterator[tuple[Tensor, int]]:
    """Yield `(rows, blocks per row)`, rows of similar length together; of exactly equal length if
    `even`.
    """
    order = count.argsort(descending=True, stable=True)  # as `Lists.by_length`
    lengths = count[order].tolist()
    first = 0
    while first < len(lengths) and lengths[first]:
        longest = lengths[first]
        end = min(len(lengths), first + max(1, _CHUNK_BYTES // (longest * bytes_per_block)))
        least = longest if even else max(1, longest // 2)
        last = first + 1
        while last < end and lengths[last] >= least:
            last += 1
        yield order[first:last], longest
        first = last

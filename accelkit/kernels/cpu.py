"""The torch path that really skips work on a CPU.

Blocks that all queries of a tile see wholly go through torch's fused CPU attention without a mask:
first those that a run of neighbouring tiles shares, read by the whole run in one piece, then what
is left of each tile. Rows with lists of equal length share a call. The diagonal is one call of
triangles; other blocks that some query sees only in part come last and with a mask. Pieces are
joined by LSE, in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels.index import ALL, ceil_div
from accelkit.kernels.launch import FAR, Launch

_CHUNK_BYTES = 8 * 2**20
"""Gathered K and V (and mask) of one fused call: fewer calls, as far as caches hold them."""

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
"""Tiles over their own blocks become triangles if a block has at least so many keys."""

_HIDDEN = -1e30
"""Added to the logits of invisible pairs. Finite, because a fully hidden stretch would give NaN
with −inf.
"""


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


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fused attention `[R, H, n, D]` → out and natural-log LSE. Its causal mask is aligned to the
    first key.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


def _join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Join a piece into another, in place; −inf marks rows that a piece left empty, whose output
    must be finite.
    """
    total = torch.logaddexp(lse, more_lse)
    safe = total.masked_fill(total == -math.inf, 0.0)
    out.mul_((lse - safe).exp_()[..., None])
    out.addcmul_(more, (more_lse - safe).exp_()[..., None])
    lse.copy_(total)


def _wide(t: Tensor, rows: int, width: int) -> Tensor:
    """`[…, N, D]` with zeros behind its rows and columns. Zeros behind the narrower of q, k and v
    change no score; the fused kernel wants one head size.
    """
    n, d = t.shape[-2:]
    return t if (n, d) == (rows, width) else pad(t, (0, width - d, 0, rows - n))


def _take(t: Tensor, heads: Tensor) -> Tensor:
    """`t[:, heads]`, without a copy where heads are neighbours or one and the same."""
    ids = heads.tolist()
    if ids == list(range(ids[0], ids[0] + len(ids))):
        return t[:, ids[0] : ids[0] + len(ids)]
    if len(set(ids)) == 1:
        return t[:, ids[:1]].expand(-1, len(ids), -1, -1)
    return t[:, heads.long()]


def _dense(launch: Launch, slots: Tensor) -> None:
    """Heads that read every visible block, straight through the fused kernel."""
    width = max(launch.q.shape[3], launch.v.shape[3])
    q = _wide(_take(launch.q, launch.q_heads[slots]), launch.n_q, width)
    k, v = (
        _wide(_take(t, launch.kv_heads[slots]), launch.n_k, width) for t in (launch.k, launch.v)
    )
    heads = launch.out_heads[slots].tolist()

    def write(rows: slice, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """The first piece's rows; the others reach their last ones."""
        (out, lse), *more = pieces
        for o, s in more:
            _join(out[:, :, -o.shape[2] :], lse[:, :, -o.shape[2] :], o, s)
        for slot, head in enumerate(heads):  # several times as fast as all at once by their ids
            launch.out[:, head, rows] = out[:, slot, :, : launch.v.shape[3]]
            launch.lse[:, head, rows] = lse[:, slot]

    if not launch.causal:
        write(slice(None), [_fused(q, k, v, launch.scale)])
        return
    # The kernel deals out runs of rows, and late rows have more to do. Where heads do not divide
    # among the threads, bands of rows do: each over all keys before it, then over its own.
    even = q.shape[0] * q.shape[1] % torch.get_num_threads() == 0
    band = launch.n_q if even else max(_TALL_ROWS[0], launch.n_q // 8)
    for first in range(0, launch.n_q, band):
        rows = slice(first, min(first + band, launch.n_q))
        edge, end = (min(launch.q_start + n, launch.n_k) for n in (rows.start, rows.stop))
        queries, pieces = q[:, :, rows], []
        if edge:
            pieces.append(_fused(queries, k[:, :, :edge], v[:, :, :edge], launch.scale))
        if end > edge:
            own = slice(edge, end)
            pieces.append(_fused(queries, k[:, :, own], v[:, :, own], launch.scale, causal=True))
        write(rows, pieces)


class _Rows:
    """The rows `(b, slot, tile)` of sparse heads: queries, and what was computed so far.

    Tiles are filled up to whole runs of the tallest height; rows that exist only for that stay
    empty. At height h, run r holds the rows `h · r … h · r + h − 1`, in one piece of memory.
    """

    def __init__(self, launch: Launch, slots: Tensor, tallest: int) -> None:
        (bq, bk), self.launch, self.slots = launch.index.size, launch, slots
        self.tiles = ceil_div(launch.tiles.numel(), tallest) * tallest
        self.width = max(launch.q.shape[3], launch.v.shape[3])
        self.dtype = torch.promote_types(launch.q.dtype, torch.float32)
        q = _take(launch.q, launch.q_heads[slots])
        whole = self.tiles if launch.rows is None else launch.index.rows
        q = _wide(q, whole * bq, self.width).unflatten(2, (-1, bq))
        if launch.rows is not None:
            q = q[:, :, launch.rows]
        self.q = q.reshape(-1, bq, self.width)
        whole = max(1, bq // bk)  # blocks are filled up to whole squares of a tile
        blocks = ceil_div(launch.key_blocks, whole) * whole
        k, v = (_wide(t, blocks * bk, self.width) for t in (launch.k, launch.v))
        self.k, self.v = (t.reshape(-1, bk * self.width) for t in (k, v))
        self.key_bytes = 2 * self.width * k.element_size()
        kv = launch.kv_heads[slots].long()
        self.kv = (torch.arange(launch.batch)[:, None] * launch.k.shape[1] + kv).flatten()
        self.base = (self.kv * blocks).repeat_interleave(self.tiles)
        self.out = torch.empty((len(self.q), bq, launch.v.shape[3]), dtype=self.dtype)
        self.lse = torch.empty((len(self.q), bq), dtype=self.dtype)
        self.empty = True

    def clear(self) -> None:
        """Nothing was computed so far; to begin with, unless `squares` does."""
        self.out.zero_()
        self.lse.fill_(-math.inf)

    def squares(self, own: Tensor) -> None:
        """Tiles over the keys at their own positions, as triangles, where `own` (bool
        `[B · S, tiles]`) says so.
        """
        bq, tiles = self.q.shape[1], self.launch.tiles
        first = self.launch.q_start // bq
        places = tiles + first if self.launch.rows is not None else slice(first, first + len(tiles))
        heads = self.launch.batch * self.launch.k.shape[1]
        k, v = (t.view(heads, -1, 1, bq, self.width) for t in (self.k, self.v))
        q, out, lse = (t.unflatten(0, (-1, self.tiles)) for t in (self.q, self.out, self.lse))
        for line, kv in enumerate(self.kv.tolist()):
            some = q[line, : len(tiles), None]
            piece = _fused(some, k[kv, places], v[kv, places], self.launch.scale, causal=True)
            out[line, : len(tiles)] = piece[0][:, 0, :, : out.shape[3]]
            lse[line, : len(tiles)] = piece[1][:, 0]
        not_own = pad(~own, (0, self.tiles - len(tiles)), value=True).flatten()
        if not_own.any():
            self.out[not_own], self.lse[not_own] = 0.0, -math.inf
        self.empty = False

    def pieces(self, lists: _Lists, height: int = 1) -> None:
        """Runs of tiles over the blocks of their lists, which all their queries see wholly."""
        queries = self.q.view(-1, height * self.q.shape[1], self.width)
        for at, count in _chunks(lists.count, self.key_bytes * self.launch.index.size[1]):
            blocks = lists.blocks[lists.first[at, None] + torch.arange(count)]
            self._join(at, *self._fused(queries, at, blocks + self.base[at * height, None]))
        self.empty &= not len(lists.blocks)

    def hidden(self, lists: _Lists) -> None:
        """Tiles over blocks that some of their queries do not see."""
        bq, bk = self.launch.index.size
        masks = _Hidden(self.launch, self.slots, self.tiles)
        size = (self.key_bytes + bq * self.dtype.itemsize) * bk
        for at, count in _chunks(lists.count, size, even=False):
            # Shorter rows of a chunk repeat block 0 behind their own, hidden.
            own = torch.arange(count) < lists.count[at, None]
            place = lists.first[at, None] + torch.arange(count)
            blocks = lists.blocks[place.clamp_(max=len(lists.blocks) - 1)].where(own, 0)
            mask, blind = masks.mask(at, blocks, own, self.dtype)
            out, lse = self._fused(self.q, at, blocks + self.base[at, None], mask[:, None])
            out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -math.inf)
            self._join(at, out, lse)

    def _fused(
        self, queries: Tensor, at: Tensor, blocks: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Out `[R, h · bq, Dv]` and LSE of the runs `at` over gathered blocks `[R, C]`."""
        one = len(at) == 1
        q = queries[int(at)][None] if one else queries.index_select(0, at)
        shape = (len(at), 1, -1, self.width)
        k, v = (t.view(shape) for t in self._gathered(blocks.flatten()))
        out, lse = _fused(q[:, None], k, v, self.launch.scale, mask=mask)
        return out[:, 0, :, : self.out.shape[2]].to(self.dtype), lse[:, 0].to(self.dtype)

    def _gathered(self, blocks: Tensor) -> list[Tensor]:
        """Keys and values of some blocks: where they lie if they are neighbours, else copied."""
        first, n = int(blocks[0]), len(blocks)
        if int(blocks[-1]) - first == n - 1 and bool((blocks.diff() == 1).all()):
            return [t[first : first + n] for t in (self.k, self.v)]
        return [t.index_select(0, blocks) for t in (self.k, self.v)]

    def _join(self, at: Tensor, out: Tensor, lse: Tensor) -> None:
        mine, mine_lse = self.out.view(-1, *out.shape[1:]), self.lse.view(-1, lse.shape[1])
        if self.empty:
            mine[at], mine_lse[at] = out, lse
        elif len(at) == 1:
            _join(mine[int(at)], mine_lse[int(at)], out[0], lse[0])
        else:
            before = mine[at], mine_lse[at]
            _join(*before, out, lse)
            mine[at], mine_lse[at] = before

    def write(self) -> None:
        """Hand the results to the launch."""
        launch, bq = self.launch, self.q.shape[1]
        lines = (launch.batch, len(self.slots), -1)
        out, lse = self.out.view(*lines, self.out.shape[2]), self.lse.view(lines)
        place: Any = slice(0, launch.n_q)
        inside: Any = place
        if launch.rows is not None:
            at = (launch.rows[:, None] * bq + torch.arange(bq)).flatten()
            inside = at < launch.n_q
            place = at[inside]
        for slot, head in enumerate(launch.out_heads[self.slots].tolist()):
            launch.out[:, head, place] = out[:, slot, inside].to(launch.out.dtype)
            launch.lse[:, head, place] = lse[:, slot, inside].to(launch.lse.dtype)


@dataclass(frozen=True)
class _Lists:
    """Ragged rows of block ids: row r is `blocks[first[r] : first[r] + count[r]]`."""

    blocks: Tensor
    first: Tensor
    count: Tensor

    @staticmethod
    def of(mask: Tensor, even: int = 1, least: int = 0) -> _Lists:
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
        return _Lists(block, count.cumsum(0) - count, count)

    def mask(self, nk: int) -> Tensor:
        """The rows as a mask again."""
        found = torch.zeros((len(self.count), nk), dtype=torch.bool)
        row = torch.repeat_interleave(torch.arange(len(self.count)), self.count)
        found[row, self.blocks] = True
        return found


def _listed(launch: Launch, slots: Tensor) -> None:
    """Sparse heads, stage by stage."""
    bk, nk, tiles = launch.index.size[1], launch.key_blocks, launch.tiles.numel()
    heights = _heights(launch)
    rows = _Rows(launch, slots, max(heights))
    clean, masked = _seen(launch, slots)  # bool [B · S, tiles, nk]
    own = _own_square(launch)
    complete = None if own is None else (masked | ~own).all(-1)
    if complete is not None and complete.any():
        rows.squares(complete)
        masked = masked & ~complete[..., None]
    else:
        rows.clear()
    # Tiles that fill up a run agree to everything.
    clean = pad(clean, (0, 0, 0, rows.tiles - tiles), value=True)
    for height in heights:
        shared = clean.unflatten(1, (-1, height)).all(2)
        shared[:, ceil_div(tiles, height) :] = False
        if height > 1:
            found = _Lists.of(shared.flatten(0, 1), ceil_div(_EVEN_KEYS, bk), _TALL_KEYS // bk)
        else:
            found = _Lists.of(shared.flatten(0, 1), ceil_div(_EVEN_KEYS, bk))
        rows.pieces(found, height)
        if len(found.blocks):
            taken = found.mask(nk).view_as(shared)
            clean &= ~taken.repeat_interleave(height, 1)
    masked |= clean[:, :tiles]
    if masked.any():
        rows.hidden(_Lists.of(pad(masked, (0, 0, 0, rows.tiles - tiles)).flatten(0, 1)))
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
    order = count.argsort(descending=True, stable=True)
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

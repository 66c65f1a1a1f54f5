"""The torch path that really skips work on a CPU.

Rows of blocks are sorted into buckets of equal length; a chunk of rows that fits the cache gathers
its K and V and goes through torch's fused CPU attention in one call, which also hands back the LSE.
Blocks that some query sees only in part (the diagonal, the tail, padding) form a second, short
piece with a mask, joined by LSE. So no mask is built or read for the bulk of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels.index import ALL
from accelkit.kernels.launch import FAR, Launch

_CHUNK_BYTES = 4 * 2**20
"""Gathered K and V (and mask) of one fused call: about the second-level caches of a few cores."""

_EVEN_KEYS = 64
"""Lists of blocks smaller than this are cut to a multiple of it, so that buckets stay few and well
filled.
"""

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
        out, lse = _dense(launch, dense)
        heads = launch.out_heads[dense]
        launch.out[:, heads] = out[..., : launch.v.shape[3]].to(launch.out.dtype)
        launch.lse[:, heads] = lse.float()
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


def _one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The fused kernel wants one head size for q, k and v: zeros behind the narrower ones change no
    score.
    """
    width = max(t.shape[-1] for t in tensors)
    return tuple(pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors)


def _fold(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two pieces; −inf marks rows that a piece left empty, whose output must be finite."""
    total = torch.logaddexp(lse, more_lse)
    safe = total.masked_fill(total == -math.inf, 0.0)
    a, b = (lse - safe).exp()[..., None], (more_lse - safe).exp()[..., None]
    return a * out + b * more, total


def _dense(launch: Launch, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Heads that read every visible block, straight through the fused kernel."""
    kv = launch.kv_heads[slots]
    q, k, v = _one_width(launch.q[:, launch.q_heads[slots]], launch.k[:, kv], launch.v[:, kv])
    if not launch.causal:
        return _fused(q, k, v, launch.scale)
    edge = min(launch.q_start, launch.n_k)
    end = min(launch.n_k, launch.q_start + launch.n_q)
    pieces = []
    if edge:
        pieces.append(_fused(q, k[:, :, :edge], v[:, :, :edge], launch.scale))
    if end > edge:
        pieces.append(_fused(q, k[:, :, edge:end], v[:, :, edge:end], launch.scale, causal=True))
    return pieces[0] if len(pieces) == 1 else _fold(*pieces[0], *pieces[1])


@dataclass(frozen=True)
class _Lists:
    """Ragged rows of block ids: row r is `blocks[first[r] : first[r] + count[r]]`."""

    blocks: Tensor
    first: Tensor
    count: Tensor


def _ragged(blocks: Tensor, row: Tensor, rows: int) -> _Lists:
    count = torch.bincount(row, minlength=rows)
    return _Lists(blocks, count.cumsum(0) - count, count)


def _split(launch: Launch, slots: Tensor) -> tuple[_Lists, _Lists]:
    """Lists of rows `(b, slot, tile)`: blocks that all queries of the tile see wholly, and those
    that need a mask.
    """
    index, tiles, nk = launch.index, launch.tiles, launch.key_blocks
    shape = (launch.batch, slots.numel(), tiles.numel())
    count = index.count[:, slots][:, :, tiles].expand(shape).flatten()
    start = index.start[:, slots][:, :, tiles].expand(shape).flatten()
    length = torch.where(count == ALL, nk, count).long()
    row = torch.repeat_interleave(torch.arange(length.numel()), length)
    place = torch.arange(row.numel()) - torch.repeat_interleave(length.cumsum(0) - length, length)
    if index.blocks.numel():
        listed = index.blocks[(start[row] + place).clamp_(max=index.blocks.numel() - 1)].long()
        block = torch.where(count[row] == ALL, place, listed)
    else:
        block = place
    inside = (block >= 0) & (block < nk)
    row, block = row[inside], block[inside]

    batch, slot = row // (shape[1] * shape[2]), slots[row // shape[2] % shape[1]]
    low, high = (_pick(t, batch, slot, tiles[row % shape[2]]) for t in launch.row_bounds())
    first, last = (_pick(t, batch, slot, block) for t in launch.key_bounds())
    seen = first <= high
    clean = seen & (last <= low) if not isinstance(launch.bias, Tensor) else torch.zeros_like(seen)
    even = _EVEN_KEYS // index.size[1]
    if even > 1:
        number = torch.bincount(row[clean], minlength=length.numel())
        rank = clean.cumsum(0) - 1 - (number.cumsum(0) - number)[row]
        clean &= rank < (number // even * even)[row]
    masked = seen & ~clean
    return _ragged(block[clean], row[clean], length.numel()), _ragged(
        block[masked], row[masked], length.numel()
    )


def _pick(table: Tensor, batch: Tensor, slot: Tensor, place: Tensor) -> Tensor:
    """Entries (or rows) of a `[B|1, H|1, n, …]` table; flat lookups, which are far faster than
    three indices.
    """
    if table.shape[1] > 1:
        place = place + slot * table.shape[2]
    if table.shape[0] > 1:
        place = place + batch * (table.shape[1] * table.shape[2])
    return table.flatten(0, 2).index_select(0, place.flatten()).unflatten(0, place.shape)


def _listed(launch: Launch, slots: Tensor) -> None:
    """Sparse heads. Large buffers are avoided: touching fresh memory costs as much as the
    arithmetic here.
    """
    (bq, bk), tiles, nk = launch.index.size, launch.tiles, launch.key_blocks
    shape = (launch.batch, slots.numel(), tiles.numel())
    clean, masked = _split(launch, slots)
    k, v = _one_width(launch.k, launch.v)
    width = k.shape[-1]
    k, v = (pad(t, (0, 0, 0, nk * bk - launch.n_k)).reshape(-1, bk * width) for t in (k, v))
    row = torch.arange(math.prod(shape))
    kv = launch.kv_heads[slots].long()[row // shape[2] % shape[1]]
    base = (
        row // (shape[1] * shape[2]) * launch.k.shape[1] + kv
    ) * nk  # first block of the row's KV head

    wide = torch.promote_types(launch.q.dtype, torch.float32)
    target = launch.out if launch.out.dtype == wide else torch.empty_like(launch.out, dtype=wide)
    q_rows = _tile_views(launch.q, launch.q_heads[slots], tiles, bq)
    out_rows = _tile_views(target, launch.out_heads[slots], tiles, bq)
    lse_rows = _tile_views(launch.lse, launch.out_heads[slots], tiles, bq)

    def fused(
        rows: list[int], blocks: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Out `[R, bq, Dv]` and LSE `[R, bq]` of some rows over the blocks `[R, C]`."""
        flat = (blocks + base[rows, None]).flatten()
        kv_shape = (len(rows), 1, -1, width)
        queries = torch.stack([_full(q_rows[r], bq, width) for r in rows])[:, None]
        keys, values = (
            k.index_select(0, flat).view(kv_shape),
            v.index_select(0, flat).view(kv_shape),
        )
        out, lse = _fused(queries, keys, values, launch.scale, causal, mask)
        return out[:, 0, :, : launch.v.shape[3]].to(wide), lse[:, 0].to(wide)

    def store(rows: list[int], out: Tensor, lse: Tensor) -> None:
        for r, o, s in zip(rows, out.unbind(), lse.unbind(), strict=True):
            n = out_rows[r].shape[0]
            out_rows[r].copy_(o[:n])
            lse_rows[r].copy_(s[:n])

    def fold(rows: list[int], out: Tensor, lse: Tensor) -> None:
        before = torch.stack([_full(out_rows[r], bq) for r in rows])
        store(rows, *_fold(before, torch.stack([_full(lse_rows[r], bq) for r in rows]), out, lse))

    for r in (clean.count == 0).nonzero().flatten().tolist():
        out_rows[r].zero_()
        lse_rows[r].fill_(-math.inf)
    for chunk, count in _chunks(clean.count, 2 * bk * width * k.element_size()):
        blocks = clean.blocks[clean.first[chunk, None] + torch.arange(count)]
        rows = chunk.tolist()
        store(rows, *fused(rows, blocks))

    if _on_diagonal(launch):
        for chunk, _ in _chunks(masked.count, 2 * bk * width * k.element_size()):
            blocks = masked.blocks[masked.first[chunk, None]]
            rows = chunk.tolist()
            fold(rows, *fused(rows, blocks, causal=True))
        masked = _Lists(masked.blocks, masked.first, torch.zeros_like(masked.count))
    hidden = _Hidden(launch, slots)
    size = (2 * width * k.element_size() + bq * wide.itemsize) * bk
    for chunk, count in _chunks(masked.count, size, even=False):
        # Shorter rows of a chunk repeat block 0 behind their own, hidden.
        own = torch.arange(count) < masked.count[chunk, None]
        blocks = masked.blocks[
            (masked.first[chunk, None] + torch.arange(count)).clamp_(max=masked.blocks.numel() - 1)
        ]
        blocks = torch.where(own, blocks, 0)
        mask, empty = hidden.mask(chunk, blocks, own, wide)
        rows = chunk.tolist()
        piece, piece_lse = fused(rows, blocks, mask[:, None])
        piece_lse = piece_lse.masked_fill_(empty, -math.inf)
        piece = piece.masked_fill_(empty[..., None], 0.0)
        fold(rows, piece, piece_lse)
    if target is not launch.out:
        for r, mine in enumerate(_tile_views(launch.out, launch.out_heads[slots], tiles, bq)):
            mine.copy_(out_rows[r])


def _on_diagonal(launch: Launch) -> bool:
    """Whether the only partly visible block of a tile is its own, seen as a triangle."""
    (bq, bk), plain = launch.index.size, launch.q_pos is None and launch.k_pos is None
    square = bq == bk and launch.q_start % bq == 0 and launch.n_k >= launch.q_start + launch.n_q
    return (
        launch.causal
        and plain
        and square
        and bk >= _EVEN_KEYS
        and not isinstance(launch.bias, Tensor)
    )


def _tile_views(t: Tensor, heads: Tensor, tiles: Tensor, bq: int) -> list[Tensor]:
    """Views of the query tiles of `[B, H, N, …]`, in the order (b, slot, tile); the last tile may
    be short.
    """
    chosen, views = tiles.tolist(), []
    for batch in t.unbind():
        for head in heads.tolist():
            pieces = batch[head].split(bq)
            views += [pieces[i] for i in chosen]
    return views


def _full(t: Tensor, rows: int, width: int | None = None) -> Tensor:
    """A tile with zeros added up to `rows` rows (and `width` columns)."""
    if t.dim() == 1:
        return t if t.shape[0] == rows else pad(t, (0, rows - t.shape[0]))
    width = t.shape[1] if width is None else width
    return t if t.shape == (rows, width) else pad(t, (0, width - t.shape[1], 0, rows - t.shape[0]))


class _Hidden:
    """Additive masks for blocks that are visible in part."""

    def __init__(self, launch: Launch, slots: Tensor) -> None:
        (bq, bk), self.tiles, self.slots = launch.index.size, launch.tiles, slots
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
        n_tiles, n_slots = self.tiles.numel(), self.slots.numel()
        batch, slot = rows // (n_slots * n_tiles), self.slots[rows // n_tiles % n_slots]
        at = (batch[:, None], slot[:, None], blocks)
        place = torch.where(own[..., None], _pick(self.places, *at), -1).flatten(1)[
            :, None
        ]  # [R, 1, C · bk]
        place = place.masked_fill(place < 0, FAR)
        seen = place <= _pick(self.limits, batch, slot, self.tiles[rows % n_tiles])[..., None]
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

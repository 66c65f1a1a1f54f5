"""How much an index computes (density) and how much attention it covers (recall)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import InvalidInputError
from accelkit.kernels import dispatch, pyramid
from accelkit.kernels.index import ALL, BlockIndex, Inputs, ceil_div
from accelkit.kernels.positions import in_place, key_places, row_limits

TILES = 16
"""Query tiles whose pairs are counted at once: more take more memory, fewer more launches."""


def pair_counts(call: Inputs, size: tuple[int, int]) -> Tensor:
    """Visible query-key pairs in each block, int64 `[B|1, H|1, nq, nk]`. For block units: with
    `size[1] == 1` this has one number per tile and key.
    """
    (nq, nk), (bq, bk) = call.tiles(size), size
    device = call.q.device
    if in_place(call):
        tile, block = torch.arange(nq, device=device) * bq, torch.arange(nk, device=device) * bk
        rows = (call.n_q - tile).clamp(max=bq)[:, None]
        keys = (call.n_k - block).clamp(max=bk)
        if not call.causal:
            return (rows * keys)[None, None]
        return staircase(call.q_start + tile[:, None] + 1 - block, rows, keys)[None, None]
    places, limit = key_places(call), row_limits(call)
    # Rows that see key j: those whose limit is not below its place. Rows behind the end see none.
    limits = pad(limit, (0, nq * bq - limit.shape[-1]), value=-1).unflatten(-1, (nq, bq))
    lead = torch.broadcast_shapes(limits.shape[:2], places.shape[:2])
    out = []
    for some in limits.sort(-1).values.split(TILES, 2):
        order = some.expand(*lead, -1, -1).contiguous()
        place = places[:, :, None].expand(*lead, order.shape[2], -1).contiguous()
        blind = torch.searchsorted(order, place)
        seen = torch.where(place >= 0, bq - blind, 0)
        out.append(pad(seen, (0, -call.n_k % bk)).unflatten(-1, (-1, bk)).sum(-1))
    return torch.cat(out, 2)


def staircase(first: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """`Σ_{i < rows} clamp(first + i, 0, keys)`: row i of a causal tile sees that many keys."""

    def below(x: Tensor) -> Tensor:
        """Sum of min(u, keys) over 0 ≤ u < x."""
        x = x.clamp(min=0)
        m = torch.minimum(x, keys)
        return m * (m - 1) // 2 + (x - m) * keys

    return below(first + rows) - below(first)


def density(index: BlockIndex | Sequence[BlockIndex], call: Inputs) -> Tensor:
    """Visible query-key pairs inside the listed blocks ÷ all visible pairs, fp32 `[H]`.

    Element-exact at block granularity; several disjoint pieces add up. Reads sizes back to the
    host: for reports, not for the forward pass. Raises `InvalidInputError` for lists of another
    call.
    """
    pieces = [index] if isinstance(index, BlockIndex) else list(index)
    heads, batch = len(call.heads), call.q.shape[0]
    for piece in pieces:
        if piece.heads != heads or piece.rows != call.tiles(piece.size)[0]:
            raise InvalidInputError(
                f"density: the index has {piece.heads} heads and {piece.rows} tiles, the call "
                f"{heads} heads and {call.tiles(piece.size)[0]} tiles of {piece.size[0]}"
            )
    if in_place(call) and dispatch.fast_device(call.q):
        from accelkit.kernels._triton import select as fast

        found = [
            fast.listed_pairs(p, call, _keys(p, call)).sum(-1).double().mean(0) for p in pieces
        ]
        return (sum(found) / max(_visible_pairs(call), 1)).float()
    counts = {(128, 128): pair_counts(call, (128, 128))}
    whole = counts[128, 128].sum((-1, -2)).expand(batch, heads).double()
    listed = torch.zeros((batch, heads), dtype=torch.float64, device=call.q.device)
    for piece in pieces:
        for b in range(batch):
            listed[b] += _listed_pairs(piece, call, b, whole[b], counts)
    return (listed.sum(0) / whole.sum(0).clamp(min=1)).float()


def _keys(piece: BlockIndex, call: Inputs) -> int:
    """Keys that the entries of a piece count through, means among them."""
    return pyramid.rows(call.n_k, piece.size[1]) if piece.pyramid else call.n_k


def _visible_pairs(call: Inputs) -> int:
    """Query-key pairs of a head in plain positions, on the host."""
    if not call.causal:
        return call.n_q * call.n_k
    first, keys = torch.tensor(call.q_start + 1), torch.tensor(call.n_k)
    return int(staircase(first, torch.tensor(call.n_q), keys))


def _listed_pairs(
    piece: BlockIndex, call: Inputs, b: int, whole: Tensor, known: dict[tuple[int, int], Tensor]
) -> Tensor:
    """Visible pairs in the lists of one sequence, fp64 `[H]`, one entry at a time; `known` keeps
    the pairs of each block by unit.
    """
    heads, (bq, bk), device = len(call.heads), piece.size, call.q.device
    nq, keys_in_all = call.tiles(piece.size)[0], _keys(piece, call)
    nk = ceil_div(keys_in_all, bk)
    own = b if piece.count.shape[0] > 1 else 0
    start, count = piece.start[own].reshape(-1), piece.count[own].reshape(-1).long()
    if bool((count == ALL).all()):
        return whole
    # Rows of dense heads get every block; they have no list to read.
    free = count == ALL
    length = torch.where(free, nk, count)
    line = torch.repeat_interleave(torch.arange(heads * nq, device=device), length)
    at = torch.arange(line.numel(), device=device) - (length.cumsum(0) - length)[line]
    source = piece.blocks if piece.blocks.numel() else piece.blocks.new_zeros(1)
    place = torch.where(free[line], 0, start[line] + at).clamp(max=source.numel() - 1)
    block = torch.where(free[line], at, source[place].long())
    real = (block >= 0) & (block < nk)
    block, head, tile = block.clamp(0, nk - 1), line // nq, line % nq
    if in_place(call):
        rows = (call.n_q - tile * bq).clamp(max=bq)
        keys = (keys_in_all - block * bk).clamp(max=bk)
        pairs = rows * keys
        if call.causal:
            pairs = staircase(call.q_start + tile * bq + 1 - block * bk, rows, keys)
    else:
        if piece.size not in known:
            known[piece.size] = pair_counts(call, piece.size)
        counts = known[piece.size]
        counts = counts[b if counts.shape[0] > 1 else 0].expand(heads, -1, -1)
        pairs = counts[head, tile, block]
    total = torch.zeros(heads, dtype=torch.float64, device=device)
    return total.index_add_(0, head, torch.where(real, pairs, 0).double())


def recall(mask: Tensor, mass: Tensor) -> Tensor:
    """Share of the attention mass that a selection covers, fp32 `[H]`, mean over tiles and batch.

    `mass` is `scores.block_mass` `[B, H, R, nk]`, `mask` bool for the same tiles.
    """
    covered, whole = (mass * mask).sum((0, 2, 3)), mass.sum((0, 2, 3))
    return (covered / whole.clamp(min=1e-30)).float()

"""Blocks too light to read and too many to drop: one key and one value stand for each.

For a tile with mean query m, attention of m inside block j gives the weights of its keys, and with
them a mean key, a mean value and the logarithm of the block's mass. A row of the tile moves that
logarithm by its distance from m, to first order exactly:

    w = softmax over j of m · k · scale,   c = Σ w k,   u = Σ w v,   ℓ = log Σ exp(m · k · scale)
    log-mass of row r on block j ≈ ℓ + (r − m) · c · scale,   its output there ≈ u

The cost is that of one query row for each tile and of one key for each block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels.cpu_rows import fused
from accelkit.kernels.index import Inputs, Partial, device_ids
from accelkit.kernels.positions import filled, groups, take_heads
from accelkit.kernels.scores import pool_queries

_HIDDEN = -1e30
"""Log-mass of blocks that do not count; finite, so that rows without any give no NaN."""
_VOTERS = 4
"""Every so manieth row of a tile votes on the mass of blocks."""
_LOGITS = 1 << 23
"""Logits at a time over what stands for blocks."""
_BAND = 16
"""Blocks that are expanded at once."""


@dataclass(frozen=True)
class Group:
    """Heads that share a KV head, `slots` among the call's.

    `q` `[B, H, nq, bq, D]` are the tiles' rows; `keys` `[B, H, nq, nk, D]` and `values` `[…, Dv]`
    stand for the blocks; `level` fp32 `[B, H, nq, nk]` is what a row's logits get besides.
    """

    slots: list[int]
    q: Tensor
    keys: Tensor
    values: Tensor
    level: Tensor


@dataclass(frozen=True)
class Expansion:
    """What stands for every block of every head. `seen` and `whole` (bool `[B|1, 1, nq, nk]`):
    blocks of which a tile's rows see some key, every key.
    """

    groups: tuple[Group, ...]
    seen: Tensor
    whole: Tensor
    scale: float
    n_q: int

    def mass(self) -> Tensor:
        """Share of each block in its tile's attention, mean over some rows, fp32 `[B, H, nq, nk]`;
        −inf where nothing is visible.
        """
        found = []
        for g in self.groups:
            rows = g.q[..., _VOTERS // 2 :: _VOTERS, :]
            logits = torch.matmul(rows, g.keys.transpose(-1, -2)).float().mul_(self.scale)
            level = g.level.masked_fill(~self.seen, _HIDDEN)
            share = logits.add_(level[..., None, :]).softmax(-1).mean(-2)
            found.append(share.masked_fill_(~self.seen, -math.inf))
        return self._in_order(found)

    def piece(self, blocks: Tensor) -> Partial:
        """Attention over what stands for `blocks` (bool `[B, H, nq, nk]`): out `[B, H, N, Dv]` and
        lse fp32 `[B, H, N]`; −inf for rows without any.
        """
        first, heads = self.groups[0], blocks.shape[1]
        batch, width = len(blocks), first.values.shape[-1]
        out = first.values.new_empty((batch, heads, self.n_q, width))
        lse = first.level.new_empty((batch, heads, self.n_q))
        for g in self.groups:
            level = g.level.masked_fill(~take_heads(blocks, g.slots), _HIDDEN)
            for b in range(batch):
                found, found_lse = _attend(g, level, b, self.scale)
                for n, slot in enumerate(g.slots):
                    out[b, slot] = found[n].flatten(0, 1)[: self.n_q]
                    lse[b, slot] = found_lse[n].flatten()[: self.n_q]
        return Partial(out, lse.masked_fill_(lse < _HIDDEN / 2, -math.inf))

    def _in_order(self, found: list[Tensor]) -> Tensor:
        """What groups gave, `[B, H, …]`, joined in the order of the call's heads."""
        order = [s for g in self.groups for s in g.slots]
        whole = found[0] if len(found) == 1 else torch.cat(found, 1)
        if order == sorted(order):
            return whole
        back = sorted(range(len(order)), key=order.__getitem__)
        return whole[:, device_ids(tuple(back), whole.device)]


def expand(call: Inputs, size: tuple[int, int]) -> Expansion:
    """Expand every block around the mean query of every tile. Rows and keys are in token order."""
    seen, whole = _visible(call, size)
    mean = pool_queries(call, size[0])
    parts = tuple(_group(call, kv, slots, mean, seen, size) for kv, slots in groups(call))
    return Expansion(parts, seen.any(-1)[:, None], whole[:, None], call.scale, call.n_q)


def _group(
    call: Inputs, kv: int, slots: list[int], means: Tensor, seen: Tensor, size: tuple[int, int]
) -> Group:
    """Expand the blocks of one KV head. `means` fp32 `[B, H, nq, D]`; `seen` as of `_visible`."""
    (bq, bk), (nq, nk), heads = size, call.tiles(size), len(slots)
    dim, tail = call.k.shape[3], nk * bk - call.n_k
    k, v = (filled(t[:, kv], tail).unflatten(1, (nk, bk)) for t in (call.k, call.v))
    both, mean = torch.cat([k, v], -1), take_heads(means, slots).to(k.dtype)
    level = torch.full((len(k), nk, heads, nq), _HIDDEN, device=k.device)
    keys = k.new_zeros((len(k), heads, nq, nk, dim))
    values = v.new_zeros((len(k), heads, nq, nk, v.shape[-1]))
    for first in range(0, nk, _BAND):
        some = slice(first, min(first + _BAND, nk))
        # Tiles from the first that may see the band on: causal calls need half of the pairs.
        begin = max(0, first * bk - call.q_start) // bq if call.causal else 0
        if begin >= nq:
            break
        queries = mean[:, :, begin:].flatten(1, 2)[:, None]
        logits = torch.matmul(queries, k[:, some].transpose(-1, -2)).float().mul_(call.scale)
        logits = logits.unflatten(2, (heads, -1))  # [B, band, H, tiles, bk]
        hidden = ~seen[:, begin:, some].transpose(1, 2)[:, :, None]
        share, level[:, some, :, begin:] = _softmax(logits.masked_fill_(hidden, _HIDDEN))
        found = torch.matmul(share.to(v.dtype).flatten(2, 3), both[:, some])
        found = found.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
        keys[:, :, begin:, some], values[:, :, begin:, some] = found.split([dim, v.shape[-1]], -1)
    own = torch.matmul(keys, mean[..., None]).float()[..., 0]  # [B, H, nq, nk]
    level = level.permute(0, 2, 3, 1) - call.scale * own
    q = take_heads(call.q, [call.heads[s] for s in slots])
    q = filled(q, nq * bq - call.n_q).unflatten(2, (nq, bq))
    return Group(slots, q, keys, values, level)


def _attend(g: Group, level: Tensor, b: int, scale: float) -> tuple[Tensor, Tensor]:
    """Rows of prompt `b` over all that stands for blocks: out `[H, nq, bq, Dv]` and its lse."""
    q, keys, values = g.q[b], g.keys[b], g.values[b]
    if not q.is_cuda and keys.shape == values.shape:
        q, keys, values = (t.transpose(0, 1) for t in (q, keys, values))
        mask = level[b].to(torch.promote_types(q.dtype, torch.float32)).transpose(0, 1)
        mask = mask[:, :, None].expand(-1, -1, q.shape[2], -1)
        out, lse = fused(q, keys, values, scale, mask=mask)
        return out.transpose(0, 1), lse.transpose(0, 1)
    heads, tiles, rows, _ = q.shape
    out, lse = values.new_empty((*q.shape[:3], values.shape[-1])), level.new_empty(q.shape[:3])
    step = max(1, _LOGITS // (heads * rows * keys.shape[2]))
    for first in range(0, tiles, step):
        some = slice(first, first + step)
        logits = torch.matmul(q[:, some], keys[:, some].transpose(-1, -2)).float().mul_(scale)
        share, lse[:, some] = _softmax(logits.add_(level[b, :, some, None]))
        torch.matmul(share.to(values.dtype), values[:, some], out=out[:, some])
    return out, lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, and the log of its sum: the greatest share tells it without more exponentials."""
    share = logits.softmax(-1)
    return share, logits.amax(-1) - share.amax(-1).log()


def _visible(call: Inputs, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Keys that some row of a tile sees, bool `[B|1, nq, nk, bk]`, and blocks of which all its rows
    see every key, `[B|1, nq, nk]`.
    """
    (bq, bk), (nq, nk), device = size, call.tiles(size), call.q.device
    key = torch.arange(nk * bk, device=device).view(nk, bk)
    real = (key < call.n_k)[None]
    if call.key_mask is not None:
        real = pad(call.key_mask, (0, nk * bk - call.n_k)).unflatten(1, (nk, bk))
    first = call.q_start + torch.arange(nq, device=device)[:, None, None] * bq
    last = (first + bq - 1).clamp(max=call.q_start + call.n_q - 1)
    if not call.causal:
        first = last = torch.full_like(first, call.n_k)
    return real[:, None] & (key <= last), (real[:, None] & (key <= first)).all(-1)

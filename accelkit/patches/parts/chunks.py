"""Chunks of neighbouring tokens, laid out by `orders.chunked`: their means and their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from accelkit.kernels import scores
from accelkit.kernels.index import Inputs, ceil_div
from accelkit.kernels.permute import take_rows
from accelkit.patches.parts import grids
from accelkit.patches.parts.grids import Grid, Visual


@dataclass(frozen=True)
class Chunks:
    """`members` int32 `[1, chunks · most]` are places in kernel order, −1 behind a chunk's last
    token; `counts` fp32 `[chunks]`. `own` bool `[nq, chunks]` and `covers` fp32 `[chunks, nk]` say
    which chunks a query tile and a key block touch.
    """

    members: Tensor
    counts: Tensor
    own: Tensor
    covers: Tensor

    def blocks(self, chosen: Tensor) -> Tensor:
        """Key blocks that the chosen chunks `[B, H, nq, chunks]` touch, bool `[B, H, nq, nk]`."""
        return torch.matmul(chosen.to(self.covers.dtype), self.covers) > 0


def of(where: Visual, chunk: Grid, size: tuple[int, int], device: torch.device) -> Chunks:
    """Chunks of a grid in the order of `orders.chunked`, against blocks of `size` tokens."""
    number, _, count = grids.cells(where.grid, chunk)
    counts = number.bincount(minlength=count)
    first = where.start + counts.cumsum(0) - counts
    slot = torch.arange(prod(min(c, n) for c, n in zip(chunk, where.grid, strict=True)))
    members = torch.where(slot < counts[:, None], first[:, None] + slot, -1)

    def touched(block: int) -> Tensor:
        begin = torch.arange(ceil_div(where.tokens, block)) * block
        return (begin[:, None] < first + counts) & (begin[:, None] + block > first)

    wide = torch.float32 if device.type == "cpu" else torch.float16
    return Chunks(
        members.flatten()[None].int().to(device),
        counts.float().to(device),
        touched(size[0]).to(device),
        touched(size[1]).T.to(device, wide),
    )


def gate(call: Inputs, chunks: Chunks, query_block: int) -> Tensor:
    """Mean query of each tile · mean key of each chunk, fp32 `[B, H, nq, chunks]`."""
    count = chunks.counts.numel()
    rows = take_rows(call.k, chunks.members).unflatten(2, (count, -1))
    mean = rows.sum(3, dtype=torch.float32) / chunks.counts[:, None]
    queries = scores.pool_queries(call, query_block)
    return torch.matmul(queries, mean[:, call.kv_of_head].transpose(-1, -2))

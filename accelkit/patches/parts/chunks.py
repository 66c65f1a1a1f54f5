"""Chunks of neighbouring tokens, laid out by `orders.chunked`: their means and their blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelkit.kernels import scores
from accelkit.kernels.index import Inputs, ceil_div
from accelkit.patches.parts import grids
from accelkit.patches.parts.grids import Grid, Visual


@dataclass(frozen=True)
class Chunks:
    """In kernel order chunk i is `begin[i] … begin[i + 1] − 1` (int32 `[chunks + 1]`). `own` bool
    `[nq, chunks]` and `covers` fp32 `[chunks, nk]` say which chunks a query tile and a key block
    touch.
    """

    begin: Tensor
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

    def touched(block: int) -> Tensor:
        begin = torch.arange(ceil_div(where.tokens, block)) * block
        return (begin[:, None] < first + counts) & (begin[:, None] + block > first)

    wide = torch.float32 if device.type == "cpu" else torch.float16
    return Chunks(
        torch.cat([first, first[-1:] + counts[-1:]]).int().to(device),
        touched(size[0]).to(device),
        touched(size[1]).T.to(device, wide),
    )


def gate(call: Inputs, chunks: Chunks, query_block: int) -> Tensor:
    """Mean query of each tile · mean key of each chunk, fp32 `[B, H, nq, chunks]`."""
    mean = scores.pool_runs(call.k, chunks.begin)[:, call.kv_of_head]
    return torch.matmul(scores.pool_queries(call, query_block), mean.transpose(-1, -2))

"""Chunks of neighbouring tokens, laid out by `orders.chunked`: their means and their blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelkit.kernels import scores
from accelkit.kernels.index import Inputs, ceil_div
from accelkit.kernels.select import Runs
from accelkit.patches.parts import grids
from accelkit.patches.parts.grids import Grid, Visual


@dataclass(frozen=True)
class Chunks:
    """In kernel order chunk i is `begin[i] … begin[i + 1] − 1` (int32 `[chunks + 1]`). `own` bool
    `[nq, chunks]` says which chunks a query tile touches, `touched` which ones a key block does.
    """

    begin: Tensor
    own: Tensor
    touched: Runs


def of(where: Visual, chunk: Grid, size: tuple[int, int], device: torch.device) -> Chunks:
    """Chunks of a grid in the order of `orders.chunked`, against blocks of `size` tokens."""
    number, _, count = grids.cells(where.grid, chunk)
    counts = number.bincount(minlength=count)
    first = where.start + counts.cumsum(0) - counts

    def touched(block: int) -> Tensor:
        begin = torch.arange(ceil_div(where.tokens, block)) * block
        return (begin[:, None] < first + counts) & (begin[:, None] + block > first)

    by_block = touched(size[1])
    begin = by_block.int().argmax(-1)  # the first one, 0 where there is none
    return Chunks(
        torch.cat([first, first[-1:] + counts[-1:]]).int().to(device),
        touched(size[0]).to(device),
        Runs(
            begin.int().to(device),
            (begin + by_block.sum(-1)).int().to(device),
            int(by_block.sum(-1).max()),
        ),
    )


def gate(call: Inputs, chunks: Chunks, query_block: int) -> Tensor:
    """Mean query of each tile · mean key of each chunk, fp32 `[B, H, nq, chunks]`."""
    mean = scores.pool_runs(call.k, chunks.begin, call.kv_of_head)
    return torch.matmul(scores.pool_queries(call, query_block), mean.transpose(-1, -2))

"""Shapes that are measured, and random data and block lists of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelkit.kernels.index import ALL, BlockIndex

BLOCK = (128, 128)


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int
    causal: bool

    @property
    def pairs(self) -> float:
        """Visible query-key pairs of all heads."""
        n = self.tokens
        return self.batch * self.heads * (n * (n + 1) / 2 if self.causal else float(n) ** 2)


LLM = Shape("causal 32K, 32/8 heads, d128", 1, 32, 8, 32768, 128, True)
LONG = Shape("causal 128K, 32/8 heads, d128", 1, 32, 8, 131072, 128, True)
FULL = Shape("full 32K, 32/8 heads, d128", 1, 32, 8, 32768, 128, False)
VIDEO = Shape("full 118,800, 24 heads, d128", 1, 24, 24, 118800, 128, False)
D64 = Shape("full 17,776, 48 heads, d64", 1, 48, 48, 17776, 64, False)
NARROW = Shape("causal 32K, 32/8 heads, d64", 1, 32, 8, 32768, 64, True)
LAPTOP = Shape("causal 8K, 4/2 heads, d64, CPU", 1, 4, 2, 8192, 64, True)


def random_call(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v `[B, H, N, D]` as projections leave them: transposed views of `[B, N, H, D]`."""
    sizes = [
        (shape.batch, shape.tokens, h, shape.head_size)
        for h in (shape.heads, *[shape.kv_heads] * 2)
    ]
    return [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for size in sizes]


def visible_blocks(shape: Shape, size: tuple[int, int], device: str) -> Tensor:
    """Blocks that some row of their tile sees, bool `[nq, nk]`."""
    nq, nk = -(-shape.tokens // size[0]), -(-shape.tokens // size[1])
    if not shape.causal:
        return torch.ones(nq, nk, dtype=torch.bool, device=device)
    last = (torch.arange(1, nq + 1, device=device)[:, None] * size[0]).clamp(max=shape.tokens) - 1
    return torch.arange(nk, device=device) * size[1] <= last


def random_mask(shape: Shape, size: tuple[int, int], density: float, device: str) -> Tensor:
    """Uniform random blocks of the visible ones, the diagonal always: bool `[1, H, nq, nk]`."""
    seen = visible_blocks(shape, size, device)
    mask = torch.rand(1, shape.heads, *seen.shape, device=device) < density
    if shape.causal:
        edge = seen.sum(-1, keepdim=True) - 1
        mask = mask | (torch.arange(seen.shape[1], device=device) == edge)
    return mask & seen


def stripes(
    shape: Shape, keys: int, rows: int = 2048, device: str = "cuda"
) -> tuple[list[Tensor], BlockIndex, float]:
    """A call, random earlier keys for every `rows` queries of each head (all where there are
    fewer), and the query-key pairs that they make.
    """
    tiles = shape.tokens // rows
    ids = torch.arange(shape.tokens, device=device)
    listed, counts = [], []
    for _ in range(shape.batch * shape.heads):
        noise = torch.rand(tiles, shape.tokens, device=device)
        noise.masked_fill_(ids >= torch.arange(tiles, device=device)[:, None] * rows, -1.0)
        best = noise.topk(keys, -1)
        there = best.values >= 0
        found = torch.where(there, best.indices, shape.tokens).sort(-1).values
        listed.append(found.int())
        counts.append(there.sum(-1, dtype=torch.int32))
    count = torch.stack(counts).view(shape.batch, shape.heads, tiles)
    start = torch.arange(count.numel(), device=device).view_as(count) * keys
    index = BlockIndex(start, count, torch.stack(listed).flatten(), (rows, 1))
    call = random_call(shape, device, torch.bfloat16)
    return call, index, float(count.sum()) * rows


def mixed(index: BlockIndex, share: int) -> BlockIndex:
    """Every share-th head dense."""
    count = index.count.clone()
    count[:, ::share] = ALL
    return BlockIndex(index.start, count, index.blocks, index.size)

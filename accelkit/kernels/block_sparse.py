"""Attention over key blocks: the torch reference, which is the specification of every backend.

For head slot `j` and query row `i` of tile `t`, with the blocks that `index` lists for `(j, t)`:

    visible = listed & (k_pos >= 0) & (k_pos <= q_pos if causal)
    s       = scale · q · kᵀ + bias          out = softmax(s) · v          lse = log Σ exp s
    (over visible keys)

A row without visible keys gives zeros and −inf. With `skip`, the blocks of a row tile are visited
in list order and a block is dropped when, for every row that sees some of it, `rowmax(s) − running
maximum < ln λ`; its mass is missing from the LSE as well, and a row's first visible block always
counts. With `qk` and `pv` in 8 bits the operands are rounded as `quantize` does, and P relative to
its row maximum.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from accelkit.kernels.index import ALL, BlockIndex
from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import Operands, dequantize, round_probabilities, rounding_of
from accelkit.kernels.quantize import reference as quantize

_CHUNK = 512
"""Query rows at a time: bounds the scores that are alive at once."""


def reference(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse` by dense masked softmax in fp32 (fp64 for fp64 inputs),
    any unit size.

    Slow and plain on purpose. Serves every option of `attend`.
    """
    index, ops = launch.index, None
    if launch.qk != "native":
        launch, ops = _rounded(launch)
    wide = torch.float64 if launch.q.dtype == torch.float64 else torch.float32
    limits, places = launch.row_positions(), launch.key_positions()
    tiles = launch.tiles
    step = max(1, _CHUNK // index.size[0])
    pairs = zip(
        launch.q_heads.tolist(), launch.kv_heads.tolist(), launch.out_heads.tolist(), strict=True
    )
    for slot, (hq, hk, ho) in enumerate(pairs):
        for b in range(launch.batch):
            k, v = launch.k[b, hk].to(wide), launch.v[b, hk].to(wide)
            place, limit = _of(places, b, slot), _of(limits, b, slot)
            bias = _of(launch.bias, b, slot) if isinstance(launch.bias, Tensor) else launch.bias
            for part in tiles.split(step):
                rows, ids = _rows_of(part, index.size[0], launch.n_q)
                seen = (place >= 0) & (place <= limit[rows, None])  # [rows, Nk]
                s = launch.q[b, hq, rows].to(wide) @ k.T * launch.scale + bias
                if launch.skip is None:
                    seen &= _listed(index, b, slot, part, launch.n_k)[ids]
                else:
                    _visit(launch, launch.skip, b, slot, part, ids, s, seen)
                s = s.masked_fill(~seen, -math.inf)
                lse = s.logsumexp(-1)
                p = (s - lse.masked_fill(lse == -math.inf, 0.0)[:, None]).exp()
                if ops is not None and ops.shift is not None:
                    lse = lse + ops.shift[b, slot, rows]
                if ops is None or ops.v_mean is None:
                    out = p @ v
                else:
                    out = round_probabilities(p) @ v + p.sum(-1, keepdim=True) * ops.v_mean[b, hk]
                launch.out[b, ho, rows] = out.to(launch.out.dtype)
                launch.lse[b, ho, rows] = lse.float()


def _rounded(launch: Launch) -> tuple[Launch, Operands]:
    """The launch over operands that have been through 8 bits, V without its mean."""
    ops = quantize(launch.q, launch.k, launch.v, rounding_of(launch))
    q, k, v = dequantize(ops)
    slots = torch.arange(launch.heads, dtype=torch.int32, device=q.device)
    return replace(launch, q=q, k=k, v=v, q_heads=slots), ops


def _of(table: Tensor, b: int, h: int) -> Tensor:
    """Row of a `[B|1, H|1, N]` table."""
    return table[b if table.shape[0] > 1 else 0, h if table.shape[1] > 1 else 0]


def _rows_of(tiles: Tensor, bq: int, n_q: int) -> tuple[Tensor, Tensor]:
    """Query rows of some tiles, and for each row which of those tiles (0 …) it belongs to."""
    rows = (tiles[:, None] * bq + torch.arange(bq, device=tiles.device)).flatten()
    ids = torch.arange(tiles.numel(), device=tiles.device).repeat_interleave(bq)
    inside = rows < n_q
    return rows[inside], ids[inside]


def _listed(index: BlockIndex, b: int, slot: int, tiles: Tensor, n_k: int) -> Tensor:
    """Keys that the index lists for each of some tiles, bool `[tiles, Nk]`."""
    b = b if index.count.shape[0] > 1 else 0
    row = BlockIndex(
        index.start[b, slot, tiles][None, None],
        index.count[b, slot, tiles][None, None],
        index.blocks,
        index.size,
    )
    blocks = row.to_mask(-(-n_k // index.size[1]))[0, 0]
    return blocks.repeat_interleave(index.size[1], -1)[:, :n_k]


def _visit(
    launch: Launch,
    skip: Tensor,
    b: int,
    slot: int,
    tiles: Tensor,
    ids: Tensor,
    s: Tensor,
    seen: Tensor,
) -> None:
    """Narrow `seen` to the blocks that survive the skip rule, one tile after another."""
    index, bk = launch.index, launch.index.size[1]
    bi = b if index.count.shape[0] > 1 else 0
    threshold = skip[slot]
    for t, tile in enumerate(tiles.tolist()):
        start, count = int(index.start[bi, slot, tile]), int(index.count[bi, slot, tile])
        blocks = (
            range(launch.key_blocks)
            if count == ALL
            else index.blocks[start : start + count].tolist()
        )
        own = (ids == t).nonzero().flatten()
        keep = torch.zeros_like(seen[own])
        top = torch.full((own.numel(),), -math.inf, device=s.device, dtype=s.dtype)
        for block in blocks:
            if not 0 <= block < launch.key_blocks:
                continue
            span = slice(block * bk, (block + 1) * bk)
            peak = s[own, span].masked_fill(~seen[own, span], -math.inf).amax(-1)
            # −inf − −inf is NaN and compares false: a row that sees nothing has no vote.
            if bool((peak - top >= threshold).logical_and(peak > -math.inf).any()):
                keep[:, span] = seen[own, span]
                top = torch.maximum(top, peak)
        seen[own] = keep

"""From block logits to lists in one launch: softmax, the shortest prefix that holds a share of it,
what is kept anyhow, and the list. A row lies in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.select import greatest, starts, warps_of
from accelkit.kernels._triton.tile import table
from accelkit.kernels.index import BlockIndex


@triton.jit(do_not_specialize=["n_heads", "nq", "nk"])
def _nucleus(
    LOGITS, SHARE, KEYS, ROWS, KEPT, s_tb, s_th, s_tn, BLOCKS, COUNT, s_share, n_heads, nq, nk,
    N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    bh, i = row // nq, row % nq
    b, h = bh // n_heads, bh % n_heads
    at = tl.arange(0, N)
    inside = at < nk
    x = tl.load(LOGITS + row * nk + at, mask=inside, other=-float("inf"))
    odd = tl.load(KEYS + bh * nk + at, mask=inside, other=0)
    kept = tl.load(KEPT + b * s_tb + h * s_th + i * s_tn + at, mask=inside, other=0)
    whole = tl.load(ROWS + row)
    share = tl.load(SHARE + h * s_share)
    seen = x > -float("inf")
    judged = tl.where(odd > 0, -float("inf"), x)
    top = tl.max(judged, 0)
    p = tl.exp(judged - tl.where(top > -float("inf"), top, 0.0))
    chosen = greatest(judged, p, share * tl.sum(p, 0))
    chosen = tl.where(odd > 0, 1, tl.where(kept > 0, 1, chosen))
    chosen = tl.where(whole > 0, 1, tl.where(share >= 1.0, 1, chosen))
    chosen = tl.where(seen, chosen, 0)
    tl.store(BLOCKS + row * nk + tl.cumsum(chosen, 0) - 1, at, mask=chosen > 0)
    tl.store(COUNT + row, tl.sum(chosen, 0))


def nucleus(
    logits: Tensor, share: Tensor, keys: Tensor, rows: Tensor, kept: Tensor, size: tuple[int, int]
) -> BlockIndex:
    """`kernels.select.nucleus`; `share` fp32 `[H]` or `[1]`, masks are bool."""
    batch, heads, nq, nk = logits.shape
    device, width = logits.device, max(16, triton.next_power_of_2(nk))
    blocks = torch.empty(batch * heads * nq * nk, dtype=torch.int32, device=device)
    count = torch.empty((batch, heads, nq), dtype=torch.int32, device=device)
    marks = (m.contiguous().view(torch.uint8) for m in (keys, rows))
    if kept.stride(-1) != 1:
        kept = kept.contiguous()
    if blocks.numel():
        _nucleus[(batch * heads * nq,)](
            logits.contiguous(), share, *marks, *table(kept.view(torch.uint8)[..., 0], count),
            blocks, count, int(share.numel() > 1), heads, nq, nk, N=width,
            num_warps=warps_of(width),
        )  # fmt: skip
    return BlockIndex(starts(batch, heads, nq, nk, device), count, blocks, size)

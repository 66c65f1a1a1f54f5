"""Means of a few neighbouring keys or values, in one read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.tile import next_power_of_two

_ROWS = 32


@triton.jit(do_not_specialize=["n_heads", "n"])
def _means(
    X, OUT, s_xb, s_xh, s_xn, n_heads, n, OF: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    row, bh = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    b, h = (bh // n_heads).to(tl.int64), bh % n_heads
    d = tl.arange(0, BD)
    inside = (row < n)[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS, BD], tl.float32)
    for j in tl.static_range(OF):
        at = b * s_xb + h * s_xh + (row * OF + j)[:, None] * s_xn + d[None, :]
        total += tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    at = (bh.to(tl.int64) * n + row)[:, None] * D + d[None, :]
    tl.store(OUT + at, (total / OF).to(OUT.dtype.element_ty), mask=inside)


def means(x: Tensor, of: int) -> Tensor:
    """Means of `of` tokens each, `[B, H, N // of, D]` in x's dtype from x `[B, H, N, D]`."""
    batch, heads, n, d = x.shape
    out = x.new_empty((batch, heads, n // of, d))
    if out.numel():
        with torch.cuda.device_of(x):
            _means[(triton.cdiv(n // of, _ROWS), batch * heads)](
                x, out, *x.stride()[:3], heads, n // of, OF=of, ROWS=_ROWS, D=d,
                BD=next_power_of_two(d), num_warps=4,
            )  # fmt: skip
    return out

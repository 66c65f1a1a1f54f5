"""Pieces of one attention call into one, in a single pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from accelkit.kernels._triton.tile import next_power_of_two
from accelkit.kernels.index import Partial

MOST = 4
"""Pieces that one launch joins."""


@triton.jit
def _lse(LSE, at, real):
    return tl.load(LSE + at, mask=real, other=-float("inf")) * 1.4426950408889634


@triton.jit
def _weighted(OUT, at, weight, inside):
    """Rows times their weights. A piece that is empty there is not read: it may hold anything."""
    x = tl.load(OUT + at, mask=inside & (weight > 0)[:, None], other=0.0)
    return x.to(tl.float32) * weight[:, None]


@triton.jit(do_not_specialize=["n_rows", "n_heads", "n"])
def _merge(
    A, B, C, E, LA, LB, LC, LE, OUT, LSE, s_b, s_h, s_n, s_lb, s_lh, s_ln, s_ob, s_oh, s_on,
    n_rows, n_heads, n, PIECES: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    i, h, b = row % n, (row // n) % n_heads, row // (n * n_heads)
    at = b * s_lb + h * s_lh + i * s_ln
    la, lb = _lse(LA, at, real), _lse(LB, at, real)
    top = tl.maximum(la, lb)
    if PIECES > 2:
        lc = _lse(LC, at, real)
        top = tl.maximum(top, lc)
    if PIECES > 3:
        le = _lse(LE, at, real)
        top = tl.maximum(top, le)
    safe = tl.where(top == -float("inf"), 0.0, top)
    d = tl.arange(0, BD)
    inside = real[:, None] & (d < D)[None, :]
    at = (b * s_b + h * s_h + i * s_n)[:, None] + d[None, :]
    wa, wb = tl.exp2(la - safe), tl.exp2(lb - safe)
    total = wa + wb
    out = _weighted(A, at, wa, inside) + _weighted(B, at, wb, inside)
    if PIECES > 2:
        wc = tl.exp2(lc - safe)
        total += wc
        out += _weighted(C, at, wc, inside)
    if PIECES > 3:
        we = tl.exp2(le - safe)
        total += we
        out += _weighted(E, at, we, inside)
    some = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (safe + tl.log2(some)) * 0.6931471805599453, -float("inf"))
    at = OUT + (b * s_ob + h * s_oh + i * s_on)[:, None] + d[None, :]
    tl.store(at, (out / some[:, None]).to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + row, lse, mask=real)


def merge_some(parts: Sequence[Partial], dtype: torch.dtype) -> Partial:
    """Join two to `MOST` pieces; the output has the first one's layout and the given dtype."""
    batch, heads, n, width = parts[0].out.shape
    outs, lses = [p.out for p in parts], [p.lse for p in parts]
    if outs[0].stride(-1) != 1 or len({t.stride() for t in outs}) > 1:
        outs = [t.contiguous() for t in outs]
    if len({t.stride() for t in lses}) > 1:
        lses = [t.contiguous() for t in lses]
    out = torch.empty_like(outs[0], dtype=dtype)
    lse = torch.empty((batch, heads, n), dtype=torch.float32, device=out.device)
    if out.numel() == 0:
        return Partial(out, lse)
    rows, spare = 16, MOST - len(parts)
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(batch * heads * n, rows),)](
            *outs, *outs[:1] * spare, *lses, *lses[:1] * spare, out, lse,
            *outs[0].stride()[:3], *lses[0].stride(), *out.stride()[:3],
            batch * heads * n, heads, n, PIECES=len(parts), ROWS=rows, D=width,
            BD=next_power_of_two(width), num_warps=4,
        )  # fmt: skip
    return Partial(out, lse)

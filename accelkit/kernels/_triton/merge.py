"""Two pieces of one attention call into one, in a single pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from accelkit.kernels._triton.tile import LN2, LOG2E, next_power_of_two
from accelkit.kernels.index import Partial


@triton.jit(do_not_specialize=["n_rows", "n_heads", "n"])
def _merge(
    A, LA, B, LB, OUT, LSE,
    s_ab, s_ah, s_an, s_lab, s_lah, s_lan, s_bb, s_bh, s_bn, s_lbb, s_lbh, s_lbn, s_ob, s_oh, s_on,
    n_rows, n_heads, n, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < n_rows
    i, h, b = row % n, (row // n) % n_heads, row // (n * n_heads)
    none = -float("inf")
    la = tl.load(LA + b * s_lab + h * s_lah + i * s_lan, mask=real, other=none) * 1.4426950408889634
    lb = tl.load(LB + b * s_lbb + h * s_lbh + i * s_lbn, mask=real, other=none) * 1.4426950408889634
    top = tl.maximum(la, lb)
    safe = tl.where(top == none, 0.0, top)
    wa, wb = tl.exp2(la - safe), tl.exp2(lb - safe)
    both = wa + wb
    d = tl.arange(0, BD)
    inside = real[:, None] & (d < D)[None, :]
    # An empty piece is not read: its output may hold anything.
    a = tl.load(
        A + (b * s_ab + h * s_ah + i * s_an)[:, None] + d[None, :],
        mask=inside & (wa > 0)[:, None],
        other=0.0,
    )
    c = tl.load(
        B + (b * s_bb + h * s_bh + i * s_bn)[:, None] + d[None, :],
        mask=inside & (wb > 0)[:, None],
        other=0.0,
    )
    out = (a.to(tl.float32) * wa[:, None] + c.to(tl.float32) * wb[:, None]) / tl.where(
        both > 0, both, 1.0
    )[:, None]
    lse = tl.where(both > 0, (safe + tl.log2(tl.where(both > 0, both, 1.0))) * LN2, none)
    at = OUT + (b * s_ob + h * s_oh + i * s_on)[:, None] + d[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + row, lse, mask=real)


def merge_pair(a: Partial, b: Partial, dtype: torch.dtype) -> Partial:
    """Join two pieces; the output has `a`'s layout and the given dtype."""
    assert LOG2E == 1.4426950408889634
    batch, heads, n, width = a.out.shape
    outs = [t if t.stride(-1) == 1 else t.contiguous() for t in (a.out, b.out)]
    out = torch.empty_like(outs[0], dtype=dtype)
    lse = torch.empty((batch, heads, n), dtype=torch.float32, device=out.device)
    if out.numel() == 0:
        return Partial(out, lse)
    rows = 16
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(batch * heads * n, rows),)](
            outs[0], a.lse, outs[1], b.lse, out, lse,
            *outs[0].stride()[:3], *a.lse.stride(), *outs[1].stride()[:3], *b.lse.stride(),
            *out.stride()[:3],
            batch * heads * n, heads, n, ROWS=rows, D=width, BD=next_power_of_two(width),
            num_warps=4,
        )  # fmt: skip
    return Partial(out, lse)

"""Rows of tokens into another order and back: one program moves a few rows of one head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.tile import next_power_of_two, table

_ROWS = 64


@triton.jit(do_not_specialize=["n", "slots"])
def _move(
    X, OUT, IDS, HEADS, s_xb, s_xh, s_xn, s_ob, s_oh, s_on, s_ib, s_ih, s_in, n, slots,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bh = tl.program_id(1)
    b, slot = (bh // slots).to(tl.int64), bh % slots
    head = tl.load(HEADS + slot).to(tl.int64)
    ids = tl.load(IDS + b * s_ib + slot.to(tl.int64) * s_ih + at.to(tl.int64) * s_in,
                  mask=at < n, other=-1).to(tl.int64)  # fmt: skip
    d, at = tl.arange(0, BD), at.to(tl.int64)
    inside, real = (at < n)[:, None] & (d < D)[None, :], (ids >= 0)[:, None] & (d < D)[None, :]
    if BACK:
        x = tl.load(X + b * s_xb + slot * s_xh + at[:, None] * s_xn + d[None, :], mask=real)
        tl.store(OUT + b * s_ob + head * s_oh + ids[:, None] * s_on + d[None, :], x, mask=real)
    else:
        x = tl.load(
            X + b * s_xb + head * s_xh + ids[:, None] * s_xn + d[None, :], mask=real, other=0.0
        )
        tl.store(OUT + b * s_ob + slot * s_oh + at[:, None] * s_on + d[None, :], x, mask=inside)


def _launch(x: Tensor, out: Tensor, ids: Tensor, heads: Tensor, back: bool) -> None:
    n, slots, d = ids.shape[2], heads.numel(), x.shape[3]
    with torch.cuda.device_of(x):
        _move[(triton.cdiv(n, _ROWS), x.shape[0] * slots)](
            x, out, ids, heads, *x.stride()[:3], *out.stride()[:3], *table(ids, ids)[1:], n, slots,
            D=d, BD=next_power_of_two(d), ROWS=_ROWS, BACK=back, num_warps=4,
        )  # fmt: skip


def take_rows(x: Tensor, ids: Tensor, heads: Tensor) -> Tensor:
    """Rows `ids` `[B|1, slots|1, n]` of the heads of x, zeros at holes: `[B, slots, n, D]`."""
    out = x.new_empty((x.shape[0], heads.numel(), ids.shape[2], x.shape[3]))
    _launch(x, out, ids, heads, back=False)
    return out


def put_rows(out: Tensor, x: Tensor, ids: Tensor, heads: Tensor) -> None:
    """Row i of slot j of x to row `ids[j, i]` of head `heads[j]` of `out`."""
    _launch(x, out, ids, heads, back=True)

"""What the warp-specialised kernels share beyond the walk over their work list."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""The copy of a tile into shared memory, by the name that this Triton has for it."""


@gluon.jit
def normalised(acc, LSE, s_lb, s_lh, s_ln, b, head, rows, n_q, m, total):
    """acc ÷ sums; stores the rows' natural-log LSE. `m` are their maxima in base 2."""
    alive = total > 0.0
    safe = gl.where(alive, total, 1.0)
    lse = gl.where(alive, (m + gl.log2(safe)) * 0.6931471805599453, -float("inf"))
    at = LSE + b.to(gl.int64) * s_lb + head.to(gl.int64) * s_lh + rows.to(gl.int64) * s_ln
    gl.store(at, lse, mask=rows < n_q)
    return acc * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, acc.type.layout))[:, None]

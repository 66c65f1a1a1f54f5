"""What the warp-specialised kernels share beyond the walk over their work list."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

gather = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)
"""The copy of rows by pointer into shared memory, by the name that this Triton has for it."""

load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""The copy of a tile into shared memory, by the name that this Triton has for it."""

K_FREE = gl.constexpr(3)
"""Processor barrier of the first place for K; those of the others follow. Triton uses 0 to 2."""


@gluon.jit
def give(barrier):
    """A warpgroup is through with a place. Threads: two warpgroups and the copying warp."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 288; mov.b32 $0, 0;", "=r,r", [barrier], gl.int32, False, 1
    )


@gluon.jit
def take(barrier):
    """The copying warp waits until both warpgroups have given a place."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 288; mov.b32 $0, 0;", "=r,r", [barrier], gl.int32, False, 1
    )


@gluon.jit
def listed(LISTS, start, place, count, n_k):
    """Keys at some places of a list of single keys, int32; `FAR` behind its end and where there is
    none. A row with `start < 0` lists every key.
    """
    inside = place < count
    key = gl.load(LISTS + start + place, mask=inside & (start >= 0), other=-1)
    key = gl.where(start < 0, place, key)
    return gl.where(inside & (key >= 0) & (key < n_k), key, 2147483647)


@gluon.jit
def normalised(acc, LSE, s_lb, s_lh, s_ln, b, head, rows, n_q, m, total):
    """acc ÷ sums; stores the rows' natural-log LSE. `m` are their maxima in base 2."""
    alive = total > 0.0
    safe = gl.where(alive, total, 1.0)
    lse = gl.where(alive, (m + gl.log2(safe)) * 0.6931471805599453, -float("inf"))
    at = LSE + b.to(gl.int64) * s_lb + head.to(gl.int64) * s_lh + rows.to(gl.int64) * s_ln
    gl.store(at, lse, mask=rows < n_q)
    return acc * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, acc.type.layout))[:, None]

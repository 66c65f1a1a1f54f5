"""Warp-specialised kernels that do next to nothing: what a race checker says of Triton's own code.

`apart` shares nothing between its two parts, `handed` one tile by an mbarrier.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

N = gl.constexpr(128)


@gluon.jit
def _write(OUT, add, WARPS: gl.constexpr):
    at = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.store(OUT + at, at + add)


@gluon.jit
def apart(OUT):
    """Either part writes its half of OUT, int32 [256]."""
    gl.warp_specialize([(_write, (OUT, 0, 4)), (_write, (OUT + N, N, 1))], [1], [40])


@gluon.jit
def _take(OUT, tile, full):
    mbarrier.wait(full, 0)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.store(OUT + gl.arange(0, N, layout=layout), tile.load(layout))


@gluon.jit
def _give(tile, full):
    tile.store(gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(full)


@gluon.jit
def handed(OUT):
    """The second part makes 0 … 127, the first one writes them to OUT, int32 [128]."""
    tile = gl.allocate_shared_memory(gl.int32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    gl.warp_specialize([(_take, (OUT, tile, full)), (_give, (tile, full))], [1], [40])

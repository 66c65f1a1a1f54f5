"""Warp-specialised kernels that do next to nothing: what a race checker says of Triton's own code.

`apart` shares nothing between its parts. `handed` hands one tile over by an mbarrier, `relayed`
also to a single warp that comes for it late.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

N = gl.constexpr(128)


@gluon.jit
def _places(WARPS: gl.constexpr):
    return gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))


@gluon.jit
def _write(OUT, add, WARPS: gl.constexpr):
    at = _places(WARPS)
    gl.store(OUT + at, at + add)


@gluon.jit
def apart(OUT):
    """Either part writes its half of OUT, int32 [256]."""
    gl.warp_specialize([(_write, (OUT, 0, 4)), (_write, (OUT + N, N, 1))], [1], [40])


@gluon.jit
def _give(tile, full):
    tile.store(_places(1))
    mbarrier.arrive(full)


@gluon.jit
def _take(OUT, tile, full, taken, WARPS: gl.constexpr):
    mbarrier.wait(full, 0)
    at = _places(WARPS)
    gl.store(OUT + at, tile.load(at.type.layout))
    mbarrier.arrive(taken)


@gluon.jit
def _take_late(OUT, tile, full, taken):
    mbarrier.wait(taken, 0)
    _take(OUT, tile, full, taken, 1)


@gluon.jit
def _shared():
    tile = gl.allocate_shared_memory(gl.int32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(taken, count=1)
    return tile, full, taken


@gluon.jit
def handed(OUT):
    """One warp makes 0 … 127, four write them to OUT, int32 [128]."""
    tile, full, taken = _shared()
    gl.warp_specialize([(_take, (OUT, tile, full, taken, 4)), (_give, (tile, full))], [1], [40])


@gluon.jit
def relayed(OUT):
    """The same, and another warp writes them to the second half of OUT, int32 [256]."""
    tile, full, taken = _shared()
    gl.warp_specialize(
        [
            (_take, (OUT, tile, full, taken, 4)),
            (_give, (tile, full)),
            (_take_late, (OUT + N, tile, full, taken)),
        ],
        [1, 1],
        [40, 40],
    )

"""Warp-specialised kernels that do next to nothing: what a race checker says of Triton's own code.

`apart` shares nothing between its parts. `handed` hands one number over by an mbarrier, `relayed`
also to a single warp that comes for it late.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _write(OUT, number):
    gl.store(OUT, number)


@gluon.jit
def apart(OUT):
    """Each part writes its number to OUT, int32 [2]."""
    gl.warp_specialize([(_write, (OUT, 1)), (_write, (OUT + 1, 2))], [1], [40])


@gluon.jit
def _give(place, full):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place.store(gl.full([1], 3, gl.int32, one))
    mbarrier.arrive(full)


@gluon.jit
def _take(OUT, place, full, taken, WARPS: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(full, 0)
    gl.store(OUT, gl.max(place.load(one), 0))
    mbarrier.arrive(taken)


@gluon.jit
def _take_late(OUT, place, full, taken):
    mbarrier.wait(taken, 0)
    _take(OUT, place, full, taken, 1)


@gluon.jit
def _shared():
    place = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(taken, count=1)
    return place, full, taken


@gluon.jit
def handed(OUT):
    """One warp gives a number, four write it to OUT, int32 [1]."""
    place, full, taken = _shared()
    gl.warp_specialize([(_take, (OUT, place, full, taken, 4)), (_give, (place, full))], [1], [40])


@gluon.jit
def relayed(OUT):
    """The same, and another warp writes it to the second place of OUT, int32 [2]."""
    place, full, taken = _shared()
    gl.warp_specialize(
        [
            (_take, (OUT, place, full, taken, 4)),
            (_give, (place, full)),
            (_take_late, (OUT + 1, place, full, taken)),
        ],
        [1, 1],
        [40, 40],
    )

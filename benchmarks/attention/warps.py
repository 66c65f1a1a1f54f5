"""Warp-specialised kernels that do next to nothing: what NVIDIA's checkers say of them.

`apart` shares nothing between its parts. `handed` hands one number over by an mbarrier, `relayed`
also to a single warp that comes for it late. `met` has one processor barrier in both parts.
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


SYNC = "bar.sync 14, 160; mov.b32 $0, 1;"
ARRIVE = "bar.arrive 14, 160; mov.b32 $0, 1;"
VOTE = (
    "{ .reg .pred a; setp.eq.b32 a, $1, $1; bar.red.or.pred a, 14, 160, a; selp.b32 $0, 1, 0, a; }"
)


@gluon.jit
def _meet(OUT, BARRIER: gl.constexpr):
    zero = gl.program_id(0)
    gl.store(OUT, gl.inline_asm_elementwise(BARRIER, "=r,r", [zero], gl.int32, False, 1))


@gluon.jit
def met(OUT, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """160 threads, of which four warps reach a barrier at one instruction and one warp at another.
    Each part writes 1 to its place of OUT, int32 [2].
    """
    gl.warp_specialize([(_meet, (OUT, FIRST)), (_meet, (OUT + 1, SECOND))], [1], [40])

"""What the warps of the 8-bit Hopper kernel do beside arithmetic: walk over rows, copy tiles, wait
for each other.

Places for tiles are given back, and turns passed, at barriers of the processor. Unlike an arrival
at an mbarrier these need no barrier of the warpgroup before: its warps may drift apart.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from accelkit.kernels._triton.gluon_kernel import _item
from accelkit.kernels._triton.gluon_parts import K_FREE, load, take

_ROWS = gl.constexpr(64)
_V_FREE = gl.constexpr(7)
_TURN = gl.constexpr(11)
"""Processor barrier on which the first warpgroup awaits its turn, before that of the second."""


@gluon.jit
def _pass_turn(WHO: gl.constexpr):
    """The turn goes to a warpgroup."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, 256; mov.b32 $0, 0;", "=r,r", [_TURN + WHO], gl.int32, False, 1
    )


@gluon.jit
def _await_turn(WHO: gl.constexpr):
    """A warpgroup waits until the other has passed it the turn."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.b32 $0, 0;", "=r,r", [_TURN + WHO], gl.int32, False, 1
    )


@gluon.jit
def _in_turn(x, WHO: gl.constexpr):
    """`x`, two numbers a thread, when the turn has come. It goes by way of a load that never
    happens (no maximum is infinite), so that what follows from it stays behind the barrier, and of
    stores that never happen, so that both numbers are there before the turn is awaited.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p, o; .reg .b32 a; mov.b32 a, 0; setp.eq.f32 p, $2, 0f7f800000;"
        " setp.eq.f32 o, $3, 0f7f800000; @p st.shared.f32 [a], $2; @o st.shared.f32 [a], $3;"
        f" bar.sync {_TURN + WHO}, 256; mov.f32 $0, $2; mov.f32 $1, $3;"
        " @p ld.volatile.shared.f32 $0, [a]; @p ld.volatile.shared.f32 $1, [a];}",
        "=f,=f,f,f", [x], gl.float32, False, 2,
    )  # fmt: skip


@gluon.jit
def _rounds(n_items):
    """How many items this program serves."""
    pid, width = gl.program_id(0), gl.num_programs(0)
    full = n_items // width
    place = pid
    if full % 2 == 1:
        place = width - 1 - pid
    return full + (place < n_items - full * width).to(gl.int32)


@gluon.jit
def _place(round):
    """The item of a round. Odd rounds run backwards: who had the longest row gets the shortest."""
    pid, width = gl.program_id(0), gl.num_programs(0)
    place = pid
    if round % 2 == 1:
        place = width - 1 - pid
    return round * width + place


@gluon.jit
def _key0(LISTS, at, tile, BK: gl.constexpr, BN: gl.constexpr):
    R: gl.constexpr = BK // BN
    return gl.load(LISTS + at + tile // R) * BK + (tile % R) * BN


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, ITEMS, LISTS, KV_HEADS, n_items,
    capacity, q, k, v, q_full, q_empty, k_full, v_full,
    BQ: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, PV8: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    R: gl.constexpr = BK // BN
    stage, copied = 0, 0
    for round in range(_rounds(n_items)):
        row, m0, b, slot, masked, clean = _item(
            ITEMS, _place(round), n_items, 2 * _ROWS, BQ // (2 * _ROWS)
        )
        hk = gl.load(KV_HEADS + slot)
        at = row.to(gl.int64) * capacity
        side = round % 2
        mbarrier.wait(q_empty.index(side), ((round // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(side), q_desc.block_type.nbytes * 2)
        load(q_desc, [b, slot, m0, 0], q_full.index(side), q.index(side * 2))
        load(q_desc, [b, slot, m0 + _ROWS, 0], q_full.index(side), q.index(side * 2 + 1))
        for j in range((masked + clean) * R):
            k0 = _key0(LISTS, at, j, BK, BN)
            if copied >= STAGES:
                take(K_FREE + stage)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load(k_desc, [b, hk, k0, 0], k_full.index(stage), k.index(stage))
            if copied >= STAGES:
                take(_V_FREE + stage)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            if PV8:
                load(v_desc, [b, hk, 0, k0], v_full.index(stage), v.index(stage))
            else:
                load(v_desc, [b, hk, k0, 0], v_full.index(stage), v.index(stage))
            stage, copied = (stage + 1) % STAGES, copied + 1
    for i in range(gl.minimum(copied, STAGES)):  # no barrier is left half full
        take(K_FREE + (copied - 1 - i) % STAGES)
        take(_V_FREE + (copied - 1 - i) % STAGES)


@gluon.jit
def _in_order(x):
    """`x`, by way of a store that never happens (no row sum is negative). Without it the assembler
    moves the wait for PV in front of the softmax, which is there to run under it.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000;"
        " @p st.shared.f32 [a], $1; mov.f32 $0, $1;}",
        "=f,f", [x], gl.float32, is_pure=False, pack=1,
    )  # fmt: skip

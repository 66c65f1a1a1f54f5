"""Tiles of keys or values in shared memory: a part of one entry of a list, or two entries that are
half as wide. These are copied apart, and still lie as one tile that a product can read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from accelkit.kernels._triton.gluon_parts import load

WIDTH = gl.constexpr(64)
"""Columns that one swizzle of shared memory spans."""
PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Whether this Triton has `reinterpret` under its public name."""


@gluon.jit
def tiles(entries, BK: gl.constexpr, BN: gl.constexpr):
    """Tiles of a row, and how many entries the first one lacks: a tile holds two that are half as
    wide. An empty row reads one tile and hides all of it.
    """
    n = gl.maximum((entries * BK + BN - 1) // BN, 1)
    return n, n * (BN // BK) - entries


@gluon.jit
def entry(tile, lacks, BK: gl.constexpr, BN: gl.constexpr):
    """Place in its list of a tile's first entry."""
    place = tile // (BK // BN) if BK >= BN else gl.maximum(tile * (BN // BK) - lacks, 0)
    return place


@gluon.jit
def fetch(
    desc, full, ring, stage, b, head, first, second, BK: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Copy a tile into a stage of a ring: BN rows from `first` on, or BK from there and BK from
    `second` on, then in columns of one swizzle each, as they lie in a tile.
    """
    if BK >= BN:
        mbarrier.expect(full, desc.block_type.nbytes)
        load(desc, [b, head, first, 0], full, ring.index(stage))
    else:
        PARTS: gl.constexpr = D // WIDTH
        mbarrier.expect(full, desc.block_type.nbytes * 2 * PARTS)
        for i in gl.static_range(PARTS):
            part = ring.index((stage * PARTS + i) * 2)
            load(desc, [b, head, first, i * WIDTH], full, part)
            part = ring.index((stage * PARTS + i) * 2 + 1)
            load(desc, [b, head, second, i * WIDTH], full, part)


@gluon.jit
def ring(
    desc, STAGES: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Shared memory for some tiles, as they are multiplied and as they are copied."""
    if BK >= BN:
        whole = gl.allocate_shared_memory(desc.dtype, [STAGES, 1, 1, BN, D], desc.layout)
        parts = whole
    else:
        shape: gl.constexpr = [STAGES * (D // WIDTH) * 2, 1, 1, BK, WIDTH]
        parts = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
        if PUBLIC:
            whole = parts.reinterpret(desc.dtype, [STAGES, 1, 1, BN, D], desc.layout)
        else:
            whole = parts._reinterpret(desc.dtype, [STAGES, 1, 1, BN, D], desc.layout)
    return whole, parts

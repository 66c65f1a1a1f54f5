"""Scores of a tile in the Hopper kernel: which are hidden, what they get besides, their softmax."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from accelkit.kernels._triton.gluon_tiles import entry


@gluon.jit
def hide(s, k0, limit, BN: gl.constexpr, layout: gl.constexpr):
    """Scores of a tile from key `k0` on, −inf beyond each row's limit."""
    col = k0 + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    return gl.where(col[None, :] <= limit[:, None], s, -float("inf"))


@gluon.jit
def hide_half(
    s, k0, limit, lacks, BK: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The same for a first tile of two entries, of which the second is whole or not there."""
    col = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    seen = (col < BK)[None, :] & ((k0 + col)[None, :] <= limit[:, None])
    return gl.where(seen | ((col >= BK) & (lacks == 0))[None, :], s, -float("inf"))


@gluon.jit
def hide_keys(s, places, there, phase, pred, limit, layout: gl.constexpr):
    """Scores of a tile of single keys, whose positions come with its values."""
    mbarrier.wait(there, phase, pred=pred)
    col = places.load(gl.SliceLayout(0, layout))
    return gl.where(col[None, :] <= limit[:, None], s, -float("inf"))


@gluon.jit
def limits(rows, count, n_k, q_start, CAUSAL: gl.constexpr):
    """Last key that each row may see; −1 in an empty row."""
    limit = rows * 0 + n_k - 1
    if CAUSAL:
        limit = gl.minimum(limit, rows + q_start)
    return gl.where(count > 0, limit, -1)


@gluon.jit
def entries_of(
    LISTS, tile, entries, lacks, there, BK: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    """First keys of a tile's one or two entries, 0 of what is not there."""
    place = LISTS + entry(tile, lacks, BK, BN)
    first = gl.load(place, mask=there & (entries > 0), other=0) * BK
    second = first
    if BK < BN:
        second = gl.load(place + 1, mask=there & (entries > lacks + 1), other=0) * BK
    return first, second


@gluon.jit
def biases_at(BIAS, first, second):
    """What base-2 scores get besides at two keys."""
    return gl.load(BIAS + first) * 1.4426950408889634, gl.load(BIAS + second) * 1.4426950408889634


@gluon.jit
def bias_of(
    BIAS, LISTS, tile, entries, lacks, n_k, BK: gl.constexpr, BN: gl.constexpr,
    layout: gl.constexpr, BIAS_BY: gl.constexpr,
):  # fmt: skip
    """What the base-2 scores of a tile get besides, from lists and bias of its row: numbers for its
    one or two entries, and one for each key. What there is none of is 0.
    """
    first, second, keys = 0.0, 0.0, 0.0
    if BIAS_BY != "":
        k0, k1 = entries_of(LISTS, tile, entries, lacks, True, BK, BN)
        if BIAS_BY == "entry":
            first, second = biases_at(BIAS, k0, k1)
        else:
            col = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
            if BK < BN:
                key = gl.where(col < BK, k0, k1 - BK) + col
            else:
                key = k0 + (tile % (BK // BN)) * BN + col
            keys = gl.load(BIAS + key, mask=key < n_k, other=0.0) * 1.4426950408889634
    return first, second, keys


@gluon.jit
def softmax(s, m, total, factor, bias, BK: gl.constexpr, BIAS_BY: gl.constexpr):
    """Probabilities of a tile, and maximum, rescaling factor and sum of its rows after it."""
    BN: gl.constexpr = s.shape[1]
    first, second, keys = bias
    if BIAS_BY == "key":
        s = s * factor + keys[None, :]
        m_new = gl.maximum(m, gl.max(s, 1))
        p = gl.exp2(s - m_new[:, None])
    elif BIAS_BY == "entry" and BK < BN:
        # Each half has its own shift, which costs its elements nothing. They share a maximum, which
        # may then be as much above the true one as their biases differ: by little.
        half = (gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout)) < BK)[None, :]
        m_new = gl.maximum(m, gl.max(s, 1) * factor + gl.maximum(first, second))
        shift = gl.where(half, (m_new - first)[:, None], (m_new - second)[:, None])
        p = gl.exp2(s * factor - shift)
    elif BIAS_BY == "entry":
        m_new = gl.maximum(m, gl.max(s, 1) * factor + first)
        p = gl.exp2(s * factor - (m_new - first)[:, None])
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * factor)
        p = gl.exp2(s * factor - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, alpha, total * alpha + gl.sum(p, 1)

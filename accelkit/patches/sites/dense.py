"""Dense heads as lists that read everything: by themselves, or riding along with sparse ones."""

from __future__ import annotations

from collections.abc import Iterable

from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall

UNIT = (128, 128)
ALONE = 2**27
"""Query-key pairs from which dense heads get a launch of their own on a GPU: below, it costs more
than what wide blocks save.
"""


def lists(call: AttentionCall, size: tuple[int, int] = UNIT) -> BlockIndex:
    """Every visible key for all heads of a call, in blocks of this size."""
    return BlockIndex.dense(len(call.heads), call.tiles(size)[0], size, call.q.device)


def unit(call: AttentionCall, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Blocks in which heads ride along with lists of these sizes: the largest; on a GPU, which
    computes pairs in narrow ones a quarter slower, those of UNIT where they are there, and where
    pairs are many.
    """
    known = set(sizes)
    pairs = len(call.q) * len(call.heads) * call.n_q * call.n_k / (1 + call.causal)
    wide = call.q.is_cuda and (UNIT in known or pairs >= ALONE)
    return UNIT if wide or not known else max(known)

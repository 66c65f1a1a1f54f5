"""Head groups of long calls in portions, whose lists and scores are there at one time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from accelkit.kernels import positions
from accelkit.patches.call import AttentionCall
from accelkit.patches.plan import HeadGroup
from accelkit.patches.sites import dense

MOST_CELLS = 2**28
"""Pairs of blocks, as `dense.UNIT`, of all heads that run at once: what a method scores, marks and
lists of them takes up to some GB.
"""


def portions(call: AttentionCall, groups: Sequence[HeadGroup]) -> Iterator[tuple[HeadGroup, bool]]:
    """Groups of few enough heads for a call of this length, and whether they are whole groups.
    Heads that share keys stay together.
    """
    pairs = len(call.q) * math.prod(call.tiles(dense.UNIT))
    most = max(1, MOST_CELLS // max(pairs, 1))
    for group in groups:
        if len(group.heads) <= most:
            yield group, True
            continue
        some: list[int] = []
        for _, slots in positions.groups(call.take(group.heads)):
            if some and len(some) + len(slots) > most:
                yield replace(group, heads=tuple(some)), False
                some = []
            some += [group.heads[slot] for slot in slots]
        yield replace(group, heads=tuple(some)), False

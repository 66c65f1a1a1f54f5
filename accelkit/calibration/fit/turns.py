"""Kernels of several units on a CPU, timed in turns.

Other programs slow a machine down for seconds at a time. Timed one after another, units would look
cheap or dear by when their turn was, and search would take the wrong one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial

from accelkit.calibration.fit.kernels import Point, anew, densities, judged, launches
from accelkit.calibration.timing import times_ms
from accelkit.kernels.cost import Check, Kernel
from accelkit.patches.call import AttentionCall

TURNS = (2, 5)
"""Readings of every launch, at least and at most; the least one counts."""
Size = tuple[int, int]


def kernels(
    calls: Mapping[int, AttentionCall], sizes: Iterable[Size], until: float
) -> dict[Size, tuple[Kernel, tuple[Check, ...]]]:
    """Coefficients of each unit, and what they say of launches that they have not seen; after the
    moment `until` no launch is timed more often than it must be.
    """
    points = {size: list(launches(calls, size, densities(size))) for size in sizes}
    spent = {size: [float("inf")] * len(some) for size, some in points.items()}
    for turn in range(TURNS[1]):
        if turn >= TURNS[0] and time.monotonic() > until:
            break
        for size, some in points.items():
            spent[size] = [min(ms, _once(p)) for ms, p in zip(spent[size], some, strict=True)]
    return {size: judged(size, some, spent[size]) for size, some in points.items()}


def _once(point: Point) -> float:
    return times_ms(partial(anew, point.one), 1, 0, point.one.call.q.device)[0]

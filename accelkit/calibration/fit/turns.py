"""A fit on a CPU: everything is timed in turns.

What is read more than once is read in another turn, as far apart as can be: other programs slow a
machine down for seconds at a time, and a probe beside a reading does not tell all of that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from accelkit.calibration.fit.kernels import Point, anew, densities, judged, launches
from accelkit.calibration.timing import steady_ms
from accelkit.kernels.cost import Check, Kernel
from accelkit.patches.call import AttentionCall

TURNS = (1, 3)
"""Readings of everything, at least and at most; their mean counts."""
Size = tuple[int, int]


class Timer:
    """Times pieces of work that come in the same order in every turn: milliseconds of a run, the
    mean of the turns so far.
    """

    def __init__(self) -> None:
        self._seen: list[list[float]] = []
        self._at = 0

    def begin(self) -> Timer:
        """Begin a turn."""
        self._at = 0
        return self

    def __call__(self, run: Callable[[], Any], times: int = 1) -> float:
        if self._at == len(self._seen):
            self._seen.append([])
        mine = self._seen[self._at]
        mine.append(steady_ms(run))
        self._at += 1
        return fmean(mine)


class Timers:
    """A timer for each of several sequences of work, and random lists for the kernels' units."""

    def __init__(self, calls: Mapping[int, AttentionCall]) -> None:
        self.calls = calls
        self._timers: dict[str, Timer] = defaultdict(Timer)
        self._points: dict[Size, list[Point]] = {}
        self._spent: dict[Size, list[float]] = {}

    def turn(self, name: str) -> Timer:
        """The timer of a sequence, at its beginning."""
        return self._timers[name].begin()

    def kernels(self, sizes: Iterable[Size]) -> None:
        """Time random lists of these units once more."""
        for size in sizes:
            if size not in self._points:
                few = densities(size, brief=True)
                self._points[size] = list(launches(self.calls, size, few))
        for size, some in self._points.items():
            clock = self.turn(f"{size}")
            self._spent[size] = [clock(partial(anew, p.one)) for p in some]

    def fitted(self, size: Size) -> tuple[Kernel, tuple[Check, ...]]:
        """Coefficients of a unit, and what they say of launches that they have not seen."""
        return judged(size, self._points[size], self._spent[size])

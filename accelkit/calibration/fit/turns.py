"""A fit on a CPU: everything is timed in turns.

Other programs slow a machine down for seconds at a time. Timed one after another, a method or a
unit would look cheap or dear by when its turn was, and search would take the wrong one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from accelkit.calibration.fit.kernels import Point, anew, densities, judged, launches
from accelkit.calibration.timing import times_ms
from accelkit.kernels.cost import Check, Kernel
from accelkit.patches.call import AttentionCall

TURNS = (2, 4)
"""Readings of everything, at least and at most; the least one counts."""
Size = tuple[int, int]


class Timer:
    """Times pieces of work that come in the same order in every turn: milliseconds of a run, the
    least of the turns so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seen: list[float] = []
        self._at = 0

    def begin(self) -> Timer:
        """Begin a turn."""
        self._at = 0
        return self

    def __call__(self, run: Callable[[], Any], times: int = 1) -> float:
        (ms,) = times_ms(run, 1, 0, self.device)
        if self._at < len(self._seen):
            ms = min(ms, self._seen[self._at])
        self._seen[self._at : self._at + 1] = [ms]
        self._at += 1
        return ms


class Timers:
    """A timer for each of several sequences of work, and random lists for the kernels' units."""

    def __init__(self, calls: Mapping[int, AttentionCall]) -> None:
        self.calls = calls
        self.device = next(iter(calls.values())).q.device
        self._timers: dict[str, Timer] = defaultdict(partial(Timer, self.device))
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

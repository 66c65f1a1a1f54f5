"""Tables of all places beside each step cache, and searches in them.

Errors come in two kinds that travel differently. What a method leaves out is alike in all tokens
and steps; what low precision rounds is like noise, and dense arithmetic makes some of it as well.
So options that leave nothing out are told from the others: they are *quiet*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from accelkit.calibration.assemble import Measured, SiteData
from accelkit.calibration.candidates import arithmetic_only
from accelkit.calibration.denoise.caches import Cached
from accelkit.calibration.search import DENSE, Choice, Solution, Table, predicted, search

ANY = 1e3
"""An error that allows everything."""
LEAST = 1e-6
"""Share of its calls that any step cache leaves a place, so that choices there are ranked."""


@dataclass
class Beside:
    """Tables beside each step cache, and what search finds in them. Step caches differ by the share
    that they leave of every choice's time, so the fronts of single places are made once.

    `kept` are the options of each place that `tables` have, where that is not all of them. `sets`
    are the fronts of sets of families that others have made.
    """

    tables: Sequence[Sequence[Table]]
    kept: Sequence[Sequence[int]] | None = None
    sets: dict[Any, Any] = field(default_factory=dict)
    fronts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fronts = [{"sets": self.sets} for _ in self.tables]
        self._fastest: dict[int, Solution] = {}

    def fastest(self, n: int) -> Solution:
        """The fastest solution of all beside the n-th step cache."""
        if n not in self._fastest:
            self._fastest[n] = self._searched(n, ANY)
        return self._fastest[n]

    def search(self, n: int, error: float) -> Solution:
        """The fastest solution beside the n-th step cache with at most this error."""
        best = self.fastest(n)
        return best if best.error <= error else self._searched(n, error)

    def _searched(self, n: int, error: float) -> Solution:
        like = next((m for m, f in enumerate(self.fronts) if m and "layers" in f), 0)
        if n and like and n != like:
            ways = zip(self.fronts[like]["layers"], self.tables[like], self.tables[n], strict=True)
            layers = [replace(f, ms=f.ms * b.dense_ms / a.dense_ms) for f, a, b in ways]
            self.fronts[n] |= {"layers": layers, "segments": {}}
        found = search(self.tables[n], error, self.fronts[n])
        if self.kept is None:
            return found
        choices = tuple(
            Choice(tuple(h if h == DENSE else kept[h] for h in c.heads))
            for c, kept in zip(found.choices, self.kept, strict=True)
        )
        return replace(found, choices=choices)


class Tables:
    """What search reads: all options beside each step cache, and the quiet ones alone.

    Among all of them the error of a quiet one is multiplied by `ratio`: how much less far it goes
    than that of the others.
    """

    def __init__(self, data: Sequence[SiteData], caches: Sequence[Cached]) -> None:
        self.data, self.caches = data, caches
        self.plain = [d.table for d in data]
        self.kept = [
            [i for i, o in enumerate(d.options) if arithmetic_only(o.method)] for d in data
        ]
        few = [
            replace(t, options=tuple(t.options[i] for i in kept), loans=())
            for t, kept in zip(self.plain, self.kept, strict=True)
        ]
        self.sets: dict[Any, Any] = {}
        self.quiet = Beside(self._beside(few, self.kept), self.kept, self.sets)
        self.weigh(1.0)

    def weigh(self, ratio: float) -> None:
        """Let errors of quiet options count for so much among all."""
        self.all = Beside(
            self._beside(scaled(self.plain, self.kept, ratio, 1.0), None), None, self.sets
        )

    def errors(self, choices: Sequence[Choice]) -> tuple[float, float]:
        """Predicted errors of what choices leave out, and of their quiet options."""
        loud = predicted(scaled(self.plain, self.kept, 0.0, 1.0), choices)
        return loud, predicted(scaled(self.plain, self.kept, 1.0, 0.0), choices)

    def _beside(
        self, tables: Sequence[Table], kept: Sequence[Sequence[int]] | None
    ) -> list[list[Table]]:
        options = [
            d.options if kept is None else [d.options[i] for i in kept[n]]
            for n, d in enumerate(self.data)
        ]
        ways = list(zip(tables, options, strict=True))
        return [[left(t, some, c) for t, some in ways] for c in self.caches]


def scaled(
    tables: Sequence[Table], kept: Sequence[Sequence[int]], quiet: float, loud: float
) -> list[Table]:
    """Tables with the errors of their quiet options (those in `kept`), and of the others,
    multiplied.
    """
    return [
        replace(
            t,
            options=tuple(
                replace(o, error=o.error * (quiet if i in some else loud))
                for i, o in enumerate(t.options)
            ),
        )
        for t, some in zip(tables, kept, strict=True)
    ]


def left(table: Table, options: Sequence[Measured], cache: Cached) -> Table:
    """A table with the calls that a step cache leaves. What methods that live over several steps
    remember would be too old beside it: they are as slow as dense there.
    """
    if cache.method is None:
        return table
    share = max(cache.left[table.site], LEAST)
    lasting = [table.dense_ms * (one.method.renewed(2) > 0) for one in options]
    return replace(
        table,
        dense_ms=share * table.dense_ms,
        ride_ms=share * table.ride_ms,
        options=tuple(
            replace(o, ms=share * np.maximum(o.ms, least))
            for o, least in zip(table.options, lasting, strict=True)
        ),
        fixed=_times(share, table.fixed),
    )


def _times(share: float, ms: Mapping[str, float]) -> dict[str, float]:
    return {k: share * v for k, v in ms.items()}

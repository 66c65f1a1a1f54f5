"""What a launch costs on this device: a fitted table and its predictions.

For one launch over heads h with `pairs_h` computed query-key pairs in tiles of `bq` rows,

    ms = launch + sort (many rows) + row · (heads · query tiles)
       + Σ_h pairs_h · (pair + far · log₂(tokens / NEAR)) + tail · tokens · mean density

with coefficients by unit `(bq, bk)`. Lists are lowered anew in every launch, many rows for longer;
beyond `NEAR` tokens keys no longer stay in the cache; the longest row ends alone. Dense attention
and whole `index()` calls are measured at a few lengths and interpolated. The table knows numbers
only, those of its own errors among them; `calibration.fit` fills it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from accelkit.kernels.index import ceil_div

NEAR = 16384
"""Tokens up to which the pairs of a call cost the same."""
FEW_ROWS = 128
"""Rows of a launch that are sorted at no cost of their own."""
TALL = 128
"""Query rows that a program of the kernel over single keys computes at one time."""
Points = tuple[tuple[int, float], ...]
"""Milliseconds by length in tokens, ascending."""


@dataclass(frozen=True)
class Kernel:
    """Coefficients of one unit on the backend that serves it: ms a launch, a row of a head, a
    million pairs, a thousand keys of the longest row, sorting more than `FEW_ROWS` rows, and a
    million pairs for each time that the length doubles beyond `NEAR`. `kept` is what a launch takes
    less over lists that an earlier one has brought into the order in which they run. `lanes` is how
    many programs run at one time where many of them have one list and so end at one time: the last
    turn is not full, and that counts. 0 where they are of all lengths.

    `error` is the mean relative error on points that the fit did not see.
    """

    launch: float
    row: float
    pair: float
    error: float = 0.0
    backend: str = ""
    tail: float = 0.0
    sort: float = 0.0
    far: float = 0.0
    kept: float = 0.0
    lanes: int = 0

    def turns(self, rows: float) -> float:
        """Turns of programs ÷ what they would be if the last one was full, for so many query
        rows.
        """
        full = rows / TALL / self.lanes if self.lanes else 0.0
        return math.ceil(full) / full if full else 1.0


@dataclass(frozen=True)
class Check:
    """A prediction of something that the fit did not see: a launch of a unit over random lists
    (`term` "kernel") or a whole call of a method ("call"), and what it took.
    """

    term: str
    what: str
    tokens: int
    heads: int
    density: float
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative error; above 0 where the prediction is too slow."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class MethodCost:
    """What a method costs beside the kernels that read its lists, for all heads of a layer; `share`
    of it is paid however few heads take part. `terms` are what `points` are the sum of, by the
    names in `TERMS`. `lists` is, by length, what its own lists took ÷ what their kernels are
    predicted to take, which were fitted over random lists: neighbours in windows and tiles read
    the same keys. `rows` is the same of the part that does not shrink with density, in which a few
    long rows among short ones count; without it `lists` holds for all. `error` is how far the
    prediction of a whole call lay from one that the fit did not see.
    """

    TERMS: ClassVar = ("estimator", "selection", "permutation")

    points: Points
    share: float = 1.0
    error: float = 0.0
    terms: Mapping[str, Points] = field(default_factory=dict)
    lists: Points = ()
    rows: Points = ()


@dataclass(frozen=True)
class CostTable:
    """Costs of one device, dtype and head shape.

    `dense` is the best dense path for a whole layer of `heads` heads, `ride` all of them as dense
    heads run beside sparse ones, both in ms. `on_prompts` is, by family of settings, what its lists
    took on a user's prompts ÷ what the rest of the table says of them.
    """

    device: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    dense: Points
    ride: Points
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    methods: Mapping[str, MethodCost] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    causal: bool = True
    checks: tuple[Check, ...] = ()
    on_prompts: Mapping[str, float] = field(default_factory=dict)

    def dense_ms(self, tokens: int) -> float:
        """A layer whose heads are all dense, as the unpatched model runs it."""
        return interpolate(self.dense, tokens)

    def ride_ms(self, tokens: int) -> float:
        """One dense head in a layer that has sparse ones."""
        return interpolate(self.ride, tokens) / self.heads

    def launch_ms(self, size: tuple[int, int], kept: bool = False) -> float:
        """What a launch costs before any head takes part; `kept`: over lists that ran before."""
        k = self._kernel(size)
        return max(k.launch + k.sort - kept * k.kept, 0.0)

    def head_ms(self, size: tuple[int, int], tokens: int, density: float) -> float:
        """One head of a call of `tokens` rows at `density` = computed ÷ visible pairs, with its
        part in the tail of a launch over all heads.
        """
        k = self._kernel(size)
        rows = ceil_div(tokens, size[0])
        pairs = density * visible_pairs(tokens, self.causal) / 1e6
        turns = k.turns(self.heads * rows * size[0])
        tail = k.tail * density * tokens / 1e3 / self.heads
        return turns * (k.row * rows + (k.pair + k.far * beyond(tokens)) * pairs) + tail

    def rows_ms(self, size: tuple[int, int], tokens: int) -> float:
        """What a head's rows cost whatever is in their lists."""
        return self.head_ms(size, tokens, 0.0)

    def random_ms(self, size: tuple[int, int], tokens: int, densities: Sequence[float]) -> float:
        """A launch over random lists of one unit, of these densities by head."""
        alone = replace(self, heads=len(densities))  # the last turn and the longest row are theirs
        k, rows = self._kernel(size), len(densities) * ceil_div(tokens, size[0])
        sort = k.sort if rows > FEW_ROWS else 0.0
        return k.launch + sort + sum(alone.head_ms(size, tokens, d) for d in densities)

    def lists_ms(
        self, kind: str, size: tuple[int, int], tokens: int, densities: Sequence[float]
    ) -> list[float]:
        """Heads of a call over a method's lists of one unit, without the launch."""
        cost, each = self.methods[kind], self.rows_ms(size, tokens)
        own, rows = (_between(p, tokens) for p in (cost.lists, cost.rows or cost.lists))
        return [rows * each + own * (self.head_ms(size, tokens, d) - each) for d in densities]

    def method_ms(self, kind: str, tokens: int, anew: float = 1.0) -> tuple[float, float]:
        """A method beside its kernels: ms of the layer, and ms more for each head. Lists are made
        in the share `anew` of calls; rows are laid out in all of them.
        """
        cost = self.methods[kind]
        ms = interpolate(cost.points, tokens)
        if anew < 1 and "permutation" in cost.terms:
            moving = min(interpolate(cost.terms["permutation"], tokens), ms)
            ms = anew * (ms - moving) + moving
        else:
            ms *= anew
        return ms * cost.share, ms * (1 - cost.share) / self.heads

    def call_ms(
        self,
        kind: str,
        tokens: int,
        lists: Sequence[tuple[tuple[int, int], Sequence[float]]],
        anew: float = 1.0,
    ) -> float:
        """A whole call of a layer whose heads all run one method: its lists' units, each with the
        densities of the heads. Lists that are never made anew are kept.
        """
        once, each = self.method_ms(kind, tokens, anew)
        return once + sum(
            self.launch_ms(size, anew == 0) + sum(self.lists_ms(kind, size, tokens, densities))
            for size, densities in lists
        ) + each * self.heads  # fmt: skip

    def worst(self, most: int) -> list[Check]:
        """The predictions that lay farthest off what was measured, the worst first."""
        return sorted(self.checks, key=lambda c: -abs(c.error))[:most]

    def error(self) -> float:
        """The worst kernel's fit error on points that the fit did not see."""
        return max((k.error for k in self.kernels.values()), default=0.0)

    @cached_property
    def _by_unit(self) -> dict[tuple[int, int], Kernel]:
        return {unit(name): k for name, k in self.kernels.items()}

    def _kernel(self, size: tuple[int, int]) -> Kernel:
        known = self._by_unit
        if size in known:
            return known[size]
        # A unit that was not measured: the nearest one of its kind, tokens apart on a log scale.
        alike = [s for s in known if (s[1] == 1) == (size[1] == 1)] or list(known)
        if not alike:
            raise KeyError(f"the cost table has no kernel for unit {size}; fit it on this device")
        near = min(
            alike, key=lambda s: (abs(math.log(s[0] / size[0])) + abs(math.log(s[1] / size[1])), s)
        )
        return known[near]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CostTable:
        """The table that `to_dict` wrote."""
        fields = dict(data)
        for name in ("dense", "ride"):
            fields[name] = _points(fields[name])
        fields["kernels"] = {k: Kernel(**v) for k, v in fields["kernels"].items()}
        fields["checks"] = tuple(Check(**v) for v in fields.get("checks", ()))
        fields["methods"] = {
            k: MethodCost(
                **{
                    **v,
                    "points": _points(v["points"]),
                    "lists": _lists(v.get("lists", ())),
                    "rows": _points(v.get("rows", ())),
                    "terms": {t: _points(p) for t, p in v.get("terms", {}).items()},
                }
            )
            for k, v in fields["methods"].items()
        }
        return CostTable(**fields)


def visible_pairs(tokens: int, causal: bool = True) -> float:
    """Query-key pairs of one head over `tokens` tokens."""
    return tokens * (tokens + 1) / 2 if causal else float(tokens) ** 2


def beyond(tokens: int) -> float:
    """How often a length doubles beyond `NEAR`."""
    return math.log2(max(tokens, NEAR) / NEAR)


def name(size: tuple[int, int]) -> str:
    """Key of a unit in the table: "128x128"."""
    return f"{size[0]}x{size[1]}"


def unit(text: str) -> tuple[int, int]:
    """The unit that `name` wrote."""
    bq, _, bk = text.partition("x")
    return int(bq), int(bk)


def interpolate(points: Sequence[Sequence[float]], tokens: int) -> float:
    """Milliseconds at `tokens`: a constant, a linear and a quadratic part and, for rows that are
    filled up to a power of two in kernels, a part that grows with those; none negative, as near to
    the points as they come, times what these lie off it, between them on logarithmic axes.

    Two points are joined by a power of the length; a single one grows with the length. Raises
    `ValueError` without any.
    """
    if not points:
        raise ValueError("interpolate needs at least one measured point")
    if len(points) == 1:
        n, ms = points[0]
        return ms * tokens / n
    known = tuple((int(n), max(float(ms), 1e-9)) for n, ms in points)
    if len(known) == 2:
        return _power(known, tokens)
    parts = _smooth(known)

    def curve(n: int) -> float:
        return sum(c * f for c, f in zip(parts, _growth(n), strict=False))

    return curve(tokens) * _between([(n, ms / curve(n)) for n, ms in known], tokens)


def _growth(tokens: int) -> tuple[float, float, float, float]:
    """What the parts of a time are proportional to."""
    n = float(tokens)
    return 1.0, n, n * n, n * (1 << (tokens - 1).bit_length())


@lru_cache(maxsize=512)
def _smooth(points: Points) -> tuple[float, ...]:
    """The parts of the curve that comes nearest to the points. Only lengths that fill up their
    power of two differently tell the last part from the quadratic one.
    """
    filled = {(1 << (n - 1).bit_length()) / n for n, _ in points}
    parts = 4 if len(points) > 3 and max(filled) > 1.01 * min(filled) else 3
    return tuple(least_squares([_growth(n)[:parts] for n, _ in points], [m for _, m in points]))


def _between(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """A factor at `tokens`; beyond the ends that of the end, 1 without points."""
    if not points:
        return 1.0
    if len(points) == 1:
        return points[0][1]
    return _power(points, min(max(tokens, points[0][0]), points[-1][0]))


def _power(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """Straight lines between points on logarithmic axes; beyond the ends the nearest goes on."""
    right = next((i for i, p in enumerate(points) if p[0] >= tokens), len(points) - 1)
    (n0, a), (n1, b) = points[max(right, 1) - 1], points[max(right, 1)]
    return a * (tokens / n0) ** (math.log(b / a) / math.log(n1 / n0))


def least_squares(features: Sequence[Sequence[float]], ms: Sequence[float]) -> list[float]:
    """Coefficients ≥ 0 of least relative error; features that would go negative drop out."""
    import numpy as np

    x = np.asarray(features, float) / np.asarray(ms, float)[:, None]
    y = np.ones(len(ms))
    active = list(range(x.shape[1]))
    found = np.zeros(x.shape[1])
    while active:
        scale = np.abs(x[:, active]).max(0).clip(1e-30)
        part = np.linalg.lstsq(x[:, active] / scale, y, rcond=None)[0] / scale
        if (part >= 0).all():
            found[active] = part
            break
        active.pop(int(np.argmin(part * scale)))
    return found.tolist()


def _lists(lists: float | Sequence[Sequence[float]]) -> Points:
    """By length; older tables hold one number for all of them."""
    return ((1, float(lists)),) if isinstance(lists, (int, float)) else _points(lists)


def _points(points: Sequence[Sequence[float]]) -> Points:
    return tuple((int(n), float(ms)) for n, ms in points)

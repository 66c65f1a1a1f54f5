"""Chooses: least Σ ms with √ Σ_sites (Σ_heads weight · error)² ≤ ε.

Errors of the heads of a site point the same way more often than not; those of different sites do
not, so they add like independent noise.

A front holds the pairs (error, ms) that no other choice beats in both. Heads merge into the front
of a set of families, whose estimators the layer pays once; the sets of a layer unite; layers merge
into the model's front, on which the answer is the cheapest point within ε. Lists may be lent: a
dynamic programme cuts the layers into single sites and into segments, each served by its first
site, the anchor, whose own heads must then run what they lend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

DENSE = -1
MOST_FAMILIES = 2
"""Families besides dense that a layer may use."""
FEW_SETS = 12
"""Of more sets of families than these, only promising ones get a front."""
PRICES = (-2.0, 6.0, 65)
"""Prices of error at which sets are compared: powers of ten, and how many, of the price at which an
error of 1 costs as much as the dense layer.
"""
NEAR = 0.1
"""Share of the least price within which a set is promising."""
MOST_SETS = 16
"""Most sets of several families that get a front."""
POINTS = 300
"""Points that a front keeps; they lie closer together where errors are small."""
MANY = 3000
"""Points of which those that no grain keeps are dropped before they are sorted."""


@dataclass(frozen=True)
class Option:
    """One measured candidate of a site: setting `setting` of `family`; arrays are per head.

    `error` is relative, `ms` what a head adds to the launch.
    """

    family: str
    setting: int
    error: np.ndarray
    ms: np.ndarray


@dataclass(frozen=True)
class Loan:
    """Lists of an earlier site `anchor` (its place in the tables), run there as `option`.

    Head h reads the lists of the anchor's head `heads[h]`.
    """

    anchor: int
    option: int
    heads: tuple[int, ...]
    error: np.ndarray
    ms: np.ndarray


@dataclass(frozen=True)
class Table:
    """What search knows of one site. `fixed` is the ms that a family costs the layer once."""

    site: str
    weight: np.ndarray
    dense_ms: float
    ride_ms: float
    options: tuple[Option, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    loans: tuple[Loan, ...] = ()

    @property
    def heads(self) -> int:
        return len(self.weight)


@dataclass(frozen=True)
class Choice:
    """What a site runs: for each head an option's place, or DENSE; or, with `loan`, the lists of
    that loan for the heads in `borrowed`, and `heads` for the others.
    """

    heads: tuple[int, ...]
    loan: int | None = None
    borrowed: tuple[bool, ...] = ()

    @property
    def dense(self) -> bool:
        return all(h == DENSE for h in self.heads) and not any(self.borrowed)


@dataclass(frozen=True)
class Solution:
    """A choice for every site with its predicted cost and error."""

    choices: tuple[Choice, ...]
    ms: float
    error: float


def search(tables: Sequence[Table], budget: float, memo: dict | None = None) -> Solution:
    """The cheapest choice with a predicted error of at most `budget`, up to the grain of the
    fronts.

    Sites are in running order. `memo` keeps the fronts of single layers for other budgets; what it
    has under "sets" may be shared with other tables of the same sites.
    """
    memo, most = {} if memo is None else memo, budget**2
    if "layers" not in memo:
        memo["layers"] = [_layer(t, known=memo.get("sets")) for t in tables]
        memo["segments"] = _segments(tables, memo["layers"])
    whole = [_Front(np.zeros(1), np.zeros(1), lambda _: ())]
    for end in range(1, len(tables) + 1):
        ways = [_merge(whole[end - 1], memo["layers"][end - 1], most)]
        for begin, segment in memo["segments"].get(end, ()):
            ways.append(_merge(whole[begin], segment, most))
        whole.append(_unite(ways, most))
    choices = whole[-1].made(int(whole[-1].ms.argmin()))
    ms = sum(cost(t, c) for t, c in zip(tables, choices, strict=True))
    return Solution(choices, ms, predicted(tables, choices))


def predicted(tables: Sequence[Table], choices: Sequence[Choice]) -> float:
    """Budget error of a choice for every site."""
    return composed([loss(t, c) for t, c in zip(tables, choices, strict=True)])


def composed(losses: Sequence[float]) -> float:
    """What the losses of several sites make together."""
    return float(sum(one**2 for one in losses) ** 0.5)


def cost(table: Table, choice: Choice) -> float:
    """Milliseconds of a site."""
    if choice.dense:
        return table.dense_ms
    ms, paid = 0.0, set()
    for h, at in enumerate(choice.heads):
        if choice.borrowed and choice.borrowed[h]:
            ms += float(table.loans[choice.loan].ms[h])  # type: ignore[index]
        elif at == DENSE:
            ms += table.ride_ms
        else:
            option = table.options[at]
            ms += float(option.ms[h])
            paid.add(option.family)
    return ms + sum(table.fixed.get(f, 0.0) for f in sorted(paid))


def loss(table: Table, choice: Choice) -> float:
    """Σ weight · error of the heads of a site."""
    total = 0.0
    for h, at in enumerate(choice.heads):
        if choice.borrowed and choice.borrowed[h]:
            total += float(table.weight[h] * table.loans[choice.loan].error[h])  # type: ignore[index]
        elif at != DENSE:
            total += float(table.weight[h] * table.options[at].error[h])
    return total


# -- fronts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Front:
    """Points by ascending error and descending ms; `made(i)` tells the choices behind point i."""

    error: np.ndarray
    ms: np.ndarray
    made: Callable[[int], tuple]


def _pruned(error: np.ndarray, ms: np.ndarray, budget: float | None) -> np.ndarray:
    """Places of the points that no other beats, thinned to the grain of a front.

    Grains are even up to `budget`; without one they are even on a logarithmic scale.
    """
    places = np.arange(len(error))
    if budget is not None:
        places = places[error <= budget]
    if not len(places):
        return places
    if budget is not None and len(places) > MANY:
        places = _cheapest(error, ms, places, budget)
    places = places[np.lexsort((ms[places], error[places]))]
    least = np.minimum.accumulate(ms[places])
    better = np.concatenate([[True], least[1:] < least[:-1]])
    places = places[better]
    if len(places) <= POINTS:
        return places
    e = error[places]
    top = max(budget if budget is not None else e[-1], 1e-30)
    at = e / top if budget is not None else 1 + np.log10(np.maximum(e / top, 1e-8)) / 8
    grain = np.floor(at * (POINTS - 1))
    # The last point of a grain is its cheapest.
    last = np.concatenate([grain[1:] != grain[:-1], [True]])
    last[0] = True
    return places[last]


def _cheapest(error: np.ndarray, ms: np.ndarray, places: np.ndarray, budget: float) -> np.ndarray:
    """Those of many points that are the cheapest of their grain, and those of least error: no
    other one would be kept, and sorting them all takes long.
    """
    grain = (error[places] / max(budget, 1e-30) * (POINTS - 1)).astype(np.int64)
    least = np.full(POINTS, np.inf)
    np.minimum.at(least, grain, ms[places])
    first = error[places] == error[places].min()
    return places[(ms[places] == least[grain]) | first]


def _merge(a: _Front, b: _Front, budget: float | None = None) -> _Front:
    """Every point of one with every point of the other."""
    error = (a.error[:, None] + b.error).ravel()
    ms = (a.ms[:, None] + b.ms).ravel()
    keep = _pruned(error, ms, budget)
    width = len(b.error)

    def made(i: int) -> tuple:
        return a.made(int(keep[i] // width)) + b.made(int(keep[i] % width))

    return _Front(error[keep], ms[keep], made)


def _unite(fronts: Sequence[_Front], budget: float | None = None) -> _Front:
    """The points of several fronts."""
    if len(fronts) == 1:
        return fronts[0]
    error, ms = np.concatenate([f.error for f in fronts]), np.concatenate([f.ms for f in fronts])
    keep = _pruned(error, ms, budget)
    ends = np.cumsum([len(f.error) for f in fronts])

    def made(i: int) -> tuple:
        which = int(np.searchsorted(ends, keep[i], side="right"))
        return fronts[which].made(int(keep[i] - ends[which] + len(fronts[which].error)))

    return _Front(error[keep], ms[keep], made)


def _layer(
    table: Table,
    forced: Mapping[int, int] | None = None,
    loan: int | None = None,
    known: dict | None = None,
) -> _Front:
    """The front of one site, its errors squared. `forced` heads must run the option given; with
    `loan` every head may read that loan's lists, and some head does. `known` fronts of sets are
    taken and added to.
    """
    forced = forced or {}
    needed = {table.options[o].family for o in forced.values()}
    names = sorted({o.family for o in table.options})
    most = MOST_FAMILIES - (loan is not None)
    ways: list[_Front] = []
    sets: list[tuple[str, ...]] = []
    if not forced and loan is None:
        still = (Choice((DENSE,) * table.heads),)
        ways.append(_Front(np.zeros(1), np.array([table.dense_ms]), lambda _: still))
    for count in range(0 if loan is not None else 1, most + 1):
        for some in combinations(names, count):
            if needed <= set(some):
                sets.append(some)
    if not forced and loan is None and len(sets) > FEW_SETS:
        sets = _worth(table, sets)
    if known is not None and not forced and loan is None:
        ways += [_known(table, some, known) for some in sets]
    else:
        ways += [_set(table, some, forced, loan) for some in sets]
    front = _unite(ways)
    return _Front(front.error**2, front.ms, front.made)


def _worth(table: Table, sets: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Single families, and the sets that are likely to hold points of the layer's front: at some
    price of error they come near the least price of all, and each of their families serves a head.
    Heads choose apart at a price, so that every set's is at hand without its front.
    """
    unit = table.dense_ms / max(float(table.weight.sum()), 1e-30)
    price = unit * np.logspace(*PRICES)[:, None]
    alone: dict[str, np.ndarray] = {}  # [price, head]
    for o in table.options:
        paid = o.ms + price * (table.weight * o.error)
        alone[o.family] = np.minimum(alone.get(o.family, table.ride_ms), paid)
    # Family by family of every set; what a smaller set lacks is its first one again.
    at = {f: i for i, f in enumerate(alone)}
    most = max(map(len, sets))
    which = np.array([[at[f] for f in (*s, *s[:1] * (most - len(s)))] for s in sets])
    fixed = np.array([table.fixed.get(f, 0.0) for f in alone])
    each = np.stack(list(alone.values()))
    total = each[which].min(1).sum(-1)  # [set, price]
    total += np.array([sum(table.fixed.get(f, 0.0) for f in s) for s in sets])[:, None]
    apart = (each.sum(-1) + fixed[:, None])[which]  # [set, family, price]
    least = total.min(0).clip(max=table.dense_ms)
    used = (apart < table.heads * table.ride_ms).all(1) & (apart.max(1) <= least * (1 + NEAR))
    mixed = used | (total < apart.min(1))
    above = np.where(mixed, total / least, np.inf).min(1)
    order = [n for n in above.argsort(kind="stable") if len(sets[n]) > 1]
    together = [sets[n] for n in order if above[n] <= 1 + NEAR]
    return [s for s in sets if len(s) == 1] + together[:MOST_SETS]


def _known(table: Table, some: Sequence[str], known: dict) -> _Front:
    """The front of a set where heads choose freely. Tables that differ in other families, or in
    the unit of time alone, share it: a step cache leaves the same part of every time.
    """
    unit = table.dense_ms or 1.0
    at = tuple(i for i, o in enumerate(table.options) if o.family in some)
    mine = [table.options[i] for i in at]
    numbers = [
        table.ride_ms / unit, sum(table.fixed.get(f, 0.0) for f in some) / unit,
        *(table.weight * o.error for o in mine), *(o.ms / unit for o in mine),
    ]  # fmt: skip
    key = (table.site, at, np.hstack(numbers).astype(np.float32).tobytes())
    if key not in known:
        front = _set(table, some, {}, None)
        known[key] = replace(front, ms=front.ms / unit)
    return replace(known[key], ms=known[key].ms * unit)


def _set(table: Table, some: Sequence[str], forced: Mapping[int, int], loan: int | None) -> _Front:
    """The front of a site whose heads choose among some families, dense and a loan."""
    at = [i for i, o in enumerate(table.options) if o.family in some]
    front = _Front(
        np.zeros(1), np.array([sum(table.fixed.get(f, 0.0) for f in some)]), lambda _: ()
    )
    for h in range(table.heads):
        mine = [forced[h]] if h in forced else [DENSE, *at]
        error = [0.0 if o == DENSE else table.weight[h] * table.options[o].error[h] for o in mine]
        ms = [table.ride_ms if o == DENSE else table.options[o].ms[h] for o in mine]
        picks = [(o, False) for o in mine]
        if loan is not None:
            error.append(table.weight[h] * table.loans[loan].error[h])
            ms.append(table.loans[loan].ms[h])
            picks.append((DENSE, True))
        e, m = np.array(error, float), np.array(ms, float)
        keep = _pruned(e, m, None)
        made = _pick([picks[k] for k in keep])
        front = _merge(front, _Front(e[keep], m[keep], made))

    def choice(i: int) -> tuple[Choice]:
        picked = front.made(i)
        heads = tuple(o for o, _ in picked)
        borrowed = tuple(b for _, b in picked)
        return (Choice(heads, loan, borrowed) if any(borrowed) else Choice(heads),)

    paid = front.ms.copy()
    if choice(0)[0].dense:  # nothing is there to ride along with
        paid[0] = table.dense_ms
    return _Front(front.error, paid, choice)


def _pick(picks: Sequence[tuple[int, bool]]) -> Callable[[int], tuple]:
    return lambda i: (picks[i],)


def _segments(
    tables: Sequence[Table], layers: Sequence[_Front]
) -> dict[int, list[tuple[int, _Front]]]:
    """Fronts of all segments by their end: the anchor with what it lends, then sites that borrow
    from it, stand alone or form segments of their own; the last one borrows. The anchor's heads
    that any of them may read run what is lent.
    """
    found: dict[int, list[tuple[int, _Front]]] = {}
    lent: dict[tuple[int, int], dict[int, int]] = {}  # borrowers, each with the loan's place
    for i, table in enumerate(tables):
        for n, loan in enumerate(table.loans):
            lent.setdefault((loan.anchor, loan.option), {}).setdefault(i, n)
    # The last anchors first: theirs are the segments within those of others.
    for (anchor, option), borrowers in sorted(lent.items(), reverse=True):
        forced: dict[int, int] = {}
        rest = {anchor + 1: _Front(np.zeros(1), np.zeros(1), lambda _: ())}
        for i in range(anchor + 1, max(borrowers) + 1):
            here = layers[i]
            if i in borrowers:
                at = borrowers[i]
                forced |= dict.fromkeys(tables[i].loans[at].heads, option)
                here = _unite([_layer(tables[i], loan=at), here])
            inner = [(b, s) for b, s in found.get(i + 1, ()) if b > anchor]
            ways = [_merge(rest[i], here), *(_merge(rest[b], s) for b, s in inner)]
            rest[i + 1] = _unite(ways)
            if i in borrowers:
                first = _layer(tables[anchor], forced)
                found.setdefault(i + 1, []).append((anchor, _merge(first, rest[i + 1])))
    return found

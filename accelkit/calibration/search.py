"""Chooses: least Σ ms with Σ weight · error ≤ ε.

Prices first (Lagrange): at a price of an error each layer chooses by itself, from all sets of at most
two families, the policy of every head; a layer pays the estimator of each family once. Lists may be
lent: a dynamic programme over layers cuts them into segments, each served by its first layer, the
anchor. The price is found by bisection; what it leaves of ε is spent greedily, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

DENSE = -1
MOST_FAMILIES = 2
"""Families besides dense that a layer may use."""
_STEPS = 60


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
    """What a site runs: for each head an option's place, or DENSE; or, with `loan`, the lists of that
    loan for the heads in `borrowed`, and `heads` for the others.
    """

    heads: tuple[int, ...]
    loan: int | None = None
    borrowed: tuple[bool, ...] = ()

    @property
    def dense(self) -> bool:
        return all(h == DENSE for h in self.heads) and not any(self.borrowed)


@dataclass(frozen=True)
class Solution:
    """A choice for every site with its predicted cost and Σ weight · error."""

    choices: tuple[Choice, ...]
    ms: float
    error: float


def search(tables: Sequence[Table], budget: float) -> Solution:
    """The cheapest choice whose Σ weight · error is at most `budget`.

    Sites are in running order. Exact on the convex hull; off it, greedy filling leaves a gap that is
    small against one head's share.
    """
    choices = [Choice((DENSE,) * t.heads) for t in tables]
    free = _at_price(tables, 0.0)
    if _error(tables, free) <= budget:
        return _solution(tables, free)
    low, high = 1e-9, 1.0
    while _error(tables, _at_price(tables, high)) > budget and high < 1e18:
        high *= 100.0
    over = free
    for _ in range(_STEPS):
        price = (low * high) ** 0.5
        found = _at_price(tables, price)
        if _error(tables, found) <= budget:
            choices, high = found, price
        else:
            over, low = found, price
    best = _fill(tables, choices, over, budget)
    dense = [Choice((DENSE,) * t.heads) for t in tables]
    return min((_solution(tables, c) for c in (best, dense)), key=lambda s: s.ms)


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
    """Σ weight · error of a site."""
    total = 0.0
    for h, at in enumerate(choice.heads):
        if choice.borrowed and choice.borrowed[h]:
            total += float(table.weight[h] * table.loans[choice.loan].error[h])  # type: ignore[index]
        elif at != DENSE:
            total += float(table.weight[h] * table.options[at].error[h])
    return total


# -- at a price -----------------------------------------------------------------------------------


def _at_price(tables: Sequence[Table], price: float) -> list[Choice]:
    """Every site's best choice when an error of one costs `price` ms; segments by dynamic programme."""
    alone = [_layer(t, price) for t in tables]
    value = [_priced(t, c, price) for t, c in zip(tables, alone, strict=True)]
    n = len(tables)
    best = [0.0] * (n + 1)
    back: list[tuple[int, dict[int, Choice]]] = [(0, {})] * (n + 1)
    segments = _segments(tables, price, alone, value)
    for end in range(1, n + 1):
        best[end], back[end] = best[end - 1] + value[end - 1], (end - 1, {end - 1: alone[end - 1]})
        for begin, total, taken in segments.get(end, ()):
            if best[begin] + total < best[end] - 1e-12:
                best[end], back[end] = best[begin] + total, (begin, taken)
    choices: dict[int, Choice] = {}
    end = n
    while end:
        begin, taken = back[end]
        choices |= taken
        end = begin
    return [choices[i] for i in range(n)]


def _layer(table: Table, price: float, forced: Mapping[int, int] | None = None) -> Choice:
    """The best choice of one site: each set of families in turn, each head the best of the set.

    `forced` heads must run the option given.
    """
    forced = forced or {}
    best, least = None, np.inf
    if not forced:
        best, least = Choice((DENSE,) * table.heads), table.dense_ms
    if not table.options:
        return best or Choice((DENSE,) * table.heads)
    names = sorted({o.family for o in table.options})
    needed = {table.options[o].family for o in forced.values()}
    priced = np.stack([o.ms + price * table.weight * o.error for o in table.options])
    rest = np.full((1, table.heads), table.ride_ms)
    for count in range(1, MOST_FAMILIES + 1):
        for some in combinations(names, count):
            if not needed <= set(some):
                continue
            at = [i for i, o in enumerate(table.options) if o.family in some]
            columns = np.concatenate([priced[at], rest])
            pick = columns.argmin(0)
            total = columns.min(0)
            for h, o in forced.items():
                pick[h], total[h] = at.index(o), priced[o][h]
            heads = tuple(at[p] if p < len(at) else DENSE for p in pick.tolist())
            used = {table.options[i].family for i in heads if i != DENSE}
            whole = float(total.sum()) + sum(table.fixed.get(f, 0.0) for f in used)
            if used and whole < least:
                best, least = Choice(heads), whole
    assert best is not None
    return best


def _segments(
    tables: Sequence[Table], price: float, alone: Sequence[Choice], value: Sequence[float]
) -> dict[int, list[tuple[int, float, dict[int, Choice]]]]:
    """Every worthwhile segment by its end: first site, priced cost, choices.

    Within a segment a site borrows from the anchor when that is cheaper than standing alone.
    """
    found: dict[int, list[tuple[int, float, dict[int, Choice]]]] = {}
    lent = sorted({(loan.anchor, loan.option) for t in tables for loan in t.loans})
    for anchor, option in lent:
        forced: dict[int, int] = {}
        taken: dict[int, Choice] = {}
        saved = 0.0
        for i in range(anchor + 1, len(tables)):
            mine = _borrowing(tables[i], price, anchor, option)
            taken[i] = alone[i]
            if mine is not None:
                choice, total = mine
                needs = {
                    tables[i].loans[choice.loan].heads[h]  # type: ignore[index]
                    for h, b in enumerate(choice.borrowed)
                    if b
                }
                grown = forced | dict.fromkeys(needs, option)
                first = _layer(tables[anchor], price, grown)
                extra = _priced(tables[anchor], first, price) - value[anchor]
                gain = value[i] - total
                if gain > 0:
                    taken[i], forced, saved = choice, grown, saved + gain
                    whole = sum(value[anchor : i + 1]) + extra - saved
                    found.setdefault(i + 1, []).append((anchor, whole, {**taken, anchor: first}))
    return found


def _borrowing(table: Table, price: float, anchor: int, option: int) -> tuple[Choice, float] | None:
    """The best choice of a site that reads the anchor's lists, and its priced cost."""
    for at, loan in enumerate(table.loans):
        if (loan.anchor, loan.option) != (anchor, option):
            continue
        priced = loan.ms + price * table.weight * loan.error
        borrowed = priced < table.ride_ms
        if borrowed.any():
            choice = Choice((DENSE,) * table.heads, at, tuple(borrowed.tolist()))
            return choice, float(np.where(borrowed, priced, table.ride_ms).sum())
    return None


def _priced(table: Table, choice: Choice, price: float) -> float:
    return cost(table, choice) + price * loss(table, choice)


# -- what the price leaves ------------------------------------------------------------------------


def _fill(
    tables: Sequence[Table], choices: Sequence[Choice], over: Sequence[Choice], budget: float
) -> list[Choice]:
    """Spend what is left of the budget: whole sites as `over` would have them, then single heads.

    Sites that lend or borrow stay as they are.
    """
    now = list(choices)
    bound = _bound(tables, now) | _bound(tables, over)
    left = budget - _error(tables, now)
    while True:
        moves = []
        for i, table in enumerate(tables):
            if i in bound:
                continue
            here, spent = cost(table, now[i]), loss(table, now[i])
            for choice in (over[i], *_neighbours(table, now[i])):
                gain, more = here - cost(table, choice), loss(table, choice) - spent
                if gain > 1e-9 and more <= left:
                    moves.append((gain / max(more, 1e-12), gain, i, choice, more))
        if not moves:
            return now
        _, _, i, choice, more = max(moves, key=lambda m: (m[0], m[1], -m[2]))
        now[i], left = choice, left - more


def _neighbours(table: Table, choice: Choice) -> list[Choice]:
    """Choices that differ in one head and stay within the families already paid for."""
    used = {table.options[o].family for o in choice.heads if o != DENSE}
    out = []
    for h, now in enumerate(choice.heads):
        for o, option in enumerate(table.options):
            if o != now and (option.family in used or not used):
                out.append(Choice((*choice.heads[:h], o, *choice.heads[h + 1 :])))
    return out


def _bound(tables: Sequence[Table], choices: Sequence[Choice]) -> set[int]:
    borrowing = {i for i, c in enumerate(choices) if c.loan is not None}
    return borrowing | {tables[i].loans[choices[i].loan].anchor for i in borrowing}  # type: ignore[index]


def _error(tables: Sequence[Table], choices: Sequence[Choice]) -> float:
    return sum(loss(t, c) for t, c in zip(tables, choices, strict=True))


def _solution(tables: Sequence[Table], choices: Sequence[Choice]) -> Solution:
    ms = sum(cost(t, c) for t, c in zip(tables, choices, strict=True))
    return Solution(tuple(choices), ms, _error(tables, choices))

"""Search against brute force on tables small enough to try everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from accelkit.calibration import search as search_module
from accelkit.calibration.search import (
    DENSE,
    Choice,
    Loan,
    Option,
    Table,
    cost,
    loss,
    predicted,
    search,
)


def random_table(rng: np.random.Generator, heads: int = 2, families: int = 2) -> Table:
    options = []
    for f in range(families):
        error = np.sort(rng.uniform(0.01, 0.4, (2, heads)), 0)[::-1]
        ms = np.sort(rng.uniform(0.2, 3.0, (2, heads)), 0)
        options += [Option(f"f{f}", s, error[s], ms[s]) for s in range(2)]
    fixed = {f"f{f}": float(rng.uniform(0.0, 1.0)) for f in range(families)}
    weight = rng.uniform(0.1, 1.0, heads)
    return Table("site", weight, 4.0 * heads, 4.2, tuple(options), fixed)


def every_choice(table: Table) -> list[Choice]:
    rows = range(DENSE, len(table.options))
    found = [Choice(h) for h in product(rows, repeat=table.heads)]
    for at, _ in enumerate(table.loans):
        for some in product((False, True), repeat=table.heads):
            if any(some):
                found.append(Choice((DENSE,) * table.heads, at, some))
    return found


def optimum(tables: list[Table], budget: float) -> float:
    """Least cost by trying everything, lists only borrowed from anchors that run them."""
    best = np.inf
    priced = [[(c, cost(t, c), loss(t, c)) for c in every_choice(t)] for t in tables]
    for combination in product(*priced):
        if sum(x[2] ** 2 for x in combination) > budget**2:
            continue
        if lawful(tables, [x[0] for x in combination]):
            best = min(best, sum(x[1] for x in combination))
    return best


def lawful(tables: list[Table], choices: list[Choice]) -> bool:
    for table, choice in zip(tables, choices, strict=True):
        if choice.loan is None:
            continue
        loan = table.loans[choice.loan]
        # What may be lent is run, whichever heads then read it.
        if any(choices[loan.anchor].heads[h] != loan.option for h in loan.heads):
            return False
    return True


@pytest.mark.parametrize("seed", range(12))
def test_close_to_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = [random_table(rng) for _ in range(3)]
    for budget in (0.05, 0.2, 0.6):
        found = search(tables, budget)
        assert found.error <= budget
        best = optimum(tables, budget)
        whole = sum(t.dense_ms for t in tables)
        # What the grain of the fronts may miss, as a share of what can be gained at all.
        assert found.ms - best <= 0.02 * (whole - best) + 1e-9
        assert found.ms == pytest.approx(sum(map(cost, tables, found.choices)))
        assert found.error == pytest.approx(predicted(tables, found.choices))


def test_known_optimum() -> None:
    """Two heads, one fragile: only the other may be sparse within the budget."""
    option = Option("a", 0, np.array([0.1, 0.1]), np.array([1.0, 1.0]))
    table = Table("s", np.array([1.0, 0.1]), 8.0, 4.0, (option,), {"a": 0.5})
    assert search([table], 0.02).choices[0].heads == (DENSE, 0)
    assert search([table], 0.2).choices[0].heads == (0, 0)
    assert search([table], 0.001).choices[0].dense


def test_heads_add_up_and_sites_add_like_noise() -> None:
    option = Option("a", 0, np.array([0.03, 0.03]), np.array([1.0, 1.0]))
    two = Table("s", np.ones(2), 8.0, 4.0, (option,))
    one = Table("t", np.ones(1), 8.0, 8.0, (Option("a", 0, np.array([0.03]), np.ones(1)),))
    assert search([two], 0.059).choices[0].heads in ((DENSE, 0), (0, DENSE))
    assert search([two], 0.061).choices[0].heads == (0, 0)
    both = search([one, one], 0.0425)  # √2 · 0.03 = 0.04243
    assert [c.heads for c in both.choices] == [(0,), (0,)]
    assert both.error == pytest.approx(2**0.5 * 0.03)
    assert sum(c.dense for c in search([one, one], 0.0424).choices) == 1


def test_dense_wins_where_the_estimate_is_dear() -> None:
    option = Option("a", 0, np.zeros(2), np.array([1.0, 1.0]))
    table = Table("s", np.ones(2), 8.0, 4.0, (option,), {"a": 7.0})
    assert search([table], 1.0).choices[0].dense


def test_an_estimate_is_paid_once() -> None:
    """Two families would each be best for one head; together their estimates cost too much."""
    a = Option("a", 0, np.zeros(2), np.array([1.0, 2.0]))
    b = Option("b", 0, np.zeros(2), np.array([2.0, 1.0]))
    table = Table("s", np.ones(2), 20.0, 10.0, (a, b), {"a": 3.0, "b": 3.0})
    found = search([table], 1.0)
    assert found.ms == pytest.approx(6.0)
    assert len(set(found.choices[0].heads)) == 1


def lending(rng: np.random.Generator, sites: int) -> list[Table]:
    tables: list[Table] = []
    for i in range(sites):
        base = random_table(rng, families=1)
        loans = tuple(
            Loan(
                anchor,
                option,
                tuple(rng.integers(0, 2, 2).tolist()),
                rng.uniform(0.01, 0.3, 2),
                rng.uniform(0.2, 1.5, 2),
            )
            for anchor in range(max(0, i - 2), i)
            for option in (0, 1)
        )
        tables.append(
            Table(
                f"s{i}", base.weight, base.dense_ms, base.ride_ms, base.options, {"f0": 2.5}, loans
            )
        )
    return tables


@pytest.mark.parametrize("seed", range(6))
def test_anchors_close_to_brute_force(seed: int) -> None:
    tables = lending(np.random.default_rng(seed), 3)
    for budget in (0.3, 1.0, 10.0):
        found = search(tables, budget)
        assert found.error <= budget
        assert lawful(tables, list(found.choices))
        best = optimum(tables, budget)
        whole = sum(t.dense_ms for t in tables)
        assert found.ms - best <= 0.1 * (whole - best) + 1e-9


def test_anchor_segment_of_known_optimum() -> None:
    """One dear estimate serves three layers."""
    option = Option("a", 0, np.full(1, 0.01), np.ones(1))

    def layer(i: int) -> Table:
        loans = (Loan(0, 0, (0,), np.full(1, 0.01), np.ones(1)),) if i else ()
        return Table(f"s{i}", np.ones(1), 6.0, 6.0, (option,), {"a": 4.0}, loans)

    found = search([layer(0), layer(1), layer(2)], 1.0)
    assert [c.loan for c in found.choices] == [None, 0, 0]
    assert found.choices[0].heads == (0,)
    assert found.ms == pytest.approx(5.0 + 1.0 + 1.0)


def one_head(i: int, loans: dict[int, float], ms: float = 1.0) -> Table:
    """One head whose own choice of keys costs 4 ms, and loans by anchor, with their errors."""
    option = Option("a", 0, np.full(1, 0.01), np.full(1, ms))
    lent = tuple(Loan(a, 0, (0,), np.full(1, error), np.ones(1)) for a, error in loans.items())
    return Table(f"s{i}", np.ones(1), 6.0, 6.0, (option,), {"a": 4.0}, lent)


def test_anchors_may_lie_far_back() -> None:
    """Sites between that read nothing of the anchor's stand alone, or have an anchor of their own
    among them.
    """
    tables = [
        one_head(0, {}), one_head(1, {}, 9.0), one_head(2, {}), one_head(3, {2: 0.01}),
        one_head(4, {0: 0.01}), one_head(5, {1: 0.01}),
    ]  # fmt: skip
    found = search(tables, 1.0)
    assert [c.loan for c in found.choices] == [None, None, None, 0, 0, None]
    assert [c.heads[0] for c in found.choices[:3]] == [0, DENSE, 0]
    assert found.ms == pytest.approx(5.0 + 6.0 + 5.0 + 1.0 + 1.0 + 5.0)
    near = [replace(t, loans=()) if n == 4 else t for n, t in enumerate(tables)]
    assert search(near, 1.0).ms == pytest.approx(found.ms + 4.0)


def test_heads_that_all_ride_are_a_dense_layer() -> None:
    """Where riding is cheap a dense layer is dear all the same: nothing is there to ride with."""

    def layer(ride: float, ms: float) -> Table:
        own = Option("a", 0, np.full(2, 0.4), np.full(2, ms))
        return Table("s", np.ones(2), 9.0, ride, (own,), {"a": 0.5})

    tables = [layer(3.0, 1.0), layer(4.5, 2.0)]
    assert search(tables, 0.85).ms == pytest.approx(optimum(tables, 0.85))
    assert search(tables, 0.1).ms == pytest.approx(18.0)


def test_nothing_to_choose_from() -> None:
    table = Table("s", np.ones(2), 8.0, 4.0)
    assert search([table], 0.5).choices[0].dense


def test_points_that_are_dropped_unsorted_change_nothing(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    tables = []
    for n in range(12):
        noise = rng.lognormal(0, 0.4, (6, 4)), rng.random((6, 4))
        options = tuple(
            Option(f"f{k % 2}", k, 0.6 * 0.5**k * noise[0][k], 0.2 * k + noise[1][k])
            for k in range(6)
        )
        tables.append(Table(f"site{n}", rng.random(4), 9.0, 2.3, options, {"f0": 0.3}))
    found = []
    for many in (0, 10**9):
        monkeypatch.setattr("accelkit.calibration.search.MANY", many)
        found.append([search(tables, e) for e in (0.05, 0.4, 1.5)])
    assert found[0] == found[1]
    assert len({s.ms for s in found[0]}) == 3


@pytest.mark.parametrize("alike", [0.05, 1.0], ids=["heads alike", "heads unlike"])
def test_sets_without_a_front_of_their_own_hardly_matter(monkeypatch, alike: float) -> None:
    """Eight families, four heads: sets that come near no least price are left out."""
    rng = np.random.default_rng(3)
    tables = []
    for _ in range(6):
        table = random_table(rng, heads=4, families=8)
        near = [
            replace(o, error=mean + alike * (o.error - mean), ms=ms + alike * (o.ms - ms))
            for o in table.options
            for mean, ms in [(o.error.mean(), o.ms.mean())]
        ]
        tables.append(replace(table, options=tuple(near)))
    made: list[int] = []
    real = search_module._set
    monkeypatch.setattr(search_module, "_set", lambda *a: made.append(1) or real(*a))
    budgets = (0.03, 0.1, 0.3, 0.6)
    few = [search(tables, b).ms for b in budgets]
    fronts = len(made)
    monkeypatch.setattr(search_module, "FEW_SETS", 1000)
    every = [search(tables, b).ms for b in budgets]
    assert fronts < 0.8 * (len(made) - fronts)
    assert few == pytest.approx(every, rel=0.005)


def test_fronts_of_sets_are_shared_where_only_the_unit_of_time_differs(monkeypatch) -> None:
    rng = np.random.default_rng(5)
    tables = [replace(random_table(rng, 3, 3), site=f"s{n}") for n in range(4)]
    half = [
        replace(
            t, dense_ms=t.dense_ms * 0.3, ride_ms=t.ride_ms * 0.3,
            options=tuple(replace(o, ms=o.ms * 0.3) for o in t.options),
            fixed={f: ms * 0.3 for f, ms in t.fixed.items()},
        )
        for t in tables
    ]  # fmt: skip
    shared: dict = {"sets": {}}
    for b in (0.05, 0.2, 0.5):
        assert search(tables, b, shared).ms == pytest.approx(search(tables, b).ms)
    monkeypatch.setattr(search_module, "_set", None)  # nothing is made anew
    for b in (0.05, 0.2, 0.5):
        found = search(half, b, {"sets": shared["sets"]})
        assert found.ms == pytest.approx(0.3 * search(tables, b, shared).ms)
    other = [replace(t, weight=t.weight * 2) for t in tables]
    with pytest.raises(TypeError):
        search(other, 0.2, {"sets": shared["sets"]})

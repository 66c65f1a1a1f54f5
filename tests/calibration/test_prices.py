"""What lists cost on prompts: clocked beside dense attention, the same for all of a family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import planted
import pytest
import torch

from accelkit.calibration import search
from accelkit.calibration.assemble import head_ms, site_data
from accelkit.calibration.candidates import Bench, Family, lists_ms, stored
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.prefill import prices
from accelkit.calibration.search import DENSE, Choice, Loan
from accelkit.calibration.stages import kept
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.kernels.select import density
from accelkit.patches.method import load

TOKENS = 1024
NAMES = ("window", "xattention")
COSTS = CostTable(
    "cpu", "float32", planted.HEADS, planted.KV_HEADS, 64, ((TOKENS, 8.0),), ((TOKENS, 8.0),),
    {"128x128": Kernel(0.0, 0.0, 4.0)},
    {name: MethodCost(((TOKENS, 0.0),)) for name in NAMES},
)  # fmt: skip
SETTINGS = (load("xattention")(coverage=0.6, qk="native"), load("xattention")(coverage=0.9))


@pytest.fixture(scope="module")
def bench() -> Bench:
    call = planted.planted(TOKENS, everywhere=False)
    return Bench(call, dense_attention(call), np.zeros(0, dtype=np.int64))


def record(errors: list[float], clocked: float | None = None) -> dict[str, Any]:
    """Two settings with these median errors."""
    rows = [[e] * planted.HEADS for e in errors]
    some = [stored(m) for m in SETTINGS]
    return {"settings": some, "field": "coverage", "error": rows, "ms": [clocked, clocked]}


def clocked(monkeypatch, dense: list[float], lists: float) -> list[Any]:
    """Readings of dense attention, before and after, and of lists; what ran."""
    ran: list[Any] = []

    def steady_ms(run):
        ran.append(run)
        return lists if len(ran) == 2 else dense.pop(0)

    monkeypatch.setattr(prices, "steady_ms", steady_ms)
    return ran


def test_lists_are_clocked_in_units_of_dense_attention(bench, monkeypatch) -> None:
    """A machine at half of its speed reads twice the table's time, and the factor is 1."""
    method = SETTINGS[1]
    own = bench.answers(method)[0].index
    shares = density([own], bench.call).tolist()
    said = sum(COSTS.lists_ms("xattention", own.size, TOKENS, shares))
    ran = clocked(monkeypatch, [15.0, 17.0], 2 * said)
    factors = prices.beside_table(bench, {"x": record([0.2, 0.04])}, COSTS)
    assert len(ran) == 3
    assert factors == {"x": pytest.approx(1.0, rel=1e-3)}
    clocked(monkeypatch, [8.0, 8.0], 3 * said)
    assert prices.beside_table(bench, {"x": record([0.2, 0.04])}, COSTS)["x"] == pytest.approx(3.0)


def test_the_setting_near_which_plans_run_it_is_clocked(bench, monkeypatch) -> None:
    asked: list[Any] = []
    answers = bench.answers
    monkeypatch.setattr(bench, "answers", lambda m: asked.append(m) or answers(m))
    for errors, place in (([0.2, 0.04], 1), ([0.02, 0.001], 0)):
        clocked(monkeypatch, [8.0, 8.0], 1.0)
        prices.beside_table(bench, {"x": record(errors)}, COSTS)
        assert stored(asked.pop()) == stored(SETTINGS[place])
    clocked(monkeypatch, [8.0, 8.0], 1.0)
    assert prices.beside_table(bench, {"x": record([0.2, 0.04], clocked=5.0)}, COSTS) == {}
    assert not asked


def test_real_readings_are_finite(bench) -> None:
    found = prices.beside_table(bench, {"x": record([0.2, 0.04])}, COSTS)
    assert 0 < found["x"] < np.inf


def test_a_factor_is_the_median_of_the_places_within_bounds() -> None:
    seen = [{"a": 1.0, "b": 90.0}, {}, {"a": 1.4}, {"a": 9.0}]
    assert prices.on_prompts(COSTS, seen).on_prompts == {"a": 1.4, "b": prices.BOUNDS[1]}
    assert prices.places(list("abcdefg")) == {"a", "d", "g"}
    assert prices.places(["a", "b"]) == {"a", "b"}
    assert prices.places([]) == set()


def one(name: str, density: float) -> dict[str, Any]:
    """A setting in all heads, with an error that any plan may have."""
    heads = planted.HEADS
    return {
        "settings": [stored(load(name)())], "field": None, "error": [[0.01] * heads],
        "recall": [[1.0] * heads], "density": [[density] * heads], "ms": [None],
        "size": [(128, 128)], "parts": [None],
    }  # fmt: skip


def test_families_are_compared_by_what_their_lists_cost_on_prompts() -> None:
    found = {"families": {"window": one("window", 0.3), "xattention": one("xattention", 0.4)}}
    assert [f.name for f in kept(found, COSTS, TOKENS, TOKENS, 1)] == ["window"]
    dear = replace(COSTS, on_prompts={"window": 1.5})
    assert [f.name for f in kept(found, dear, TOKENS, TOKENS, 1)] == ["xattention"]


def test_search_pays_what_lists_cost_on_prompts_and_borrowers_too() -> None:
    """Not what choosing costs."""
    families = [Family("window", (load("window")(),), None)]
    heads = planted.HEADS
    loan = {
        "anchor": "a", "setting": stored(load("window")()), "heads": list(range(heads)),
        "error": [0.01] * heads, "recall": [1.0] * heads, "density": [0.3] * heads,
        "size": (128, 128),
    }  # fmt: skip
    unit = {
        "a": {"families": {"window": one("window", 0.3)}, "loans": []},
        "b": {"families": {}, "loans": [loan]},
    }
    weights = [{"a": [1.0] * heads, "b": [1.0] * heads}]
    choosing = replace(COSTS, methods={"window": MethodCost(((TOKENS, 4.0),), share=0.0)})

    def tables(costs: CostTable) -> tuple[Any, Any]:
        some = {"a": families, "b": []}
        data = site_data(["a", "b"], some, unit, [(TOKENS, unit)], TOKENS, weights, costs)
        return head_ms(data[0].options[0], costs, TOKENS), data[1].table.loans[0].ms

    own, lent = tables(choosing)
    dear, dearer = tables(replace(choosing, on_prompts={"window": 1.5}))
    each = 4.0 / heads
    assert dear - each == pytest.approx(1.5 * (own - each))
    assert dearer == pytest.approx(1.5 * lent)


def test_a_gpu_is_not_asked(bench) -> None:
    meta = replace(bench.call, q=bench.call.q.to("meta"))
    other = Bench.__new__(Bench)
    other.call = meta
    assert torch.device("meta") == meta.q.device
    assert prices.beside_table(other, {"x": record([0.2, 0.04])}, COSTS) == {}


def places_of(*names: str) -> list[Any]:
    """Two sites with a setting of each of these methods in their options."""
    families = {path: [Family(n, (load(n)(),), None) for n in names] for path in ("a", "b")}
    unit = {p: {"families": {n: one(n, 0.3) for n in names}, "loans": []} for p in families}
    weights = [{path: [1.0] * planted.HEADS for path in families}]
    return site_data(["a", "b"], families, unit, [(TOKENS, unit)], TOKENS, weights, COSTS)


def test_lists_cost_what_choices_took_as_a_plan_runs_them() -> None:
    """Elsewhere what it took where it ran."""
    before = places_of(*NAMES)
    choice = Choice((0, *(DENSE,) * (planted.HEADS - 1)))
    ride = COSTS.ride_ms(TOKENS)
    said = float(head_ms(before[0].options[0], COSTS, TOKENS)[0])
    whole = (planted.HEADS - 1) * ride + 3.0 * said  # three times as much as the table says
    lent = Choice((DENSE,) * planted.HEADS, 0, (True,) * planted.HEADS)
    ran = [{choice: whole / (planted.HEADS * ride), lent: 9.0}, {}]
    cell = ("window", "a", 0)
    read = prices.factors([prices.Reading(3.0 * said, prices.JITTER * whole, {cell: said})])
    factors = {"a": [read[cell], *[read[cell[:2]]] * (planted.HEADS - 1)], "b": read[cell[:1]]}
    assert 1.0 < factors["b"] < factors["a"][1] < factors["a"][0] < 3.0
    for was, now in zip(before, prices.as_they_ran(before, ran, COSTS, TOKENS), strict=True):
        assert now.options[0].factor == pytest.approx(factors[now.site])
        ms = np.array(factors[now.site]) * was.table.options[0].ms
        assert now.table.options[0].ms == pytest.approx(ms)
        assert now.options[1].factor == pytest.approx(1.0)
        assert now.table.options[1].ms == pytest.approx(was.table.options[1].ms)


def test_what_the_clock_tells_less_surely_of_a_site_counts_for_less_there() -> None:
    """Lists are most of what the first two layers took and a tenth of the third's: nearly all of
    its reading may be the other heads'.
    """

    def reading(site: str, took: float, whole: float) -> prices.Reading:
        return prices.Reading(took, prices.JITTER * whole, {("f", site, 0): 1.0})

    some = [("a", 1.1, 1.0), ("b", 1.5, 1.0), ("b", 1.7, 1.0), ("c", 4.0, 10.0)]
    found = prices.factors([reading(*each) for each in some])
    common = found[("f",)]
    assert 1.2 < common < 1.45
    assert 1.1 < found["f", "a", 0] < 1.2
    assert 1.5 < found["f", "b", 0] < 1.6
    assert common < found["f", "c", 0] < 1.7
    alone = prices.factors([reading("a", 0.5, 10.0)])
    assert 0.9 < alone["f", "a", 0] < 1.0


def test_choices_that_differ_by_a_head_tell_what_it_costs() -> None:
    """Two heads cost what is said of them; with a third one beside them it is twice that."""
    two = {("f", "a", 0): 1.0, ("f", "a", 1): 1.0}
    three = two | {("f", "a", 2): 1.0}
    found = prices.factors([prices.Reading(2.0, 0.1, two), prices.Reading(4.0, 0.1, three)])
    assert found["f", "a", 2] > 1.3
    assert found["f", "a", 0] == pytest.approx(found["f", "a", 1]) == pytest.approx(1.0, abs=0.15)


def test_on_a_cpu_no_pair_is_cheaper_than_one_of_dense_attention() -> None:
    shares = np.array([0.5, 1.0])
    cheap = replace(COSTS, kernels={"128x128": Kernel(0.0, 0.0, 1e-3)})
    parts = (((128, 128), 1.0),)
    floor = shares * COSTS.ride_ms(TOKENS)
    assert lists_ms(cheap, "window", parts, TOKENS, shares) == pytest.approx(floor)
    assert lists_ms(cheap, "window", parts, TOKENS, shares, 0.5) == pytest.approx(floor)
    gpu = lists_ms(replace(cheap, device="toy"), "window", parts, TOKENS, shares)
    assert (gpu < floor).all()


def test_lent_lists_cost_what_they_cost_where_they_come_from() -> None:
    a, b = places_of("window")
    lends = Loan(0, 0, tuple(range(planted.HEADS)), a.options[0].error, a.table.options[0].ms)
    b = replace(b, table=replace(b.table, loans=(lends,)), loans=(a.options[0],))
    choice = Choice((0,) * planted.HEADS)
    share = 2.0 * search.cost(a.table, choice) / (planted.HEADS * COSTS.ride_ms(TOKENS))
    after = prices.as_they_ran([a, b], [{choice: share}, {}], COSTS, TOKENS)
    factor = after[0].options[0].factor
    assert (factor > 1.5).all() and (factor < 2.0).all()
    assert after[1].table.loans[0].ms == pytest.approx(factor * lends.ms)


def test_nothing_changes_where_nothing_was_clocked() -> None:
    before = places_of("window")
    (a, b) = prices.as_they_ran(before, [{}, {}], COSTS, TOKENS)
    assert (a.options[0].factor, b.options[0].factor) == (1.0, 1.0)


def test_calls_are_clocked_beside_dense_attention(bench, monkeypatch) -> None:
    """In turns and by the mean of readings; what they give is of their first runs."""
    readings = iter([5.0, 5.0, 7.0, 7.0, 3.0, 9.0])

    def steady_ms(run):
        run()
        return next(readings)

    monkeypatch.setattr(prices, "steady_ms", steady_ms)
    ran = iter("abcd")
    runs = [lambda: next(ran)] * 2
    assert prices.beside_dense(bench.call, runs) == (["a", "b"], [0.75, 0.5])
    assert next(ran, None) is None

"""What is measured on further prompts: what search picks near the budget, and its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_cases import probe_methods

from accelkit.calibration.assemble import Measured, SiteData, site_data, wanted
from accelkit.calibration.candidates import Family
from accelkit.calibration.search import Loan, Option, Table
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches import method

HEADS = 2
BUDGET = 0.02


def family(name: str, count: int) -> Family:
    with probe_methods():
        probe = method.load("probe_window")
        return Family(name, tuple(probe(blocks=n + 1) for n in range(count)), "blocks")


def data(site: str, rows: dict[str, tuple[Family, list[tuple[float, float]]]], **more) -> SiteData:
    """Errors and milliseconds of each setting of some families, equal in all heads."""
    options, measured = [], []
    for name, (some, values) in rows.items():
        for one, (error, ms) in zip(some.settings, values, strict=True):
            errors = np.full(HEADS, error)
            options.append(Option(name, len(options), errors, np.full(HEADS, ms)))
            measured.append(
                Measured(
                    name,
                    one,
                    "blocks",
                    (((64, 64), 1.0),),
                    errors,
                    errors,
                    1 - errors,
                    {1024: errors},
                )
            )
    table = Table(site, np.ones(HEADS), 4.0, 2.0, tuple(options), {}, **more)
    return SiteData(table, tuple(measured), (), site)


def test_only_what_search_picks_is_measured_further() -> None:
    dial, slow = family("dial", 6), family("slow", 2)
    # Two heads at ½, 1 and 2 times the budget: errors up to .02, .01 and .005 each.
    steps = [(0.5, 0.1), (0.1, 0.2), (0.02, 0.4), (0.01, 0.6), (0.005, 0.8), (0.001, 1.5)]
    rows = {"dial": (dial, steps), "slow": (slow, [(0.01, 1.0), (0.001, 1.8)])}
    kept = wanted([data("a", rows)], {"a": [dial, slow]}, BUDGET)
    (one,) = kept["a"]
    assert one.name == "dial"
    assert one.settings == dial.settings[1:]  # one sparser than the sparsest, one denser


def test_a_site_without_a_pick_is_left_alone() -> None:
    poor = family("poor", 1)
    assert wanted([data("a", {"poor": (poor, [(0.4, 1.0)])})], {"a": [poor]}, BUDGET) == {"a": []}


def test_what_is_lent_is_kept() -> None:
    """An anchor's setting, picked because a later site borrows its lists."""
    lent = family("lent", 1)
    anchor = data("a", {"lent": (lent, [(0.001, 1.9)])})
    loan = Loan(0, 0, (0, 1), np.full(HEADS, 0.001), np.full(HEADS, 0.1))
    later = data("b", {}, loans=(loan,))
    kept = wanted([anchor, later], {"a": [lent], "b": []}, BUDGET)
    assert kept == {"a": [lent], "b": []}


def test_a_prompt_counts_with_its_own_weights() -> None:
    """A head that one task hardly asks may be wrong there, and is not on another."""
    some = family("dial", 1)
    row = {"kind": some.settings[0].kind, **some.settings[0].model_dump(mode="json")}
    costs = CostTable(
        "cpu", "float32", HEADS, HEADS, 64, ((1024, 4.0),), ((1024, 4.0),),
        {"64x64": Kernel(0.0, 0.0, 1.0)}, {row["kind"]: MethodCost(((1024, 0.1),))},
    )  # fmt: skip

    def unit(errors: list[float]) -> dict:
        found = {
            "settings": [row], "field": "blocks", "error": [errors], "recall": [[1.0, 1.0]],
            "density": [[0.5, 0.5]], "ms": [None], "size": [[64, 64]], "parts": [None],
        }  # fmt: skip
        return {"a": {"families": {"dial": found}, "loans": []}}

    units = [(1024, unit([0.1, 0.1])), (1024, unit([0.2, 0.04]))]
    weights = [{"a": [1.0, 1.0]}, {"a": [0.25, 4.0]}]
    (one,) = site_data(
        ["a"], {"a": [some]}, {"a": unit([0.1, 0.1])["a"]}, units, 1024, weights, costs
    )
    assert one.table.weight.tolist() == [1.0, 4.0]
    # Head 0: 1 · .1 and ¼ · .2; head 1: 1 · .1 and 4 · .04; at the weights of the table.
    assert one.table.options[0].error.tolist() == pytest.approx([0.1, 0.04])
    assert one.options[0].error.tolist() == [0.2, 0.1]

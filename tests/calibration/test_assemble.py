"""What is measured on further prompts: what search picks near the budget, and its neighbours."""

from __future__ import annotations

import numpy as np
from tiny_cases import probe_methods

from accelkit.calibration.assemble import Measured, SiteData, wanted
from accelkit.calibration.candidates import Family
from accelkit.calibration.search import Loan, Option, Table
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

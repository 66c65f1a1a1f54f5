"""Which head lost an answer, and what search makes of that."""

from __future__ import annotations

import numpy as np
import pytest

from accelkit.calibration.prefill import blame
from accelkit.calibration.search import DENSE, Choice, Loan, Option, Table, search

HEADS = 4


def table(site: str = "a") -> Table:
    """Two families alike, the first a little cheaper."""
    options = [
        Option(f"f{n}", n, np.full(HEADS, 0.01), np.full(HEADS, 0.2 + 0.1 * n)) for n in range(2)
    ]
    return Table(site, np.ones(HEADS), 4.0, 1.0, tuple(options))


STEPS = ((0, 0.4, 0.1), (1, 0.4, 0.2), (2, 0.1, 0.3))
"""Settings, errors and milliseconds of a head."""
CHOICES = (Choice((0, DENSE, 0, 0)), Choice((DENSE, 0, 0, DENSE)), Choice((DENSE,) * HEADS))


@pytest.mark.parametrize("guilty", [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2)])
def test_the_head_is_found_by_halves(guilty: blame.Head) -> None:
    asked = []

    def mends(choices) -> bool:
        site, h = guilty
        asked.append(choices)
        return choices[site].heads[h] == DENSE

    assert blame.culprit(CHOICES, mends) == guilty
    assert len(asked) <= 3  # of five heads
    assert blame.culprit(CHOICES[2:], mends) is None


@pytest.mark.parametrize("guilty", [(0, 2), (1, 1)])
def test_beside_a_plan_that_is_fine_only_what_differs_is_suspected(guilty: blame.Head) -> None:
    fine = (Choice((0, DENSE, 1, 0)), Choice((DENSE, 1, 0, DENSE)), CHOICES[2])
    asked = []

    def mends(choices) -> bool:
        site, h = guilty
        asked.append(choices)
        assert choices[0].heads[0] == 0  # alike in both
        return choices[site].heads[h] == 1

    assert blame.culprit(CHOICES, mends, fine) == guilty
    assert len(asked) == 1  # of two heads
    assert blame.culprit(CHOICES, mends, CHOICES) is None


def test_settings_that_are_known_to_be_fine_keep_their_errors() -> None:
    options = [
        Option("f", n, np.full(HEADS, e), np.full(HEADS, 0.1)) for n, e in ((0, 0.4), (1, 0.1))
    ]
    tables = [Table("a", np.ones(HEADS), 4.0, 1.0, tuple(options))]
    (changed,) = blame.raised(tables, (Choice((0,) * HEADS),), (0, 1), (Choice((1,) * HEADS),))
    assert changed.options[0].error.tolist() == [0.4, 0.4 * blame.BANNED, 0.4, 0.4]
    assert changed.options[1].error.tolist() == [0.1] * HEADS


def test_heads_that_borrow_are_made_dense_too() -> None:
    lent = Choice((DENSE, 0, DENSE, DENSE), 0, (True, False, True, False))
    (some,) = blame.mended((lent,), [(0, 0)])
    assert some == Choice((DENSE, 0, DENSE, DENSE), 0, (False, False, True, False))
    (none,) = blame.mended((lent,), [(0, 0), (0, 2)])
    assert none == Choice((DENSE, 0, DENSE, DENSE))


def test_search_turns_to_another_family_for_that_head() -> None:
    tables = [table("a"), table("b")]
    before = search(tables, 0.1).choices
    assert before[0].heads == (0,) * HEADS
    changed = blame.raised(tables, before, (0, 2))
    assert changed[1] is tables[1]
    assert tables[0].options[0].error[2] == 0.01
    assert search(changed, 0.06).choices[0].heads[2] == 1


def test_denser_settings_of_the_family_are_tried_before_the_same_again() -> None:
    options = [Option("f", n, np.full(HEADS, e), np.full(HEADS, m)) for n, e, m in STEPS]
    tables = [Table("a", np.full(HEADS, 0.001), 4.0, 1.0, tuple(options))]
    before = search(tables, 0.02).choices
    assert before[0].heads == (0,) * HEADS
    changed = blame.raised(tables, before, (0, 1))
    assert search(changed, 0.02).choices[0].heads == (0, 2, 0, 0)  # the weight is small
    again = blame.raised(changed, (Choice((0, 2, 0, 0)),), (0, 1))
    assert search(again, 0.02).choices[0].heads == (0, DENSE, 0, 0)


def test_a_loan_is_blamed_without_its_anchor() -> None:
    loan = Loan(0, 0, (0,) * HEADS, np.full(HEADS, 0.02), np.full(HEADS, 0.1))
    tables = [table(), Table("b", np.ones(HEADS), 4.0, 1.0, (), {}, (loan,))]
    borrowed = Choice((DENSE,) * HEADS, 0, (True,) * HEADS)
    changed = blame.raised(tables, (Choice((0,) * HEADS), borrowed), (1, 3))
    assert changed[0] is tables[0]
    assert changed[1].loans[0].error.tolist() == [0.02, 0.02, 0.02, 0.02 * blame.BANNED]

"""One method with one setting in all heads: points of the search's own space behind which it must
not end. What screening said of all sites is all that is known of most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelkit.calibration.assemble import SiteData, ms_at, site_data
from accelkit.calibration.candidates import arithmetic_only, stored
from accelkit.calibration.refine import WORTH, Checker, Outcome, Proposal, Round
from accelkit.calibration.search import Choice, Solution, predicted
from accelkit.calibration.session import Run
from accelkit.calibration.stages import family_of
from accelkit.kernels.cost import CostTable

WIDER = 3.0
"""Predicted error ÷ the budget up to which a setting may hold: what screening says of rounding in
all heads adds up to far more than that does.
"""
LITTLE = 0.97
"""Share of dense attention's time from which a plan gains so little that single settings compete.
"""
MOST = 2
"""Settings that leave keys out, and of arithmetic alone, which are checked at most."""


def screened(
    screen: Mapping[str, Any],
    weights: Mapping[str, Sequence[float]],
    costs: CostTable,
    brief: int,
) -> list[SiteData]:
    """What screening on `brief` tokens found of every setting."""
    families = {
        path: [
            family_of(name, f)
            for name, f in record["families"].items()
            if f["settings"][0]["kind"] in costs.methods
        ]
        for path, record in screen.items()
    }
    units = {path: {**record, "loans": []} for path, record in screen.items()}
    return site_data(list(screen), families, screen, [(brief, units)], brief, [weights], costs)


def settings(
    data: Sequence[SiteData], costs: CostTable, brief: int, tokens: int, budget: float
) -> list[Solution]:
    """A few settings that every site has and whose error may be within the budget, the fastest at a
    length first. Those slower than dense attention are left out, but for arithmetic that computes
    all pairs: what it does beside them weighs less there than where it was clocked.
    """
    if not data:
        return []
    grown = costs.dense_ms(tokens) / costs.dense_ms(brief)
    there = [
        replace(d, options=tuple(replace(m, ms=m.ms and grown * m.ms) for m in d.options))
        for d in data
    ]
    places = [{str(stored(m.method)): i for i, m in enumerate(d.options)} for d in data]
    found: dict[bool, list[Solution]] = {False: [], True: []}
    for name, first in places[0].items():
        if not all(name in place for place in places):
            continue
        choices = tuple(
            Choice((place[name],) * d.table.heads) for d, place in zip(data, places, strict=True)
        )
        ms = sum(ms_at(d, c, costs, tokens) for d, c in zip(there, choices, strict=True))
        one = Solution(choices, ms, predicted([d.table for d in data], choices))
        exact = arithmetic_only(data[0].options[first].method)
        if one.error <= WIDER * budget and (exact or ms < len(data) * costs.dense_ms(tokens)):
            found[exact].append(one)
    return [s for some in found.values() for s in sorted(some, key=lambda s: s.ms)[:MOST]]


def beside(
    run: Run,
    found: Outcome,
    others: Callable[[], Sequence[Proposal]],
    checker: Checker,
    allowed: float,
) -> Outcome:
    """The outcome, or where that gains little a further plan that holds and is faster."""
    if _share(found) < LITTLE:
        return found
    for proposal in others():
        late = partial(run.late, 0.9, "single settings in all heads", checker.seconds())
        if _share(found) < LITTLE or late():
            break
        # Taught: what screening predicted says nothing of search's predictions.
        now = Round(proposal.error, proposal, taught=True)
        found = replace(found, rounds=(*found.rounds, now))
        checker.look(now, allowed)
        if not now.judged:
            checker.check(now, allowed)
        if now.held:
            other = Outcome(found.rounds, now, checker.speed(proposal.plan))
            if _share(other) < min(WORTH, _share(found)):
                found = other
    return found


def _share(found: Outcome) -> float:
    """A plan's time ÷ that of the dense sides that it was timed with."""
    sides = [v for k, v in found.speed.items() if k in ("dense_ms", "trimmed_ms")]
    return found.speed["ms"] / min(sides) if sides else 1.0

"""Rounds of proposing and checking, on a made-up model whose error follows ε."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from accelkit.calibration.refine import (
    ENOUGH,
    FIRST,
    Outcome,
    Proposal,
    Round,
    _Turns,
    in_turns,
)

ALLOWED = 0.02


class Made:
    """Checks plans of a model whose worst prompt has the error `error(ε)`, and the first prompt
    `first` times that; plans of ε below `dense` are dense, those from `loses` on lose answers.
    """

    def __init__(
        self,
        error: Callable[[float], float],
        first: float = 1.0,
        dense: float = 0.0,
        loses: float = 1.0,
        afford: bool = True,
        speed: dict[str, float] | None = None,
    ) -> None:
        self.error, self.first, self.dense, self.loses = error, first, dense, loses
        self.afford, self.timed = afford, {"dense_ms": 3.0, "ms": 1.0} | (speed or {})
        self.checked: list[float] = []
        self.apart = False
        self.limit = 1e9

    def propose(self, epsilon: float) -> Proposal:
        plan = SimpleNamespace(epsilon=epsilon)
        return Proposal(plan, epsilon, 1 / epsilon, 1000.0, epsilon, epsilon < self.dense)  # type: ignore

    def look(self, now, allowed: float) -> None:
        now.measured = self.first * self.error(now.epsilon)
        now.bound, now.judged = now.measured, now.measured > allowed

    def expect(self, now) -> None:
        now.bound = now.measured

    def check(self, now, allowed: float) -> None:
        self.checked.append(now.epsilon)
        now.measured = now.bound = self.error(now.epsilon)
        now.held = now.measured <= allowed and now.epsilon < self.loses
        now.apart = self.apart and not now.held
        now.judged = True

    def affords(self) -> bool:
        return self.afford

    def seconds(self) -> float:
        return 10.0

    def speed(self, plan) -> dict[str, float]:
        return self.timed

    def run(
        self,
        rounds: int = 8,
        learn: Callable[[Any, Any], Any] = lambda now, rounds: False,
        others: Any = (),
    ) -> Outcome:
        run = SimpleNamespace(
            preset=SimpleNamespace(rounds=rounds),
            late=lambda share, what, seconds: 10 * len(self.checked) + seconds > self.limit,
            skipped=["a round"],
        )
        return in_turns(run, lambda e: self.propose(e), self, ALLOWED, learn, others)  # type: ignore


def test_one_round_is_enough_where_the_budget_is_used() -> None:
    found = Made(lambda e: 0.9 * e).run()
    assert [r.epsilon for r in found.rounds] == [FIRST * ALLOWED]
    assert found.best is found.rounds[0]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 3.0, 10.0])
def test_rounds_end_with_the_budget_used(ratio: float) -> None:
    made = Made(lambda e: ratio * e)
    found = made.run()
    assert found.best is found.rounds[-1]
    assert ENOUGH * ALLOWED <= found.best.measured <= ALLOWED
    assert len(found.rounds) <= 4
    assert made.checked == [found.best.epsilon]  # others were only looked at


@pytest.mark.parametrize("power", [0.3, 0.6, 1.5])
@pytest.mark.parametrize("scale", [0.6, 1.5, 2.5])
def test_errors_that_follow_slowly_are_bracketed(power: float, scale: float) -> None:
    """Between the largest ε that fits and the smallest that does not, until the budget is used."""
    found = Made(lambda e: scale * ALLOWED * (e / ALLOWED) ** power).run()
    assert found.best is not None
    assert ENOUGH * ALLOWED <= found.best.measured <= ALLOWED


@pytest.mark.parametrize("apart", [True, False])
def test_a_failure_that_says_nothing_of_epsilon_leads_to_what_seemed_to_fit(apart: bool) -> None:
    made = Made(lambda e: 0.5 * e, loses=1.5 * ALLOWED)
    made.apart = apart
    found = made.run()
    first, second = made.checked[:2]
    assert first > 1.5 * ALLOWED
    assert (second == FIRST * ALLOWED) == apart
    assert found.best is not None
    assert found.best.epsilon >= ALLOWED


@pytest.mark.parametrize(
    ("expected", "tell", "checked"),
    [(0.019, True, True), (0.015, True, True), (0.015, False, True), (0.013, True, False)],
)
def test_after_a_failure_what_should_use_enough_of_the_budget_is_checked(
    expected: float, tell: bool, checked: bool
) -> None:
    """A look was far from the budget; by what a check of a larger ε told since, it is near it."""
    made = Made(lambda e: e)
    turns = _Turns(made, ALLOWED, 8)
    small, looked, failed = (Round(e, made.propose(e)) for e in (0.02, 0.036, 0.044))
    turns.rounds = [small, looked, failed]
    for now, reach in ((small, 0.01), (looked, 0.0155), (failed, 0.0248)):
        now.bound = reach
        failed.judged = now is failed
        turns.note(now.epsilon, now)
    looked.bound, turns.looks_tell = expected, tell
    assert (turns.next(failed) == looked.epsilon) == checked


def test_a_plan_just_over_the_budget_is_not_the_end() -> None:
    """The plans below the one candidate that failed are dense: what lies between is tried."""
    found = Made(lambda e: 1.35 * e, dense=0.6 * FIRST * ALLOWED).run()
    assert found.rounds[0].reach > ALLOWED
    assert found.best is not None
    assert found.best.reach <= ALLOWED


def test_what_was_looked_at_is_checked_rather_than_a_plan_a_little_bolder() -> None:
    """After a failure, further prompts are feared more than they turn out."""

    class Wary(Made):
        def expect(self, now) -> None:
            now.bound = 1.45 * now.measured

        def check(self, now, allowed: float) -> None:
            super().check(now, allowed)
            now.bound = 1.25 * now.measured
            now.held = now.bound <= allowed

    made = Wary(lambda e: 0.0139 * (e / 0.02) ** 0.82)
    found = made.run()
    first, bold = found.rounds
    assert made.checked == [bold.epsilon, first.epsilon]
    assert found.best is first


def test_what_the_first_prompt_does_not_tell_is_found_by_all() -> None:
    made = Made(lambda e: 1.2 * e, first=0.8)
    found = made.run()
    assert found.best is not None
    assert found.best.epsilon in made.checked
    assert found.best.measured <= ALLOWED


@pytest.mark.parametrize("loses", [1.0, 0.8 * ALLOWED])
def test_when_all_that_seemed_to_fit_fails_rounds_go_on_below(loses: float) -> None:
    """The first prompt shows half of the error, so ε grows until it is full; then every round fails
    on another prompt, or on its answers.
    """
    found = Made(lambda e: 1.3 * e, first=0.5, loses=loses).run(rounds=4)
    assert max(r.epsilon for r in found.rounds) > FIRST * ALLOWED
    assert found.best is not None
    assert found.best.measured <= ALLOWED
    assert found.best.epsilon < loses


@pytest.mark.parametrize("first", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("ratio", [0.7, 1.1, 2.5])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_looks_that_mislead_do_not_end_in_a_dense_plan(first, ratio, power) -> None:
    """The first prompt's error is the smallest: what seems to fit does not."""
    found = Made(lambda e: ratio * ALLOWED * (e / ALLOWED) ** power, first=first).run(rounds=4)
    assert found.best is not None
    assert 0.5 * ALLOWED < found.best.measured <= ALLOWED


def test_lost_answers_narrow_within_the_budget() -> None:
    found = Made(lambda e: 0.95 * e, loses=0.6 * ALLOWED).run()
    assert not found.rounds[0].held
    assert found.best is not None
    assert 0.5 * 0.6 * ALLOWED < found.best.epsilon < 0.6 * ALLOWED


@pytest.mark.parametrize("loses", [0.9, 0.5, 0.2])
def test_answers_lost_where_looks_saw_nothing(loses: float) -> None:
    """Looks find errors far below the budget and no answer lost; then all prompts are run, and ε
    goes down until a plan holds.
    """
    made = Made(lambda e: 0.5 * e, first=0.9, loses=loses * ALLOWED)
    found = made.run()
    assert found.best is not None
    assert 0.4 * loses * ALLOWED < found.best.epsilon < loses * ALLOWED
    first = next(n for n, r in enumerate(found.rounds) if r.judged)
    assert all(r.judged for r in found.rounds[first:])


def test_rounds_end_with_what_the_check_may_cost() -> None:
    """The first prompt is the worst of them all: a plan within the budget leaves room, and the next
    one is only tried where it can be checked.
    """
    poor = Made(lambda e: 0.65 * e, first=1.1, afford=False).run()
    assert len(poor.rounds) == 1
    assert poor.best is poor.rounds[0]
    rich = Made(lambda e: 0.65 * e, first=1.4).run()
    assert len(rich.rounds) > 1
    assert rich.best.epsilon > poor.best.epsilon


@pytest.mark.parametrize("dense", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("first", [0.01, 0.5, 1.0])
def test_where_every_sparse_plan_fails_rounds_end(dense: float, first: float) -> None:
    found = Made(lambda e: 3.0 * ALLOWED, first=first, dense=dense * ALLOWED, loses=0.0).run()
    assert found.best is None
    assert found.why == "no sparse plan held within the budget"
    assert len(found.rounds) <= 13


def test_a_far_more_careful_plan_is_tried_before_none() -> None:
    """Looks see nothing and answers are lost down to a hundredth of the budget."""
    found = Made(lambda e: 0.5 * e, loses=0.01 * ALLOWED).run(rounds=2)
    assert found.best is not None
    assert found.best.epsilon < 0.01 * ALLOWED


def test_what_lost_an_answer_is_learnt_before_errors_narrow() -> None:
    """The same ε is tried again once proposals have changed, and only then a smaller one."""
    made, asked = Made(lambda e: 0.95 * e, loses=0.0), []

    def learn(now, rounds) -> bool:
        assert rounds[-1] is now
        asked.append(now.epsilon)
        made.loses = 1.0
        made.propose = lambda e: Proposal(None, (e,), 1.0, 2.0, e, False)  # type: ignore
        return True

    found = made.run(learn=learn)
    assert asked == [FIRST * ALLOWED]
    assert [r.epsilon for r in found.rounds] == [FIRST * ALLOWED] * 2
    assert found.best is found.rounds[1]
    assert found.best.held
    assert [r.taught for r in found.rounds] == [True, False]


@pytest.mark.parametrize(("ratio", "enough"), [(0.8, True), (0.5, False)])
def test_nothing_is_learnt_beyond_what_uses_enough_of_the_budget(
    ratio: float, enough: bool
) -> None:
    """A look used 80 or 50 % of the budget, and the next one failed."""
    made, asked = Made(lambda e: ratio * e if e < 1.05 * ALLOWED else 2 * e), []
    found = made.run(learn=lambda now, rounds: asked.append(now.epsilon))
    assert found.best is not None and found.best.epsilon == FIRST * ALLOWED
    assert bool(asked) != enough
    assert (len(found.rounds) == 2) == enough


def test_lessons_do_not_use_up_rounds() -> None:
    """Each failure that teaches something is one more round, however few are wished."""
    made, lessons = Made(lambda e: 0.95 * e, loses=0.0), []

    def learn(now, rounds) -> bool:
        lessons.append(now)
        made.loses = float(len(lessons) == 6)
        made.propose = lambda e: Proposal(None, (e, len(lessons)), 1.0, 2.0, e, False)  # type: ignore
        return True

    found = made.run(rounds=1, learn=learn)
    assert len(lessons) == 6
    assert found.best is found.rounds[-1]


def test_what_was_learnt_does_not_predict() -> None:
    """A round that failed for a cause of its own says nothing of proposals that avoid it."""

    def made(measured: float, **more) -> Round:
        return Round(0.1, Proposal(None, measured, 1.0, 2.0, 0.1, False), measured=measured, **more)  # type: ignore

    best = made(0.03, held=True)
    rounds = (made(0.4, taught=True), best, made(0.05), made(0.5, taught=True))
    assert Outcome(rounds, best).composition == pytest.approx(0.5)
    assert Outcome((rounds[0], best), best).composition == pytest.approx(4.0)


def test_a_plan_for_a_tighter_budget_competes() -> None:
    """It is checked where it is the faster one, and wins if it holds."""
    for ms, wins in ((1.0, True), (1e3, False)):
        made = Made(lambda e: 0.9 * e)
        known = Proposal("known", "known", ms, 1000.0, 0.008, False)  # type: ignore
        found = made.run(others=[known])
        assert (found.best.proposal is known) is wins
        assert (len(found.rounds) > 1) is wins


def test_a_plan_has_to_beat_the_trimmed_layer_alone() -> None:
    assert Made(lambda e: 0.9 * e, speed={"trimmed_ms": 1.1}).run().best is not None
    found = Made(lambda e: 0.9 * e, speed={"trimmed_ms": 0.9}).run()
    assert found.best is None
    assert found.why == "no plan was faster than dense attention"


def test_what_gains_less_than_readings_differ_is_not_worth_its_error() -> None:
    assert Made(lambda e: 0.9 * e, speed={"ms": 2.9}).run().best is not None
    assert Made(lambda e: 0.9 * e, speed={"ms": 2.97}).run().best is None


def test_a_round_that_would_end_late_is_not_begun() -> None:
    """A check takes ten seconds, and so does everything before the first one."""
    free, short = Made(lambda e: e, loses=0.005), Made(lambda e: e, loses=0.005)
    free.run()
    short.limit = 25.0
    short.run()
    assert short.checked == free.checked[:2] and len(free.checked) > 2
    short.limit = 9.0
    found = short.run()
    assert not found.rounds and found.why == "no time was left to check a plan"

"""Rounds of proposing and checking, on a made-up model whose error is a multiple of ε."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accelkit.calibration.refine import ENOUGH, FIRST, Proposal, in_turns

ALLOWED = 0.02


def rounds(ratio: float, speed: dict[str, float] | None = None):
    """The outcome when a plan of ε has `ratio` · ε as its error."""
    run = SimpleNamespace(preset=SimpleNamespace(rounds=8), late=lambda share, what: False)

    def propose(epsilon: float) -> Proposal:
        return Proposal(None, epsilon, 1 / epsilon, 1000.0, epsilon, False)  # type: ignore

    def check(now, allowed: float) -> None:
        now.measured = now.bound = ratio * now.epsilon
        now.held = now.measured <= allowed

    timed = {"dense_ms": 3.0, "ms": 1.0} | (speed or {})
    checker = SimpleNamespace(check=check, speed=lambda plan: timed)
    return in_turns(run, propose, checker, ALLOWED)  # type: ignore


def test_one_round_is_enough_where_the_budget_is_used() -> None:
    found = rounds(1.2)
    assert [r.epsilon for r in found.rounds] == [FIRST * ALLOWED]
    assert found.best is found.rounds[0]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 3.0, 10.0])
def test_rounds_end_with_the_budget_used(ratio: float) -> None:
    found = rounds(ratio)
    assert found.best is found.rounds[-1]
    assert ENOUGH * ALLOWED <= found.best.measured <= ALLOWED
    assert len(found.rounds) <= 4


def test_a_plan_has_to_beat_the_trimmed_layer_alone() -> None:
    assert rounds(1.2, {"trimmed_ms": 1.1}).best is not None
    found = rounds(1.2, {"trimmed_ms": 0.9})
    assert found.best is None
    assert found.why == "no plan was faster than dense attention"

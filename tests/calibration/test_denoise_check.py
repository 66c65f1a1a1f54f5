"""The end-to-end check of a pipeline's plan: what it may cost, and whose clock it believes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelkit.calibration.denoise import check as denoise_check
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.check import CAREFUL, MOST_RUNS, Checker
from accelkit.calibration.denoise.video import Settings, Shot, Take
from accelkit.calibration.journal import Journal
from accelkit.calibration.refine import Proposal, Round
from accelkit.patches.plan import Plan, Policy

PROMPTS = 2


def checker(cost: float, model: Any = None) -> Checker:
    run = SimpleNamespace(
        model=model, journal=Journal(None, {}, False), tell=lambda _: None,
        late=lambda share, what: False, preset=SimpleNamespace(rounds=9),
    )  # fmt: skip
    shots = [Shot(f"prompt {n}", {}, n) for n in range(PROMPTS)]
    return Checker(run, Settings(), shots, lambda plan: cost, 1.0)  # type: ignore[arg-type]


def proposal(epsilon: float) -> Proposal:
    plan = Plan.model_construct(policies=(Policy(),), sites={}, limits=None)
    return Proposal(plan, epsilon, 1.0, 2.0, epsilon, False)


def rounds_of(one: Checker, errors: Sequence[float], allowed: float = 0.1) -> list[Round]:
    """Rounds of a check in which a prompt's error is some multiple of ε, until the check is
    spent.
    """
    order, rounds, aim = [0, 1], list[Round](), 0.8 * allowed
    while len(rounds) < 9:
        now = Round(one.care(rounds, proposal(aim).plan) * aim, proposal(aim))
        if one.spent(rounds, now.plan):
            break
        for n in order:
            now.rows.append({"error": errors[n] * now.epsilon, "done": 1.0, "prompt": n})
            if now.rows[-1]["error"] > allowed:
                break
        now.measured = max(r["error"] for r in now.rows)
        now.held = len(now.rows) == PROMPTS and now.measured <= allowed
        rounds.append(now)
        aim = now.epsilon * 0.9 * allowed / now.measured
        order = sorted(order, key=lambda n: -errors[n]) if len(now.rows) == PROMPTS else order
    return rounds


@pytest.mark.parametrize("cost", [0.2, 0.45, 0.7, 0.95])
@pytest.mark.parametrize("errors", [(0.6, 0.5), (1.0, 1.1), (1.1, 1.6), (2.5, 2.0), (1.0, 4.0)])
def test_the_check_is_worth_two_dense_runs_a_prompt_at_most(cost, errors) -> None:
    rounds = rounds_of(checker(cost), errors)
    assert rounds
    seen = {r["prompt"] for now in rounds for r in now.rows}
    runs = len(seen) + cost * sum(len(now.rows) for now in rounds)
    assert runs / PROMPTS <= MOST_RUNS
    # A prediction within a half of the truth leads to a plan that holds even where runs are dear.
    assert any(now.held for now in rounds) or max(errors) > 1.5


def test_the_last_round_that_can_be_afforded_is_careful() -> None:
    dearest, dear, cheap = (rounds_of(checker(cost), (1.6, 1.9)) for cost in (0.8, 0.6, 0.1))
    assert [now.held for now in dear] == [False, True]
    aim = 0.9 * 0.1 * dear[0].epsilon / dear[0].measured
    assert dear[1].epsilon == pytest.approx(CAREFUL * aim)
    assert cheap[1].epsilon == pytest.approx(aim)
    assert dearest[0].epsilon == pytest.approx(CAREFUL * dear[0].epsilon)


def take(steps: list[float]) -> Take:
    return Take(torch.zeros(1), None, sum(steps), torch.tensor(steps).cumsum(0).tolist())


def test_a_busy_machine_during_the_reference_does_not_make_a_plan_fast(monkeypatch) -> None:
    one = checker(0.5)
    plan = proposal(0.1).plan
    digest = denoise_check.plan_digest(plan)
    rows = [
        {"steps_ms": [3.0, 1.0, 9.0, 1.0], "dense_steps_ms": [8.0, 4.0, 4.0, 99.0]},
        {"steps_ms": [3.0, 1.0, 1.0, 7.0], "dense_steps_ms": [8.0, 4.0, 40.0, 4.0]},
    ]
    for n, row in enumerate(rows):
        one.run.journal.put(f"check/{digest}/{n}", row, 0.0)
    again = iter([take([0.008, 0.004, 0.004])])
    monkeypatch.setattr(video, "run", lambda *a, **k: next(again))
    assert one.speed(plan) == pytest.approx({"ms": 6.0, "dense_ms": 20.0})

    slow = checker(0.5)
    for n, row in enumerate(rows):
        slow.run.journal.put(f"check/{digest}/{n}", row, 0.0)
    again = iter([take([0.004, 0.002, 0.002])])
    assert slow.speed(plan) == pytest.approx({"ms": 6.0, "dense_ms": 10.0})

"""The end-to-end check of a pipeline's plan: what it may cost, and whose clock it believes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelkit.calibration import denoise_check, video
from accelkit.calibration.denoise_check import CAREFUL, MOST_RUNS, Checker
from accelkit.calibration.journal import Journal
from accelkit.calibration.refine import Outcome, Proposal, Round, in_turns
from accelkit.calibration.video import Settings, Shot, Take
from accelkit.patches.plan import Plan, Policy

PROMPTS = 2


def checker(cost: float, model: Any = None) -> Checker:
    run = SimpleNamespace(
        model=model, journal=Journal(None, {}, False), tell=lambda _: None,
        late=lambda share, what: False, preset=SimpleNamespace(rounds=9),
    )  # fmt: skip
    shots = [Shot(f"prompt {n}", {}, n) for n in range(PROMPTS)]
    return Checker(run, Settings(), shots, lambda plan: cost)  # type: ignore[arg-type]


def proposal(epsilon: float) -> Proposal:
    plan = Plan.model_construct(policies=(Policy(),), sites={}, limits=None)
    return Proposal(plan, epsilon, 1.0, 2.0, epsilon, False)


def refined(one: Checker, errors: dict[int, float], allowed: float = 0.1) -> tuple[Outcome, float]:
    """The rounds of a check in which a prompt's error is some multiple of ε, and the dense runs
    that they are worth for each prompt.
    """
    seen: set[int] = set()

    def check(now: Round, allowed: float) -> None:
        for n, share in errors.items():
            seen.add(n)
            now.rows.append({"error": share * now.epsilon, "done": 1.0, "prompt": n})
            if now.rows[-1]["error"] > allowed:
                break
        now.measured = max(r["error"] for r in now.rows)
        now.held = len(now.rows) == PROMPTS and now.measured <= allowed

    one.check = check  # type: ignore[method-assign]
    one.speed = lambda plan: {"ms": 1.0, "dense_ms": 2.0}  # type: ignore[method-assign]
    found = in_turns(one.run, proposal, one, allowed, 0.8, one.pace)
    runs = len(seen) + one.cost(None) * sum(len(r.rows) for r in found.rounds)  # type: ignore[arg-type]
    return found, runs / PROMPTS


@pytest.mark.parametrize("cost", [0.2, 0.45, 0.7, 0.95])
@pytest.mark.parametrize("errors", [(0.6, 0.5), (1.0, 1.1), (1.1, 1.6), (2.5, 2.0), (1.0, 4.0)])
def test_the_check_is_worth_two_dense_runs_a_prompt_at_most(cost, errors) -> None:
    found, runs = refined(checker(cost), dict(enumerate(errors)))
    assert runs <= MOST_RUNS
    assert found.rounds


def test_the_last_round_that_can_be_afforded_is_careful() -> None:
    """A plan that errs twice as far as predicted is mended in one round, if that is the last."""
    found, _ = refined(checker(0.6), {0: 1.6, 1: 1.9})
    assert [r.held for r in found.rounds] == [False, True]
    first, second = (r.epsilon for r in found.rounds)
    assert second == pytest.approx(CAREFUL * first * 0.9 * 0.1 / found.rounds[0].measured)
    found, _ = refined(checker(0.1), {0: 1.6, 1: 1.9})
    assert found.rounds[1].epsilon > second


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

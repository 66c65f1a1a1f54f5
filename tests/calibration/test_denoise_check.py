"""The end-to-end check of a pipeline's plan: what it may cost, and whose clock it believes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelkit.calibration.denoise import check as denoise_check
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.check import CAREFUL, HOPELESS, Checker
from accelkit.calibration.denoise.plan import Planner
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings, Take
from accelkit.calibration.journal import Journal
from accelkit.calibration.refine import MARGIN, Proposal, Round
from accelkit.patches.plan import Budget, Plan, Policy

PROMPTS = 2


class Straight(Planner):
    """Plans of any error, whose runs take `cost` of a dense one; believes what a check shows."""

    def __init__(self, cost: float, budget: float = 0.1) -> None:
        self.cost, self.budget, self.kappas = cost, Budget(max_rel_error=budget), {None: 1.0}
        self.scale = 1.0

    def propose(self, epsilon: float, alone: bool = False) -> Proposal:
        size = epsilon / self.scale
        plan = SimpleNamespace(model_dump_json=lambda include: f"{size}", tables={})
        return Proposal(plan, size, self.cost * (1 - 1e-3 * size), 1.0, epsilon, False)  # type: ignore[arg-type]

    def learn(self, now: Round, typical: float) -> None:
        self.scale *= typical / now.proposal.error


def checker(cost: float, model: Any = None) -> Checker:
    run = SimpleNamespace(
        model=model, journal=Journal(None, {}, False), tell=lambda _: None, skipped=[],
        late=lambda share, what: False, preset=SimpleNamespace(rounds=9),
    )  # fmt: skip
    shots = [Shot(f"prompt {n}", {}, n) for n in range(PROMPTS)]
    return Checker(run, Settings(), shots, lambda plan: cost, 1.0)  # type: ignore[arg-type]


def rounds_of(one: Checker, errors: Sequence[float], longer: float = 1.0) -> tuple[Round, ...]:
    """Rounds of a check in which a prompt's error is some multiple of ε, and runs take some
    multiple of what was predicted.
    """
    cost, dense = one.cost(None), [100.0] * 10  # type: ignore[arg-type]

    def row(plan: Any, n: int, allowed: float) -> dict[str, Any]:
        error = errors[n] * float(plan.model_dump_json(None))
        done = 5 if error > HOPELESS * allowed else 10
        times = {"steps_ms": [100 * cost * longer] * done, "dense_steps_ms": dense[:done]}
        return {"error": error * done / 10, "done": done / 10, **times}

    one._row = row  # type: ignore[method-assign]
    one.speed = lambda plan: {"ms": cost, "dense_ms": 1.0}  # type: ignore[method-assign]
    return Straight(cost).settle(one.run, one).rounds


@pytest.mark.parametrize("cost", [0.2, 0.45, 0.7, 0.95])
@pytest.mark.parametrize("errors", [(0.6, 0.5), (1.0, 1.1), (1.1, 1.6), (2.5, 2.0), (1.0, 4.0)])
@pytest.mark.parametrize("longer", [1.0, 1.05])
def test_the_check_is_worth_two_dense_runs_a_prompt_at_most(cost, errors, longer) -> None:
    one = checker(cost)
    rounds = rounds_of(one, errors, longer)
    assert rounds
    seen = {r["prompt"] for now in rounds for r in now.rows}
    runs = len(seen) + longer * cost * sum(r["done"] for now in rounds for r in now.rows)
    assert (runs + one.retimed() / 10) / PROMPTS <= 2.0
    # A prediction within a half of the truth leads to a plan that holds even where runs are dear.
    assert any(now.held for now in rounds) or max(errors) > 1.5


def test_the_last_round_that_can_be_afforded_is_careful() -> None:
    dearest, dear, cheap = (rounds_of(checker(c), (1.6, 1.9)) for c in (0.8, 0.6, 0.1))
    assert [now.held for now in dear] == [False, True]
    assert dear[1].epsilon == pytest.approx(CAREFUL * MARGIN * 0.1)
    assert cheap[1].epsilon == pytest.approx(MARGIN * 0.1)
    assert dearest[0].epsilon == pytest.approx(CAREFUL * dear[0].epsilon)


def take(steps: list[float]) -> Take:
    return Take(torch.zeros(1), None, sum(steps), torch.tensor(steps).cumsum(0).tolist())


def test_a_busy_machine_during_the_reference_does_not_make_a_plan_fast(monkeypatch) -> None:
    one = checker(0.5)
    plan = Plan.model_construct(policies=(Policy(),), sites={}, limits=None)
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

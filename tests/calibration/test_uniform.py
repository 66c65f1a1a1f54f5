"""Single settings in all heads compete where the search's own plans gain little."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from accelkit.calibration.candidates import stored
from accelkit.calibration.prefill import uniform
from accelkit.calibration.refine import Outcome, Proposal, Round
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches.method import Method, load

BRIEF, TOKENS, ALLOWED = 1024, 4096, 0.02
COSTS = CostTable(
    "gpu", "float32", 2, 1, 64, ((1024, 10.0), (4096, 160.0)), ((1024, 10.0), (4096, 160.0)),
    {"128x128": Kernel(0.0, 0.0, 80.0 / 8.39)},
    {name: MethodCost(((4096, 1.0),)) for name in ("window", "sage_attention")},
)  # fmt: skip


def family(some: list[Method], error: list[float], density: list[float], ms=None) -> dict[str, Any]:
    n = len(some)
    return {
        "settings": [stored(m) for m in some], "field": "window_tokens" if n > 1 else None,
        "size": [(128, 128)] * n, "parts": [None] * n, "ms": [ms] * n,
        "error": [[e, e] for e in error], "recall": [[1.0, 1.0]] * n,
        "density": [[d, d] for d in density],
    }  # fmt: skip


def screen(sage_ms: float = 9.0) -> dict[str, Any]:
    """Two sites; the second lacks the window of 128 tokens."""
    window, sage = load("window"), load("sage_attention")()
    some = [window(window_tokens=n) for n in (128, 256, 512)]
    exact = {"sage_attention": family([sage], [0.01], [1.0], sage_ms)}
    refused = {"xattention": family([load("xattention")()], [0.0], [0.1])}
    first = {"window": family(some, [0.03, 0.02, 0.01], [0.1, 0.2, 0.4]), **exact, **refused}
    second = {"window": family(some[1:], [0.02, 0.01], [0.2, 0.4]), **exact, **refused}
    return {"a": {"families": first}, "b": {"families": second}}


def settings(budget: float, weight: float = 0.5, **how: float) -> list[tuple[str, float, float]]:
    weights = {"a": [weight, weight], "b": [weight, weight]}
    data = uniform.screened(screen(**how), weights, COSTS, BRIEF)
    found = uniform.settings(data, COSTS, BRIEF, TOKENS, budget)
    return [(data[0].options[s.choices[0].heads[0]].method.kind, s.ms, s.error) for s in found]


def test_settings_that_all_sites_have_by_their_time() -> None:
    """Errors of heads add in a site, those of two sites like noise; refused methods are out."""
    found = settings(ALLOWED)
    assert [kind for kind, _, _ in found] == ["window", "window", "sage_attention"]
    errors = [error / 2**0.5 for _, _, error in found]
    assert errors == pytest.approx([0.02, 0.01, 0.01])
    times = [ms for _, ms, _ in found]
    assert times[0] < times[1] < 2 * 160.0
    assert times[2] == pytest.approx(2 * (16 * 9.0 + 1.0))  # clocked at a quarter of the length


def test_errors_beyond_the_budget_and_slow_lists_are_left_out() -> None:
    assert [kind for kind, _, _ in settings(0.006)] == ["window", "sage_attention"]
    assert not settings(0.001)
    # Arithmetic that took longer than dense attention on short prompts may not on long ones.
    assert settings(ALLOWED, sage_ms=11.0)[-1][0] == "sage_attention"


class Checker:
    """Plans are names; some hold, and take a share of dense attention's time."""

    def __init__(self, **share: float) -> None:
        self.share, self.looked = share, []

    def look(self, now: Round, allowed: float) -> None:
        self.looked.append(now.plan)
        now.judged = now.plan not in self.share

    def check(self, now: Round, allowed: float) -> None:
        now.held = now.judged = True

    def seconds(self) -> float:
        return 10.0

    def speed(self, plan: Any) -> dict[str, float]:
        return {"ms": 50.0 * self.share[plan], "dense_ms": 50.0}


def proposals(*names: Any) -> list[Proposal]:
    return [Proposal(name, name, 1.0, 2.0, 0.01, False) for name in names]


def beside(found: Outcome, checker: Checker, *names: str, deadline: float | None = None) -> Outcome:
    def late(share: float, what: str, seconds: float) -> bool:
        return deadline is not None and seconds > deadline

    run = SimpleNamespace(late=late)
    return uniform.beside(run, found, lambda: proposals(*names), checker, ALLOWED)  # type: ignore[arg-type]


def held(share: float) -> Outcome:
    best = Round(0.02, proposals("mixture")[0], held=True, judged=True)
    return Outcome((best,), best, {"ms": 100 * share, "dense_ms": 100.0})


def test_a_dense_outcome_is_replaced_by_what_holds_and_is_faster() -> None:
    checker = Checker(slow=1.02, fast=0.98, faster=0.975)
    found = beside(Outcome((), why="no plan held"), checker, "fails", "slow", "fast", "faster")
    assert found.best is not None and found.best.plan == "faster"
    assert checker.looked == ["fails", "slow", "fast", "faster"] == [r.plan for r in found.rounds]


def test_a_plan_that_gains_much_is_not_challenged() -> None:
    checker = Checker(fast=0.5)
    assert beside(held(0.9), checker, "fast").best.plan == "mixture"  # type: ignore[union-attr]
    assert not checker.looked
    assert beside(held(0.98), checker, "fast", "other").best.plan == "fast"  # type: ignore[union-attr]
    assert checker.looked == ["fast"], "it gains enough"


def test_the_faster_one_stays() -> None:
    assert beside(held(0.98), Checker(single=0.99), "single").best.plan == "mixture"  # type: ignore[union-attr]


def test_no_check_is_begun_that_would_end_late() -> None:
    checker = Checker(fast=0.5)
    assert beside(held(0.98), checker, "fast", deadline=5.0).best.plan == "mixture"  # type: ignore[union-attr]
    assert not checker.looked

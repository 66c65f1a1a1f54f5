"""What checks of a pipeline's plans teach: whom an error is blamed on, and when checks end."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from planted import video as planted_video

from accelkit.calibration.candidates import Bench, Family
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.denoise import measure as denoise_measure
from accelkit.calibration.denoise import plan as denoise_plan
from accelkit.calibration.denoise.caches import Cached
from accelkit.calibration.denoise.check import CAREFUL, MOST_RUNS, Checker
from accelkit.calibration.denoise.plan import Planner
from accelkit.calibration.denoise.tables import Tables, left
from accelkit.calibration.denoise.weights import Small, carried_on
from accelkit.calibration.journal import Journal
from accelkit.calibration.refine import Proposal, Round, plan_digest
from accelkit.calibration.search import DENSE, Choice, Option, Table
from accelkit.patches.method import load
from accelkit.patches.plan import Budget

SPARSE, STILL, EIGHT = (Choice((0,)),), (Choice((DENSE,)),), (Choice((1,)),)


def planner(**facts) -> Planner:
    """One site with one head and two caches. A window halves the time with error 0.1, eight bits
    save a fifth with 0.02.
    """
    one = object.__new__(Planner)
    options = tuple(
        Option(kind, 0, np.array([error]), np.array([ms]))
        for kind, error, ms in (("window", 0.1, 5.0), ("sage_attention", 0.02, 8.0))
    )
    one.caches = [Cached(None, 0.0, {"a@0": 1.0})] + [
        Cached(load("first_block_cache")(threshold=t), error, {"a@0": left})
        for t, error, left in ((0.1, 0.05, 0.6), (0.2, 0.2, 0.3))
    ]
    table = Table("a@0", np.ones(1), 10.0, 10.0, options)
    measured = [SimpleNamespace(method=load(o.family)()) for o in options]
    one.tables = Tables([SimpleNamespace(table=table, options=measured)], one.caches)  # type: ignore[list-item]
    one.kappas, one.quiet, one.scale, one.known = {None: 1.0}, 1.0, 1.0, {}
    one.rest_ms, one.steps, one.dense_ms, one.ratios = 0.0, [20], 10.0, {}
    one._assembled = lambda cache, solution: SimpleNamespace(  # type: ignore[method-assign]
        model_dump_json=lambda include: f"{cache.left} {solution.choices}", tables={}
    )
    for name, value in facts.items():
        setattr(one, name, value)
    return one


def checked(n: int, choices, error: float) -> Round:
    return Round(0.1, Proposal(None, (n, choices), 1.0, 2.0, error, False))


def test_a_step_cache_alone_is_known_afterwards() -> None:
    one = planner()
    one.learn(checked(1, STILL, 0.05), 0.2)
    assert one.cached_error(1) == 0.2
    assert 0.2 < one.cached_error(2) < 0.8, "another one is believed in only half as much"
    assert one.kappa(1) == 1.0


def test_what_a_known_step_cache_does_not_explain_is_attention() -> None:
    one = planner(known={1: 0.06})
    one.learn(checked(1, SPARSE, (0.06**2 + 0.1**2) ** 0.5), 0.1)
    assert one.kappa(1) == pytest.approx(0.8)
    one = planner()
    one.learn(checked(0, SPARSE, 0.1), 0.15)
    assert one.kappa(1) == pytest.approx(1.5)
    one.learn(checked(0, SPARSE, 0.1), 9.0)
    assert one.kappa(1) == pytest.approx(1.5 * denoise_plan.BELIEVED), "one check is not everything"


def test_an_unknown_step_cache_is_blamed_for_what_is_beyond_belief() -> None:
    one = planner()
    one.learn(checked(2, SPARSE, 0.22), 0.9)
    assert one.cached_error(2) == pytest.approx((0.81 - 0.01) ** 0.5)
    assert (one.kappa(2), one.scale) == (1.0, 1.0)
    one = planner()
    one.learn(checked(2, SPARSE, 0.22), 0.22 * 1.44)
    assert one.kappa(2) == one.scale == pytest.approx(1.2)


def test_other_arithmetic_has_a_factor_of_its_own() -> None:
    one = planner()
    one.learn(checked(0, EIGHT, 0.02), 0.03)
    assert one.quiet == pytest.approx(1.5)
    assert one.kappa(0) == 1.0
    one.learn(checked(0, SPARSE, 0.1), 0.2)
    assert (one.quiet, one.kappa(0)) == pytest.approx((1.5, 2.0))


def test_rounding_is_part_of_what_other_arithmetic_does() -> None:
    """A plan that stays dense at a place has none of it there."""
    one = planner(rounding=0.03)
    one._changed = lambda small, plan, sparse=True: 0.03  # type: ignore[method-assign]
    one._rehearse_arithmetic(None)  # type: ignore[arg-type]
    assert one.quiet == pytest.approx(1.5)
    assert one.propose(0.031, alone=True).choice == (0, EIGHT)
    assert one.propose(0.029, alone=True).choice == (0, STILL)


def test_a_step_cache_and_other_arithmetic_share_the_blame() -> None:
    one = planner()
    one.learn(checked(1, EIGHT, (0.05**2 + 0.02**2) ** 0.5), 2 * (0.05**2 + 0.02**2) ** 0.5)
    assert one.quiet == pytest.approx(2 ** (0.02**2 / (0.05**2 + 0.02**2)))
    together = (one.cached_error(1) ** 2 + (0.02 * one.quiet) ** 2) ** 0.5
    assert together == pytest.approx(2 * (0.05**2 + 0.02**2) ** 0.5)
    one = planner(kappas={None: 9.0})
    one.learn(checked(2, EIGHT, 0.2), 0.25)
    assert one.quiet == pytest.approx(1.0, abs=0.01), "the step cache's error is far larger"


def test_a_step_cache_that_is_only_guessed_is_tried_first() -> None:
    one = planner(kappas={None: 9.0})
    assert one.propose(0.15).choice[0] == 1
    assert one.propose(0.15, alone=True).choice == (2, EIGHT), "0.2 is within half as much again"
    one.known[2] = 0.2
    assert one.propose(0.15, alone=True).choice[0] == 1


def test_attention_gets_what_a_step_cache_leaves_of_the_error() -> None:
    """Squares add: beside a cache of 0.05 a window of 0.1 needs 0.112."""
    assert planner().propose(0.11).choice == (1, EIGHT)
    assert planner().propose(0.113).choice == (1, SPARSE)


def test_a_step_cache_that_changes_what_rounding_does_is_as_good_as_none() -> None:
    one = planner(rounding=0.06)
    assert one.propose(0.03).choice[0] == 1, "its error is 0.05"
    one.rounding = 0.04
    assert one.propose(0.03).choice[0] == 0


def test_eight_bits_are_proposed_where_what_is_left_out_goes_too_far() -> None:
    one = planner(kappas={None: 10.0})
    assert one.propose(0.03).choice == (0, EIGHT)
    assert one.propose(0.06).choice == (1, EIGHT), "beside a step cache as well"
    assert one.propose(0.03, alone=True).error == pytest.approx(0.02)
    one.kappas[None] = 0.1
    assert one.propose(0.03).choice == (0, SPARSE)
    assert one.propose(0.03, alone=True).choice == (0, EIGHT)


def test_among_all_options_errors_of_other_arithmetic_count_less() -> None:
    one = planner()
    assert one.tables.all.search(0, 0.01).choices == STILL
    one.tables.weigh(0.1)
    assert one.tables.all.search(0, 0.01).choices == EIGHT
    assert one.tables.errors(EIGHT) == pytest.approx((0.0, 0.02)), "what is predicted does not"


def asked(checker: Checker, budget: float, *rows: dict) -> Round:
    """A round of a plan whose runs give these rows."""
    waiting = iter(rows)
    checker._row = lambda plan, n, allowed: next(waiting)  # type: ignore[method-assign]
    checker.run = checker.run or SimpleNamespace(  # type: ignore[assignment]
        tell=lambda what: None, journal=Journal(None, {}, False)
    )
    plan = SimpleNamespace(model_dump_json=lambda include: "", tables={})
    now = Round(budget, Proposal(plan, None, 1.0, 2.0, 0.1, False))  # type: ignore[arg-type]
    checker.check(now, budget)
    return now


def test_a_run_that_was_cut_for_a_smaller_budget_is_run_again() -> None:
    checker = Checker(None, None, [None], lambda plan: 0.5, 1.0)  # type: ignore[arg-type]
    assert not asked(checker, 0.1, {"error": 0.15, "done": 0.5}).held
    assert asked(checker, 0.1).rows[0]["done"] == 0.5, "known, and cut again"
    assert asked(checker, 0.2, {"error": 0.18, "done": 1.0}).held
    assert asked(checker, 0.25).rows[0]["error"] == 0.18


def test_further_prompts_count_with_the_spread() -> None:
    """Two prompts within the budget do not hold where others spread widely."""
    checker = Checker(None, None, [None] * 2, lambda plan: 0.5, 1.5)  # type: ignore[arg-type]
    now = asked(checker, 0.1, {"error": 0.06, "done": 1.0}, {"error": 0.09, "done": 1.0})
    assert now.measured == 0.09
    assert now.bound == pytest.approx(1.5 * (0.06 * 0.09) ** 0.5)
    assert not now.held
    assert now.reach == now.bound


def test_a_prompt_that_tells_most_does_not_stand_for_all() -> None:
    checker = Checker(None, None, [None] * 2, lambda plan: 0.5, 1.5)  # type: ignore[arg-type]
    assert asked(checker, 0.2, {"error": 0.04, "done": 1.0}, {"error": 0.16, "done": 1.0}).held
    checker.run.journal = Journal(None, {}, False)
    now = asked(checker, 0.1, {"error": 0.12, "done": 1.0})
    assert len(now.rows) == 1 and not now.held, "the worst prompt failed at once"
    assert now.bound == pytest.approx(1.5 * (0.12 * 0.03) ** 0.5), "the other one would be better"
    checker.run.journal = Journal(None, {}, False)
    now = asked(checker, 0.1, {"error": 0.09, "done": 1.0}, {"error": 0.03, "done": 1.0})
    assert now.held


def test_frames_count_beside_latents() -> None:
    """Noise that is left in the frames is a small error of the latents."""
    checker = Checker(None, None, [None] * 2, lambda plan: 0.5, 1.0)  # type: ignore[arg-type]
    noisy = {"error": 0.1, "done": 1.0, "ssim": 0.6}
    now = asked(checker, 0.2, noisy, {**noisy, "ssim": 0.9})
    assert len(now.rows) == 1 and not now.held
    assert now.reach == pytest.approx(0.4)
    assert now.bound == pytest.approx(0.1), "what is learnt is the error of the latents"
    checker.run.journal = Journal(None, {}, False)
    assert asked(checker, 0.2, {**noisy, "ssim": 0.9}, {**noisy, "ssim": None}).held


def test_what_stayed_within_the_budget_on_every_prompt_is_better_than_dense(caplog) -> None:
    checker = Checker(None, None, [None] * 2, lambda plan: 0.5, 1.0)  # type: ignore[arg-type]
    proposal = Proposal(None, None, 1.0, 2.0, 0.1, False)  # type: ignore[arg-type]

    def turn(measured: float, bound: float, prompts: int = 2) -> Round:
        rows = [{"done": 1.0}] * prompts
        return Round(0.1, proposal, rows, measured=measured, bound=bound)

    rounds = [turn(0.15, 0.24), turn(0.14, 0.22), turn(0.1, 0.21, 1), turn(0.3, 0.4)]
    checker.least(rounds, 0.2)
    assert [r.held for r in rounds] == [False, True, False, False]
    assert "0.22" in caplog.text
    rounds = [turn(0.15, 0.24), turn(0.19, 0.2)]
    rounds[1].held = True
    checker.least(rounds, 0.2)
    assert [r.held for r in rounds] == [False, True]


def test_hope_is_for_checks_that_afford_a_plan_after_it() -> None:
    """A step cache that is not predicted to hold is tried first only then."""
    one = planner(kappas={None: 9.0})
    first = one.propose(0.15, alone=True)
    assert first.choice[0] == 2 and first.error > 0.15
    dear, cheap = (
        Checker(None, None, [None] * 2, lambda plan, c=cost: c, 1.0)  # type: ignore[arg-type,misc]
        for cost in (0.6, 0.4)
    )
    assert not one.worth_hoping(dear, first, 0.15)
    assert one.worth_hoping(cheap, first, 0.15)
    assert one.worth_hoping(dear, first, 0.25), "this one is predicted to hold"


def test_checks_end_after_two_dense_runs() -> None:
    checker = Checker(None, None, [None] * 2, lambda plan: plan, 1.0)  # type: ignore[arg-type]

    def turn(cost: float, held: bool, prompts: int = 2) -> Round:
        rows = [{"done": 1.0}] * prompts
        return Round(0.1, Proposal(cost, None, 1.0, 2.0, 0.1, False), rows, held=held)  # type: ignore[arg-type]

    assert checker.care([], 0.4) == 1.0
    assert checker.care([], 0.9) == CAREFUL, "a second round would be too much"
    assert checker.care([turn(0.9, False)], 0.9) == CAREFUL
    assert checker.care([turn(0.9, True)], 0.9) == 1.0
    assert not checker.spent([], 0.9)
    assert checker.spent([turn(0.9, False)], 0.9), "without a plan as well"
    assert not checker.spent([turn(0.4, False, 1), turn(0.4, True)], 0.4)
    assert checker.spent([turn(0.4, False), turn(0.4, True)], 0.4)


class Doubled(Planner):
    """Predicts half of every error, until a check has shown it."""

    def propose(self, epsilon: float, alone: bool = False) -> Proposal:
        error = epsilon / self.scale
        return Proposal(error, error, 0.9, 1.0, epsilon, False)  # type: ignore[arg-type]

    def learn(self, now: Round, typical: float) -> None:
        self.scale = 2.0


def test_a_plan_that_is_too_careful_is_better_than_none() -> None:
    """The second round runs the one prompt that the check still affords; without it the plan would
    be dense.
    """
    one = object.__new__(Doubled)
    one.budget, one.kappas, one.scale = Budget(max_rel_error=0.1), {None: 1.0}, 1.0
    preset = SimpleNamespace(rounds=5)
    run = SimpleNamespace(preset=preset, late=lambda share, what: False, skipped=[])
    checker = Checker(run, None, [None] * 2, lambda plan: 0.9, 1.0)  # type: ignore[arg-type]

    def check(now: Round, allowed: float) -> None:
        now.rows = [{"done": 1.0}]  # the worst one, which fails or is the only one left
        now.measured = now.bound = 2 * now.plan  # type: ignore[operator]
        now.held = now.measured <= allowed

    checker.check, checker.speed = check, lambda plan: {"ms": 0.9, "dense_ms": 1.0}  # type: ignore
    found = one.settle(run, checker)  # type: ignore[arg-type]
    assert [r.held for r in found.rounds] == [False, True]
    assert found.best is found.rounds[1]
    assert checker.used(found.rounds) <= MOST_RUNS
    assert run.skipped[0].startswith("1 of 2 prompts of round 2")


def test_a_plan_that_failed_is_not_proposed_twice() -> None:
    """Proposals change at some errors only, so a smaller one may name what has just failed."""

    class Coarse(Doubled):
        def propose(self, epsilon: float, alone: bool = False) -> Proposal:
            size = 0.2 if epsilon > 0.05 else 0.04
            return Proposal(size, size, 0.4, 1.0, epsilon, False)  # type: ignore[arg-type]

        def learn(self, now: Round, typical: float) -> None:
            pass

    one = object.__new__(Coarse)
    one.budget, one.kappas = Budget(max_rel_error=0.1), {None: 1.0}
    run = SimpleNamespace(
        preset=SimpleNamespace(rounds=5), late=lambda share, what: False, skipped=[]
    )
    checker = Checker(run, None, [None] * 2, lambda plan: 0.4, 1.0)  # type: ignore[arg-type]

    def check(now: Round, allowed: float) -> None:
        now.rows = [{"done": 1.0}]
        now.measured = now.bound = now.plan  # type: ignore[assignment]
        now.held = now.measured <= allowed

    checker.check, checker.speed = check, lambda plan: {"ms": 0.4, "dense_ms": 1.0}  # type: ignore
    found = one.settle(run, checker)  # type: ignore[arg-type]
    assert [r.plan for r in found.rounds] == [0.2, 0.04]
    assert found.best is found.rounds[1]


def test_a_check_counts_what_runs_took() -> None:
    """Half as long again as predicted, compiling apart; of four steps three are timed again."""
    journal = Journal(None, {}, False)
    run = SimpleNamespace(journal=journal)
    checker = Checker(run, None, [None] * 2, lambda plan: 0.4, 1.0)  # type: ignore[arg-type]
    plan = SimpleNamespace(model_dump_json=lambda include: "", tables={})
    journal.put(f"check/{plan_digest(plan)}/0", {}, 2.0, 0.5)  # type: ignore[arg-type]
    row = {"done": 0.5, "prompt": 0, "steps_ms": [600.0, 500.0], "dense_steps_ms": [500.0, 500.0]}
    now = Round(0.1, Proposal(plan, None, 1.0, 2.0, 0.1, False), [row])  # type: ignore[arg-type]
    assert checker.used([now]) == pytest.approx(1 + (0.5 * 0.6 + 0.75) / 2)
    assert checker.whole([now], plan) == pytest.approx(0.6)  # type: ignore[arg-type]
    assert checker.whole([], plan) == 0.4  # type: ignore[arg-type]
    decoded = {"decoding_ms": 500.0, "dense_decoding_ms": 500.0}
    whole = {**row, "done": 1.0, **decoded}
    assert checker.took(plan, whole) == pytest.approx((1100 - 500 + 500) / 1500)  # type: ignore[arg-type]


def test_a_check_that_affords_no_prompt_more_ends() -> None:
    run = SimpleNamespace(skipped=[])
    checker = Checker(run, None, [None] * 2, lambda plan: 0.9, 1.0)  # type: ignore[arg-type]
    proposal = Proposal(None, None, 1.0, 2.0, 0.1, False)  # type: ignore[arg-type]
    assert not checker.narrow([Round(0.1, proposal, [{"done": 1.0}] * 2)], proposal.plan)
    assert run.skipped[0].startswith("2 of 2 prompts of round 2")


def test_an_early_step_counts_for_no_less_than_a_later_one() -> None:
    # Of 12 steps buckets have 2, 1, 3 and 6; of 20, 2, 3, 5 and 10.
    middle = (0.05, 0.175, 0.375, 0.75)
    fading = carried_on([n / m for n, m in zip((2, 1, 3, 6), middle, strict=True)], 12, 20)
    expected = [0.6 * n / m for n, m in zip((2, 3, 5, 10), middle, strict=True)]
    assert fading == pytest.approx(expected)
    even = carried_on([2.0, 0.1, 3.0, 6.0], 12, 20)
    assert even == pytest.approx([0.75 * f for f in fading]), "the last bucket tells of the others"
    first = carried_on([90.0, 0.1, 3.0, 6.0], 12, 20)
    assert first == pytest.approx([54.0, *even[1:]]), "what it shows of its own counts"


def test_a_result_that_tips_over_tells_nothing_of_the_others() -> None:
    small = object.__new__(Small)
    book = Journal(None, {}, False)
    book.put("composition/a/0", [0.01, 0.9, 0.02], 0.0)
    small.shots, small.spreads = [None], []  # type: ignore[list-item]
    small.run = SimpleNamespace(tell=lambda what: None, journal=book)  # type: ignore[assignment]
    assert small.change("composition/a", None) == 0.02  # type: ignore[arg-type]


def test_the_spread_is_that_between_results_of_one_change() -> None:
    small = object.__new__(Small)
    small.spreads = []
    assert small.margin() == 1.0
    small.spreads = [np.log([0.1, 0.1, 0.1]), np.log([0.4, 0.4])]
    assert small.margin() == pytest.approx(1.0)
    small.spreads = [np.log([0.1, 0.2]), np.log([0.01, 0.02])]
    assert small.margin() == pytest.approx(np.exp(1.645 * np.log(2) / 2**0.5))


def test_variants_of_step_caches() -> None:
    own = load("mag_cache")()
    assert [v.max_skip_steps for v in own.variants()] == [3, 6, 6]
    assert own.variants()[2].retention_ratio == own.retention_ratio / 2
    assert [v.lite for v in load("taylor_seer")().variants()] == [False, True]
    assert load("first_block_cache")().variants() == (load("first_block_cache")(),)


def test_beside_a_step_cache_old_memories_are_worth_nothing() -> None:
    methods = [load("re_ttention")(), load("window")()]
    options = tuple(
        Option(m.kind, 0, np.array([0.1]), np.array([2.0 + n])) for n, m in enumerate(methods)
    )
    table = Table("a@0", np.ones(1), 10.0, 10.0, options, {"window": 1.0})
    measured: list = [SimpleNamespace(method=m) for m in methods]
    assert left(table, measured, Cached(None, 0.0, {"a@0": 1.0})) is table
    cache = Cached(load("first_block_cache")(), 0.1, {"a@0": 0.5})
    half = left(table, measured, cache)
    assert half.dense_ms == half.ride_ms == 5.0
    assert [float(o.ms[0]) for o in half.options] == [5.0, 1.5]
    assert half.fixed == {"window": 0.5}


def test_a_short_bucket_renews_memories_more_often() -> None:
    call = planted_video(text_first=True, grid=(8, 12, 12))
    family = Family("re_ttention", (load("re_ttention")(window=0.25, block=32),), "window")
    dense = dense_attention(call)
    long, short = (
        Bench(call, dense, denoise_measure.NO_ROWS, steps=steps).family(family, 0)["density"]
        for steps in (50, 2)
    )
    for a, b in zip(long[0], short[0], strict=True):
        assert (b - 0.5) / 0.5 == pytest.approx((a - 0.2) / 0.8, abs=1e-4)
        assert b > 0.5 > a > 0.2


def test_all_pairs_in_other_arithmetic_are_clocked_once(monkeypatch) -> None:
    """Their time is the same in every call of a shape; over lists it is not."""
    clocked: list[str] = []

    def clock(some, batch):
        clocked.extend(map(repr, some))
        return [2.0 * batch] * len(some)

    monkeypatch.setattr("accelkit.calibration.candidates.answers_ms", clock)
    call = planted_video(grid=(4, 8, 8))
    dense, shelf = dense_attention(call), {}
    for _ in range(2):
        bench = Bench(call, dense, denoise_measure.NO_ROWS, shelf=shelf)
        row = bench.family(Family("sage_attention", (load("sage_attention")(),), None), 0)
        assert row["ms"] == [2.0]
        paro = load("paro_attention")(int8=True)
        bench.family(Family("paro_attention", (paro,), None), 0)
    assert len(clocked) == 3


def test_of_arithmetics_alike_in_time_the_most_exact_is_kept() -> None:
    def row(ms: float | None, *errors: float) -> dict:
        return {"ms": [ms], "error": [errors]}

    found = {"fp8": row(7.0, 0.01, 0.1), "int8": row(7.3, 0.02, 0.03), "slow": row(8.7, 0.0, 0.0)}
    assert denoise_measure._most_exact(found) == ["int8"]
    assert denoise_measure._most_exact({"plain": row(None, 0.0)}) == []

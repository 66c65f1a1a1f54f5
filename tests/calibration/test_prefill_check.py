"""The order and the end of a check over made-up prompts, and what stands out in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cases import probe_methods, tiny_model, tiny_plan

from accelkit.calibration.data import Inputs
from accelkit.calibration.evaluation import quality
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.journal import Journal
from accelkit.calibration.prefill import check as prefill_check
from accelkit.calibration.prefill.check import LIFT, MOST_RUNS, Checker
from accelkit.calibration.refine import Proposal, Round

ALLOWED = 0.02
TASKS = ("text", "text", "needle", "variables")


@pytest.fixture(scope="module")
def plan():
    with probe_methods():
        yield tiny_plan(tiny_model())


class Made:
    """Prompts whose errors and lost answers are given; `asked` notes what was run."""

    def __init__(self, plan, monkeypatch, errors, lost, batch) -> None:
        samples = tuple(
            Sample(t, np.full(64, n), () if t == "text" else ((8, 9),) * 24)
            for n, t in enumerate(TASKS)
        )
        self.errors, self.lost, self.asked, self.plan = errors, lost, [], plan
        more = lambda task, tokens, n: Sample(task, np.full(64, 100 + n), ((8, 9),) * 24)  # noqa: E731
        run = SimpleNamespace(
            model=None, journal=Journal(None, {}, False), tell=lambda stage: None, batch=batch
        )
        monkeypatch.setattr(quality, "references", lambda model, samples, still: samples)
        monkeypatch.setattr(quality, "checks", lambda model, plan, some: [*map(self.row, some)])
        monkeypatch.setattr(quality, "answers", lambda m, plan, still, make: self.row(make()))
        monkeypatch.setattr(prefill_check, "plan_digest", lambda plan: repr(plan))
        self.checker = Checker(run, Inputs(samples, samples, "", more), plan)  # type: ignore

    def row(self, sample: Sample) -> dict[str, Any]:
        n = int(sample.ids[0])
        self.asked.append(n)
        lost, asked = self.lost.get(n, 0), len(sample.answers)
        further = n >= 100
        return {
            "task": sample.task, "tokens": 64, "kl": 0.0, "asked": asked, "right": asked - lost,
            "error": None if further else self.errors[n], "lost_answers": list(range(lost)),
            "dense_right": None if further and not lost else asked,
        }  # fmt: skip

    def round(self, name: str = "plan") -> Round:
        return Round(ALLOWED, Proposal(name, name, 1.0, 2.0, ALLOWED, False))  # type: ignore


@pytest.fixture
def made(plan, monkeypatch) -> Callable[..., Made]:
    def make(errors: tuple[float, ...], lost: dict[Any, int] | None = None, batch: int = 1) -> Made:
        return Made(plan, monkeypatch, dict(enumerate(errors)), lost or {}, batch)

    return make


def test_a_look_runs_one_prompt_and_expects_more_of_others(made) -> None:
    one = made((0.01, 0.012, 0.011, 0.009))
    now = one.round()
    one.checker.look(now, ALLOWED)
    assert one.asked == [0]
    assert (now.measured, now.bound, now.judged) == (0.01, 0.01 * LIFT, False)
    one.checker.check(now, ALLOWED)
    assert one.asked == [0, 1, 2, 3]
    assert now.held
    assert now.measured == 0.012
    later = one.round("later")
    one.checker.look(later, ALLOWED)
    assert one.asked[4:] == [1]  # the worst one comes first, and says what all reached
    assert later.bound == pytest.approx(max(now.reach, 0.012))


def test_a_check_ends_where_it_fails(made) -> None:
    one = made((0.01, 0.012, 0.021, 0.009))
    now = one.round()
    one.checker.look(now, ALLOWED)
    one.checker.check(now, ALLOWED)
    assert one.asked == [0, 1, 2]
    assert now.judged
    assert not now.held
    assert one.checker.order[0] == 2


def test_prompts_share_forwards_as_far_as_the_batch_goes(made) -> None:
    """What ran beside the first prompt that failed is known as well, but does not judge."""
    one = made((0.01, 0.012, 0.021, 0.009), batch=3)
    now = one.round()
    one.checker.look(now, ALLOWED)
    one.checker.check(now, ALLOWED)
    assert one.asked == [0, 1, 2, 3]
    assert [r["prompt"] for r in now.rows] == [0, 1, 2, 3]
    assert one.checker.runs == 2 * len(TASKS)  # what ran beside it was run all the same
    assert now.measured == 0.021
    assert now.judged
    assert not now.held


def test_lost_answers_are_asked_about_on_further_prompts(made) -> None:
    """One of 24 is more than one in a hundred; one of 120 is not."""
    one = made((0.01, 0.012, 0.011, 0.009), {3: 1})
    now = one.round()
    one.checker.check(now, ALLOWED)
    assert one.asked == [0, 1, 2, 3, 101, 102, 103, 104]
    assert one.checker.runs == 2 * 4 + 4
    assert now.held
    two = made((0.01, 0.012, 0.011, 0.009), {3: 1, 102: 1})
    now = two.round()
    two.checker.check(now, ALLOWED)
    assert two.asked == [0, 1, 2, 3, 101, 102]
    assert two.checker.runs == 2 * 4 + 1 + 2  # the dense side of what lost an answer as well
    assert not now.held


def test_the_further_prompt_that_told_comes_first(made) -> None:
    one = made((0.01, 0.012, 0.011, 0.009), {3: 1, 103: 1})
    now = one.round()
    one.checker.check(now, ALLOWED)
    assert one.asked == [0, 1, 2, 3, 101, 102, 103]
    assert one.checker.suspicion(now, [now], ALLOWED) is not None
    one.asked.clear()
    one.checker.check(one.round("later"), ALLOWED)
    assert one.asked[:2] == [3, 103]
    one.lost.pop(103)  # it is mended, and the others are asked as well
    one.asked.clear()
    last = one.round("last")
    one.checker.check(last, ALLOWED)
    assert one.asked[:5] == [3, 103, 101, 102, 104]
    assert last.held


def test_what_ends_a_round_is_asked_of_other_plans(made, monkeypatch) -> None:
    lost = made((0.01, 0.012, 0.011, 0.009), {3: 2})
    now = lost.round()
    lost.checker.check(now, ALLOWED)
    mended, fine = lost.checker.suspicion(now, [now], ALLOWED)
    assert fine is None
    given = {"some": [False, True], "others": [True, True]}
    monkeypatch.setattr(quality, "answered", lambda model, plan, sample: (given[plan], 1.0))
    assert not mended("some")
    assert mended("others")

    early = made((0.01, 0.012, 0.011, 0.009), {2: 2})  # of needles, which another one decides
    now = early.round()
    early.checker.check(now, ALLOWED)
    now.rows.append(early.row(Sample("text", np.full(64, 0), ())) | {"prompt": 0})
    assert early.checker.suspicion(now, [now], ALLOWED) is not None

    far = made((0.01, 0.012, 0.055, 0.009), {2: 2})  # and its error is far off
    now = far.round()
    far.checker.check(now, ALLOWED)
    assert far.checker.suspicion(now, [now], ALLOWED) is None

    over = made((0.021, 0.012, 0.011, 0.009), {3: 2})  # smaller errors are due anyway
    now = over.round()
    over.checker.look(now, ALLOWED)
    now.rows.append(over.row(Sample("variables", np.full(64, 3), ())) | {"prompt": 3})
    assert now.rows[-1]["lost_answers"]
    assert over.checker.suspicion(now, [now], ALLOWED) is None

    even = made((0.019, 0.019, 0.021, 0.009))
    now = even.round()
    even.checker.check(now, ALLOWED)
    assert not now.held
    assert even.checker.suspicion(now, [now], ALLOWED) is None
    assert even.checker.stands_out(now) is None


def test_a_round_that_gave_the_answer_is_found(made) -> None:
    one = made((0.01, 0.012, 0.011, 0.009))
    fine = one.round("fine")
    one.checker.check(fine, ALLOWED)
    one.lost[3] = 2
    now = one.round("later")
    one.checker.check(now, ALLOWED)
    assert one.checker.suspicion(now, [fine, now], ALLOWED)[1] is fine


def test_a_prompt_that_stands_out_is_looked_at_beside_one_that_tells_of_the_others(made) -> None:
    one = made((0.015, 0.012, 0.045, 0.009))
    before = one.round("before")
    one.checker.look(before, ALLOWED)
    one.checker.check(before, ALLOWED)
    assert one.checker.stands_out(before) == 2
    now = one.round("now")
    one.errors[2] = 0.001  # it is mended: alone it would say that errors may be far larger
    one.checker.look(now, ALLOWED)
    assert [r["prompt"] for r in now.rows] == [2, 0]
    assert (now.judged, now.bound) == (False, 0.015 * LIFT)


def test_a_prompt_stands_out_once(made) -> None:
    """If the next plan does not mend it, its heads' errors do not tell why."""
    one = made((0.01, 0.012, 0.055, 0.009))
    for name, found in (("first", 2), ("second", None)):
        now = one.round(name)
        one.checker.check(now, ALLOWED)
        runs = one.checker.runs
        assert one.checker.stands_out(now) == found
        assert (one.checker.runs > runs) == (found is not None)


def test_a_prompt_that_lost_answers_does_not_stand_out(made) -> None:
    lost = made((0.01, 0.012, 0.045, 0.009), {2: 2})
    now = lost.round()
    lost.checker.check(now, ALLOWED)
    assert lost.checker.stands_out(now) is None


def test_a_prompt_is_held_against_others_of_its_kind_where_there_are_no_more(made) -> None:
    two = made((0.045, 0.012))
    two.checker.samples = two.checker.samples[:2]
    two.checker.order = [0, 1]
    now = two.round()
    two.checker.look(now, ALLOWED)
    assert [r["prompt"] for r in now.rows] == [0]
    assert two.checker.stands_out(now) == 0
    assert [r["prompt"] for r in now.rows] == [0, 1]


def test_what_was_looked_at_is_judged_anew_after_a_check(made) -> None:
    one = made((0.01, 0.012, 0.011, 0.009))
    looked = one.round("looked")
    one.checker.look(looked, ALLOWED)
    assert looked.bound == pytest.approx(0.01 * LIFT)
    one.errors[1] = 0.0155
    other = one.round("other")
    one.checker.check(other, ALLOWED)
    one.checker.expect(looked)
    assert looked.bound == pytest.approx(other.reach)  # all reach as much beside the first
    assert other.reach > 0.015
    one.errors[1] = 0.05  # this one stands out, which says nothing of other plans
    before = dict(one.checker.lifts)
    one.checker.check(one.round("a third"), ALLOWED)
    assert one.checker.lifts == before


@pytest.mark.parametrize(
    ("readings", "found"),
    [
        # Dense attention on the first and the last of three kinds.
        ([3.0, 2.0, 2.0, 2.0, 5.0], (4.0, 2.0)),
        # Something slowed the plan down on all of them, and dense attention once meanwhile.
        ([3.0, 9.0, 8.0, 9.0, 3.0, 9.0, 2.0, 3.0, 2.0, 3.0, 2.0], (3.0, 2.0)),
        # The plan computes more of some kinds than of others.
        ([3.0, 1.0, 1.5, 2.0, 3.0], (3.0, 1.5)),
        ([3.0, 4.0, 4.0, 4.0, 3.0] + [3.0, 4.0] * 3, (3.0, 4.0)),
    ],
)
def test_a_plan_that_seems_slow_is_timed_again(made, monkeypatch, readings, found) -> None:
    one, left = made((0.01, 0.012, 0.011, 0.009)), list(readings)
    monkeypatch.setattr(prefill_check, "times_ms", lambda *_: (left.pop(0),))
    monkeypatch.setattr(prefill_check, "patch", lambda model, plan: nullcontext())
    one.checker.run.device, one.checker.run.batch = torch.device("cpu"), 1
    took = one.checker.speed(one.plan)
    assert (took["dense_ms"], took["ms"]) == pytest.approx(found)
    assert not left


def test_where_the_question_is_dense_answers_are_looked_at_first(made) -> None:
    """Two of them, of the tasks that fail first; texts come last."""
    one = made((0.01, 0.012, 0.011, 0.009))
    still = one.plan.model_copy(update={"trim_last_layer": True, "dense_rows": 8})
    checker = Checker(one.checker.run, Inputs(one.checker.samples, one.checker.samples, ""), still)
    assert [TASKS[n] for n in checker.order] == ["variables", "needle", "text", "text"]
    now = one.round("first")
    checker.look(now, ALLOWED)
    assert [r["prompt"] for r in now.rows] == [3, 2]
    assert one.asked == [3, 2]


def test_another_plan_is_afforded_within_what_the_check_is_worth(made) -> None:
    """Beside a look and a check of all prompts, whose dense side counts where it has not run."""
    one = made((0.01, 0.012, 0.011, 0.009))
    assert one.checker.affords()
    one.checker.check(one.round(), ALLOWED)
    assert one.checker.runs == 8
    while one.checker.runs <= MOST_RUNS * len(TASKS) - 5:
        assert one.checker.affords()
        one.checker.look(one.round(f"after {one.checker.runs} runs"), ALLOWED)
    assert not one.checker.affords()

"""Plans for prefill: searches, has them checked, and writes down what was measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accelkit.calibration.assemble import SiteData, assemble, crossover
from accelkit.calibration.data import Inputs
from accelkit.calibration.evaluation import quality
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.prefill import uniform
from accelkit.calibration.prefill.blame import Head, culprit, raised
from accelkit.calibration.prefill.check import Checker
from accelkit.calibration.prefill.last_rows import for_generation, kept_row
from accelkit.calibration.refine import WORTH, Proposal, Round, in_turns, outcome_numbers, short
from accelkit.calibration.search import DENSE, Choice, Solution, search
from accelkit.calibration.session import Run
from accelkit.kernels.cost import CostTable
from accelkit.patches.plan import Budget, Fingerprint, Limits, Plan

log = logging.getLogger("accelkit")
KEPT = "plan/"
"""How keys of the journal's plans begin."""
MOST_LEARNT = 4
"""Heads that may be looked for by halves, each of which takes as many runs as halving those that
differ from a plan that ran the prompt well, or all heads; and held-out prompts that may be measured
since they stand out.
"""


def _nothing_further(
    prefix: str, sample: Sample, data: Sequence[SiteData], epsilon: float
) -> list[SiteData]:
    return list(data)


@dataclass(frozen=True)
class Known:
    """What is known before search: costs; every site; the length of the screening, and what that
    found of all settings; and `further(prefix, sample, data, epsilon)`, which adds to the sites
    what one more prompt says of them, measured anew.
    """

    costs: CostTable
    data: list[SiteData]
    brief: int
    screened: Callable[[], list[SiteData]] = list
    further: Callable[[str, Sample, Sequence[SiteData], float], list[SiteData]] = _nothing_further


def refined(
    run: Run,
    inputs: Inputs,
    fingerprint: Fingerprint,
    budget: Budget,
    known: Known,
) -> Plan:
    """The fastest plan for prefill that holds within the budget on every prompt to check on. Plans
    for tighter budgets that the journal holds compete: a wider one is never slower than these. So
    do, where little is gained, settings in all heads, of which screening tells.
    """
    data, costs, tokens = list(known.data), known.costs, inputs.longest
    ruled = run.ruled(tokens)
    fronts: dict[str, Any] = {}
    last = None if run.trimmed is None else kept_row(run.heads[run.trimmed], costs, tokens)
    # What runs beside the rows that rules hold for.
    rest_ms = len(data) * (costs.dense_ms(tokens) - costs.dense_ms(ruled))
    dense_ms = sum(d.table.dense_ms for d in data) + rest_ms
    rest_ms += 0.0 if last is None else last.ms
    dense_ms += 0.0 if last is None else last.dense_ms

    def planned(
        solution: Solution, limits: Limits, data: Sequence[SiteData] = data, seen: int = ruled
    ) -> Plan:
        plan = assemble(data, solution, fingerprint, budget, seen, limits)
        if last is None:
            return plan
        return for_generation(plan, str(run.trimmed), last, run.dense_rows, costs)

    def chosen(epsilon: float) -> Solution:
        return search([d.table for d in data], epsilon, fronts)

    def propose(epsilon: float) -> Proposal:
        with run.planning(f"{len(learnt)} learnt, {epsilon:.9g} of {budget.max_rel_error:g}"):
            solution = chosen(epsilon)
            low = inputs.shortest // 2  # nothing is known of far shorter prompts
            least = crossover(data, solution, costs, ruled, max(1, run.ruled(low)))
            wins = max(low, least + run.dense_rows)
        limits = Limits(min_length=wins, max_length=tokens)
        dense = all(c.dense for c in solution.choices)
        ms = solution.ms + rest_ms
        plan = planned(solution, limits)
        return Proposal(plan, solution.choices, ms, dense_ms, solution.error, dense)

    def everywhere() -> list[Proposal]:
        found = []
        with run.planning("settings in all heads"):
            seen = known.screened()
            some = uniform.settings(seen, costs, known.brief, ruled, budget.max_rel_error)
        for one in some:
            limits = Limits(min_length=tokens // 2, max_length=tokens)
            plan, ms = planned(one, limits, seen, known.brief), one.ms + rest_ms
            found.append(Proposal(plan, one.choices, ms, dense_ms, one.error, False))
        return found

    choices = tuple(Choice((DENSE,) * d.table.heads) for d in data)
    still = planned(Solution(choices, dense_ms, 0.0), Limits(max_length=tokens))
    checker = Checker(run, inputs, still)

    learnt: list[int | Head] = []

    def learn(now: Round, rounds: Sequence[Round]) -> bool:
        if len(learnt) == MOST_LEARNT or not checker.affords():
            return False
        return measured(now) or blamed(now, rounds)

    def measured(now: Round) -> bool:
        """Whether search chooses otherwise since a prompt that stands out was measured."""
        n = checker.stands_out(now)
        if n is None or run.late(0.9, "measuring a prompt that stands out", checker.seconds()):
            return False
        learnt.append(n)
        prefix = f"blame/{budget.max_rel_error}/{n}/"
        data[:] = known.further(prefix, inputs.check[n], data, now.epsilon)
        fronts.clear()
        return chosen(now.epsilon).choices != now.proposal.choice

    def blamed(now: Round, rounds: Sequence[Round]) -> bool:
        """Whether a single head was found that lost an answer."""
        suspected = checker.suspicion(now, rounds, budget.max_rel_error)
        if suspected is None:
            return False
        choices, (mended, fine) = now.proposal.choice, suspected
        good = None if fine is None else fine.proposal.choice

        def mends(some: Sequence[Choice]) -> bool:
            return mended(planned(Solution(tuple(some), 0.0, 0.0), now.plan.limits))

        head = culprit(choices, mends, good)
        if head is not None:
            learnt.append(head)
            changed = raised([d.table for d in data], choices, head, good)
            data[:] = [replace(d, table=t) for d, t in zip(data, changed, strict=True)]
            fronts.clear()
        return head is not None

    earlier = _tighter(run, budget)
    found = in_turns(run, propose, checker, budget.max_rel_error, learn, earlier)
    found = uniform.beside(run, found, everywhere, checker, budget.max_rel_error)
    if found.best is not None:
        _keep(run, budget, found.best)
        return _measured(found.best.plan, outcome_numbers(found, dense_ms), found.speed, found.best)
    log.warning("the plan is dense: %s at %d tokens", found.why, tokens)
    numbers = outcome_numbers(found, dense_ms)
    speed = {} if last is None else checker.speed(still)
    if last is not None and speed["ms"] < WORTH * speed["dense_ms"]:
        numbers["ms"] = short(dense_ms - last.dense_ms + last.ms)
        return _measured(still, numbers, speed)
    # Where a model waits for its host, trimming the last layer costs more than it saves.
    sites = {path: layer for path, layer in still.sites.items() if path != run.trimmed}
    update = {"trim_last_layer": False, "dense_rows": 0, "sites": sites}
    return _measured(still.model_copy(update=update).with_tables(still.tables), numbers, {})


def _keep(run: Run, budget: Budget, best: Round) -> None:
    """Leave a plan in the journal for wider budgets."""
    plan, proposal = best.plan, best.proposal
    tables = {k: (str(t.dtype).removeprefix("torch."), t.tolist()) for k, t in plan.tables.items()}
    kept = {
        "budget": budget.max_rel_error, "ms": proposal.ms, "dense_ms": proposal.dense_ms,
        "error": proposal.error, "plan": plan.model_dump(mode="json"), "tables": tables,
    }  # fmt: skip
    run.journal.unit(f"{KEPT}{budget.max_rel_error}", lambda: kept)


def _tighter(run: Run, budget: Budget) -> list[Proposal]:
    """The journal's plans for tighter budgets."""
    found = [run.journal[k] for k in run.journal.units if k.startswith(KEPT)]
    return [
        Proposal(_read(one, budget), one["budget"], one["ms"], one["dense_ms"], one["error"], False)
        for one in found
        if one["budget"] < budget.max_rel_error
    ]


def _read(kept: Mapping[str, Any], budget: Budget) -> Plan:
    tables = {k: torch.tensor(v, dtype=getattr(torch, t)) for k, (t, v) in kept["tables"].items()}
    return Plan.model_validate({**kept["plan"], "budget": budget}).with_tables(tables)


def _measured(
    plan: Plan, numbers: dict[str, Any], speed: dict[str, float], best: Round | None = None
) -> Plan:
    """The plan with what its check and its timing found."""
    measured = numbers | ({"per_task": _tasks(best.rows)} if best else {})
    if speed:
        measured |= {
            "prefill_tokens": speed["tokens"],
            "prefill_ms": short(speed["ms"]),
            "prefill_dense_ms": short(speed["dense_ms"]),
            "prefill_speedup": short(speed["dense_ms"] / speed["ms"]),
        }
    if "trimmed_ms" in speed:
        measured["prefill_trimmed_ms"] = short(speed["trimmed_ms"])
    return plan.model_copy(update={"measured": measured}).with_tables(plan.tables)


def _tasks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        task: {k: short(v) if isinstance(v, float) else v for k, v in found.items()}
        for task, found in quality.by_task(rows).items()
    }

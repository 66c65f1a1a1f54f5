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


class _Search:
    """Plans by the error that they may cost, and what failed checks taught of the sites since."""

    def __init__(
        self, run: Run, inputs: Inputs, fingerprint: Fingerprint, budget: Budget, known: Known
    ) -> None:
        self.run, self.inputs, self.known = run, inputs, known
        self.fingerprint, self.budget = fingerprint, budget
        self.data, self.tokens = list(known.data), inputs.longest
        self.ruled = run.ruled(self.tokens)
        costs, trimmed = known.costs, run.trimmed
        self.last = None if trimmed is None else kept_row(run.heads[trimmed], costs, self.tokens)
        # What runs beside the rows that rules hold for.
        self.rest_ms = len(self.data) * (costs.dense_ms(self.tokens) - costs.dense_ms(self.ruled))
        self.dense_ms = sum(d.table.dense_ms for d in self.data) + self.rest_ms
        if self.last is not None:
            self.rest_ms += self.last.ms
            self.dense_ms += self.last.dense_ms
        choices = tuple(Choice((DENSE,) * d.table.heads) for d in self.data)
        nothing = Solution(choices, self.dense_ms, 0.0)
        self.still = self.planned(nothing, Limits(max_length=self.tokens))
        """Dense but for the last layer, where that is trimmed."""
        self.checker = Checker(run, inputs, self.still)
        self.learnt: list[int | Head] = []
        """Prompts that were measured and heads that were found, as checks failed of them."""
        self._fronts: dict[str, Any] = {}

    def planned(
        self,
        solution: Solution,
        limits: Limits,
        data: Sequence[SiteData] | None = None,
        seen: int | None = None,
    ) -> Plan:
        """The plan of a solution, by default of these sites as they are known now."""
        data, seen = self.data if data is None else data, self.ruled if seen is None else seen
        plan = assemble(data, solution, self.fingerprint, self.budget, seen, limits)
        if self.last is None:
            return plan
        run = self.run
        return for_generation(plan, str(run.trimmed), self.last, run.dense_rows, self.known.costs)

    def chosen(self, epsilon: float) -> Solution:
        return search([d.table for d in self.data], epsilon, self._fronts)

    def propose(self, epsilon: float) -> Proposal:
        """The cheapest plan within this error."""
        run, costs, budget = self.run, self.known.costs, self.budget.max_rel_error
        with run.planning(f"{len(self.learnt)} learnt, {epsilon:.9g} of {budget:g}"):
            solution = self.chosen(epsilon)
            low = self.inputs.shortest // 2  # nothing is known of far shorter prompts
            least = crossover(self.data, solution, costs, self.ruled, max(1, run.ruled(low)))
            wins = max(low, least + run.dense_rows)
        plan = self.planned(solution, Limits(min_length=wins, max_length=self.tokens))
        dense = all(c.dense for c in solution.choices)
        return self._proposal(plan, solution, dense)

    def everywhere(self) -> list[Proposal]:
        """Settings in all heads, of which screening tells."""
        known, limits = self.known, Limits(min_length=self.tokens // 2, max_length=self.tokens)
        with self.run.planning("settings in all heads"):
            seen, most = known.screened(), self.budget.max_rel_error
            some = uniform.settings(seen, known.costs, known.brief, self.ruled, most)
        plans = [self.planned(one, limits, seen, known.brief) for one in some]
        return [self._proposal(p, one, False) for p, one in zip(plans, some, strict=True)]

    def _proposal(self, plan: Plan, solution: Solution, dense: bool) -> Proposal:
        ms = solution.ms + self.rest_ms
        return Proposal(plan, solution.choices, ms, self.dense_ms, solution.error, dense)

    def learn(self, now: Round, rounds: Sequence[Round]) -> bool:
        """Whether a round that failed taught something that changes what is chosen."""
        if len(self.learnt) == MOST_LEARNT or not self.checker.affords():
            return False
        return self._by_measuring(now) or self._by_blaming(now, rounds)

    def _by_measuring(self, now: Round) -> bool:
        """Whether search chooses otherwise since a prompt that stands out was measured."""
        n, checker = self.checker.stands_out(now), self.checker
        if n is None or self.run.late(0.9, "measuring a prompt that stands out", checker.seconds()):
            return False
        prefix = f"blame/{self.budget.max_rel_error}/{n}/"
        sample = self.inputs.check[n]
        self._know(n, self.known.further(prefix, sample, self.data, now.epsilon))
        return self.chosen(now.epsilon).choices != now.proposal.choice

    def _by_blaming(self, now: Round, rounds: Sequence[Round]) -> bool:
        """Whether a single head was found that lost an answer."""
        suspected = self.checker.suspicion(now, rounds, self.budget.max_rel_error)
        if suspected is None:
            return False
        choices, (mended, fine) = now.proposal.choice, suspected
        good = None if fine is None else fine.proposal.choice

        def mends(some: Sequence[Choice]) -> bool:
            return mended(self.planned(Solution(tuple(some), 0.0, 0.0), now.plan.limits))

        head = culprit(choices, mends, good)
        if head is not None:
            changed = raised([d.table for d in self.data], choices, head, good)
            pairs = zip(self.data, changed, strict=True)
            self._know(head, [replace(d, table=t) for d, t in pairs])
        return head is not None

    def _know(self, cause: int | Head, data: list[SiteData]) -> None:
        self.learnt.append(cause)
        self.data = data
        self._fronts.clear()


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
    made = _Search(run, inputs, fingerprint, budget, known)
    checker, allowed, earlier = made.checker, budget.max_rel_error, _tighter(run, budget)
    found = in_turns(run, made.propose, checker, allowed, made.learn, earlier)
    found = uniform.beside(run, found, made.everywhere, checker, allowed)
    numbers = outcome_numbers(found, made.dense_ms)
    if found.best is None:
        log.warning("the plan is dense: %s at %d tokens", found.why, made.tokens)
        return _dense(made, numbers)
    _keep(run, budget, found.best)
    return _measured(found.best.plan, numbers, found.speed, found.best)


def _dense(made: _Search, numbers: dict[str, Any]) -> Plan:
    """The plan where no other one is worth its error: the last layer is trimmed where that is
    faster.
    """
    plan, last = made.still, made.last
    speed = {} if last is None else made.checker.speed(plan)
    if last is not None and speed["ms"] < WORTH * speed["dense_ms"]:
        numbers = numbers | {"ms": short(made.dense_ms - last.dense_ms + last.ms)}
        return _measured(plan, numbers, speed)
    # Where a model waits for its host, trimming the last layer costs more than it saves.
    sites = {path: layer for path, layer in plan.sites.items() if path != made.run.trimmed}
    update = {"trim_last_layer": False, "dense_rows": 0, "sites": sites}
    return _measured(plan.model_copy(update=update).with_tables(plan.tables), numbers, {})


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

"""Search and check in turns: a plan is predicted, run on held-out prompts, and ε follows.

κ, the ratio of measured to predicted error, comes from earlier rounds; it says how errors of single
heads compose in the whole model. The fastest plan that held on every prompt wins; if none held, or
none was faster, the plan is dense and says so.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from accelkit.calibration import quality, session
from accelkit.calibration.assemble import SiteData, assemble, crossover, kept_row, trimmed
from accelkit.calibration.bench import prefill, times_ms
from accelkit.calibration.data import Inputs
from accelkit.calibration.fit_clock import device_ms
from accelkit.calibration.measure import Run
from accelkit.calibration.search import DENSE, Choice, Solution, search
from accelkit.calibration.tasks import Sample
from accelkit.kernels.cost import CostTable
from accelkit.patches.patch import patch
from accelkit.patches.plan import Budget, Fingerprint, Limits, Plan

log = logging.getLogger("accelkit")
MARGIN = 0.9
"""Share of the budget that the next round aims at."""
FIRST = 0.75
"""ε of the first round ÷ the budget: predictions are for a typical prompt, and the worst one, with
a margin for further ones, is to stay within the budget.
"""
ENOUGH = 0.85
"""Share of the budget whose use ends the rounds: the next one would cost more than it finds."""
FEW = 2
"""Most lost answers that are asked about on further prompts: near ties fall either way."""
CLOSE = 1.15
"""Rounds end when the largest ε that held and the smallest that failed are this close."""
SLOPES = (0.4, 1.0)
"""Least and most change of the logarithm of the error by that of ε which is believed."""
WIDEN = 8.0
"""Most by which one round may widen ε."""


@dataclass(frozen=True)
class Proposal:
    """The cheapest plan within some ε, with its predicted error and milliseconds beside those of
    dense: of a prefill's attention, or of a whole denoising, whose step cache saves more than
    attention. Equal proposals have equal `choice`.
    """

    plan: Plan
    choice: Any
    ms: float
    dense_ms: float
    error: float
    dense: bool


@dataclass
class Round:
    """One proposal and its check. `rows` are the prompts that were run; a failure stops early.

    `measured` is the worst error of them; `bound`, at least that, what further ones may reach.
    """

    epsilon: float
    proposal: Proposal
    rows: list[dict[str, Any]] = field(default_factory=list)
    measured: float = 0.0
    bound: float = 0.0
    held: bool = False

    @property
    def plan(self) -> Plan:
        return self.proposal.plan

    @property
    def reach(self) -> float:
        """The error that must stay within the budget."""
        return max(self.measured, self.bound)


class Checker(Protocol):
    """Runs plans on held-out inputs."""

    def check(self, now: Round, allowed: float) -> None:
        """Fill in the round's rows, its measured error, and whether it held."""

    def speed(self, plan: Plan) -> dict[str, float]:
        """`ms` and `dense_ms` of the whole run; `trimmed_ms`, where the plan trims the last layer
        beside its rules, of that alone.
        """


@dataclass(frozen=True)
class Outcome:
    """The fastest plan that held and its speed; without one, why the plan is dense."""

    rounds: tuple[Round, ...]
    best: Round | None = None
    speed: dict[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def composition(self) -> float:
        """κ of the rounds besides the best: what predicted the best one."""
        rest = [r for r in self.rounds if r is not self.best and r.proposal.error]
        return statistics.median([r.measured / r.proposal.error for r in rest]) if rest else 1.0


def in_turns(
    run: Run,
    propose: Callable[[float], Proposal],
    checker: Checker,
    allowed: float,
) -> Outcome:
    """Propose and check until ε is found."""
    rounds: list[Round] = []
    low, high, epsilon = 0.0, float("inf"), FIRST * allowed
    for turn in range(run.preset.rounds):
        if turn and run.late(0.9, f"round {turn + 1} of the end-to-end check"):
            break
        proposal = propose(epsilon)
        if proposal.dense:
            if low or epsilon > 100 * FIRST * allowed:
                break
            low, epsilon = epsilon, epsilon * WIDEN
            continue
        if any(r.proposal.choice == proposal.choice for r in rounds):
            break
        now = Round(epsilon, proposal)
        checker.check(now, allowed)
        rounds.append(now)
        aim = epsilon * (MARGIN * allowed / max(now.reach, 1e-9)) ** (1 / _slope(rounds))
        if now.held:
            low = max(low, epsilon)
            epsilon = min(max(aim, epsilon * CLOSE), epsilon * WIDEN)
            if epsilon >= high:
                epsilon = (low * high) ** 0.5
        else:
            high = min(high, epsilon)
            # Right answers may be lost within the budget: then the error says nothing.
            epsilon = aim if now.reach > allowed else epsilon / 2
            if epsilon <= low:
                epsilon = (low * high) ** 0.5
        enough = now.held and now.reach >= ENOUGH * allowed
        if enough or (low and high / low < CLOSE):
            break
    return fastest(rounds, checker)


def fastest(rounds: Sequence[Round], checker: Checker) -> Outcome:
    """Of the rounds that held the one with the fastest plan, if it beats dense."""
    held = sorted((r for r in rounds if r.held), key=lambda r: r.proposal.ms)
    for best in held:
        speed = checker.speed(best.plan)
        if min(speed["dense_ms"], speed.get("trimmed_ms", np.inf)) > speed["ms"]:
            return Outcome(tuple(rounds), best, speed)
    why = (
        "no plan was faster than dense attention"
        if held
        else "no sparse plan held within the budget"
        if rounds
        else "no method was predicted to be faster than dense attention"
    )
    return Outcome(tuple(rounds), why=why)


def _slope(rounds: Sequence[Round]) -> float:
    """How the measured error followed ε in the last two rounds, on logarithmic axes; errors that
    hardly follow ask for larger changes of it.
    """
    if len(rounds) < 2:
        return 1.0
    (e0, m0), (e1, m1) = ((r.epsilon, max(r.reach, 1e-9)) for r in rounds[-2:])
    if e0 == e1:
        return 1.0
    return float(np.clip(np.log(m1 / m0) / np.log(e1 / e0), *SLOPES))


def refined(
    run: Run,
    data: Sequence[SiteData],
    inputs: Inputs,
    fingerprint: Fingerprint,
    budget: Budget,
    costs: CostTable,
) -> Plan:
    """The fastest plan for prefill that holds within the budget on every prompt to check on."""
    tables = [d.table for d in data]
    dense_ms = sum(t.dense_ms for t in tables)
    tokens = inputs.longest
    fronts: dict[str, Any] = {}
    last = None if run.trimmed is None else kept_row(run.heads[run.trimmed], costs, tokens)
    rest_ms = 0.0 if last is None else last.ms
    dense_ms += 0.0 if last is None else last.dense_ms

    def planned(solution: Solution, limits: Limits) -> Plan:
        plan = assemble(data, solution, fingerprint, budget, tokens, limits)
        return plan if last is None else trimmed(plan, str(run.trimmed), last)

    def propose(epsilon: float) -> Proposal:
        solution = search(tables, epsilon, fronts)
        limits = Limits(
            min_length=max(crossover(data, solution, costs, tokens), inputs.shortest // 2),
            max_length=tokens,
        )
        dense = all(c.dense for c in solution.choices)
        ms = solution.ms + rest_ms
        return Proposal(planned(solution, limits), solution, ms, dense_ms, solution.error, dense)

    checker = _Checker(run, inputs)
    found = in_turns(run, propose, checker, budget.max_rel_error)
    if found.best is not None:
        return _measured(found.best.plan, outcome_numbers(found, dense_ms), found.speed, found.best)
    log.warning("the plan is dense: %s at %d tokens", found.why, tokens)
    choices = tuple(Choice((DENSE,) * d.table.heads) for d in data)
    dense_plan = planned(Solution(choices, dense_ms, 0.0), Limits(max_length=tokens))
    numbers = outcome_numbers(found, dense_ms)
    if last is None:
        return _measured(dense_plan, numbers, {})
    numbers["ms"] = _short(dense_ms - last.dense_ms + last.ms)
    return _measured(dense_plan, numbers, checker.speed(dense_plan))


class _Checker:
    """Runs plans on the prompts to check on; the dense side of each is run once."""

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run, self.samples, self.more = run, inputs.check, inputs.more
        self.order = list(range(len(inputs.check)))
        self.references: dict[str, quality.Reference] = {}

    def check(self, now: Round, allowed: float) -> None:
        """Run the prompts, the most revealing of earlier rounds first, until one fails."""
        digest = plan_digest(now.plan)
        tried = 0
        for n in list(self.order):
            rows = self._rows(now.plan, f"check/{digest}/{n}", n)
            now.rows += [{**row, "prompt": n} for row in rows]
            tried += 1
            # What is over stays over, but answers that a task's other prompts may make up for.
            over = quality.by_task(now.rows)
            if any(t["bound"] > allowed for t in over.values()):
                break
            if not quality.holds(quality.by_task(rows), allowed) and not self._shared(n):
                break
        tasks = quality.by_task(now.rows)
        now.measured = max(t["worst"] for t in tasks.values())
        now.bound = max(t["bound"] for t in tasks.values())
        now.held = tried == len(self.samples) and quality.holds(tasks, allowed)
        worst = sorted(now.rows, key=lambda r: -r["error"])
        first = list(dict.fromkeys(r["prompt"] for r in worst))
        self.order = first + [n for n in self.order if n not in first]

    def _shared(self, n: int) -> bool:
        """Whether other prompts of the same task and length have a say in what is lost."""
        mine = self.samples[n]
        return sum((s.task, len(s.ids)) == (mine.task, len(mine.ids)) for s in self.samples) > 1

    def _rows(self, plan: Plan, key: str, n: int) -> list[dict[str, Any]]:
        """One prompt, and further ones of its task when a few lost answers leave it open whether
        more than one in a hundred are lost.
        """
        sample = self.samples[n]
        rows = [self._row(plan, key, str(n), lambda: sample)]
        while self.more is not None and self._open(rows):
            at, task, tokens = len(rows), sample.task, len(sample.ids)
            further = partial(self.more, task, tokens, at)
            rows.append(self._row(plan, f"{key}+{at}", f"{task}@{tokens}+{at}", further))
        return rows

    @staticmethod
    def _open(rows: Sequence[dict[str, Any]]) -> bool:
        lost = sum(r["dense_right"] - r["right"] for r in rows)
        asked = sum(r["asked"] for r in rows)
        return 0 < lost <= FEW and lost > quality.MOST_DROP * asked

    def _row(self, plan: Plan, key: str, name: str, make: Callable[[], Sample]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            if name not in self.references:
                self.references[name] = quality.reference(self.run.model, make())
            return quality.check(self.run.model, plan, self.references[name])

        self.run.tell("checking a plan")
        return self.run.journal.unit(key, work)

    def speed(self, plan: Plan) -> dict[str, float]:
        """Milliseconds of a whole prefill as `generate` does it, dense and patched, on the longest
        prompt.
        """
        sample = max(self.samples, key=lambda s: len(s.ids))
        model, device = self.run.model, self.run.device
        ids = np.repeat(sample.ids[None].astype(np.int64), self.run.batch, 0)

        on_gpu = device.type == "cuda"
        run = partial(prefill, model, torch.from_numpy(ids).to(device))
        sides: dict[str, Plan | None] = {"dense_ms": None, "ms": plan}
        if plan.trim_last_layer and any(s.rules for s in plan.sites.values()):
            bare = {p: s.model_copy(update={"rules": ()}) for p, s in plan.sites.items()}
            sides["trimmed_ms"] = plan.model_copy(update={"sites": bare})

        def once(side: Plan | None) -> float:
            with nullcontext() if side is None else patch(model, side):
                if on_gpu:
                    run()  # lists that follow from geometry are made once in a patch's life
                return device_ms(run, 1)[0] if on_gpu else times_ms(run, 1, 0, device)[0]

        def work() -> dict[str, float]:
            # In turns, so that a drifting clock meets all sides.
            turns = [{k: once(s) for k, s in sides.items()} for _ in range(2)]
            return {k: min(t[k] for t in turns) for k in sides} | {"tokens": len(sample.ids)}

        self.run.tell("timing the plan")
        return self.run.journal.unit(f"speed/{plan_digest(plan)}", work)


def _measured(
    plan: Plan, numbers: dict[str, Any], speed: dict[str, float], best: Round | None = None
) -> Plan:
    """The plan with what its check and its timing found."""
    measured = numbers | ({"per_task": _tasks(best.rows)} if best else {})
    if speed:
        measured |= {
            "prefill_tokens": speed["tokens"],
            "prefill_ms": _short(speed["ms"]),
            "prefill_dense_ms": _short(speed["dense_ms"]),
            "prefill_speedup": _short(speed["dense_ms"] / speed["ms"]),
        }
    if "trimmed_ms" in speed:
        measured["prefill_trimmed_ms"] = _short(speed["trimmed_ms"])
    return plan.model_copy(update={"measured": measured}).with_tables(plan.tables)


def outcome_numbers(found: Outcome, dense_ms: float) -> dict[str, Any]:
    """What a plan keeps of its rounds: errors, attention's milliseconds; why it is dense."""
    rounds = _rounds(found.rounds)
    if found.best is None:
        ms = {"ms": _short(dense_ms), "dense_ms": _short(dense_ms)}
        errors = {"predicted_error": 0.0, "measured_error": 0.0}
        return {**errors, **ms, "note": f"dense: {found.why}", "rounds": rounds}
    best, kappa = found.best, found.composition
    return {
        "predicted_error": _short(kappa * best.proposal.error),
        "measured_error": _short(best.measured),
        "further_error": _short(best.reach),
        "composition": _short(kappa),
        "ms": _short(best.proposal.ms),
        "dense_ms": _short(dense_ms),
        "attention_speedup": _short(dense_ms / best.proposal.ms),
        "rounds": rounds,
    }


def _rounds(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    return [
        {
            "epsilon": _short(r.epsilon),
            "predicted_error": _short(r.proposal.error),
            "measured_error": _short(r.measured),
            "further_error": _short(r.reach),
            "predicted_ms": _short(r.proposal.ms),
            "predicted_dense_ms": _short(r.proposal.dense_ms),
            "prompts": len(r.rows),
            "held": r.held,
        }
        for r in rounds
    ]


def _tasks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        task: {k: _short(v) if isinstance(v, float) else v for k, v in found.items()}
        for task, found in quality.by_task(rows).items()
    }


def plan_digest(plan: Plan) -> str:
    """Key of a plan's choices: policies, rules and side tensors."""
    parts = [plan.model_dump_json(include={"policies", "sites", "limits"}).encode()]
    parts += [k.encode() + session.bare(v) for k, v in sorted(plan.tables.items())]
    return session.digest(parts)


def _short(value: float) -> float:
    return float(f"{value:.5g}")

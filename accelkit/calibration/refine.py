"""Search and check in turns: a plan is predicted, run on held-out prompts, and ε follows.

κ, the ratio of measured to predicted error, comes from earlier rounds; it says how errors of single
heads compose in the whole model. The fastest plan that held on every prompt wins; if none held, or
none was faster, the plan is dense and says so.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from accelkit.calibration import quality
from accelkit.calibration.assemble import SiteData, assemble, crossover
from accelkit.calibration.capture import forward
from accelkit.calibration.data import Inputs
from accelkit.calibration.fit import clock, device_ms
from accelkit.calibration.measure import Run
from accelkit.calibration.search import DENSE, Choice, Solution, search
from accelkit.calibration.tasks import Sample
from accelkit.kernels.cost import CostTable
from accelkit.patches.patch import patch
from accelkit.patches.plan import Budget, Fingerprint, Limits, Plan

log = logging.getLogger("accelkit")
MARGIN = 0.9
"""Share of the budget that the next round aims at."""
FIRST = 1.0
"""ε of the first round ÷ the budget; a plan that is over the budget is found out on its first
prompt.
"""
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
        """`ms` and `dense_ms` of the whole run."""


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
    first: float = FIRST,
    spent: Callable[[Sequence[Round]], bool] = lambda rounds: False,
) -> Outcome:
    """Propose and check until ε is found; the first one is `first` · `allowed`. `spent` ends it."""
    rounds: list[Round] = []
    low, high, epsilon = 0.0, float("inf"), first * allowed
    for turn in range(run.preset.rounds):
        if spent(rounds):
            break
        if turn and run.late(0.9, f"round {turn + 1} of the end-to-end check"):
            break
        proposal = propose(epsilon)
        if proposal.dense:
            if low or epsilon > 100 * first * allowed:
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
        if low and high / low < CLOSE:
            break
    held = sorted((r for r in rounds if r.held), key=lambda r: r.proposal.ms)
    for best in held:
        speed = checker.speed(best.plan)
        if speed["dense_ms"] > speed["ms"]:
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

    def propose(epsilon: float) -> Proposal:
        solution = search(tables, epsilon, fronts)
        limits = Limits(
            min_length=max(crossover(data, solution, costs, tokens), inputs.shortest // 2),
            max_length=tokens,
        )
        plan = assemble(data, solution, fingerprint, budget, tokens, limits)
        dense = all(c.dense for c in solution.choices)
        return Proposal(plan, solution, solution.ms, dense_ms, solution.error, dense)

    found = in_turns(run, propose, _Checker(run, inputs), budget.max_rel_error)
    if found.best is not None:
        return _finished(found, dense_ms)
    log.warning("the plan is dense: %s at %d tokens", found.why, tokens)
    return _dense(data, fingerprint, budget, tokens, found)


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
        """Milliseconds of a whole prefill, dense and patched, on the longest prompt."""
        sample = max(self.samples, key=lambda s: len(s.ids))
        model, device = self.run.model, self.run.device
        ids = np.repeat(sample.ids[None], self.run.batch, 0)

        on_gpu = device.type == "cuda"
        run = partial(forward, model, ids)

        def once() -> float:
            return device_ms(run, 1)[0] if on_gpu else clock(run, 1, device)

        def work() -> dict[str, float]:
            dense, sparse = [], []
            # In turns, so that a drifting clock meets both sides.
            for _ in range(2):
                dense.append(once())
                with patch(model, plan):
                    if on_gpu:
                        run()  # lists that follow from geometry are made once in a patch's life
                    sparse.append(once())
            return {"dense_ms": min(dense), "ms": min(sparse), "tokens": len(sample.ids)}

        self.run.tell("timing the plan")
        return self.run.journal.unit(f"speed/{plan_digest(plan)}", work)


def _finished(found: Outcome, dense_ms: float) -> Plan:
    best, speed = found.best, found.speed
    assert best is not None
    measured = outcome_numbers(found, dense_ms) | {
        "per_task": _tasks(best.rows),
        "prefill_tokens": speed["tokens"],
        "prefill_ms": _short(speed["ms"]),
        "prefill_dense_ms": _short(speed["dense_ms"]),
        "prefill_speedup": _short(speed["dense_ms"] / speed["ms"]),
    }
    return best.plan.model_copy(update={"measured": measured}).with_tables(best.plan.tables)


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


def _dense(
    data: Sequence[SiteData],
    fingerprint: Fingerprint,
    budget: Budget,
    tokens: int,
    found: Outcome,
) -> Plan:
    ms = sum(d.table.dense_ms for d in data)
    choices = tuple(Choice((DENSE,) * d.table.heads) for d in data)
    plan = assemble(
        data, Solution(choices, ms, 0.0), fingerprint, budget, tokens, Limits(max_length=tokens)
    )
    return plan.model_copy(update={"measured": outcome_numbers(found, ms)})


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
    parts = [plan.model_dump_json(include={"policies", "sites", "limits"})]
    parts += [f"{k} {v.tolist()}" for k, v in sorted(plan.tables.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _short(value: float) -> float:
    return float(f"{value:.5g}")

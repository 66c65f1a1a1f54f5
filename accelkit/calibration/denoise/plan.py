"""Searches attention and step cache together, and makes plans of what it finds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accelkit.calibration import refine
from accelkit.calibration.assemble import assemble, site_data
from accelkit.calibration.denoise.caches import Cached
from accelkit.calibration.denoise.check import Checker
from accelkit.calibration.denoise.look import Look, bucket_of, buckets, site_of
from accelkit.calibration.denoise.measure import Measurements
from accelkit.calibration.denoise.tables import Tables
from accelkit.calibration.denoise.weights import Small
from accelkit.calibration.evaluation.quality import geometric_mean
from accelkit.calibration.search import DENSE, Choice, Solution, composed, cost
from accelkit.calibration.session import Run
from accelkit.kernels.cost import CostTable
from accelkit.patches.plan import Budget, Fingerprint, LayerPlan, Limits, Plan, Schedule

REHEARSALS = 6
"""Most plans that are run at the small geometry to see how errors compose."""
NEAR = 1.15
"""A rehearsed plan whose error is within this factor of the predicted one ends rehearsals."""
MOST_KAPPA = 16.0
FIRST = 0.8
"""First aim ÷ budget: a check that fails costs nearly as much as one that holds."""
BELIEVED = 3.0
"""Most by which one check may change what is predicted of all plans."""
CHEAP = 0.35
"""A step cache is checked alone, first, where that takes at most this share of a dense run."""
PART = 0.25
"""However well the rest explains a change at the small geometry, so much of it is attention's."""
TINY = 1e-12
TRUST = 0.93
"""What leaves nothing out is predicted best and differs least between prompts: a plan that leaves
something out must take at most this share of its time.
"""
HOPE = 1.5
"""Error ÷ ε of a step cache that is worth a cheap first check, for the small geometry only guesses
it.
"""
WORTH = 0.98
"""A plan is checked only if it takes at most this share of the time of the best one that held."""
log = logging.getLogger("accelkit")


@dataclass
class Planner:
    """Searches attention and step cache together for the fastest denoising within some error.

    `kappas` say how errors of what attention leaves out compose beside each step cache, the last of
    them stands for the others; `quiet`, how those of other arithmetic do; `scale` is the error of a
    step cache ÷ that at the small geometry. All follow what checks measure. `known` has the errors
    of the step caches that were checked without loss of attention. `rounding` is the error of other
    kernels that compute the same: what is left dense, bit for bit, has none of it.
    """

    seen: Look
    found: Measurements
    weights: Mapping[str, Sequence[float]]
    costs: CostTable
    tokens: int
    caches: Sequence[Cached]
    fingerprint: Fingerprint
    budget: Budget
    limits: Limits
    kappas: dict[int | None, float] = field(default_factory=lambda: {None: 1.0})
    quiet: float = 1.0
    scale: float = 1.0
    rounding: float = 0.0
    known: dict[int, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shares = buckets(self.seen.total)
        data = site_data(
            self.seen.places, self.found.families, self.found.screen,
            [(self.tokens, unit) for unit in self.found.units], self.tokens,
            [self.weights] * len(self.found.units), self.costs, self.seen.calls,
            {p: self.found.refresh.get(site_of(p), 1) for p in self.seen.places},
        )  # fmt: skip
        self.data = [
            replace(d, site=site_of(d.site), steps=shares[bucket_of(d.site)]) for d in data
        ]
        self.tables = Tables(self.data, self.caches)
        self.dense_ms = sum(d.table.dense_ms for d in self.data)
        whole = 1e3 * self.found.step_seconds * self.seen.total
        # What is not attention, for each step; never less than nothing.
        self.rest_ms = max(whole - self.dense_ms, 0.0) / self.seen.total
        self.steps = [
            sum(low <= s / self.seen.total < high for s in range(self.seen.total))
            for low, high in shares
        ]

    def settle(self, run: Run, checker: Checker) -> refine.Outcome:
        """Checks the fastest step cache alone if that is cheap, then what step caches and attention
        make together, and predicts anew after every check. The fastest plan that held wins; where
        none did, a last and careful one runs the prompts that the check still affords.
        """
        allowed, rounds = self.budget.max_rel_error, list[refine.Round]()
        aim, cautious = FIRST * allowed / checker.margin, True
        while len(rounds) < run.preset.rounds:
            if rounds and run.late(0.9, f"round {len(rounds) + 1} of the end-to-end check"):
                break
            epsilon, proposal = aim, self.propose(aim, alone=cautious)
            if (share := checker.care(rounds, proposal.plan)) < 1:
                epsilon = share * aim
                proposal = self.propose(epsilon, alone=cautious)
            if cautious and not self.worth_hoping(checker, proposal, aim):
                cautious = False
                continue
            if proposal.dense and not rounds and self.kappas[None] > 1 / MOST_KAPPA:
                self.believe(None, self.kappas[None] / BELIEVED)  # it may be too much
                continue
            best = min((r.proposal.ms for r in rounds if r.held), default=float("inf"))
            if proposal.dense or proposal.ms > WORTH * best:
                break
            if any(r.proposal.choice == proposal.choice for r in rounds):
                aim *= refine.MARGIN  # it did not hold
                continue
            last = checker.spent(rounds, proposal.plan)
            if last and (any(r.held for r in rounds) or not checker.narrow(rounds, proposal.plan)):
                break
            now = refine.Round(epsilon, proposal)
            checker.check(now, allowed)
            rounds.append(now)
            if last:
                break
            typical = max(now.bound / checker.margin, 1e-12)
            self.learn(now, typical)
            aim, cautious = refine.MARGIN * allowed * typical / max(now.reach, 1e-12), False
        checker.least(rounds, allowed)
        return refine.fastest(rounds, checker)

    def worth_hoping(self, checker: Checker, proposal: refine.Proposal, aim: float) -> bool:
        """Whether a step cache may be tried alone first: its round is cheap, and where it is not
        predicted to hold, the check affords what is.
        """
        if proposal.ms > CHEAP * proposal.dense_ms:
            return False
        return proposal.error <= aim or checker.affords(proposal.plan, self.propose(aim).plan)

    def propose(self, epsilon: float, alone: bool = False) -> refine.Proposal:
        """The fastest denoising whose predicted error, the step cache's included, is ε; `alone`:
        attention leaves nothing out.
        """
        ways = []
        for n, cache in enumerate(self.caches):
            error = self.cached_error(n)
            hope = HOPE if alone and n not in self.known else 1.0
            # What changes no more than rounding alone is as good as nothing.
            if n and error > max(hope * epsilon, self.rounding):
                continue
            # A step cache that is tried may take it all, in theory.
            least = epsilon / 2 if error > epsilon else 0.0
            room = max(epsilon**2 - error**2, least**2) ** 0.5
            solution = self.tables.quiet.search(n, room / self.quiet)
            ways.append((solution.ms + self._rest(cache), error, n, solution))
            if not alone:
                solution = self.tables.all.search(n, room / self.kappa(n))
                loud = self.tables.errors(solution.choices)[0] > 0
                handicap = 1 / TRUST if loud else 1.0
                ways.append(((solution.ms + self._rest(cache)) * handicap, error, n, solution))
        # Equally fast ones differ in their last digits.
        _, _, n, solution = min(ways, key=lambda w: (float(f"{w[0]:.6g}"), *w[1:3]))
        return self.proposal(n, solution)

    def proposal(self, n: int, solution: Solution) -> refine.Proposal:
        """A solution beside the n-th step cache with its plan."""
        plan = self._assembled(self.caches[n], solution)
        ms = solution.ms + self._rest(self.caches[n])
        dense_ms = self.dense_ms + self._rest(self.caches[0])
        self.ratios[refine.plan_digest(plan)] = ms / dense_ms
        error = composed([*self.attention(n, solution.choices), self.cached_error(n)])
        dense = n == 0 and all(c.dense for c in solution.choices)
        return refine.Proposal(plan, (n, solution.choices), ms, dense_ms, error, dense)

    def attention(self, n: int, choices: Sequence[Choice]) -> tuple[float, float]:
        """Errors beside the n-th step cache of what choices leave out, and of other arithmetic."""
        loud, quiet = self.tables.errors(choices)
        return self.kappa(n) * loud, self.quiet * quiet

    def kappa(self, n: int) -> float:
        """How errors of attention compose beside the n-th step cache."""
        return self.kappas.get(n, self.kappas[None])

    def believe(self, n: int | None, found: float) -> None:
        """Let κ follow what was found beside the n-th step cache."""
        now = self.kappas.get(n, self.kappas[None])
        kappa = min(max(found, now / BELIEVED), now * BELIEVED)
        self.kappas[n] = self.kappas[None] = kappa

    def cached_error(self, n: int) -> float:
        """Error of the n-th step cache at the whole geometry, as measured or predicted."""
        return self.known.get(n, self.scale * self.caches[n].error)

    def learn(self, now: refine.Round, typical: float) -> None:
        """Predict what was measured on a typical prompt. What the step cache is known to do is
        subtracted; one that was never checked alone is to blame for an error beyond belief.
        """
        n, choices = now.proposal.choice
        loud, quiet = self.attention(n, choices)
        wrong, cached = typical / max(now.proposal.error, TINY), self.cached_error(n)
        if not loud and not n:
            if quiet:
                found = self.quiet * without(typical, cached) / quiet
                self.quiet = min(max(found, self.quiet / BELIEVED), self.quiet * BELIEVED)
        elif not loud:
            # Each is to blame for its share of what was predicted.
            blame = wrong ** (quiet**2 / max(quiet**2 + cached**2, TINY))
            self.quiet *= min(max(blame, 1 / BELIEVED), BELIEVED)
            self.known[n] = max(without(typical, blame * quiet), typical / 2)
            self.scale *= wrong**0.5  # others may be predicted better, or worse
        elif n == 0 or n in self.known:
            self.believe(n, self.kappa(n) * without(typical, cached, quiet) / loud)
        elif wrong > BELIEVED:
            self.known[n] = without(typical, loud, quiet)
        else:
            self.believe(n, self.kappa(n) * wrong**0.5)
            self.scale *= wrong**0.5

    def still(self, n: int) -> Solution:
        """Dense attention in the steps that the n-th step cache leaves."""
        tables = self.tables.all.tables[n]
        choices = tuple(Choice((DENSE,) * t.heads) for t in tables)
        return Solution(choices, sum(t.dense_ms for t in tables), 0.0)

    def rehearse(self, small: Small, margin: float) -> None:
        """Run what would be proposed at the small geometry, until the error is what was predicted:
        search is fond of what looks harmless, and some of it only looks so.
        """
        aim = FIRST * self.budget.max_rel_error / margin
        self._rehearse_arithmetic(small)
        seen: list[Any] = []
        found: dict[int, list[float]] = {}
        while len(seen) < REHEARSALS:
            proposal = self.propose(aim)
            n, choices = proposal.choice
            loud, quiet = self.attention(n, choices)
            if proposal.choice in seen or not loud:
                break
            change = self._changed(small, proposal.plan)
            if change is None:
                break
            rest = max(without(change, self._alone(small, n), quiet), PART * change)
            kappa = self.kappa(n) * rest / loud
            found.setdefault(n, []).append(kappa)
            self.believe(n, geometric_mean(found[n]))
            if not seen:
                self.tables.weigh(self.quiet / self.kappa(n))
            seen.append(proposal.choice)
            if 1 / NEAR < rest / loud < NEAR:
                break

    def _rehearse_arithmetic(self, small: Small) -> None:
        """Run the fastest arithmetic that computes every pair at the small geometry."""
        proposal = self.proposal(0, self.tables.quiet.fastest(0))
        _, quiet = self.attention(0, proposal.choice[1])
        change = self._changed(small, proposal.plan) if quiet else None
        if change is not None:
            # Rounding is part of it, for a plan that stays dense here has none.
            self.quiet *= change / quiet

    def _changed(self, small: Small, plan: Plan, sparse: bool = True) -> float | None:
        """Change of the final latents by a plan at the small geometry."""
        return small.change(f"composition/{refine.plan_digest(plan)}", plan, sparse)

    def _alone(self, small: Small, n: int) -> float:
        """Change by the n-th step cache alone in the few steps of a rehearsal, where it skips
        longer ways than in all of them.
        """
        if not n:
            return self.cached_error(n)
        plan = self._assembled(self.caches[n], self.still(n))
        return self._changed(small, plan, sparse=False) or 0.0

    def ratio(self, plan: Plan) -> float:
        """Predicted time of a plan's denoising ÷ that of the dense one."""
        return self.ratios[refine.plan_digest(plan)]

    def _rest(self, cache: Cached) -> float:
        """Milliseconds besides attention."""
        return self.rest_ms * sum(n * cache.share(b) for b, n in enumerate(self.steps) if n)

    def _assembled(self, cache: Cached, solution: Solution) -> Plan:
        plan = assemble(
            self.data, solution, self.fingerprint, self.budget, self.tokens, self.limits, "denoise"
        )
        layers = {
            site: layer.model_copy(
                update={"schedule": Schedule(refresh_every=self.found.refresh.get(site, 1))}
            )
            for site, layer in plan.sites.items()
        }
        if cache.method is not None:
            for root in self.fingerprint.components:
                layers[root] = LayerPlan(block=cache.method)
        tables = {**plan.tables, **self._read(plan)}
        return plan.model_copy(update={"sites": layers}).with_tables(tables)

    def _read(self, plan: Plan) -> dict[str, torch.Tensor]:
        """Side tensors of calibrators that a policy of the plan reads."""
        read: dict[str, set[str]] = {}
        for site, layer in plan.sites.items():
            rows = {row for rule in layer.rules for row in rule.policies}
            methods = [m for row in rows for m in plan.policies[row].methods]
            read[site] = {v for m in methods for _, v in m if isinstance(v, str)}
        return {
            f"{site_of(place)}/{name}": table
            for place, tables in self.found.tables.items()
            for name, table in tables.items()
            if name in read.get(site_of(place), ())
        }

    def finished(self, outcome: refine.Outcome) -> Plan:
        """The plan with what was measured; a dense one if none held."""
        measured = refine.outcome_numbers(outcome, self.dense_ms)
        best, speed = outcome.best, outcome.speed
        if best is None:
            log.warning("the plan is dense: %s", outcome.why)
            plan = self._assembled(self.caches[0], self.still(0))
            return plan.model_copy(update={"measured": measured})
        n, choices = best.proposal.choice
        cache = self.caches[n].method
        tables = self.tables.all.tables[n]
        ms = sum(cost(t, c) for t, c in zip(tables, choices, strict=True))
        keep = ("error", "latent_psnr", "psnr", "ssim", "lpips")
        measured |= {
            "predicted_error": best.proposal.error,
            "composition": self.kappa(n),
            "arithmetic": self.quiet,
            "ms": ms,
            "attention_speedup": self.dense_ms / max(ms, 1e-9),
            "attention_share": min(
                1.0, self.dense_ms / (1e3 * self.found.step_seconds * self.seen.total)
            ),
            "step_cache": None if cache is None else cache.kind,
            "step_cache_error": 0.0 if cache is None else self.cached_error(n),
            "per_task": {
                f"{r['task']} (seed {r['seed']})": {k: r[k] for k in keep if r.get(k) is not None}
                for r in best.rows
            },
            "predicted_speedup": 1 / self.ratio(best.plan),
            "denoise_tokens": self.tokens,
            "denoise_steps": self.seen.total,
            "denoise_ms": speed["ms"],
            "denoise_dense_ms": speed["dense_ms"],
            "denoise_speedup": speed["dense_ms"] / speed["ms"],
        }
        return best.plan.model_copy(update={"measured": _short(measured)}).with_tables(
            best.plan.tables
        )


def without(error: float, *parts: float) -> float:
    """What is left of an error without some parts of it."""
    return max(error**2 - sum(p**2 for p in parts), 0.0) ** 0.5


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value

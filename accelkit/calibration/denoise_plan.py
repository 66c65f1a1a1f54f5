"""Searches attention and step cache together, and makes plans of what it finds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accelkit.calibration import refine
from accelkit.calibration.assemble import assemble, site_data
from accelkit.calibration.denoise_caches import Cached
from accelkit.calibration.denoise_look import Look, bucket_of, buckets, site_of
from accelkit.calibration.denoise_measure import Measurements
from accelkit.calibration.denoise_weights import Small, grown
from accelkit.calibration.search import DENSE, Choice, Solution, Table, composed, search
from accelkit.kernels.cost import CostTable
from accelkit.patches.plan import Budget, Fingerprint, LayerPlan, Limits, Plan, Schedule

TURNS = 2
"""Plans that are run at the small geometry to see how errors compose."""
MOST_KAPPA = 16.0
log = logging.getLogger("accelkit")


@dataclass
class Planner:
    """Searches attention and step cache together for the fastest denoising within some error."""

    seen: Look
    found: Measurements
    weights: Mapping[str, Sequence[float]]
    costs: CostTable
    tokens: int
    caches: Sequence[Cached]
    fingerprint: Fingerprint
    budget: Budget
    limits: Limits
    kappa: float = 1.0
    ratios: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shares = buckets(self.seen.total)
        data = site_data(
            self.seen.places, self.found.families, self.found.screen,
            [(self.tokens, unit) for unit in self.found.units], self.tokens, self.weights,
            self.costs, self.seen.calls,
            {p: self.found.refresh.get(site_of(p), 1) for p in self.seen.places},
        )  # fmt: skip
        self.data = [
            replace(
                d,
                table=_grown(d.table),
                site=site_of(d.site),
                steps=shares[bucket_of(d.site)],
            )
            for d in data
        ]
        self.tables = [[_left(d.table, c) for d in self.data] for c in self.caches]
        self.fronts: list[dict[str, Any]] = [{} for _ in self.caches]
        self.dense_ms = sum(d.table.dense_ms for d in self.data)
        whole = 1e3 * self.found.step_seconds * self.seen.total
        # What is not attention, for each step; never less than nothing.
        self.rest_ms = max(whole - self.dense_ms, 0.0) / self.seen.total
        self.steps = [
            sum(low <= s / self.seen.total < high for s in range(self.seen.total))
            for low, high in shares
        ]

    def propose(self, epsilon: float) -> refine.Proposal:
        """The fastest denoising whose predicted error, the step cache's included, is ε."""
        ways = []
        for n, cache in enumerate(self.caches):
            if n and cache.error > min(epsilon, refine.MARGIN * self.budget.max_rel_error):
                continue
            room = max(epsilon**2 - cache.error**2, 0.0) ** 0.5
            solution = search(self.tables[n], room / self.kappa, self.fronts[n])
            ways.append((solution.ms + self._rest(cache), n, solution))
        ms, n, solution = min(ways, key=lambda w: w[:2])
        plan = self._assembled(self.caches[n], solution)
        dense_ms = self.dense_ms + self._rest(self.caches[0])
        self.ratios[refine.plan_digest(plan)] = ms / dense_ms
        error = composed([self.kappa * solution.error, self.caches[n].error])
        dense = n == 0 and all(c.dense for c in solution.choices)
        return refine.Proposal(plan, (n, solution), ms, dense_ms, error, dense)

    def compose(self, small: Small) -> None:
        """Find κ, how errors compose in the plans that search picks: it is fond of what looks
        harmless, and some of it only looks so.
        """
        aim = refine.MARGIN * self.budget.max_rel_error
        for turn in range(TURNS):
            solution = search(self.tables[0], aim / self.kappa, self.fronts[0])
            if not solution.error:
                break
            plan = self._assembled(self.caches[0], solution)
            change = small.change(f"composition/{turn}", plan)
            if change is None:
                break
            self.kappa = max(change / solution.error, 1 / MOST_KAPPA)
            self.kappa = min(self.kappa, MOST_KAPPA)

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
            still = tuple(Choice((DENSE,) * d.table.heads) for d in self.data)
            plan = self._assembled(self.caches[0], Solution(still, self.dense_ms, 0.0))
            return plan.model_copy(update={"measured": measured})
        n, solution = best.proposal.choice
        cache = self.caches[n].method
        keep = ("error", "latent_psnr", "psnr", "ssim", "lpips")
        measured |= {
            "ms": solution.ms,
            "attention_speedup": self.dense_ms / max(solution.ms, 1e-9),
            "attention_share": min(
                1.0, self.dense_ms / (1e3 * self.found.step_seconds * self.seen.total)
            ),
            "step_cache": None if cache is None else cache.kind,
            "step_cache_error": self.caches[n].error,
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


def _grown(table: Table) -> Table:
    options = tuple(replace(o, error=grown(o.error)) for o in table.options)
    return replace(table, options=options)


def _left(table: Table, cache: Cached) -> Table:
    """A table with the calls that a step cache leaves."""
    share = cache.left[table.site]
    return replace(
        table,
        dense_ms=share * table.dense_ms,
        ride_ms=share * table.ride_ms,
        options=tuple(replace(o, ms=share * o.ms) for o in table.options),
        fixed={k: share * v for k, v in table.fixed.items()},
    )


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value

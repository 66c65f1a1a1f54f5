"""Plans to try: in a bucket of the steps, settings whose errors are such as plans have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from accelkit.calibration.denoise.look import bucket_of, site_of
from accelkit.calibration.denoise.measure import Measurements
from accelkit.calibration.evaluation.quality import LeftOut
from accelkit.kernels.index import Partial
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Fingerprint, LayerPlan, Plan, Policy, Rule
from accelkit.patches.sites.attention import answer, compute

TYPICAL = 0.1
"""Error of a head that plans are fond of."""


@dataclass(frozen=True)
class Trial:
    """A plan that runs measured settings, with the setting of each place that has one and their
    errors by place and head.
    """

    plan: Plan
    error: Mapping[str, Sequence[float]]
    settings: Mapping[str, AttentionMethod]

    def left_out(self, place: str) -> LeftOut | None:
        """What the place's setting leaves out of a call."""
        method = self.settings.get(place)
        if method is None:
            return None
        site = f"{site_of(place)}/"
        tables = {
            k.removeprefix(site): t for k, t in self.plan.tables.items() if k.startswith(site)
        }

        def gap(call: AttentionCall, dense: Partial) -> Tensor | None:
            mask = None if call.key_mask is None else call.key_mask[:1]
            alone = replace(
                call, q=call.q[:1], k=call.k[:1], v=call.v[:1], key_mask=mask, tables=tables,
                memory={}, _shared={},
            )  # fmt: skip
            answers = answer(alone, Policy(methods=(method,)))
            if answers is None:
                return None
            return compute(answers[0]).out[0].float() - dense.out[0].float()

        return gap


def trial(
    found: Measurements,
    heads: Mapping[str, int],
    shares: Sequence[tuple[float, float]],
    fingerprint: Fingerprint,
    bucket: int,
) -> Trial:
    """At each place of a bucket the setting whose errors are most typical of what plans use; places
    without one stay dense.
    """
    policies: list[Policy] = [Policy()]
    rules: dict[str, list[Rule]] = {}
    errors: dict[str, list[float]] = {p: [0.0] * n for p, n in heads.items()}
    tables: dict[str, Tensor] = {}
    settings: dict[str, AttentionMethod] = {}
    for place, unit in found.units[0].items():
        if bucket_of(place) != bucket:
            continue
        rows = [
            (abs(np.log(max(float(np.mean(e)), 1e-6) / TYPICAL)), n, family, e)
            for n, family in enumerate(found.families[place])
            if not family.settings[0].renewed(2)
            for e in unit["families"][family.name]["error"]
        ]
        if not rows:
            continue
        _, _, family, error = min(rows, key=lambda r: r[:2])
        at = unit["families"][family.name]["error"].index(error)
        settings[place] = family.settings[at]
        policy = Policy(methods=(family.settings[at],))
        if policy not in policies:
            policies.append(policy)
        row = (policies.index(policy),) * heads[place]
        site = site_of(place)
        rule = Rule(phase="denoise", steps=shares[bucket_of(place)], policies=row)
        rules.setdefault(site, []).append(rule)
        errors[place] = [float(e) for e in error]
        tables |= {f"{site}/{k}": v for k, v in found.tables[place].items()}
    sites = {site: LayerPlan(rules=tuple(some)) for site, some in rules.items()}
    plan = Plan(fingerprint=fingerprint, policies=tuple(policies), sites=sites)
    return Trial(plan.with_tables(tables), errors, settings)

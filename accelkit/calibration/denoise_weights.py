"""Weights of a pipeline's heads, from runs at a small geometry.

How far noise on a head carries into the denoiser's output, times how far what methods do to that
output during a bucket carries into the final latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration import video
from accelkit.calibration.capture import See, dense_attention
from accelkit.calibration.denoise_look import Look, bucket_of, buckets, scaled, site_of
from accelkit.calibration.denoise_measure import Measurements
from accelkit.calibration.measure import Run
from accelkit.calibration.quality import NOISE, Show, noise_like, relative
from accelkit.calibration.video import Shot
from accelkit.errors import AccelkitError
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.parts import step_cache
from accelkit.patches.patch import patch
from accelkit.patches.plan import Fingerprint, LayerPlan, Plan, Policy, Rule

TYPICAL = 0.1
"""Error of a head that plans are fond of."""
FEW = 12
"""Steps of the disturbed runs, or a quarter of all."""


class Small:
    """The small geometry in few steps: a dense reference, kept calls of the denoisers, disturbed
    runs; and in all steps, what step caches are compared with.

    Nothing runs before it is asked for, so that a resumed calibration repeats only what it needs.
    """

    def __init__(self, run: Run, seen: Look, shot: Shot, roots: Mapping[str, Any]) -> None:
        self.run, self.seen, self.shot, self.roots = run, seen, shot, dict(roots)
        self.shares = buckets(seen.total)
        self.total = min(seen.total, max(FEW, seen.total // 4))
        self.settings = replace(seen.settings, num_inference_steps=self.total)

    def bucket(self, step: int, total: int) -> int:
        """Of a step among some total."""
        at = min(step, total - 1) / total
        return next(b for b, (low, high) in enumerate(self.shares) if low <= at < high)

    @cached_property
    def whole(self) -> tuple[Tensor, list[float]]:
        """Final latents in all steps, and the sizes of the residuals that MagCache lives on (empty
        where they cannot be had).
        """
        noted: list[float] = []
        with ExitStack() as undo:
            ratios: Callable[[], list[float]] = list
            if len(self.roots) == 1:
                root = next(iter(self.roots.values()))
                with suppress(AccelkitError):  # a class without; asking for one will say so
                    ratios = undo.enter_context(step_cache.magnitudes(root, self.seen.total))

            def each(done: int, latents: Tensor) -> None:
                noted[:] = ratios()

            take = video.run(self.run.model, self.seen.settings, self.shot, each=each)
        return take.latents, [round(r, 5) for r in noted]

    @cached_property
    def _reference(self) -> tuple[Tensor, dict[tuple[str, int], tuple[Any, Any]]]:
        kept_calls: dict[tuple[str, int], tuple[Any, Any]] = {}
        step = 0
        middle = {
            (site_of(p).partition(".")[0], bucket_of(p)): scaled(
                s[len(s) // 2], self.seen.total, self.total
            )
            for p, s in self.seen.steps.items()
        }

        def each(done: int, latents: Tensor) -> None:
            nonlocal step
            step = done + 1

        def keeper(name: str) -> Callable[..., None]:
            def keep(root: Any, args: Any, kwargs: Any) -> None:
                key = (name, self.bucket(step, self.total))
                if step == middle.get(key) and key not in kept_calls:
                    kept_calls[key] = (_first(args), _first(kwargs))

            return keep

        hooks = [
            root.register_forward_pre_hook(keeper(name), with_kwargs=True)
            for name, root in self.roots.items()
        ]
        try:
            take = video.run(self.run.model, self.settings, self.shot, each=each)
        finally:
            for hook in hooks:
                hook.remove()
        return take.latents, kept_calls

    @property
    def latents(self) -> Tensor:
        """Final latents of the dense run in few steps."""
        return self._reference[0]

    def probe(self, place: str) -> Show:
        """What runs to weigh the heads of a place: one call of its denoiser."""
        component = site_of(place).partition(".")[0]

        @torch.inference_mode()
        def show(copies: int, see: See) -> Tensor:
            args, kwargs = self._reference[1][component, bucket_of(place)]

            def visit(call: AttentionCall) -> Tensor | None:
                if call.site.path != site_of(place):
                    return None
                dense = dense_attention(call)
                if call.q.shape[0] == copies:
                    see(call, dense)
                    return dense.out
                # Some denoisers (Mochi) take a batch one by one: this is entry `ordinal` of it.
                whole = Partial(*(t.expand(copies, *t.shape[1:]).clone() for t in
                                  (dense.out, dense.lse)))  # fmt: skip
                see(call, whole)
                return whole.out[call.ordinal, None]

            with watch(self.run.model, visit):
                out = self.roots[component](*_copied(args, copies), **_copied(kwargs, copies))
            return out[0] if isinstance(out, tuple) else out.sample

        return show

    def influence(
        self, bucket: int | None, trial: Trial, heads: Mapping[str, Sequence[float]]
    ) -> float:
        """How far errors of heads in a bucket (None: in all of them) travel to the final latents:
        their change by a trial of the methods themselves, ÷ what `heads`, a weight for every head
        of each place, makes of the trial's errors.

        Noise would tell too little: what methods leave out is alike in all tokens and steps. It
        stands in only where the small geometry is too short for them.
        """
        mine = [p for p in heads if bucket in (None, bucket_of(p))]

        def work() -> dict[str, Any]:
            with patch(self.run.model, trial.plan) as handle:
                take = video.run(self.run.model, self.settings, self.shot)
                sparse = handle.report().sparse_calls
            if sparse:
                return {"change": relative(take.latents, self.latents), "noise": False}
            return {"change": self._noisy(bucket), "noise": True}

        self.run.tell("influence of early and late steps")
        found = self.run.journal.unit(f"influence/{'all' if bucket is None else bucket}", work)
        error = {p: [NOISE] * len(heads[p]) if found["noise"] else trial.error[p] for p in mine}
        total = sum(w * e for p in mine for w, e in zip(heads[p], error[p], strict=True))
        return found["change"] / max(total, 1e-12)

    def _noisy(self, bucket: int | None) -> float:
        """Relative change of the final latents by 5 % noise on all heads, the same at every step
        but not in every branch.
        """

        def disturb(call: AttentionCall) -> Tensor | None:
            if bucket not in (None, self.bucket(call.clock.step, self.total)):
                return None
            dense, seed = dense_attention(call), self.seen.branches.index(call.clock.branch)
            return dense.out + (NOISE * noise_like(dense.out, seed)).to(dense.out.dtype)

        with watch(self.run.model, disturb):
            take = video.run(self.run.model, self.settings, self.shot)
        return relative(take.latents, self.latents)


@dataclass(frozen=True)
class Trial:
    """A plan that runs measured settings, and their errors by place and head."""

    plan: Plan
    error: Mapping[str, Sequence[float]]


def trial(
    found: Measurements,
    heads: Mapping[str, int],
    shares: Sequence[tuple[float, float]],
    fingerprint: Fingerprint,
    bucket: int | None = None,
) -> Trial:
    """At each place of a bucket (None: of all) the setting whose errors are most typical of what
    plans use; places without one stay dense.
    """
    policies: list[Policy] = [Policy()]
    rules: dict[str, list[Rule]] = {}
    errors: dict[str, list[float]] = {p: [0.0] * n for p, n in heads.items()}
    tables: dict[str, Tensor] = {}
    for place, unit in found.units[0].items():
        if bucket not in (None, bucket_of(place)):
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
        policy = Policy(methods=(family.settings[at],))
        if policy not in policies:
            policies.append(policy)
        row = (policies.index(policy),) * heads[place]
        site = site_of(place)
        rule = Rule(phase="denoise", steps=shares[bucket_of(place)], policies=row)
        rules.setdefault(site, []).append(rule)
        errors[place] = error
        tables |= {f"{site}/{k}": v for k, v in found.tables[place].items()}
    sites = {site: LayerPlan(rules=tuple(some)) for site, some in rules.items()}
    plan = Plan(fingerprint=fingerprint, policies=tuple(policies), sites=sites)
    return Trial(plan.with_tables(tables), errors)


def _first(value: Any, batch: int | None = None) -> Any:
    """The first entry of the batch in a denoiser's arguments; shapes follow the hidden states."""
    if batch is None:
        inside = value.values() if isinstance(value, dict) else value
        tensors = [t for t in inside if isinstance(t, Tensor) and t.ndim > 2]
        batch = len(tensors[0]) if tensors else 1
    if isinstance(value, Tensor):
        return value[:1] if value.ndim and len(value) == batch else value
    return _mapped(value, lambda v: _first(v, batch))


def _copied(value: Any, copies: int) -> Any:
    if isinstance(value, Tensor):
        alone = value.ndim and len(value) == 1
        return value.expand(copies, *value.shape[1:]).contiguous() if alone else value
    return _mapped(value, lambda v: _copied(v, copies))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {k: change(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(change(v) for v in value)
    return value

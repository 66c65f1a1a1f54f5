"""Weights of a pipeline's heads, from runs at a small geometry.

How far noise on a head carries into the denoiser's output, times how far what methods do to that
output during a bucket carries into the final latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration.capture import See, dense_attention
from accelkit.calibration.denoise import schedule, video
from accelkit.calibration.denoise.look import Look, bucket_of, buckets, place_of, scaled, site_of
from accelkit.calibration.denoise.shots import Shot, together
from accelkit.calibration.denoise.trial import Trial
from accelkit.calibration.evaluation.quality import NOISE, ONE_IN_TWENTY, Show, noise_like, relative
from accelkit.calibration.search import composed
from accelkit.calibration.session import Run
from accelkit.errors import AccelkitError
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.parts import step_cache
from accelkit.patches.patch import patch
from accelkit.patches.plan import Limits, Plan

FEW = 12
"""Most steps of the disturbed runs; buckets are the same shares of them as of all."""
MOST_WEIGHED = 40
"""Most places that are weighed apart."""
SEEDS = 3
"""Results that are disturbed, drawn at once where that can be: one alone may be about to tip over
into another picture, or not.
"""


@dataclass(frozen=True)
class Whole:
    """A dense run at the small geometry in all steps: final latents, the sizes of the residuals
    that MagCache lives on and the best schedules for every number of steps (both empty where they
    cannot be had), seconds, and calls of each place.
    """

    latents: Tensor
    ratios: list[float]
    schedules: list[list[int]]
    seconds: float
    calls: Mapping[str, int]


class Small:
    """The small geometry in few steps: a dense reference, kept calls of the denoisers, disturbed
    runs; and in all steps, what step caches are compared with.

    Nothing runs before it is asked for, so that a resumed calibration repeats only what it needs.
    """

    def __init__(
        self, run: Run, seen: Look, shots: Sequence[Shot], roots: Mapping[str, Any]
    ) -> None:
        self.run, self.seen, self.roots = run, seen, dict(roots)
        some = [shots[n % len(shots)] for n in range(SEEDS)]
        joined = together(some)
        apart = [replace(s, seed=s.seed + SEEDS * n) for n, s in enumerate(some)]
        self.shots = apart if joined is None else [joined]
        self.shares = buckets(seen.total)
        self.total = min(seen.total, FEW)
        self.settings = replace(seen.settings, num_inference_steps=self.total)
        self.spreads: list[np.ndarray] = []
        self._few: dict[int, Tensor] = {}

    def bucket(self, step: int, total: int) -> int:
        """Of a step among some total."""
        at = min(step, total - 1) / total
        return next(b for b, (low, high) in enumerate(self.shares) if low <= at < high)

    @cached_property
    def whole(self) -> Whole:
        """The dense run in all steps."""
        noted: list[float] = []
        calls: dict[str, int] = Counter()

        def count(call: AttentionCall) -> None:
            calls[place_of(call.site.path, self.bucket(call.clock.step, self.seen.total))] += 1

        with ExitStack() as undo:
            ratios: Callable[[], list[float]] = list
            if len(self.roots) == 1:
                root = next(iter(self.roots.values()))
                with suppress(AccelkitError):  # a class without; asking for one will say so
                    ratios = undo.enter_context(step_cache.magnitudes(root, self.seen.total))

            def each(done: int, latents: Tensor) -> None:
                noted[:] = ratios()

            undo.enter_context(watch(self.run.model, count))
            kept = undo.enter_context(schedule.recorded(self.run.model))
            take = video.run(self.run.model, self.seen.settings, self.shots[0], each=each)
        best = schedule.schedules(kept) if len(self.roots) == 1 else []
        return Whole(take.latents, [round(r, 5) for r in noted], best, take.ends[-1], calls)

    def own(self, name: str) -> list[Any]:
        """Numbers of the model that step caches need: `ratios` or `schedules` of the dense run."""
        return getattr(self.whole, name)

    @cached_property
    def kept_calls(self) -> dict[tuple[str, int], tuple[Any, Any]]:
        """Arguments of a call of each denoiser in the middle of each bucket."""
        kept: dict[tuple[str, int], tuple[Any, Any]] = {}
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
                if step == middle.get(key) and key not in kept:
                    kept[key] = (_first(args), _first(kwargs))

            return keep

        hooks = [
            root.register_forward_pre_hook(keeper(name), with_kwargs=True)
            for name, root in self.roots.items()
        ]
        try:
            take = video.run(self.run.model, self.settings, self.shots[0], each=each)
            self._few[0] = take.latents
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    def latents(self, n: int) -> Tensor:
        """Final latents of the n-th dense run in few steps."""
        if n not in self._few:
            self._few[n] = video.run(self.run.model, self.settings, self.shots[n]).latents
        return self._few[n]

    def probe(self, places: Sequence[str]) -> Show:
        """What runs to weigh the heads of a single place: one call of its denoiser."""
        (place,) = places
        component = site_of(place).partition(".")[0]

        @torch.inference_mode()
        def show(copies: int, see: See) -> Tensor:
            args, kwargs = self.kept_calls[component, bucket_of(place)]

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

    def influence(self, bucket: int, trial: Trial, heads: Mapping[str, Sequence[float]]) -> float:
        """How far errors of heads in a bucket travel to the final latents: their change by a trial
        of the methods themselves, ÷ what search makes of the trial's errors with `heads`, a weight
        for every head of each place.

        Noise would tell too little: what methods leave out is alike in all tokens and steps. It
        stands in only where the small geometry is too short for them.
        """
        mine = [p for p in heads if bucket_of(p) == bucket]
        change, error = self.change(f"influence/{bucket}", trial.plan), trial.error
        if change is None:
            key = f"influence/{bucket}/noise"
            change = self.run.journal.unit(key, lambda: self._noisy(NOISE, bucket))
            error = {p: [NOISE] * len(heads[p]) for p in mine}
        losses = [sum(w * e for w, e in zip(heads[p], error[p], strict=True)) for p in mine]
        return change / max(composed(losses), 1e-12)

    def change(self, name: str, plan: Plan, sparse: bool = True) -> float | None:
        """Relative change of the final latents by a plan, the median of several results: one of
        them may tip over into another picture. None: the small geometry is too short for the
        plan, which ought to be `sparse`.
        """

        def work(n: int) -> list[float] | None:
            with patch(self.run.model, plan.model_copy(update={"limits": Limits()})) as handle:
                take = video.run(self.run.model, self.settings, self.shots[n])
                counted = handle.report().sparse_calls
            if sparse and not counted:
                return None
            return [relative(f, t) for f, t in zip(take.latents, self.latents(n), strict=True)]

        found: list[float] = []
        for n in range(len(self.shots)):
            self.run.tell("influence of early and late steps")
            some = self.run.journal.unit(f"{name}/{n}", partial(work, n))
            if some is None:
                return None
            found += some
        self.spreads.append(np.log(np.maximum(found, 1e-12)))
        return float(np.median(found))

    def margin(self) -> float:
        """By which factor a result's error exceeds the mean in one case of twenty, from the spread
        of the logarithms among the results of every change so far; 1 without any.
        """
        freedom = sum(len(logs) - 1 for logs in self.spreads)
        squares = sum(float(((logs - logs.mean()) ** 2).sum()) for logs in self.spreads)
        return float(np.exp(ONE_IN_TWENTY * (squares / freedom) ** 0.5)) if freedom else 1.0

    def rounding(self) -> float:
        """Relative change of the final latents by noise of the size of rounding on all heads: no
        plan changes them much less.
        """
        dtype = next(iter(self.roots.values())).dtype
        size = torch.finfo(dtype).eps / 2
        return self.run.journal.unit("influence/rounding", lambda: self._noisy(size))

    def _noisy(self, size: float, bucket: int | None = None) -> float:
        """Relative change of the final latents, the median of the results, by noise of some size
        on all heads, in a bucket or always; the same at every step but not in every branch.
        """

        def disturb(call: AttentionCall) -> Tensor | None:
            if bucket not in (None, self.bucket(call.clock.step, self.total)):
                return None
            dense, seed = dense_attention(call), self.seen.branches.index(call.clock.branch)
            return dense.out + (size * noise_like(dense.out, seed)).to(dense.out.dtype)

        with watch(self.run.model, disturb):
            found = video.run(self.run.model, self.settings, self.shots[0]).latents
        return float(np.median([relative(*p) for p in zip(found, self.latents(0), strict=True)]))


def carried_on(influence: Sequence[float], few: int, total: int) -> list[float]:
    """Influences of the buckets of `total` steps, from those of `few`, in which a bucket may have
    another share of the steps.

    What early steps decide, later ones cannot mend, and each of them carries it on: a step counts
    for no less than a later one, times how many times earlier it is. Small pictures show less of
    that than large ones, for there is less to decide.
    """
    shares = buckets(total)
    middle = [(low + high) / 2 for low, high in shares]

    def steps(of: int) -> list[int]:
        return [sum(low <= s / of < high for s in range(of)) for low, high in shares]

    each = [m * i * few / max(n, 1) for m, i, n in zip(middle, influence, steps(few), strict=True)]
    most = [max(each[b:]) / m for b, m in enumerate(middle)]
    return [e * n / total for e, n in zip(most, steps(total), strict=True)]


def weighed_at(places: Sequence[str]) -> dict[str, str]:
    """The place whose weights count for each: its own where places are few, else that of the same
    site in the middle one of its buckets.
    """
    if len(places) <= MOST_WEIGHED:
        return {p: p for p in places}
    mine: dict[str, list[str]] = {}
    for p in sorted(places, key=bucket_of):
        mine.setdefault(site_of(p), []).append(p)
    return {p: mine[site_of(p)][len(mine[site_of(p)]) // 2] for p in places}


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

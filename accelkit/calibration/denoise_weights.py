"""Weights of a pipeline's heads, from runs at a small geometry.

How far noise on a head carries into the denoiser's output, times how far noise on that output
during a bucket carries into the final latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from accelkit.calibration import video
from accelkit.calibration.capture import See, dense_attention
from accelkit.calibration.denoise_look import Look, bucket_of, buckets, scaled, site_of
from accelkit.calibration.measure import Run
from accelkit.calibration.quality import NOISE, Show, noise_like, relative
from accelkit.calibration.video import Shot
from accelkit.errors import AccelkitError
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.parts import step_cache

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

    def influence(self, bucket: int) -> float:
        """Change of the final latents ÷ 0.05 when the denoiser's output has 5 % noise throughout a
        bucket, the same at every step but not in every branch.
        """
        step = forward = 0

        def each(done: int, latents: Tensor) -> None:
            nonlocal step, forward
            step, forward = done + 1, 0

        def disturb(root: Any, args: Any, out: Any) -> Any:
            nonlocal forward
            forward += 1
            if self.bucket(step, self.total) != bucket:
                return None
            clean = out[0] if isinstance(out, tuple) else out.sample
            noisy = clean + (NOISE * noise_like(clean, forward)).to(clean.dtype)
            if isinstance(out, tuple):
                return (noisy, *out[1:])
            out.sample = noisy
            return out

        def work() -> float:
            hooks = [root.register_forward_hook(disturb) for root in self.roots.values()]
            try:
                take = video.run(self.run.model, self.settings, self.shot, each=each)
            finally:
                for hook in hooks:
                    hook.remove()
            return relative(take.latents, self.latents) / NOISE

        self.run.tell("influence of early and late steps")
        return self.run.journal.unit(f"influence/{bucket}", work)

    def composition(self, weights: Mapping[str, Sequence[float]]) -> float:
        """κ: what noise on all heads at all steps does to the final latents ÷ what the sum of the
        weights says.
        """

        def disturb(call: AttentionCall) -> Tensor:
            dense = dense_attention(call)
            return dense.out + (NOISE * noise_like(dense.out)).to(dense.out.dtype)

        def work() -> float:
            with watch(self.run.model, disturb):
                take = video.run(self.run.model, self.settings, self.shot)
            total = NOISE * sum(map(sum, weights.values()))
            return relative(take.latents, self.latents) / max(total, 1e-12)

        self.run.tell("composition of errors")
        return self.run.journal.unit("composition", work)


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

"""Which denoising steps to compute, from what the scheduler was given in one dense run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelkit.calibration.denoise import video
from accelkit.calibration.evaluation.quality import relative

EARLY = 0.03
"""A row of skipped steps counts 1 ÷ (this + the share of the steps before it): all that follows
carries it on.
"""
LATE = 2.0
"""How much more it counts where it ends with the last step: no later one clears the noise away."""
ALIKE = 0.02
"""Most by which a scheduler's steps that are taken again may differ from the run itself."""


@dataclass
class Given:
    """What a scheduler was given: itself as it was before the first step, the arguments of every
    step, and the latents behind the last one.
    """

    scheduler: Any = None
    steps: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    last: Tensor | None = None

    @property
    def outputs(self) -> list[Tensor]:
        """The denoiser's output at every step, guidance included, in fp32."""
        return [args[0].float() for args, _ in self.steps]


@contextmanager
def recorded(pipe: Any) -> Iterator[Given]:
    """While open, what the pipeline's scheduler is given is kept."""
    kept = Given()

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kept.scheduler is None:
            twin, own = copy.copy(pipe.scheduler), type(pipe.scheduler)
            for name in [n for n, v in vars(twin).items() if callable(v) and hasattr(own, n)]:
                delattr(twin, name)  # whoever listens shall not hear the copy
            kept.scheduler = copy.deepcopy(twin)
        kept.steps.append((tuple(a.clone() if isinstance(a, Tensor) else a for a in args), kwargs))

    def see(latents: Tensor, again: bool) -> None:
        kept.last = latents.clone()

    with video.listening(pipe, see, before):
        yield kept


def schedules(kept: Given) -> list[list[int]]:
    """For 1, 2, … and all steps the ones to compute so that the final latents change least; empty
    where the scheduler does more than weigh the outputs.
    """
    weights = carried(kept)
    if not weights or kept.last is None:
        return []
    loss, total = losses(kept.outputs, weights, kept.last), len(weights)
    # Of all ways to compute n steps before the step `end` the best one, as (loss, steps).
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())]]
    for end in range(1, total + 1):
        ways = [
            [(best[s][n][0] + loss(s, end), (*best[s][n][1], s)) for s in range(n, end)]
            for n in range(end)
        ]
        best.append([(float("inf"), ()), *map(min, ways)])
        best[end] = best[end][: end + 1]
    return [list(steps) for _, steps in best[total][1:]]


def carried(kept: Given) -> list[float]:
    """How far each output is carried into the final latents, from the scheduler's steps taken again
    with each of them doubled in turn; empty where that is not what happened.
    """
    scheduler, total = copy.deepcopy(kept.scheduler), len(kept.steps)
    once = len(getattr(scheduler, "timesteps", ())) == total
    if kept.last is None or not once or any(len(args) < 3 for args, _ in kept.steps):
        return []
    outputs, begin = kept.outputs, kept.steps[0][0][2]
    # The last of the copies has none doubled.
    latents = begin[:1].float().repeat(total + 1, *[1] * (begin.ndim - 1))
    for n, ((_, timestep, _, *rest), kwargs) in enumerate(kept.steps):
        out = outputs[n][:1].repeat(total + 1, *[1] * (begin.ndim - 1))
        out[n] *= 2
        latents = scheduler.step(out, timestep, latents, *rest, **kwargs)[0]
    plain = latents[-1]
    if relative(plain, kept.last[0].float()) > ALIKE:
        return []
    return [
        float(((end - plain) * out[0]).sum() / out[0].square().sum().clamp_min(1e-30))
        for end, out in zip(latents[:-1], outputs, strict=True)
    ]


def losses(
    outputs: Sequence[Tensor], weights: Sequence[float], last: Tensor
) -> Callable[[int, int], float]:
    """A function of two steps: relative change of the final latents if the steps between them reuse
    the output of the first, the median of the results; times what that counts for where it lies.
    """
    total, size = len(outputs), last.float().abs().flatten(1).mean(1)
    sums = torch.stack([w * o for w, o in zip(weights, outputs, strict=True)]).cumsum(0)
    known: dict[tuple[int, int], float] = {}

    def loss(first: int, end: int) -> float:
        if end - first < 2:
            return 0.0
        if (first, end) not in known:
            reused = sum(weights[first + 1 : end]) * outputs[first]
            change = reused - (sums[end - 1] - sums[first])
            counts = 1 / (EARLY + first / total) + LATE * ((end - 1) / (total - 1)) ** 8
            known[first, end] = counts * float((change.abs().flatten(1).mean(1) / size).median())
        return known[first, end]

    return loss

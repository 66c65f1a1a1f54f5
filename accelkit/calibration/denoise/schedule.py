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
NUMBERS = 4096
"""Most numbers of a result that are looked at, evenly spread: a scheduler weighs each by itself."""


@dataclass
class Given:
    """What a scheduler was given: itself as it was before the first step; of every step the output
    of the denoiser, guidance included, the timestep and further arguments; the first latents and
    those behind the last step. Of tensors some numbers, fp32 `[results, numbers]`.
    """

    scheduler: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    first: Tensor | None = None
    last: Tensor | None = None


def _some(latents: Tensor) -> Tensor:
    flat = latents.detach().flatten(1)
    return flat[:, :: -(-flat.shape[1] // NUMBERS)].float().clone()


@contextmanager
def recorded(pipe: Any) -> Iterator[Given]:
    """While open, what the pipeline's scheduler is given is kept; of a scheduler that is not called
    with output, timestep and latents nothing.
    """
    kept = Given()

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kept.scheduler is None:
            twin, own = copy.copy(pipe.scheduler), type(pipe.scheduler)
            for name in [n for n, v in vars(twin).items() if callable(v) and hasattr(own, n)]:
                delattr(twin, name)  # whoever listens shall not hear the copy
            kept.scheduler = copy.deepcopy(twin)
        if len(args) >= 3:
            output, timestep, latents, *rest = args
            kept.first = _some(latents) if kept.first is None else kept.first
            kept.outputs.append(_some(output))
            kept.calls.append((timestep, tuple(rest), kwargs))

    def see(latents: Tensor, again: bool) -> None:
        kept.last = _some(latents)

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
    return [list(steps) for _, steps in best[total][1:]]


def carried(kept: Given) -> list[float]:
    """How far each output is carried into the final latents, from the scheduler's steps taken again
    with each of them doubled in turn; empty where that is not what happened.
    """
    scheduler, total = copy.deepcopy(kept.scheduler), len(kept.calls)
    once = len(getattr(scheduler, "timesteps", ())) == total
    if kept.first is None or kept.last is None or not once:
        return []
    # The last of the copies has none doubled.
    latents = kept.first[:1].repeat(total + 1, 1)
    for n, (timestep, rest, kwargs) in enumerate(kept.calls):
        out = kept.outputs[n][:1].repeat(total + 1, 1)
        out[n] *= 2
        try:
            latents = scheduler.step(out, timestep, latents, *rest, **kwargs)[0]
        except (RuntimeError, ValueError, IndexError):  # it looks at shapes or single places
            return []
    plain = latents[-1]
    if relative(plain, kept.last[0]) > ALIKE:
        return []
    return [
        float(((end - plain) * out[0]).sum() / out[0].square().sum().clamp_min(1e-30))
        for end, out in zip(latents[:-1], kept.outputs, strict=True)
    ]


def losses(
    outputs: Sequence[Tensor], weights: Sequence[float], last: Tensor
) -> Callable[[int, int], float]:
    """A function of two steps: relative change of the final latents if the steps between them reuse
    the output of the first, the median of the results; times what that counts for where it lies.
    """
    total, size = len(outputs), last.abs().mean(1)
    sums = torch.stack([w * o for w, o in zip(weights, outputs, strict=True)]).cumsum(0)
    known: dict[tuple[int, int], float] = {}

    def loss(first: int, end: int) -> float:
        if end - first < 2:
            return 0.0
        if (first, end) not in known:
            reused = sum(weights[first + 1 : end]) * outputs[first]
            change = reused - (sums[end - 1] - sums[first])
            counts = 1 / (EARLY + first / total) + LATE * ((end - 1) / (total - 1)) ** 8
            known[first, end] = counts * float((change.abs().mean(1) / size).median())
        return known[first, end]

    return loss

"""How a pipeline is run: its size and steps, what a run gives, and listening to its steps."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.evaluation.quality import synchronise
from accelkit.errors import AccelkitError, InvalidInputError


@dataclass(frozen=True)
class Settings:
    """Size, length and steps that all runs of a pipeline share; None leaves its own default."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Call arguments; what the pipeline has no parameter for is an error."""
        wanted = {k: v for k, v in vars(self).items() if v is not None}
        known = inspect.signature(type(pipe).__call__).parameters
        strange = [k for k in wanted if k not in known]
        if strange:
            raise InvalidInputError(
                f"{type(pipe).__name__} has no {' and no '.join(strange)}; leave it out"
            )
        return wanted

    def filled(self, pipe: Any) -> Settings:
        """With the pipeline's own defaults where it has numbers for them."""
        known = inspect.signature(type(pipe).__call__).parameters
        found = {
            k: getattr(known.get(k), "default", None) for k, v in vars(self).items() if v is None
        }
        return replace(self, **{k: v for k, v in found.items() if isinstance(v, int)})

    def smaller(self) -> list[Settings]:
        """Smaller frames and fewer of them, the smallest first, this size last."""
        found = []
        for side, time_ in ((4, 4), (4, 2), (2, 4), (2, 2), (2, 1)):
            if self.height is None or self.width is None:
                break
            if self.height % (16 * side) or self.width % (16 * side):
                continue
            frames = self.num_frames
            if frames is not None and frames > 8:
                frames = max(9, (frames - 1) // (8 * time_) * 8 + 1)
            one = replace(
                self, height=self.height // side, width=self.width // side, num_frames=frames
            )
            found.append(one)
        return [*found, self]


@dataclass
class Take:
    """What one run gave: final latents, frames fp32 `[F, H, W, 3]` in 0 … 1 (None without a
    decoder), seconds in all, and seconds until each step had ended.
    """

    latents: Tensor
    frames: np.ndarray | None
    seconds: float
    ends: list[float] = field(default_factory=list)
    whole: bool = True


class Enough(Exception):
    """Ends a run early; what there is so far is its result."""


@torch.inference_mode()
def run(
    pipe: Any,
    settings: Settings,
    shot: Shot,
    *,
    decode: bool = False,
    each: Callable[[int, Tensor], None] | None = None,
    **extra: Any,
) -> Take:
    """One run of a pipeline. `each(step, latents)` is called after every step; it may raise
    `Enough`.
    """
    decode = decode and getattr(pipe, "vae", None) is not None
    latents: list[Tensor] = []
    clock = _Clock(torch.device(pipe._execution_device))

    def see(value: Tensor, again: bool) -> None:
        latents[:] = [value]
        if again:
            return
        clock.mark()
        if each is not None:
            each(len(clock.marks) - 2, value)

    whole, frames = True, None
    with listening(pipe, see), _quiet(pipe):
        clock.mark()
        try:
            out = _called(pipe, settings, shot, output_type="np" if decode else "latent", **extra)
            if decode:
                frames = _frames(out)
        except Enough:
            whole = False
            pipe.maybe_free_model_hooks()
        clock.mark()
    *ends, seconds = clock.seconds()
    return Take(latents[0].float().clone(), frames, seconds, ends, whole)


class _Clock:
    """Marks in the device's own time, so that nobody has to wait for it on the way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        synchronise(device)

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the first mark to each of the others."""
        synchronise(self.device)
        first, *rest = self.marks
        if self.device.type == "cuda":
            return [first.elapsed_time(m) / 1e3 for m in rest]
        return [m - first for m in rest]


def _called(pipe: Any, settings: Settings, shot: Shot, **extra: Any) -> Any:
    """The pipeline's own call; arguments that it refuses are bad input, told in its words."""
    known = inspect.signature(type(pipe).__call__).parameters
    strange = [k for k in shot.arguments if k not in known]
    if strange:
        raise InvalidInputError(
            f"prompt {shot.name!r}: {type(pipe).__name__} has no argument {', '.join(strange)}; "
            f"it has {', '.join(k for k in known if k != 'self')}"
        )
    arguments = {**settings.arguments(pipe), **shot.arguments, **extra}
    try:
        return pipe(**arguments, generator=torch.Generator().manual_seed(shot.seed))
    except AccelkitError:
        raise
    except ValueError as error:
        raise InvalidInputError(
            f"{type(pipe).__name__} refuses what it was called with: {error}"
        ) from error


def begin(pipe: Any, settings: Settings, shot: Shot) -> None:
    """Run a pipeline until something raises `Enough`, and tidy up behind it."""
    try:
        with torch.inference_mode(), _quiet(pipe):
            _called(pipe, settings, shot, output_type="latent")
    except Enough:
        pipe.maybe_free_model_hooks()


@contextmanager
def listening(
    pipe: Any,
    see: Callable[[Tensor, bool], None],
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
) -> Iterator[None]:
    """While open, `see` gets the latents that each of the scheduler's steps gives, and whether it
    was another look at the same timestep; `before` gets the arguments, ahead of the step.
    """
    scheduler, own = pipe.scheduler, "step" in vars(pipe.scheduler)
    step = scheduler.step

    last: list[Any] = [None]

    @wraps(step)
    def listened(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(args, kwargs)
        found = step(*args, **kwargs)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        again = timestep is not None and timestep is last[0]
        last[0] = timestep
        see(found[0] if isinstance(found, tuple) else found.prev_sample, again)
        return found

    scheduler.step = listened
    try:
        yield
    finally:
        if own:
            scheduler.step = step
        else:
            del scheduler.step


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar would write over ours."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _frames(out: Any) -> np.ndarray:
    """Frames fp32 `[F, H, W, 3]` of a pipeline's output, whose arrays have a batch in front."""
    found = getattr(out, "frames", None)
    found = np.asarray(getattr(out, "images", None) if found is None else found, np.float32)
    return found[0] if found.ndim == 5 else found

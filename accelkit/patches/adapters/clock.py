"""Which denoising step is it? The scheduler says so; without one, the timestep does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from accelkit.patches.call import Clock


class DenoiseClock:
    """Step, steps in all and guidance branch of one patched pipeline or denoiser.

    A pipeline's scheduler is listened to: `set_timesteps` begins a generation, `step` ends a step.
    A scheduler that is swapped in later is found at the next forward. A bare denoiser goes by its
    `timestep`: a new value is the next step, one against the direction begins a generation. The
    branch is the name given to `cache_context`; without one, the forwards of a step are counted.
    A pipeline whose scheduler was never set up goes by the timestep as well.
    """

    def __init__(self, pipe: Any, begin: Callable[[], None], undo: ExitStack) -> None:
        self.pipe, self._begin = pipe, begin
        self._wrapped = ExitStack()  # schedulers come later, too
        undo.callback(self._wrapped.close)
        self.step, self.total = 0, 1
        self._context: str | None = None
        self._forwards = 0
        self._scheduler: Any = None
        self._heard = False
        self._first: float | None = None
        self._last: float | None = None
        self._taken: Any = None  # the timestep of the last step
        self._direction = 0.0
        if pipe is not None:
            self._listen(getattr(pipe, "scheduler", None))

    def now(self) -> Clock:
        """The clock of the forward that is running."""
        branch = self._context or ("cond" if self._forwards <= 1 else "uncond")
        return Clock("denoise", self._step(), self.total, branch)

    def _step(self) -> int:
        """The scheduler's own index, where it has one; else what was counted."""
        for name in ("step_index", "begin_index") if self._heard else ():
            index = getattr(self._scheduler, name, None)
            if index is not None:
                return int(index)
        return self.step

    def forward(self, timestep: Tensor) -> None:
        """A denoiser's forward begins."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is not self._scheduler:
            self._listen(scheduler)
            self._heard = True
            self._start(len(scheduler.timesteps))
        if not self._heard:
            self._read(float(timestep.max()))
        self._forwards += 1

    def follow(self, root: nn.Module, undo: ExitStack) -> None:
        """Take the branch from the denoiser's `cache_context`."""
        original = getattr(root, "cache_context", None)
        if original is None:
            return

        @functools.wraps(original)
        def cache_context(name: str, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
            return self._named(name, original(name, *args, **kwargs))

        root.cache_context = cache_context  # type: ignore[assignment]
        undo.callback(delattr, root, "cache_context")

    @contextmanager
    def _named(self, name: str, inner: AbstractContextManager[None]) -> Iterator[None]:
        before, self._context = self._context, name.removeprefix("pred_")
        try:
            with inner:
                yield
        finally:
            self._context = before

    def _start(self, total: int) -> None:
        self.step, self.total, self._forwards = 0, max(total, 1), 0
        self._begin()

    def _listen(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        if scheduler is None or "set_timesteps" in vars(scheduler):
            return

        # Bound methods, so that a deep copy of the scheduler gets its own and stays silent here.
        @functools.wraps(type(scheduler).set_timesteps)
        def set_timesteps(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = type(this).set_timesteps(this, *args, **kwargs)
            if this is self._scheduler:
                self._heard = True
                self._start(len(this.timesteps))
            return result

        @functools.wraps(type(scheduler).step)
        def step(this: Any, *args: Any, **kwargs: Any) -> Any:
            result = type(this).step(this, *args, **kwargs)
            timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
            # Some pipelines (Cosmos) take two looks at one timestep: one step of the loop.
            if this is self._scheduler and (timestep is None or timestep is not self._taken):
                self.step, self._forwards, self._taken = self.step + 1, 0, timestep
            return result

        for wrapped in (set_timesteps, step):
            setattr(scheduler, wrapped.__name__, MethodType(wrapped, scheduler))
            self._wrapped.callback(delattr, scheduler, wrapped.__name__)

    def _read(self, value: float) -> None:
        """Step by timestep; the total is what the share of the way done so far amounts to."""
        if self._last is None or (value - self._last) * self._direction < 0:
            self._first, self._direction = value, 0.0
            self._start(1)
        elif value != self._last:
            self._direction = value - self._last
            self.step, self._forwards = self.step + 1, 0
            assert self._first is not None
            end = 0.0 if self._direction < 0 else (1.0 if value <= 1.0 else 1000.0)
            done = (value - self._first) / (end - self._first)
            self.total = max(self.step + 1, round(self.step / done)) if done > 0 else self.step + 1
        self._last = value

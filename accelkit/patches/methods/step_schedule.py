"""A fixed schedule of computed steps, as SmoothCache (2024) and LeMiCa (NeurIPS 2025) have them.

Which steps to compute is found in calibration, from what the denoiser gives at every step of one
dense run. With v_t for its output and s for the last computed step before a skipped step t, a row
of skipped steps changes the final latents to first order by

    Σ_t c_t (v_s − v_t),

where c_t tells how far the scheduler carries the output of step t. For each number of steps the
schedule is taken whose rows change least in all, early ones counting more. A skipped step adds the
residual of the last computed one, as in MagCache, whose hooks do it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

from pydantic import Field, field_validator

from accelkit.patches.method import BlockMethod, Dial
from accelkit.patches.parts import step_cache


class StepSchedule(BlockMethod):
    """Computes a share of the steps: those of the schedule with so many."""

    phases = ("denoise",)
    dial: ClassVar[Dial] = Dial("share", (0.2, 0.3, 0.4, 0.5, 0.65, 0.8))

    share: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the steps that is computed."""
    schedules: tuple[tuple[int, ...], ...] = ((0,),)
    """The steps to compute, for one, two and up to all of them; the first step always is."""

    @field_validator("schedules")
    @classmethod
    def _one_for_each_count(cls, schedules: tuple[tuple[int, ...], ...]) -> Any:
        total = len(schedules)
        for count, steps in enumerate(schedules, 1):
            rising = [*steps] == sorted({*steps}) and steps[:1] == (0,)
            if not rising or len(steps) != count or steps[-1] >= total:
                raise ValueError(
                    f"schedule {count} of {total} must name {count} steps that rise from 0 and lie "
                    f"below {total}; it is {steps}"
                )
        if not schedules:
            raise ValueError("at least the schedule ((0,),) is needed")
        return schedules

    def computed(self) -> tuple[int, ...]:
        """The steps that are computed."""
        return self.schedules[max(round(self.share * len(self.schedules)), 1) - 1]

    def rewire(self, model: Any, undo: ExitStack) -> None:
        steps = len(self.schedules)
        # A computed step looks like an error beyond the threshold, a skipped one like none.
        ratios = [3.0 if step in self.computed() else 1.0 for step in range(steps)]
        step_cache.enable(
            model, "MagCacheConfig", undo, threshold=1.0, max_skip_steps=steps, retention_ratio=0.0,
            num_inference_steps=steps, mag_ratios=ratios,
        )  # fmt: skip

"""MagCache (NeurIPS 2025): steps are skipped while the size of the residual is predictable.

The residual of the whole stack shrinks or grows from step to step by a ratio γ_t that hardly
depends on the prompt; calibration measures it in one run. After the last computed step the error

    Σ |1 − Π γ|

is added up over the skipped steps; skipping goes on while it is at most `threshold` and at most
`max_skip_steps` follow one another. A skipped step adds the last computed residual. The first
`retention_ratio` of the steps is always computed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

from pydantic import Field

from accelkit.patches.method import BlockMethod, Dial
from accelkit.patches.parts import step_cache


class MagCache(BlockMethod):
    """Skips all blocks while the accumulated error of `ratios`, one a step, is small."""

    phases = ("denoise",)
    dial: ClassVar[Dial] = Dial("threshold", (0.48, 0.24, 0.12, 0.06, 0.03, 0.015))

    threshold: float = Field(0.06, gt=0.0)
    """Greatest summed error of the skipped steps."""
    max_skip_steps: int = Field(3, ge=1)
    """Most steps skipped one after another."""
    retention_ratio: float = Field(0.2, ge=0.0, le=1.0)
    """Share of the steps at the beginning that is always computed."""
    ratios: tuple[float, ...] = (1.0,)
    """Mean of ‖r_t‖ ÷ ‖r_{t−1}‖ over tokens at every step; the first is 1."""

    def variants(self) -> tuple[MagCache, ...]:
        longer = self.model_copy(update={"max_skip_steps": 2 * self.max_skip_steps})
        earlier = longer.model_copy(update={"retention_ratio": self.retention_ratio / 2})
        return self, longer, earlier

    def rewire(self, model: Any, undo: ExitStack) -> None:
        step_cache.enable(
            model, "MagCacheConfig", undo, threshold=self.threshold,
            max_skip_steps=self.max_skip_steps, retention_ratio=self.retention_ratio,
            num_inference_steps=len(self.ratios), mag_ratios=list(self.ratios),
        )  # fmt: skip

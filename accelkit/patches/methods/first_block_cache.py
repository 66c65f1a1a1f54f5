"""First-Block-Cache (ParaAttention, diffusers): a step whose first block changes little is skipped.

With r the residual of the first block (output − input),

    δ = mean|r − r_prev| / mean|r_prev|

where `r_prev` is that of the last computed step. While `δ ≤ threshold` the remaining blocks are
replaced by what they added at that step; each guidance branch decides for itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

from pydantic import Field

from accelkit.patches.method import BlockMethod, Dial
from accelkit.patches.parts import step_cache


class FirstBlockCache(BlockMethod):
    """Skips the blocks behind the first one while its residual changes by at most `threshold`."""

    phases = ("denoise",)
    dial: ClassVar[Dial] = Dial("threshold", (0.4, 0.2, 0.1, 0.05, 0.025, 0.0125))

    threshold: float = Field(0.05, gt=0.0)
    """Greatest δ at which a step is skipped."""

    def rewire(self, model: Any, undo: ExitStack) -> None:
        step_cache.enable(model, "FirstBlockCacheConfig", undo, threshold=self.threshold)

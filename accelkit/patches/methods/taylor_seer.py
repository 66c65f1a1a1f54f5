"""TaylorSeer (2025): between computed steps the output of a module is forecast by a Taylor series.

At a computed step the finite differences of the module's output f are renewed,

    f_k = (f_{k−1} − f_{k−1, previous}) / Δstep,

and for the `interval − 1` steps after it the output is Σ_k f_k Δ^k / k!, up to `order`. Kept are
the outputs of the attention and feed-forward modules; with `lite` only that of the last
projection, which skips whole blocks and needs two tensors instead of some for every module.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

from pydantic import Field

from accelkit.patches.method import BlockMethod, Dial
from accelkit.patches.parts import step_cache

# diffusers' own defaults end in "attn" and so miss attn1 and attn2, and every feed-forward.
_MODULES = (r"[^.]*blocks\.\d+\.(attn\d?|ffn?|ff_context|proj_mlp)",)


class TaylorSeer(BlockMethod):
    """Computes the first `first_steps` steps and then one in `interval`."""

    phases = ("denoise",)
    dial: ClassVar[Dial] = Dial("interval", (8, 6, 5, 4, 3, 2))

    interval: int = Field(5, ge=1)
    """Of so many steps one is computed."""
    first_steps: int = Field(3, ge=1)
    """Steps at the beginning that are all computed."""
    order: int = Field(1, ge=0)
    """Highest difference that the forecast uses."""
    lite: bool = False
    """Whether only the last projection's output is kept, and whole blocks are skipped."""

    def variants(self) -> tuple[TaylorSeer, ...]:
        return self, self.model_copy(update={"lite": not self.lite})

    def rewire(self, model: Any, undo: ExitStack) -> None:
        step_cache.enable(
            model, "TaylorSeerCacheConfig", undo, cache_interval=self.interval,
            disable_cache_before_step=self.first_steps, max_order=self.order,
            taylor_factors_dtype=model.dtype, use_lite_mode=self.lite,
            cache_identifiers=None if self.lite else list(_MODULES),
        )  # fmt: skip

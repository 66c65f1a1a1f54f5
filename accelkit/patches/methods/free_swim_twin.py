"""FreeSwim's dual path: a pass without a window tells the windowed one what the prompt means.

Wu et al., 2025 (`WillWu111/FreeSwim`). For the same latents the denoiser runs twice, and in every
layer the cross-attention of the full pass, before its output projection, replaces that of the
windowed one, whose prediction counts. The full pass is made at one of `every` steps; at the others
its cross-attention is read again. The last steps and the unconditional pass have the window alone.

    steps 0, every, 2 · every … below `until_step`:  full pass, then the windowed one reads it
    the other steps below `until_step`:              the windowed pass reads the last full one
    behind them:                                     the windowed pass by itself

Patch with `[FreeSwim(), FreeSwimTwin()]`: the full pass is a guidance branch of its own, "full". It
costs time for quality, so calibration does not choose it. The release begins from a video of the
training size, enlarged and noised to 0.7, which is the pipeline's part. Each denoiser of a pipeline
counts its own steps. Its repeated blocks may be compiled; as a whole it runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import BlockMethod, Method

if TYPE_CHECKING:
    from accelkit.patches.call import Phase

FULL = "full"
"""The guidance branch of the pass without a window."""


class FreeSwimTwin(BlockMethod):
    """Guides windowed denoising by the cross-attention of a pass without a window."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)

    every: int = Field(2, ge=1)
    """Of so many steps one makes the full pass."""
    until_step: int = Field(40, ge=1)
    """From this step on the window is alone."""

    def branches(self, methods: Sequence[Method]) -> Mapping[str, Sequence[Method]]:
        windows = [m for m in methods if "windowed" in type(m).model_fields]
        return {FULL: [m.model_copy(update={"windowed": False}) for m in windows]}

    def rewire(self, model: Any, undo: ExitStack) -> None:
        parts.dual_path.connect(model, FULL, self.every, self.until_step, undo)

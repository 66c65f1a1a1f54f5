"""FreeSwim's inward window: at high resolution a token reads a box of the size it was trained on.

Wu et al., 2025 (`WillWu111/FreeSwim`). All frames, and rows and columns at most half the training
size away; at the borders the box is moved inwards, so that every token reads a whole one. The
softmax is as sharp as one over the tokens of a training frame:

    |y' − y| ≤ base_rows / 2,  |x' − x| ≤ base_columns / 2     (in tokens, box moved inwards)
    logits = q·k · scale · √(log(2 L₀) / log L₀),  L₀ = base_rows · base_columns

The window alone repeats objects in pictures far above the training size; `free_swim_twin` beside it
guides it by a path without a window, which is this method with `windowed=False`.
"""

from __future__ import annotations

from math import log, prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Execution, Order

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase
    from accelkit.patches.parts.grids import Visual

Tokens = Annotated[int, Field(ge=2)]


class FreeSwim(AttentionMethod):
    """Inward windows of the training size (default: Wan 2.1 at 480 × 832)."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    static: ClassVar[bool] = True
    full: ClassVar[dict[str, Any]] = {"base": (1 << 20, 1 << 20)}

    base: tuple[Tokens, Tokens] = (30, 52)
    """Rows and columns of the training size, in tokens."""
    windowed: bool = True
    """False: every token reads all, as sharply as in the window."""
    entropy: bool = True
    """Whether logits are sharpened; False leaves them as the model made them."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = self._where(call) if self.windowed else None
        if where is None:
            return None
        tile = parts.grids.fit_tile(where.grid, self.block)
        return parts.orders.chunked(call, where, tile)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = self._where(call) if self.windowed else None
        if where is None:
            return None
        frames, rows, columns = where.grid
        axes = (
            parts.grids.neighbourhood(frames, frames),
            parts.grids.neighbourhood(rows, self.base[0] // 2 * 2 + 1),
            parts.grids.neighbourhood(columns, self.base[1] // 2 * 2 + 1),
        )
        tile = parts.grids.fit_tile(where.grid, self.block)
        return parts.patterns.boxes(call, where, axes, tile, self.block)

    def execution(self, call: AttentionCall) -> Execution | None:
        if not self.entropy or self._where(call) is None:
            return None
        trained = prod(self.base)
        return Execution(sharpen=(log(2 * trained) / log(trained)) ** 0.5)

    def _where(self, call: AttentionCall) -> Visual | None:
        """Only above the training size is there anything to leave out."""
        where = parts.grids.visual(call)
        if where is None or all(n <= b for n, b in zip(where.grid[1:], self.base, strict=True)):
            return None
        return where

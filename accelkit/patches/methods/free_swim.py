"""FreeSwim's inward window: at high resolution a token reads a box of the size it was trained on.

Wu et al., 2025 (`WillWu111/FreeSwim`). All frames, and rows and columns at most half the training
size away; at the borders the box is moved inwards, so that every token reads a whole one.

    |y' − y| ≤ base_rows / 2,  |x' − x| ≤ base_columns / 2     (in tokens, box moved inwards)

This is the window alone. The paper also raises all logits by 5 % (an entropy scale for the size of
its training) and guides the window by a dense twin whose cross-attention replaces its own; without
the twin, pictures far above the training size repeat objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Order

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
    block: int = Field(128, ge=16)

    def order(self, call: AttentionCall) -> Order | None:
        where = self._where(call)
        if where is None:
            return None
        tile = parts.grids.fit_tile(where.grid, self.block)
        return parts.orders.chunked(call, where, tile)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = self._where(call)
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

    def _where(self, call: AttentionCall) -> Visual | None:
        """Only above the training size is there anything to leave out."""
        where = parts.grids.visual(call)
        if where is None or all(n <= b for n, b in zip(where.grid[1:], self.base, strict=True)):
            return None
        return where

"""Sparse-vDiT: every head gets one of four static shapes, found offline.

Chen et al., 2025, arXiv 2506.03065 (`Peyton-Chen/Sparse-vDiT`). Heads of a video transformer keep
their shape over prompts: they look along the diagonal (their own frame), along several diagonals
(the same place in other frames), at a fixed stripe of keys, or do next to nothing.

    diagonal         band around the diagonal, frame after frame
    multi_diagonal   the same band after laying all frames of a place together
    stripe           the first tokens of the video, read by all
    skip             the head gives zero

The band holds `density` of the map, the stripe that share of the keys: the paper leaves widths open
and picks a mode by squared error plus cost; here calibration does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Dial, Method, Order

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase, Site

Mode = Literal["diagonal", "multi_diagonal", "stripe", "skip"]


class SparseVDiT(AttentionMethod):
    """Diagonal, multi-diagonal, vertical stripe or nothing, as `mode` says."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    static: ClassVar[bool] = True
    dial: ClassVar[Dial] = Dial("density", (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6))
    full: ClassVar[dict[str, Any]] = {"density": 1.0}

    mode: Mode = "diagonal"
    """Shape of what is read."""
    density: float = Field(0.2, gt=0, le=1)
    """Share of the map in the band, or of the keys in the stripe."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.visual(call)
        if where is None or self.mode != "multi_diagonal":
            return None
        return parts.orders.transposed(call, where)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = parts.grids.visual(call)
        if where is None:
            return None
        unit = (self.block, self.block)
        if self.mode == "skip":
            return parts.patterns.nothing(call, unit)
        if self.mode == "stripe":
            stop = round(self.density * where.count)
            mask = parts.grids.first_blocks(where, stop, self.block)
            return parts.patterns.listed(mask.expand(call.tiles(unit)), call, unit)
        width = parts.grids.half_width(where.count, self.density)
        return parts.patterns.window(call, 0, width, unit)

    def calibrator(self, site: Site) -> Calibrator:
        return _Modes(self)


class _Modes(Calibrator):
    """Every mode at every density, and nothing at all."""

    def settings(self) -> tuple[Method, ...]:
        shapes = tuple(
            self.method.model_copy(update={"mode": mode, "density": density})
            for mode in ("diagonal", "multi_diagonal", "stripe")
            for density in SparseVDiT.dial.values
        )
        return (self.method.model_copy(update={"mode": "skip"}), *shapes)

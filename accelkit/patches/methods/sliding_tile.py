"""Sliding Tile Attention: a tile of tokens reads a window of whole tiles around it.

Zhang et al., ICML 2025, arXiv 2502.04507. Windows move in steps of a tile, so no tile is ever
computed in part. The centre of the window is moved inwards at the borders:

    centre = clamp(tile of the query, a // 2, n − 1 − a // 2)    on each axis of n tiles, a odd
    a tile is read if it is at most a // 2 from the centre on every axis

Windows are shares of an axis and become an odd number of tiles. The paper searches them offline per
step, layer and head among (5,6,10), (5,3,3), (1,6,10), (3,3,5), (5,1,10) and (5,6,1) of 5 × 6 × 10
tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Method, Order

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase, Site
    from accelkit.patches.parts.grids import Visual

Share = Annotated[float, Field(gt=0, le=1)]
SEARCHED = ((1.0, 1.0, 0.1), (1.0, 0.17, 1.0), (0.2, 1.0, 1.0), (0.6, 0.5, 0.5), (1.0, 0.5, 0.3))
"""Windows of the paper's search."""


class SlidingTile(AttentionMethod):
    """Windows of whole tiles."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    static: ClassVar[bool] = True
    full: ClassVar[dict[str, Any]] = {"window": (1.0, 1.0, 1.0)}

    window: tuple[Share, Share, Share] = (1.0, 0.5, 0.3)
    """Window on frames, rows and columns, as shares of each axis."""
    tile: tuple[int, int, int] | None = None
    """Frames, rows and columns of a tile, in tokens; None: what fits the grid best."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.narrowed(call, self.window)
        if where is None:
            return None
        return parts.orders.chunked(call, where, self._tile(where))

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = parts.grids.narrowed(call, self.window)
        if where is None:
            return None
        tile = self._tile(where)
        f, y, x = (
            parts.grids.sliding(n, t, round(share * -(-n // t)) | 1 if share < 1 else n)
            for n, t, share in zip(where.grid, tile, self.window, strict=True)
        )
        return parts.patterns.boxes(call, where, (f, y, x), tile, self.block)

    def _tile(self, where: Visual) -> tuple[int, int, int]:
        return self.tile or parts.grids.fit_tile(where.grid, self.block)

    def calibrator(self, site: Site) -> Calibrator:
        return _Search(self)


class _Search(Calibrator):
    """The windows of the paper."""

    def settings(self) -> tuple[Method, ...]:
        return tuple(self.method.model_copy(update={"window": w}) for w in SEARCHED)

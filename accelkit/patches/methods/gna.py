"""GNA: generalised neighbourhood attention, windows in tokens with stride and dilation.

Hassani et al., 2025, arXiv 2504.16922 (`SHI-Labs/NATTEN`). A token reads a window around it on
every axis. Neighbours of a `stride` share the window of their leader; if the stride is a tile and
the window a whole number of tiles, no tile is computed in part and the gain is the sparsity.

    leader = min((i // s) · s + s // 2, L − 1)            on each axis, i in its dilation group
    start  = max(leader − w // 2, 0), moved inwards where the window would end behind L
    token i reads [start, start + w);   a key is read if it lies in the window on every axis

Windows are shares of an axis, so they carry over to other sizes; as in the paper's HunyuanVideo run
(18 × 24 × 24 of 30 × 48 × 80) they keep 9 %. The tile is the one that fits the grid best. Tiles
follow one another without gaps, so blocks drift against them and are rounded; see `whole_tiles`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Method, Order

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase, Site
    from accelkit.patches.parts.grids import Axes, Grid, Visual

Share = Annotated[float, Field(gt=0, le=1)]
Step = Annotated[int, Field(ge=1)]
WINDOWS = (
    (0.3, 0.3, 0.3), (0.6, 0.5, 0.3), (1.0, 0.3, 0.3), (1.0, 0.5, 0.3), (1.0, 0.3, 0.5),
    (1.0, 0.5, 0.5), (1.0, 0.75, 0.5), (1.0, 0.75, 0.75), (1.0, 1.0, 0.5),
)  # fmt: skip
"""Windows worth measuring: small ones, then the whole of time, which shipped plans always keep."""
WORTH = 0.75
"""Windows that visit more than this share of the tiles are not measured."""


class GNA(AttentionMethod):
    """Windows with stride and dilation over tiles that fit the grid."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    static: ClassVar[bool] = True
    full: ClassVar[dict[str, Any]] = {"window": (1.0, 1.0, 1.0)}

    window: tuple[Share, Share, Share] = (0.6, 0.5, 0.3)
    """Window on frames, rows and columns, as shares of each axis."""
    stride: tuple[Step, Step, Step] | None = None
    """Neighbours that share their leader's window, in tokens of each axis; None: a tile."""
    dilation: tuple[Step, Step, Step] = (1, 1, 1)
    """Every so many tokens of an axis count as neighbours."""
    tile: tuple[Step, Step, Step] | None = None
    """Frames, rows and columns of a tile, in tokens; None: what fits the grid best."""
    whole_tiles: bool = False
    """A block for each tile of queries, and every block of keys that its windows touch: no token
    misses a key of its window, and some see a few more. Otherwise blocks are rounded on both sides.
    """
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.narrowed(call, self.window)
        if where is None:
            return None
        tile, slowest = self._tile(where), self._slowest(where)
        if slowest is None:
            return parts.orders.chunked(call, where, tile, self.dilation)
        return parts.orders.tiled(call, where, tile, self.dilation, self.block, slowest)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = parts.grids.narrowed(call, self.window)
        if where is None:
            return None
        return parts.patterns.boxes(
            call, where, self.axes(where), self._tile(where), self.block,
            dilation=self.dilation, slowest=self._slowest(where),
        )  # fmt: skip

    def axes(self, where: Visual) -> Axes:
        """What the positions of each axis read, bool `[L, L]`."""
        f, y, x = map(self._axis, where.grid, self.window, self._tile(where), range(3))
        return f, y, x

    def visited(self, where: Visual) -> float:
        """Share of the key tiles that a query tile visits."""
        return parts.grids.visited(self.axes(where), self._tile(where), self.dilation)

    def _axis(self, length: int, share: float, tile: int, axis: int) -> Tensor:
        dilation = self.dilation[axis]
        stride, window = tile, round(share * length / dilation)
        if self.stride is None:  # an odd number of tiles stands evenly around the leader's
            window = (window // tile | 1) * tile
        else:
            stride = self.stride[axis]
        window = max(1, window)
        return parts.grids.neighbourhood(length, window, min(stride, window), dilation)

    def _slowest(self, where: Visual) -> Grid | None:
        """In which order of the axes key tiles follow one another, if queries have whole tiles."""
        if not self.whole_tiles:
            return None
        return parts.grids.narrow_first(self.axes(where), self._tile(where), self.dilation)

    def _tile(self, where: Visual) -> tuple[int, int, int]:
        return self.tile or parts.grids.fit_tile(where.grid, self.block)

    def calibrator(self, site: Site) -> Calibrator:
        return _Pool(self)


class _Pool(Calibrator):
    """Windows that look good may visit nearly all tiles: the simulator leaves those out."""

    method: GNA

    def __init__(self, method: GNA) -> None:
        super().__init__(method)
        self.where: Visual | None = None

    def see(self, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        self.where = parts.grids.visual(call)

    def settings(self) -> tuple[Method, ...]:
        found = [self.method.model_copy(update={"window": w}) for w in WINDOWS]
        if self.where is None:
            return tuple(found)
        share = {m.window: m.visited(self.where) for m in found}
        found = [m for m in found if share[m.window] <= WORTH]
        return tuple(sorted(found, key=lambda m: share[m.window]))

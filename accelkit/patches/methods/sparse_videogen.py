"""Sparse VideoGen: each head is spatial or temporal, decided anew in every call on a few rows.

Xi et al., ICML 2025, arXiv 2502.01776. Spatial heads look around in their own and near frames,
temporal ones at the same place in all frames. Both are one band around the diagonal, the second
after laying all frames of a place together.

    half width w = N · (1 − √(1 − ρ)),   ρ = density − 2 · text / N
    read |i − j| ≤ w in the head's order, the first frame's worth of tokens, and text
    order = argmin over both of  ‖attention of sampled rows under the mask − exact attention‖²

Rows are spread evenly over the video; the release draws them from its first 10,000 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Order

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase
    from accelkit.patches.parts.grids import Visual


class SparseVideoGen(AttentionMethod):
    """Spatial or temporal band, head by head, decided online."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    dial: ClassVar[Dial] = Dial("density", (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65))
    full: ClassVar[dict[str, Any]] = {"density": 1.0}

    density: float = Field(0.25, gt=0, le=1)
    """Share of the pairs that is computed, text among them: HunyuanVideo's; 0.3 for Wan."""
    sampled_rows: int = Field(32, ge=1)
    """Rows on which a head's order is decided."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = self._where(call)
        if where is None:
            return None
        table = parts.orders.axes(where, call.q.device)[: parts.orders.TOKEN_MAJOR + 1]
        temporal = self._temporal(call, where, table[parts.orders.TOKEN_MAJOR].long())
        return Order(table, table, temporal.int() * parts.orders.TOKEN_MAJOR, whole=True)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = self._where(call)
        if where is None:
            return None
        sink, unit = where.start + where.frame, (self.block, self.block)
        return call.remember(
            self, lambda: parts.patterns.window(call, sink, self._width(where), unit)
        )

    def _temporal(self, call: AttentionCall, where: Visual, order: Tensor) -> Tensor:
        """Which heads lose less in the temporal order, bool `[B, H]`."""
        rows, masks = call.remember((self, "rows"), lambda: self._rows(where, order, call.q.device))
        found = kernels.scores.masked_rows(call, rows, masks)
        loss = (found[:, :, 1:] - found[:, :, :1]).square().mean((-2, -1))
        return loss[..., 1] < loss[..., 0]

    def _rows(self, where: Visual, order: Tensor, device: Any) -> tuple[Tensor, Tensor]:
        """Places of the sampled rows, and what they read in the spatial and in the temporal order,
        bool `[2, R, N]`, keys in token order.
        """
        rows = parts.grids.spread(where.start, where.stop, self.sampled_rows, device)
        place = order.argsort()
        sink, width = where.start + where.frame, self._width(where)
        at = place.new_empty((2, 1, where.tokens))
        at[0], at[1] = place.sort().values, place
        band = (at - at[:, 0, rows, None]).abs() < width
        return rows, band | (at < sink) | (at >= where.stop)

    def _width(self, where: Visual) -> int:
        text = (where.tokens - where.count) / where.tokens
        density = 1.0 if self.density >= 1 else max(self.density - 2 * text, 0.0)
        return parts.grids.half_width(where.tokens, density)

    def _where(self, call: AttentionCall) -> Visual | None:
        where = parts.grids.visual(call)
        return where if where is not None and where.grid[0] > 1 else None

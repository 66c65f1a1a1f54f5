"""PISA, piecewise sparse attention: heavy blocks are read, the others expanded, none is dropped.

Li et al., 2026, arXiv 2602.01077. A block that is not worth reading gives what its Taylor expansion
says, at the price of one key.

    P[i, j] = mean over rows r of tile i of the share of block j, by its expansion
    read the greatest P until they hold `mass`, sinks and what a tile sees in part; expand the rest

The expansion is around the mean query of a tile and to first order in the queries
(`kernels.expansion`), which is ours: the paper is about video, and in text the queries of a tile
are more alike than the keys of a block, even 256 of them. Works on rows in token order; others
stay dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches.method import AttentionMethod, Dial, Share

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex, Partial
    from accelkit.patches.call import AttentionCall, Phase


class PISA(AttentionMethod):
    """Blocks read or expanded, by mass."""

    phases: ClassVar[tuple[Phase, ...]] = ("prefill",)
    dial: ClassVar[Dial] = Dial("mass", (0.3, 0.5, 0.65, 0.75, 0.85, 0.92, 0.96, 0.99))
    full: ClassVar[dict[str, Any]] = {"mass": 1.0}

    mass: Share | str = 0.85
    """Share of the attention mass that is read; the rest is expanded."""
    sink_blocks: int = Field(1, ge=0)
    """First blocks, read by all tiles."""
    local_blocks: int = Field(1, ge=1)
    """Newest blocks that a tile reads."""
    tile: int = Field(256, ge=16)
    """Query rows of a tile."""
    block: int = Field(128, ge=16)
    """Keys of a block."""

    def index(self, call: AttentionCall) -> tuple[BlockIndex, Partial] | None:
        moved = call.q_pos is not None or call.k_pos is not None
        if moved or call.n_k <= self.block * (self.sink_blocks + self.local_blocks):
            return None
        size = (self.tile, self.block)
        found = call.once(("expansion", size), lambda: kernels.expansion.expand(call, size))
        read = kernels.select.top_p(found.mass(), call.per_head(self.mass)) | ~found.whole
        read = kernels.select.force(
            read, call, size, sink=self.sink_blocks, local=self.local_blocks
        )
        return kernels.select.compact(read, size), found.piece(~read & found.whole)

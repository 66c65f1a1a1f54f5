"""VMoBA: chunks in time, space and both by turns of the layers, routed by their mean key.

Wu et al., ICLR 2026, arXiv 2506.23858 (`KwaiVGI/VMoBA`), used without its training. Layer l cuts
the video into chunks of frames (l mod 3 = 0), of columns through all frames (1) or of boxes (2),
and queries read the chunks whose mean key they like best; heads spend their budget where it pays.

    g[i, c] = mean(q_i) · mean(k_c),  scaled to 0 … 1 over a head
    own chunks always;  then the greatest g of all (i, c) of the head until they and the own ones
    hold `coverage` of Σ g

Routing is rounded from query tokens to tiles, and chunks to the key blocks that they touch. The
release can also count Σ g query by query, which is what its code does unless told otherwise; the
budget of a whole head is what the paper describes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Order

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase
    from accelkit.patches.parts.grids import Grid, Visual

Size = Annotated[int, Field(ge=1)]


class VMoBA(AttentionMethod):
    """Chunk routing with a global budget for each head."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    dial: ClassVar[Dial] = Dial("coverage", (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7))
    full: ClassVar[dict[str, Any]] = {"coverage": 1.0}

    coverage: float = Field(0.25, gt=0, le=1)
    """Share of Σ g that a head's chosen chunks hold."""
    frames: Size = 2
    """Frames of a chunk in time."""
    columns: tuple[Size, Size] = (3, 4)
    """Rows and columns of a chunk in space, in tokens."""
    box: tuple[Size, Size, Size] = (4, 6, 4)
    """Frames, rows and columns of a box, in tokens."""
    query_block: int = Field(128, ge=16)
    """Query rows of a tile."""
    key_block: int = Field(64, ge=16)
    """Keys of a block."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.visual(call)
        if where is None:
            return None
        return parts.orders.chunked(call, where, self._chunk(call, where))

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where, size = parts.grids.visual(call), (self.query_block, self.key_block)
        if where is None:
            return None
        chunks = call.remember(
            self, lambda: parts.chunks.of(where, self._chunk(call, where), size, call.q.device)
        )
        gate = parts.chunks.gate(call, chunks, self.query_block)  # [B, H, nq, chunks]
        chosen = kernels.select.routed(gate, chunks.own, self.coverage)
        if self.coverage >= 1:
            chosen = chosen.fill_(True)

        def kept() -> Tensor:
            # A tile's own block lies in its own chunks: with it no row can be empty.
            own = parts.keep.text(chunks.touched.blocks(chunks.own)[None, None], call, size)
            return kernels.select.force(own, call, size, sink=0, local=1)

        anyhow = parts.keep.lasting(call, (self, "kept"), kept)
        return kernels.select.compact_runs(call, chosen, chunks.touched, anyhow, size)

    def _chunk(self, call: AttentionCall, where: Visual) -> Grid:
        f, y, x = where.grid
        turn = call.site.order % 3
        return ((self.frames, y, x), (f, *self.columns), self.box)[turn]

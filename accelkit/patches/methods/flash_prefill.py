"""FlashPrefill: every query row against mean keys, blocks within a ratio of the best.

Fan et al., 2026, arXiv 2608.19758 (V2). Rows are not averaged, so a single row that needs a block
is heard; a ratio of the row's maximum needs neither sort nor running sum.

    S[i, j] = Σ_{rows r of tile i} exp(q_r · k̄_j · scale − M_i)
    keep j  if S[i, j] ≥ alpha · max_j S[i, j],  or sink, or local, or i is among the last tiles

Scores of a row depend on that row alone, which makes the method safe in chunked prefill. V2 also
adds what a mean key stands for of the blocks that are left out; that is not part of it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Share

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase


class FlashPrefill(AttentionMethod):
    """Rows × block means, kept by ratio of the maximum."""

    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "denoise")
    dial: ClassVar[Dial] = Dial("alpha", (0.5, 0.3, 0.18, 0.12, 0.08, 0.04, 0.02, 0.005))
    full: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    alpha: Share | str = 0.1
    """Least score of a block that is read ÷ the greatest of its row."""
    sink_blocks: int = Field(2, ge=0)
    """First blocks, read by all tiles."""
    local_blocks: int = Field(4, ge=1)
    """Newest blocks that a tile reads, its own among them."""
    dense_tiles: int = Field(2, ge=0)
    """Last tiles of the prompt, which read everything: as many as in V1; 8 in V2."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if call.n_k <= self.block * (self.sink_blocks + self.local_blocks + self.dense_tiles):
            return None
        size = (self.block, self.block)
        score = call.once(
            ("rows_by_block_mean", size), lambda: kernels.scores.rows_by_block_mean(call, size)
        )
        mask = kernels.select.ratio_of_max(score, call.per_head(self.alpha))
        mask = kernels.select.force(
            mask, call, size,
            sink=self.sink_blocks, local=self.local_blocks, last=self.dense_tiles,
        )  # fmt: skip
        return kernels.select.compact(parts.keep.text(mask, call, size), size)

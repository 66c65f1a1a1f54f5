"""AnchorAttention: single keys ("stripes") that come within θ of a cheap near-maximum.

Zhang et al., EMNLP 2025, arXiv 2505.23520. The largest logit of a row nearly always stands in the
first keys or nearby. That anchor is computed exactly; any other key matters only if it comes close.
Keys are tested one by one against mean queries, once for a superblock of rows.

    anchor[t]  = mean over the rows of tile t of their greatest logit in [0, block) ∪ own superblock
    key j kept for a superblock if  mean(q_t) · k_j · scale + theta_nats ≥ anchor[t]  for any tile t

Two disjoint pieces: first block and own superblock as blocks, and the stripes between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall


class AnchorAttention(AttentionMethod):
    """First block, own superblock, and stripes near the anchor."""

    dial: ClassVar[Dial] = Dial("theta_nats", (4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0))
    full: ClassVar[dict[str, Any]] = {"theta_nats": 1e9}

    theta_nats: float | str = 12.0
    """By how much a key's logit may stay behind the anchor, in nats."""
    block: int = Field(128, ge=16)
    """Rows of a tile, and keys of the first block, in tokens."""
    superblock_tiles: int = Field(16, ge=1)
    """Tiles of rows that share their stripes."""

    def index(self, call: AttentionCall) -> tuple[BlockIndex, BlockIndex] | None:
        block, run = self.block, self.block * self.superblock_tiles
        end = call.q_start + call.n_q
        if end <= run or call.q_start % run:
            return None  # a single superblock, or a chunk that begins inside one
        near = parts.ranking.own_run(call, (block, block), run)
        near[..., 0] = True
        near = near & kernels.select.visible_blocks(call, (block, block))
        anchor = call.once(
            ("anchor", block, run), lambda: kernels.scores.anchor_max(call, block, run)
        )
        theta = call.per_head(self.theta_nats)
        stripes = kernels.scores.stripes(call, anchor, theta, block, run)
        return (
            kernels.select.compact(near.expand(-1, len(call.heads), -1, -1), (block, block)),
            kernels.select.compact(stripes, (run, 1)),
        )

"""PBS-Attn: sort keys inside segments by importance, so that the important ones share blocks.

Wang et al., ICML 2026, arXiv 2510.21270. Attention does not care in which order keys come; blocks
do. Within a segment keys may change places without disturbing causality between segments, so the
few that the last queries look at move into the same block and the rest become droppable.

    importance[j] = mean over the last rows of softmax(q Kᵀ · scale);  sort each segment by it
    P̄ = softmax(q̄ k̄ᵀ · scale) over the permuted blocks of earlier segments;  keep top `coverage`
    and the query's own segment, and the block that holds the first token
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Order, Share

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall


class PBSAttn(AttentionMethod):
    """Keys permuted inside segments, pooled scores, top-p."""

    dial: ClassVar[Dial] = Dial("coverage", (0.5, 0.65, 0.8, 0.9, 0.95, 0.98))
    full: ClassVar[dict[str, Any]] = {"coverage": 1.0}

    coverage: Share | str = 0.9
    """Share of a tile's pooled mass over earlier segments that its blocks must hold."""
    segment_tokens: int = Field(256, ge=16)
    """Keys that may change places with one another."""
    block: int = Field(128, ge=16, le=128)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        if self._short(call):
            return None
        probe = call.once(("probe", self.block), lambda: kernels.scores.probe(call, self.block))
        keys = parts.orders.segments(call, probe.columns, self.segment_tokens)
        table, row = parts.ranking.own_tables(keys)
        return Order(q_table=None, k_table=table, row=row)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if self._short(call):
            return None
        size = (self.block, self.block)
        own = parts.ranking.own_run(call, size, self.segment_tokens)
        pooled = kernels.scores.pooled(call, size).masked_fill(own, -float("inf"))
        share = kernels.select.probabilities(pooled)
        mask = kernels.select.top_p(share, call.per_head(self.coverage)) | own
        return kernels.select.compact(kernels.select.force(mask, call, size), size)

    def _short(self, call: AttentionCall) -> bool:
        return call.n_k <= 2 * max(self.segment_tokens, 2 * self.block)

"""FlexPrefill: every head decides by itself between pooled blocks and lines, and for how many.

Lai et al., ICLR 2025, arXiv 2502.20766. The exact attention Â of the last query block is the truth
to test against. Where pooled queries and keys predict its blocks well, they may choose blocks for
all other rows ("query-aware"); elsewhere the lines of Â serve every row ("vertical-slash").

    p̂ = softmax(mean(q_last) · mean(k_block)),   v̂ = block sums of Â
    query-aware if √JSD(p̂, v̂) < divergence:  blocks of softmax(q̄ k̄ᵀ) that hold `coverage` of the
                                              head's whole map, rows competing
    lines:  the fewest columns and offsets that hold `coverage`, in blocks, and at least
            `min_budget_tokens` of each
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Share

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.kernels.scores import Probe
    from accelkit.patches.call import AttentionCall


class FlexPrefill(AttentionMethod):
    """Lines or pooled blocks, by head and prompt, with a budget by attention mass."""

    dial: ClassVar[Dial] = Dial("coverage", (0.5, 0.65, 0.8, 0.9, 0.95, 0.98))
    full: ClassVar[dict[str, Any]] = {"coverage": 1.0, "divergence": 0.0}

    coverage: Share | str = 0.9
    """Share of the attention mass that blocks or lines must hold."""
    divergence: Annotated[float, Field(ge=0)] | str = 0.1
    """Greatest √JSD (√nats) at which a head trusts pooled vectors."""
    min_budget_tokens: int = Field(1024, ge=1)
    """Least columns, and least offsets, that a head reads."""
    max_budget_tokens: int | None = Field(None, ge=1)
    """Most of each; None: all."""
    block: int = Field(128, ge=16, le=128)
    """Side of a block, and rows of the last query block, in tokens."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        b, size = self.block, (self.block, self.block)
        if call.n_k <= max(2 * b, self.min_budget_tokens):
            return None
        probe = call.once(("probe", b), lambda: kernels.scores.probe(call, b))
        trusted = self._trusted(call, probe)
        columns, offsets = probe.blocks(b), probe.offset_blocks(b)
        columns[..., 0] = offsets[..., 0] = float("inf")  # the first block, the main diagonal
        columns = parts.ranking.best(columns, self._budget(call, probe.columns, trusted))
        offsets = parts.ranking.best(offsets, self._budget(call, probe.diagonals, trusted))
        lines = kernels.select.lines(call, columns, offsets, size)

        pooled = call.once(("pooled", size), lambda: kernels.scores.pooled(call, size))
        share = kernels.select.probabilities(pooled)
        aware = kernels.select.global_top_p(share, call.per_head(self.coverage))
        mask = lines | (aware & trusted[..., None, None])
        return kernels.select.compact(kernels.select.force(mask, call, size), size)

    def _trusted(self, call: AttentionCall, probe: Probe) -> Tensor:
        """Whether pooled vectors predict the last rows' attention, bool `[B, H]`."""
        guess = kernels.scores.pooled_probe(call, self.block, self.block)
        share = kernels.select.probabilities(guess)
        distance = parts.ranking.divergence(share, probe.blocks(self.block))
        return distance < call.per_head(self.divergence)

    def _budget(self, call: AttentionCall, mass: Tensor, trusted: Tensor) -> Tensor:
        """Blocks of lines to take, int64 `[B, H]`; query-aware heads take the least."""
        most = min(self.max_budget_tokens or call.n_k, call.n_k)
        tokens = parts.ranking.held_by(mass, call.per_head(self.coverage)) + 1
        blocks = (tokens // self.block + 1).masked_fill(trusted, 0)
        return blocks.clamp(-(-self.min_budget_tokens // self.block), -(-most // self.block))

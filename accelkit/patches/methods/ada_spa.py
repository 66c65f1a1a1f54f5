"""AdaSpa: exact block masses at one or two steps, their mask and LSE used for all others.

Xia et al., ICCV 2025, arXiv 2502.21079. Which blocks matter differs between prompts and heads but
barely moves over denoising steps. A search step runs dense, keeps the LSE, and a second pass sums
true probabilities:

    W[i, c] = Σ over the tile  exp(q kᵀ · scale − LSE)           exact, no second softmax
    keep the share 1 − s_h of largest W in every row of blocks, and text
    n = heads with recall > 0.8 at s:  s_h = (1 + s) / 2 for the best n, (3 s − 1) / 2 for the worst

Later searches use the first one's LSE and need no dense run; they count n anew, which the paper
does at the first one. Masks are kept as bits. The paper runs all steps before the first search
dense; here a plan says which do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex, Partial
    from accelkit.patches.call import AttentionCall, Phase

GOOD = 0.8
"""Recall at which a head may do with less."""


class AdaSpa(AttentionMethod):
    """Exact search at few steps, head-adaptive budget."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    dial: ClassVar[Dial] = Dial("sparsity", (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5))
    full: ClassVar[dict[str, Any]] = {"sparsity": 0.0, "adaptive": False}

    sparsity: float = Field(0.8, ge=0, lt=1)
    """s, share of the blocks that is left out, mean over the heads."""
    search_at: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.2, 0.6)
    """When to search, as shares of all steps; a search that was missed is made up for, and the
    first call that is not dense by plan searches.
    """
    adaptive: bool = True
    """Whether heads with good recall give some of their blocks to those with little."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens; 64 in the paper, for which GPUs take longer a pair of tokens."""

    def index(self, call: AttentionCall) -> BlockIndex | Partial | None:
        size = (self.block, self.block)
        if parts.grids.visual(call) is None or call.n_k <= 4 * self.block:
            return None
        share = call.clock.step / max(call.clock.total, 1)
        due = max(1, sum(share >= at for at in self.search_at))
        key = (self, call.heads, call.n_k)
        searched, lse, bits = call.memory.get(key, (0, None, None))
        dense = None
        if searched < due:
            if lse is None:
                dense = self._dense(call)
                lse = dense.lse
            bits = parts.bits.pack(self._search(call, lse, size))
            call.memory[key] = (due, lse, bits)
        if dense is not None:
            return dense
        return kernels.select.compact(parts.bits.unpack(bits, call.tiles(size)[1]), size)

    def renewed(self, steps: int) -> float:
        return 1 / steps  # later searches use the first one's LSE

    def _dense(self, call: AttentionCall) -> Partial:
        return kernels.attend(
            call.q, call.k, call.v, parts.patterns.dense(call), scale=call.scale, causal=False,
            heads=call.heads, kv_of_head=call.kv_heads, key_mask=call.key_mask,
        )  # fmt: skip

    def _search(self, call: AttentionCall, lse: Tensor, size: tuple[int, int]) -> Tensor:
        mass = kernels.scores.block_mass(call, lse, size)
        mask = kernels.select.top_k(mass, 1 - self.sparsity)
        if self.adaptive:
            mask = kernels.select.top_k(mass, self._budget(kernels.select.recall(mask, mass)))
        return parts.keep.text(mask, call, size)

    def _budget(self, recall: Tensor) -> Tensor:
        """Share of the blocks for each head, fp32 `[H]`; their mean stays."""
        s, heads = self.sparsity, recall.numel()
        rank = recall.argsort(descending=True, stable=True).argsort()
        some = (recall > GOOD).sum().clamp(max=heads // 2)
        budget = recall.new_full((heads,), 1 - s)
        budget = budget.masked_fill(rank < some, (1 - s) / 2)
        return budget.masked_fill(rank >= heads - some, min(1.0, (1 - s) * 1.5))

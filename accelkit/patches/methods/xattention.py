"""XAttention: the sum along antidiagonals is a good block score.

Xu et al., ICML 2025, arXiv 2503.16428. A stride-S antidiagonal of a cell crosses every vertical and
every slash line that passes through the cell, so its sum sees what a mean over the cell would blur.
All of a cell's antidiagonal comes from one product of vectors S times as long: 1/S of the work of
QKᵀ.

    A[I, J] = softmax_J( Σ_s q[IS + S−1−s] · k[JS + s] · scale / S )
    block score = Σ of A in the block;   keep the top blocks that hold `coverage` of a row

First block and diagonal are added after the selection: at most two blocks more than in the release,
which counts them first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Share

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase


class XAttention(AttentionMethod):
    """Blocks by antidiagonal sums and top-p."""

    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "denoise")
    dial: ClassVar[Dial] = Dial("coverage", (0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 0.98))
    full: ClassVar[dict[str, Any]] = {"coverage": 1.0}

    coverage: Share | str = 0.9
    """Share of a row's score that its blocks must hold."""
    stride: int = Field(8, ge=1)
    """S, tokens between the antidiagonals."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""
    qk: Literal["native", "int8"] | None = None
    """Precision of the score's products; None: int8 on a GPU, where it takes about half the time
    and finds nearly the same blocks, else the inputs' own."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if call.n_k <= 4 * self.block:
            return None
        size, stride = (self.block, self.block), self.stride
        qk = self.qk or ("int8" if call.q.is_cuda else "native")
        score = call.once(
            ("strided", stride, size, qk), lambda: kernels.scores.strided(call, stride, size, qk)
        )
        mask = kernels.select.top_p(score, call.per_head(self.coverage))
        mask = kernels.select.force(parts.keep.text(mask, call, size), call, size)
        return kernels.select.compact(mask, size)

"""SpargeAttn: pooled prediction where pooling is honest, and a softmax skip behind it.

Zhang et al., ICML 2025, arXiv 2502.18137. A block mean speaks for its block only if the tokens are
alike, so blocks are tested for self-similarity and those that fail are always computed. In the
kernel, tiles whose logits stay far below the running maximum are dropped.

    regular block:  mean cosine between its tokens > `similarity`      (keys without their mean)
    P̄ = softmax(q̄ k̄ᵀ · scale) over regular key blocks;  keep the top blocks that hold `coverage`
    and all irregular key blocks, whole rows of irregular query blocks, the first block and the own
    skip a tile if max over rows(m_tile − m_running) · log₂e + `skip_log2` ≤ 0     (None: never)

On video the tokens may lie along a space-filling curve (`hilbert`), where block means are more
honest; text is dense there. The untuned call of the release has `skip_log2` 50, which hardly ever
skips; tuned heads have less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import (
    AttentionMethod,
    Calibrator,
    Dial,
    Execution,
    Method,
    Order,
    Share,
)

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase, Site

GUARDS = (-0.1, 0.6)
"""Similarities of the release's top-k and top-p calls: nearly every block regular, or few."""
TALL_ROWS = (256, 1024)
"""Taller query tiles that calibration tries beside the release's 128."""


class SpargeAttn(AttentionMethod):
    """Pooled blocks with a self-similarity guard, top-p, and softmax skip."""

    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "denoise")
    dial: ClassVar[Dial] = Dial("coverage", (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995))
    full: ClassVar[dict[str, Any]] = {"coverage": 1.0}

    coverage: Share | str = 0.98
    """Share of a row's pooled mass that its blocks must hold."""
    similarity: Annotated[float, Field(ge=-1, le=1)] | str = 0.6
    """Mean cosine above which a block is regular."""
    skip_log2: Annotated[float, Field(ge=0)] | str | None = None
    """By how many powers of two a tile must stay behind to be skipped; None: never."""
    query_block: int = Field(128, ge=16)
    """Query rows of a tile."""
    key_block: int = Field(64, ge=16)
    """Keys of a block."""
    hilbert: bool = False
    """Whether visual tokens are laid along a space-filling curve."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.visual(call) if self.hilbert else None
        return None if where is None else parts.orders.hilbert(call, where)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        size = (self.query_block, self.key_block)
        if call.n_k <= 2 * max(size):
            return None
        # The mean key shifts all logits of a row alike, so the softmax needs no smoothing.
        least = call.per_head(self.similarity)
        if isinstance(least, float) and least < 0:
            # The mean of all cosines is a square: every block is regular.
            pooled = call.once(("pooled", size), lambda: kernels.scores.pooled(call, size))
            odd_rows = odd_keys = None
        else:
            pooled, q_similar, k_similar = call.once(
                ("alike", size), lambda: kernels.scores.pooled_alike(call, size)
            )
            if not isinstance(least, float):
                least = least[:, None]
            odd_rows, odd_keys = q_similar <= least, k_similar <= least
        kept = parts.keep.lasting(call, ("kept", size), lambda: parts.keep.anyhow(call, size))
        share = call.per_head(self.coverage)
        return kernels.select.nucleus(pooled, share, odd_keys, odd_rows, kept, size)

    def execution(self, call: AttentionCall) -> Execution | None:
        if self.skip_log2 is None or call.n_k <= 2 * max(self.query_block, self.key_block):
            return None
        return Execution(skip=2.0 ** -call.per_head(self.skip_log2))

    def calibrator(self, site: Site) -> Calibrator:
        return _Guards(self)


class _Guards(Calibrator):
    """Where the strict guard leaves a head nearly dense, the loose one may still do. What causal
    heads look for far back hardly depends on the query: taller tiles choose as well and run faster.
    """

    causal = True

    def see(self, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        self.causal = call.causal

    def settings(self) -> tuple[Method, ...]:
        fixed = [{"similarity": guard} for guard in GUARDS]
        if self.causal:
            fixed += [{"similarity": GUARDS[0], "query_block": rows} for rows in TALL_ROWS]
        return tuple(
            self.method.model_copy(update={**fields, "coverage": share})
            for fields in fixed
            for share in SpargeAttn.dial.values
        )

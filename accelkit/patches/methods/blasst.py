"""BLASST: no estimator; after QKᵀ of a tile, skip the rest if it cannot matter any more.

Yuan et al., MLSys 2026, arXiv 2512.12087. The running softmax knows a maximum; a tile in which
every row stays far under it would be multiplied by almost nothing, so its exp, its V and its second
product are left out.

    skip a tile if  max over rows(m_tile − m_running) < ln λ,     λ = scale_factor / number of keys

QKᵀ is always computed, which bounds the gain below 2×. What was seen before decides what can be
skipped, so tiles are visited where mass usually lies: first block, then from the diagonal back; the
paper goes from left to right.

Calibration counts what would be skipped at many λ and fits  scale_factor = a · exp(b · sparsity).
"""

from __future__ import annotations

from math import exp, log
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Dial, Execution, Method

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Site

TRIALS = tuple(10 ** (-6 + 6 * i / 19) * 0.99 for i in range(20))
"""λ at which calibration counts."""
TARGETS = (0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
"""Shares of skipped tiles that are worth measuring."""
STEEPEST = 20.0
"""Most that b is believed to be."""


class BLASST(AttentionMethod):
    """Softmax skip with a threshold that shrinks with length."""

    dial: ClassVar[Dial] = Dial(
        "scale_factor", (18471.0, 7800.0, 3293.0, 1400.0, 587.0, 104.0, 18.8)
    )
    full: ClassVar[dict[str, Any]] = {"scale_factor": 0.0}

    scale_factor: Annotated[float, Field(ge=0)] | str = 587.0
    """λ times the number of keys: larger skips more."""
    block: int = Field(128, ge=16, le=128)
    """Side of a tile in tokens."""
    min_tokens: int = Field(1024, ge=0)
    """Shorter prompts run dense."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if call.n_k < self.min_tokens:
            return None
        size = (self.block, self.block)
        return call.once(("visits", size), lambda: parts.visiting.sink_then_newest(call, size))

    def execution(self, call: AttentionCall) -> Execution | None:
        if call.n_k < self.min_tokens:
            return None
        # λ = 1 drops what raises no row's maximum; beyond it even new maxima would go.
        factor = call.per_head(self.scale_factor)
        if isinstance(factor, float):
            return Execution(skip=min(factor / call.n_k, 1.0))
        return Execution(skip=(factor / call.n_k).clamp(max=1.0))

    def calibrator(self, site: Site) -> Calibrator:
        return _Fit(self)


class _Fit(Calibrator):
    """Counts skippable visits of dense calls in every eighth tile, then fits the law."""

    method: BLASST

    def __init__(self, method: BLASST) -> None:
        super().__init__(method)
        self.points: list[tuple[float, float]] = []  # (sparsity, scale_factor)

    def see(self, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        index = self.method.index(call)
        if index is None:
            return
        gaps = parts.visiting.peak_gaps(call, index, range(index.rows)[::-1][::8])
        least = gaps.new_tensor([*map(log, TRIALS), float("inf")])
        *skipped, visits = (gaps.flatten()[:, None] <= least).sum(0).tolist()
        for trial, count in zip(TRIALS, skipped, strict=True):
            self.points.append((count / max(visits, 1), trial * call.n_k))

    def settings(self) -> tuple[Method, ...]:
        """Least squares of log scale_factor over sparsity, points of 10 … 90 % only."""
        points = [(s, log(f)) for s, f in self.points if 0.1 <= s <= 0.9]
        if len({s for s, _ in points}) < 2:
            return super().settings()
        sparsities, logs = zip(*points, strict=True)
        b = min(linear_regression(sparsities, logs).slope, STEEPEST)
        log_a = fmean(logs) - b * fmean(sparsities)
        return tuple(
            self.method.model_copy(update={"scale_factor": exp(log_a + b * target)})
            for target in TARGETS
        )

"""Vertical-slash: the columns and diagonals that the last queries look at.

MInference (Jiang et al., NeurIPS 2024, arXiv 2407.02490). In most heads attention falls on a few
keys that everyone reads (vertical lines) and on a few fixed distances (slash lines). The exact
softmax of the last rows shows which.

    A        = softmax(q_last Kᵀ · scale)
    vertical = top columns of Σ_rows A             the first `sink_tokens` always
    slash    = top offsets i − j of Σ_diagonal A   the newest `local_tokens` always

Slash lines become windows of one tile, rounded to blocks; columns outside them are read one by one.
The sizes are those that the released search gives most heads of Llama-3.1-8B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Dial, Method

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Site

PUBLISHED = ((30, 800), (100, 750), (100, 800), (500, 700), (3500, 100), (1000, 6096))
"""Columns and offsets that the released search chooses among."""


class VerticalSlash(AttentionMethod):
    """Top columns and diagonals of the last queries (MInference)."""

    dial: ClassVar[Dial] = Dial("slash_offsets", (200, 400, 800, 1600, 3200, 6096))
    full: ClassVar[dict[str, Any]] = {"slash_offsets": 1 << 30}

    vertical_columns: int = Field(100, ge=1)
    """Keys that every row reads."""
    slash_offsets: int = Field(800, ge=1)
    """Distances that every row reads."""
    probe_rows: int = Field(64, ge=1, le=128)
    """Last rows whose exact attention is looked at."""
    sink_tokens: int = Field(30, ge=0)
    """First tokens that are always among the columns."""
    local_tokens: int = Field(100, ge=1)
    """Smallest distances that are always among the offsets."""
    block: int = Field(64, ge=16)
    """Side of a block in tokens."""

    def index(self, call: AttentionCall) -> tuple[BlockIndex, BlockIndex] | None:
        if call.n_k <= 8 * self.block:
            return None
        rows = self.probe_rows
        probe = call.once(("probe", rows), lambda: kernels.scores.probe(call, rows))
        sink = parts.ranking.first_tokens(call, self.sink_tokens)
        columns = probe.columns.masked_fill(sink, float("inf"))
        offsets = probe.diagonals.clone()
        offsets[..., : self.local_tokens] = float("inf")
        n_v = min(call.n_k, max(self.vertical_columns, self.sink_tokens))
        n_s = min(call.n_k, max(self.slash_offsets, self.local_tokens))
        return kernels.select.vertical_slash(
            call, columns.topk(n_v).indices, offsets.topk(n_s).indices, (self.block, self.block)
        )

    def calibrator(self, site: Site) -> Calibrator:
        return _Published(self)


class _Published(Calibrator):
    """Both sizes matter, so calibration tries the released pairs and not one dial."""

    def settings(self) -> tuple[Method, ...]:
        names = ("vertical_columns", "slash_offsets")
        return tuple(
            self.method.model_copy(update=dict(zip(names, pair, strict=True))) for pair in PUBLISHED
        )

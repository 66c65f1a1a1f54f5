"""Kascade: exact top keys of a tile in a few anchor layers, read again by the layers between.

Microsoft, 2025 (`microsoft/kascade`). Neighbouring layers look at the same keys. An anchor layer
computes attention exactly, pools it over a small tile of queries and the heads that share their
keys, and keeps the best; layers after it take those lists through a map of heads. Which layers are
anchors, and the map, stand in the plan (`reuse`); this method is the anchor.

    P[t, j] = Σ over the rows of tile t and the heads of a KV group of softmax(q Kᵀ · scale)
    list of tile t = the max(floor_tokens, share · keys before t) greatest P[t, ·], and its own keys

`dense_output` serves the first layer: it runs dense, and its lists are for others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall


class Kascade(AttentionMethod):
    """Tile-pooled exact top-k, for anchor layers."""

    dial: ClassVar[Dial] = Dial("share", (0.02, 0.04, 0.07, 0.1, 0.15, 0.25, 0.4))
    full: ClassVar[dict[str, Any]] = {"share": 1.0}

    share: float = Field(0.1, gt=0, le=1)
    """Share of the keys before a tile that it reads."""
    floor_tokens: int = Field(128, ge=1)
    """Least keys that a tile reads."""
    tile: int = Field(32, ge=1)
    """Query rows that share a list."""
    dense_output: bool = False
    """Whether the layer itself runs dense and only lends its lists."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        return None if self.dense_output else self._lists(call, None)

    def emit(self, call: AttentionCall, lse: Tensor | None) -> BlockIndex | None:
        return self._lists(call, lse) if self.dense_output else None

    def _lists(self, call: AttentionCall, lse: Tensor | None) -> BlockIndex | None:
        if call.n_k <= self.floor_tokens + self.tile:
            return None
        return call.once(
            ("tile_top_k", self.tile, self.share, self.floor_tokens),
            lambda: kernels.scores.tile_top_k(
                call, self.tile, self.share, least=self.floor_tokens, lse=lse
            ),
        )

"""A-shape: a sink, a local window and, as Tri-shape, a dense end.

MInference (Jiang et al., NeurIPS 2024, arXiv 2407.02490), the first of its three head patterns:
some heads look at the beginning and nearby only. Tri-shape (SCBench, arXiv 2412.10319) also lets
the last rows, where the question stands, read everything.

    query i reads key j ≤ i:   j < sink_tokens   or   j > i − local_tokens   or   i ≥ N − dense_rows

The sizes are those of the released head search; the paper's kernel runs 1024 + 4096.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall


class AShape(AttentionMethod):
    """Sink, local window and optionally dense last rows (MInference, Tri-shape)."""

    static: ClassVar[bool] = True
    dial: ClassVar[Dial] = Dial("local_tokens", (256, 512, 800, 1024, 2048, 4096, 8192))
    full: ClassVar[dict[str, Any]] = {"sink_tokens": 1 << 30}

    sink_tokens: int = Field(100, ge=0)
    """First tokens, read by all rows."""
    local_tokens: int = Field(800, ge=1)
    """Newest tokens that a row reads, itself among them."""
    dense_rows: int = Field(0, ge=0)
    """Last rows of the prompt that read everything (Tri-shape); 0 is A-shape."""
    block: int = Field(64, ge=16)
    """Side of a block in tokens."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if call.n_k <= self.local_tokens:
            return None
        unit = (self.block, self.block)
        return parts.patterns.window(
            call, self.sink_tokens, self.local_tokens, unit, last_rows=self.dense_rows
        )

"""Window with sinks: every query reads the first tokens and its own neighbourhood.

StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453). Softmax has to put its mass somewhere, and
models learn to put it on the first tokens; a window that keeps them stays fluent at any length.

    query i reads key j ≤ i:   j < sink_tokens   or   j > i − window_tokens    (rounded to blocks)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase


class Window(AttentionMethod):
    """Sinks and a sliding window (StreamingLLM)."""

    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "denoise")
    static: ClassVar[bool] = True
    dial: ClassVar[Dial] = Dial("window_tokens", (256, 512, 1024, 2048, 4096, 8192))
    full: ClassVar[dict[str, Any]] = {"sink_tokens": 1 << 30}

    sink_tokens: int = Field(4, ge=0)
    """First tokens, read by all rows."""
    window_tokens: int = Field(1024, ge=1)
    """Newest tokens that a row reads, itself among them; on both sides if not causal."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if call.n_k <= self.window_tokens:
            return None
        unit = (self.block, self.block)
        return parts.patterns.window(call, self.sink_tokens, self.window_tokens, unit)

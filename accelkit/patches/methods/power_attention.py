"""PowerAttention: attend to blocks at distances 1, 2, 4, 8, …

Chen et al., 2025, arXiv 2503.03588. A static list of O(log n) blocks a row whose receptive field
doubles with every layer: what stands 2ⁿ blocks back arrives after n layers. The paper trains with
this mask; without training it suits heads that calibration finds local.

    D = query block − key block:   D < local_blocks   or   D = 2ⁿ   or   a sink block
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall


class PowerAttention(AttentionMethod):
    """Blocks at distances that are powers of two, beside sink and window."""

    static: ClassVar[bool] = True
    dial: ClassVar[Dial] = Dial("local_blocks", (1, 2, 3, 5, 8, 16, 32))
    full: ClassVar[dict[str, Any]] = {"sink_blocks": 1 << 20}

    block: int = Field(256, ge=16)
    """Side of a block in tokens."""
    local_blocks: int = Field(5, ge=1)
    """Newest blocks that a tile reads, its own among them."""
    sink_blocks: int = Field(1, ge=0)
    """First blocks, read by all tiles."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if call.n_k <= self.block * self.local_blocks:
            return None
        unit = (self.block, self.block)
        return parts.patterns.power_of_two(call, unit, self.local_blocks, self.sink_blocks)

"""Radial Attention: the farther two frames are apart, the narrower the band between them.

Li et al., NeurIPS 2025, arXiv 2506.19852. Attention falls with the distance in time about as a
power of it, so one static mask serves all heads: near frames are read whole, and each time the
distance D doubles, the width halves. Where it would fall below a block, frames are skipped instead.

    L = S / 2^bit_length(D)            S = the power of two above the tokens s of a frame
    D ≤ whole_frames: all   ·   L ≥ block or D mod ⌊block / L⌋ = 0:  |y − z| ≤ max(block, decay · L)
    first `sink_frames` frames: all

y and z count along the flattened frame. A block runs if over a third of its pairs are in the mask;
the release asks that of six tenths of its columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase

PARTLY = 1 / 3
"""Share of a block's pairs above which it runs."""


class RadialAttention(AttentionMethod):
    """Bands whose width halves with each doubling of the distance in time."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    static: ClassVar[bool] = True
    dial: ClassVar[Dial] = Dial("decay", (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95))
    full: ClassVar[dict[str, Any]] = {"whole_frames": 1 << 20}

    decay: float = Field(0.95, gt=0, le=1)
    """Width of a band ÷ the reach L of its distance. The release takes this for HunyuanVideo, 0.2
    for Wan 2.1 and 0.8 for Wan 2.2.
    """
    whole_frames: int = Field(1, ge=0)
    """Up to this distance frames are read whole."""
    sink_frames: int = Field(1, ge=0)
    """First frames, read by all."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = parts.grids.visual(call)
        if where is None or where.grid[0] <= self.whole_frames + 1:
            return None
        unit = (self.block, self.block)
        widths = [self._width(d, where.frame) for d in range(where.grid[0])]
        mask = parts.grids.frame_bands(where, widths, unit, least=PARTLY)
        mask |= parts.grids.first_blocks(where, self.sink_frames * where.frame, self.block)
        return parts.patterns.listed(mask, call, unit)

    def _width(self, distance: int, frame: int) -> int:
        if distance <= self.whole_frames:
            return frame
        reach = (1 << frame.bit_length()) / (1 << distance.bit_length())
        if reach < self.block and distance % int(self.block // reach):
            return -1
        return int(max(self.block, self.decay * reach))

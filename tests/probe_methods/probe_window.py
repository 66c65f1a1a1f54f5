"""A window of blocks with the first block: a method for tests that need any method at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from accelkit.patches.method import AttentionMethod, Dial

if TYPE_CHECKING:
    from accelkit.kernels.index import BlockIndex
    from accelkit.patches.call import AttentionCall


class ProbeWindow(AttentionMethod):
    """Every query tile reads the first block and `blocks` up to its own, or on both sides of it."""

    phases = ("prefill", "decode", "denoise")
    static = True
    dial = Dial("blocks", (1, 2))
    blocks: int = Field(1, ge=1, description="blocks of 64 tokens up to the diagonal")

    def index(self, call: AttentionCall) -> BlockIndex:
        import torch

        from accelkit.kernels.index import BlockIndex

        nq, nk = call.tiles((64, 64))
        row = torch.arange(nq, device=call.q.device)[:, None] + call.q_start // 64
        key = torch.arange(nk, device=call.q.device)[None]
        near = (key > row - self.blocks) & (key < row + self.blocks) | (key == 0)
        mask = near & (key <= row) if call.causal else near
        return BlockIndex.from_mask(mask.expand(1, len(call.heads), nq, nk), (64, 64))

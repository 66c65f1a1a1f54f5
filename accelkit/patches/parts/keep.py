"""What is kept whatever the scores say. Sinks, local window and last rows are
`kernels.select.force`; this file adds the ranges that only the geometry knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.kernels.index import Inputs
from accelkit.kernels.select import visible
from accelkit.patches.call import AttentionCall


def text(mask: Tensor, call: Inputs, size: tuple[int, int]) -> Tensor:
    """`mask` with text rows and columns dense where the call belongs to diffusion, which keeps
    pictures whole; other calls are left as they are.
    """
    if isinstance(call, AttentionCall) and call.clock.phase == "denoise":
        return spans(mask, call, size)
    return mask


def spans(
    mask: Tensor,
    call: AttentionCall,
    size: tuple[int, int],
    kinds: tuple[str, ...] = ("text",),
) -> Tensor:
    """`mask` with the rows and columns of some modalities dense, as far as visible; bool
    `[B, H, nq, nk]`. Key and query token ids are those of `call.geometry`; chunked rows begin at
    `q_start`.
    """
    chosen = [s for s in call.geometry.spans if s.kind in kinds and s.stop > s.start]
    if not chosen:
        return mask
    (nq, nk), (bq, bk) = call.tiles(size), size
    row = call.q_start + torch.arange(nq, device=mask.device) * bq
    key = torch.arange(nk, device=mask.device) * bk
    rows = torch.zeros(nq, dtype=torch.bool, device=mask.device)
    keys = torch.zeros(nk, dtype=torch.bool, device=mask.device)
    for span in chosen:
        rows |= (row < span.stop) & (row + bq > span.start)
        keys |= (key < span.stop) & (key + bk > span.start)
    return mask | ((rows[:, None] | keys) & visible(call, size))

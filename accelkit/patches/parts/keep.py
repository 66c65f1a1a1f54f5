"""What is kept whatever the scores say. Sinks, local window and last rows are
`kernels.select.force`; this file adds the ranges that only the geometry knows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor

from accelkit.kernels.index import Inputs
from accelkit.kernels.positions import sees_all
from accelkit.kernels.select import force, visible_blocks
from accelkit.patches.call import AttentionCall, Span


def text(mask: Tensor, call: Inputs, size: tuple[int, int]) -> Tensor:
    """`mask` with text rows and columns dense, as far as visible, where the call belongs to
    diffusion, which keeps pictures whole; other calls are left as they are. Bool `[B, H, nq, nk]`;
    token ids are those of `call.geometry`, chunked rows begin at `q_start`.
    """
    if not isinstance(call, AttentionCall) or call.clock.phase != "denoise":
        return mask
    chosen = tuple(s for s in call.geometry.spans if s.kind == "text" and s.stop > s.start)
    if not chosen:
        return mask
    kept = _touched(chosen, *call.tiles(size), size, call.q_start, mask.device)
    return mask | (kept if sees_all(call) else kept & visible_blocks(call, size))


def anyhow(call: Inputs, size: tuple[int, int]) -> Tensor:
    """What `force` and `text` keep whatever is selected, bool `[B|1, H|1, nq, nk]`: joined with a
    selection it leaves no row empty that sees anything.
    """
    return force(text(torch.zeros_like(visible_blocks(call, size)), call, size), call, size)


def lasting(call: AttentionCall, key: Hashable, made: Callable[[], Tensor]) -> Tensor:
    """`made()`, for the whole generation where every row sees every key, so that it follows from
    the geometry; for this call elsewhere.
    """
    return call.remember(key, made) if sees_all(call) else call.once(key, made)


@lru_cache(maxsize=64)
def _touched(
    chosen: tuple[Span, ...],
    nq: int,
    nk: int,
    size: tuple[int, int],
    q_start: int,
    device: torch.device,
) -> Tensor:
    """Blocks in the rows and columns of some spans, bool `[nq, nk]`."""
    (bq, bk), rows, keys = size, torch.zeros(nq, 1).bool(), torch.zeros(nk).bool()
    row, key = q_start + torch.arange(nq)[:, None] * bq, torch.arange(nk) * bk
    for span in chosen:
        rows |= (row < span.stop) & (row + bq > span.start)
        keys |= (key < span.stop) & (key + bk > span.start)
    with torch.inference_mode(False):
        return (rows | keys).to(device)

"""Orders: permutations of tokens taken before blocking."""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.kernels.index import Inputs


def segments(call: Inputs, importance: Tensor, segment: int) -> Tensor:
    """Keys sorted by descending importance inside segments of `segment` tokens (PBS-Attn,
    2510.21270): int32 `[B, H, Nk]`, the original key at each place.

    `importance` is fp32 `[B, H, Nk]`. Segments keep their order, so whatever lies in an earlier
    segment stays in the past. The incomplete last segment comes as it is; padding goes to the
    end of its segment. Equal keys keep their order.
    """
    n = call.n_k
    whole = n // segment * segment
    if call.key_mask is not None:
        importance = importance.masked_fill(~call.key_mask[:, None], -float("inf"))
    ids = torch.arange(n, device=importance.device).expand(importance.shape)
    if not whole:
        return ids.int()
    cells = importance[..., :whole].unflatten(-1, (-1, segment))
    order = cells.argsort(dim=-1, descending=True, stable=True)
    base = torch.arange(0, whole, segment, device=importance.device)[:, None]
    return torch.cat([(order + base).flatten(-2), ids[..., whole:]], -1).int()

"""Coarse maps: where a head's attention mass lies, in few cells, whatever the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.kernels.positions import groups, key_head, logits, take_heads
from accelkit.patches.call import AttentionCall
from accelkit.patches.parts import orders
from accelkit.patches.parts.grids import Visual

MASSES = 1 << 24
"""Most masses that are held at once."""


def maps(call: AttentionCall, lse: Tensor, where: Visual, cells: int, rows: int = 1024) -> Tensor:
    """Mean attention mass from query cells to key cells in each of the six orders of the axes, fp32
    `[6, H, n, n]` with n = min(cells, tokens); a row of cells sums to one.

    Cells are equal shares of all tokens in that order. `rows` query rows are drawn (the same in
    every call); `lse` fp32 `[B, H, N]` is that of dense attention. Averages over the batch.
    """
    n, tokens, device = min(cells, call.n_k), call.n_k, call.q.device
    tables = orders.axes(where, device).long()
    cell = torch.arange(tokens, device=device) * n // tokens
    # Cells of tokens in each order, one-hot: all orders of a row of masses in one product.
    of = torch.stack([torch.nn.functional.one_hot(cell[t.argsort()], n).float() for t in tables])
    sums = of.transpose(0, 1).reshape(tokens, 6 * n)
    chance = torch.Generator().manual_seed(0)
    drawn = torch.randperm(tokens, generator=chance)[:rows].to(device)
    step = max(1, MASSES // tokens)
    total = torch.zeros(6, len(call.heads), n, n, device=device)
    for part in drawn.split(step):
        for kv, slots in groups(call):
            q = take_heads(call.q, [call.heads[s] for s in slots])[:, :, part]
            p = logits(q, key_head(call, kv), call.scale)
            p = (p - take_heads(lse, slots)[:, :, part, None]).exp_().mean(0)  # [g, R, N]
            mass = (p @ sums).unflatten(-1, (6, n))
            total[:, slots] += torch.einsum("irm,grin->igmn", of[:, part], mass)
    weight = of[:, drawn].sum(1)
    return total / weight.clamp(min=1)[:, None, :, None]

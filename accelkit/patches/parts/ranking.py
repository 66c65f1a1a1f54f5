"""Counting and comparing: how many entries hold a share, the best few, whose own."""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.kernels.index import Inputs


def held_by(mass: Tensor, share: float | Tensor) -> Tensor:
    """How many of the greatest entries of `mass` `[B, H, n]` have a running sum of at most `share`
    (a number or `[H]`), int64 `[B, H]`. All of them if the share is 1.
    """
    running = mass.sort(-1, descending=True).values.cumsum(-1)
    if isinstance(share, Tensor):
        share = share.to(mass.device).view(-1, 1)
        return ((running <= share) | (share >= 1)).sum(-1)
    return (running <= (share if share < 1 else float("inf"))).sum(-1)


def best(scores: Tensor, count: Tensor) -> Tensor:
    """The `count` `[B, H]` greatest entries of each row of `[B, H, n]`, bool; ties: the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return rank < count[..., None]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of two distributions over the last dimension,
    in nats, `[…]`. Negative entries count as zero.
    """
    p, q = p.clamp(min=0), q.clamp(min=0)
    m = (p + q) / 2
    js = (torch.xlogy(p, p) - torch.xlogy(p, m) + torch.xlogy(q, q) - torch.xlogy(q, m)).sum(-1) / 2
    return js.clamp(min=0).sqrt()


def own_run(call: Inputs, size: tuple[int, int], run_tokens: int) -> Tensor:
    """Key blocks from the start of the run of `run_tokens` positions in which a query tile begins,
    bool `[1, 1, nq, nk]`. Runs are counted from position 0, so chunks see the same runs.
    """
    (nq, nk), (bq, bk) = call.tiles(size), size
    device = call.q.device
    row = call.q_start + torch.arange(nq, device=device) * bq
    end = torch.arange(1, nk + 1, device=device) * bk
    return (end > (row // run_tokens * run_tokens)[:, None])[None, None]


def first_tokens(call: Inputs, tokens: int) -> Tensor:
    """The first `tokens` real keys of each sequence, bool `[B|1, 1, Nk]`."""
    if call.key_mask is None:
        return (torch.arange(call.n_k, device=call.k.device) < tokens)[None, None]
    return (call.key_mask & (call.key_mask.cumsum(-1) <= tokens))[:, None]


def own_tables(ids: Tensor) -> tuple[Tensor, Tensor]:
    """An order for every head of every sequence, `[B, H, n]`, as `(table [B·H, n], row [B, H])`."""
    row = torch.arange(ids.shape[0] * ids.shape[1], device=ids.device)
    return ids.flatten(0, 1), row.view(ids.shape[:2])

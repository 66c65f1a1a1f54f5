"""Estimators by means of blocks: pooled queries and keys, and how alike the tokens of a block are.

Scores are fp32 `[B, H, nq, nk]` for the call's heads, −inf where no row of the tile sees a block.
Keys are expanded to the query heads only after pooling.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.kernels import dispatch
from accelkit.kernels.index import Inputs, device_ids
from accelkit.kernels.positions import (
    filled,
    in_place,
    key_places,
    sees_all,
    take_heads,
    visible_blocks,
    voting_rows,
)


def pool(x: Tensor, block: int, mask: Tensor | None = None) -> Tensor:
    """Means of tokens by block: `[…, N, D]` → fp32 `[…, ceil(N / block), D]`.

    The ragged last block is pooled by its true length. `mask` (bool, broadcast to `[…, N]`) names
    the tokens that count; a block without any gives zeros.
    """
    if mask is not None:
        return _pool_masked(x, block, mask)
    n = x.shape[-2]
    whole = n // block * block
    parts = [
        part.unflatten(-2, (-1, size)).mean(-2, dtype=torch.float32)
        for part, size in ((x[..., :whole, :], block), (x[..., whole:, :], n - whole))
        if part.shape[-2]
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _pool_masked(x: Tensor, block: int, mask: Tensor) -> Tensor:
    short = -x.shape[-2] % block
    mask = mask.expand(x.shape[:-1])
    cells = filled(torch.where(mask[..., None], x.float(), 0.0), short).unflatten(-2, (-1, block))
    count = pad(mask, (0, short)).unflatten(-1, (-1, block)).sum(-1)[..., None]
    return cells.sum(-2) / count.clamp(min=1)


def pool_queries(call: Inputs, block: int) -> Tensor:
    """Pooled queries of the call's heads, fp32 `[B, H, nq, D]`; padding rows do not vote."""
    votes = voting_rows(call)
    if dispatch.fast_device(call.q):
        from accelkit.kernels._triton import scores as fast

        places = None if votes is None else torch.where(votes, 0, -1).int()
        return fast.pool(call.q, block, call.heads, places)
    return pool(take_heads(call.q, call.heads), block, votes)


def pool_keys(call: Inputs, block: int) -> Tensor:
    """Pooled keys for the call's heads, fp32 `[B, H, nk, D]`; padding and holes do not count.

    Each KV head is pooled once, unless the holes differ by query head (`k_pos` with heads).
    """
    masked = call.key_mask is not None or call.k_pos is not None
    places = key_places(call) if masked else None
    if dispatch.fast_device(call.k):
        return _pool_heads(call.k, block, call.kv_of_head, places)
    if places is None or places.shape[1] == 1:
        mask = None if places is None else places >= 0
        return pool(call.k, block, mask)[:, call.kv_of_head]
    parts = [
        pool(call.k[:, kv : kv + 1], block, places[:, slot : slot + 1] >= 0)
        for slot, kv in enumerate(call.kv_heads)
    ]
    return torch.cat(parts, 1)


def pool_runs(x: Tensor, begin: Tensor, heads: Tensor) -> Tensor:
    """Means of runs of tokens of different lengths, fp32 `[B, len(heads), runs, D]` of some heads
    of `[B, H, N, D]`: run i is `begin[i] … begin[i + 1] − 1` (int32 `[runs + 1]`, on x's device,
    none of them empty).
    """
    if dispatch.fast_device(x):
        return _pool_heads(x, 64, heads, begin=begin)
    length = begin.diff()
    run = torch.repeat_interleave(torch.arange(length.numel(), device=x.device), length)
    total = x.new_zeros((*x.shape[:2], length.numel(), x.shape[3]), dtype=torch.float32)
    total.index_add_(2, run, x[:, :, int(begin[0]) : int(begin[-1])].float())
    return (total / length[:, None])[:, heads]


def _pool_heads(
    x: Tensor, block: int, heads: Tensor, places: Tensor | None = None, begin: Tensor | None = None
) -> Tensor:
    """Means on a GPU, of each head once: `heads` as they are asked for, unless many ask for one."""
    from accelkit.kernels._triton import scores as fast

    own = places is not None and places.shape[1] > 1
    if own or heads.numel() <= x.shape[1]:
        return fast.pool(x, block, heads, places, begin)
    return fast.pool(x, block, None, places, begin)[:, heads]


def pooled(call: Inputs, size: tuple[int, int]) -> Tensor:
    """Logits of pooled queries and pooled keys, `mean(q) · mean(k) · scale`, fp32 `[B, H, nq, nk]`.

    FlexPrefill (2502.20766), PBS-Attn (2510.21270), SpargeAttn (2502.18137) and the block pattern
    of MInference (2407.02490). A key mean of the diagonal block includes keys that the tile's first
    rows do not see; the selectors force that block anyway.
    """
    return _products(call, size, pool_queries(call, size[0]) * call.scale, pool_keys(call, size[1]))


def _products(call: Inputs, size: tuple[int, int], q: Tensor, k: Tensor) -> Tensor:
    s = torch.matmul(q, k.transpose(-1, -2))
    if sees_all(call):
        return s
    return s.masked_fill_(~visible_blocks(call, size), -float("inf"))


def pooled_alike(call: Inputs, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """`pooled`, and `self_similarity` of query blocks `[B, H, nq]` and, without the mean key, of
    key blocks `[B, H, nk]`: what SpargeAttn (2502.18137) looks at. Padding does not count.
    """
    if in_place(call) and dispatch.fast_device(call.q):
        from accelkit.kernels._triton import scores as fast

        # Heads as the call names them, unless several share their keys.
        kv_heads, shared = call.k.shape[1], len(call.heads) > call.k.shape[1]
        heads = device_ids(tuple(range(kv_heads)), call.k.device) if shared else call.kv_of_head
        rows, q = fast.self_similarity(call.q, size[0], call.heads, None, None, call.scale)
        k = fast.pool(call.k, size[1], heads)
        centre = torch.matmul(_shares(call.n_k, size[1], k.device), k)
        keys, _ = fast.self_similarity(call.k, size[1], heads, None, centre)
        if shared:
            k, keys = k[:, call.kv_of_head], keys[:, call.kv_of_head]
        return _products(call, size, q, k), rows, keys
    real = None if call.key_mask is None else call.key_mask[:, None]
    rows = self_similarity(take_heads(call.q, call.heads), size[0], voting_rows(call))
    keys = self_similarity(call.k, size[1], real, center=True)
    return pooled(call, size), rows, keys[:, call.kv_of_head]


@lru_cache(maxsize=64)
def _shares(tokens: int, block: int, device: torch.device) -> Tensor:
    """Share of each block in the mean token, fp32 `[nb]`."""
    with torch.inference_mode(False):
        first = torch.arange(0, tokens, block, device=device)
        return (tokens - first).clamp(max=block).float() / tokens


def self_similarity(
    x: Tensor, block: int, mask: Tensor | None = None, center: bool = False
) -> Tensor:
    """Mean cosine between the tokens of a block, fp32 `[…, nb]`, from `[…, N, D]`.

    It is the mean of the Gram matrix of the normalised tokens (diagonal included, as in SpargeAttn,
    2502.18137), computed as `‖Σ x̂‖² / n²`. `center` removes the mean token first, as SpargeAttn
    does for keys. `mask` names the tokens that count; a block without any gives 1.
    """
    if x.ndim == 4 and dispatch.fast_device(x) and (mask is None or mask.shape[1] == 1):
        return _fast_self_similarity(x, block, mask, center)
    n = x.shape[-2]
    short = -n % block
    x = x.float()
    if mask is None:
        mask = torch.ones(n, dtype=torch.bool, device=x.device)
    mask = mask.expand(x.shape[:-1])
    if center:
        total = mask.sum(-1)[..., None, None].clamp(min=1)
        x = x - (x * mask[..., None]).sum(-2, keepdim=True) / total
    weight = torch.linalg.vector_norm(x, dim=-1).clamp_(min=1e-12).reciprocal_() * mask
    cells = filled(x, short).unflatten(-2, (-1, block))
    weight = pad(weight, (0, short)).unflatten(-1, (-1, 1, block))
    count = pad(mask, (0, short)).unflatten(-1, (-1, block)).sum(-1)
    square = torch.matmul(weight, cells).square().sum((-1, -2))
    return torch.where(count > 0, square / count.clamp(min=1).square(), 1.0)


def _fast_self_similarity(x: Tensor, block: int, mask: Tensor | None, center: bool) -> Tensor:
    from accelkit.kernels._triton import scores as fast

    centre = None
    if center and mask is None:
        centre = torch.matmul(_shares(x.shape[2], block, x.device), fast.pool(x, block, None))
    elif center:
        assert mask is not None
        number = mask.sum(-1, keepdim=True).clamp(min=1)
        centre = torch.matmul((mask / number).to(x.dtype)[:, :, None], x)[:, :, 0].float()
    places = None if mask is None else torch.where(mask, 0, -1).int()
    return fast.self_similarity(x, block, tuple(range(x.shape[1])), places, centre)[0]

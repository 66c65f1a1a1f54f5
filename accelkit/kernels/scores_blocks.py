"""Estimators on the block grid: pooled, every row × mean key, strided, exact.

Each returns fp32 `[B, H, nq, nk]` for the call's heads. Blocks that no row of the tile sees are
−inf in estimates and 0 in exact masses. Keys are expanded to the query heads only after pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import InvalidInputError, UnsupportedConfigurationError
from accelkit.kernels import dispatch
from accelkit.kernels.index import Inputs, ceil_div, device_ids
from accelkit.kernels.positions import (
    bounds,
    exp_,
    filled,
    groups,
    hide,
    in_place,
    key_head,
    key_places,
    logits,
    per_slot,
    row_limits,
    row_shares,
    sees_all,
    softmax_,
    take_heads,
    visible_blocks,
    voting_rows,
)

CHUNK_BYTES = 512 * 2**20
"""Logits held at a time on a GPU."""
CHUNK_TOKENS = 1024
"""Query tokens at a time on a CPU: logits stay in its caches, and few keys lie beyond the rows."""


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
    x: Tensor,
    block: int,
    heads: Tensor,
    places: Tensor | None = None,
    begin: Tensor | None = None,
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


def rows_by_block_mean(call: Inputs, size: tuple[int, int]) -> Tensor:
    """Every query row × mean key: `Σ_r exp(s_rj − max)` over the rows r of a tile, fp32
    `[B, H, nq, nk]`, the maximum taken over the tile's rows and visible blocks.

    FlashPrefill (`qhfan/FlashPrefill`). A row counts for a block if it sees the block's first key.
    Chunk-safe: no row stands for another.
    """
    visible = visible_blocks(call, size)
    keys = pool_keys(call, size[1])
    if in_place(call) and size[0] <= 256 and dispatch.fast_device(call.q):
        from accelkit.kernels._triton import scores as fast

        found = fast.rows_by_block_mean(call, size, keys)
        return found.masked_fill_(~visible, -float("inf"))
    nq, nk = call.tiles(size)
    first, _ = bounds(key_places(call), size[1])
    limit, votes = row_limits(call), voting_rows(call)
    if votes is not None:
        limit = torch.where(votes, limit, -1)
    out = call.q.new_empty((call.q.shape[0], len(call.heads), nq, nk), dtype=torch.float32)
    step = _rows_per_chunk(call, nk * call.q.shape[0], size[0], 1)
    for slot, head in enumerate(call.heads):
        mean = keys[:, slot]
        for r in range(0, call.n_q, step):
            rows = slice(r, min(r + step, call.n_q))
            # Blocks before all rows need no mask, those behind them no score.
            free, n = 0, nk
            if call.causal and in_place(call):
                free = min(nk, (call.q_start + r + 1) // size[1])
                n = min(nk, ceil_div(call.q_start + rows.stop, size[1]))
            s = logits(call.q[:, head : head + 1, rows].float(), mean[:, :n], call.scale)
            near = per_slot(first, [slot])[..., None, free:n]
            seen = near <= per_slot(limit, [slot])[..., rows, None]
            s[..., free:].masked_fill_(~seen, -float("inf"))
            if s.shape[2] % size[0]:
                s = pad(s, (0, 0, 0, -s.shape[2] % size[0]), value=-float("inf"))
            s = s[:, 0].unflatten(1, (-1, size[0]))
            top = s.flatten(2).amax(2)[..., None, None]
            s = exp_(s.sub_(top.masked_fill_(top == -float("inf"), 0.0))).sum(2)
            out[:, slot, r // size[0] : r // size[0] + s.shape[1], :n] = s
    return out.masked_fill_(~visible, -float("inf"))


def _rows_per_chunk(call: Inputs, width: int, multiple: int, tokens: int) -> int:
    """Rows of `width` fp32 numbers and `tokens` query tokens each that are looked at together, a
    multiple of `multiple`.
    """
    if call.q.is_cuda:
        return max(1, CHUNK_BYTES // (4 * max(1, width) * multiple)) * multiple
    return max(1, CHUNK_TOKENS // (tokens * multiple)) * multiple


def strided(
    call: Inputs, stride: int = 8, size: tuple[int, int] = (128, 128), qk: str = "native"
) -> Tensor:
    """Antidiagonal score of XAttention (2503.16428), fp32 `[B, H, nq, nk]`.

    Tokens are cut into cells of `stride`; the logit of two cells is the mean of their antidiagonal
    `Σ_s q[iS + S−1−s] · k[jS + s] · scale / S`, softmaxed over the cells j that row cell i sees,
    then summed into blocks. A full tile's row of blocks sums to `size[0] / stride`. Ragged ends are
    padded with zeros; masked keys count as zeros, cells without a real key are not seen. A cell of
    keys is seen if its first real key is not after the row cell's last row.

    `qk="int8"` rounds each cell of queries, and of keys less their mean (which softmax does not
    see), to int8 with a scale of its own: on a GPU the products take about half the time. Raises
    `InvalidInputError` for another `qk`, or a stride that does not divide the unit.
    """
    if qk not in ("native", "int8"):
        raise InvalidInputError(f"strided: qk {qk!r}, expected 'native' or 'int8'")
    if stride < 1 or size[0] % stride or size[1] % stride:
        raise InvalidInputError(
            f"strided: stride {stride} does not divide the unit {size}; "
            "choose a stride that divides both sides"
        )
    if in_place(call) and dispatch.fast_device(call.q):
        from accelkit.kernels._triton import strided as fast

        if fast.strided_fits(call, stride, size, qk == "int8"):
            return fast.strided(call, stride, size, int8=qk == "int8")
    places, limit, votes = key_places(call), row_limits(call), voting_rows(call)
    if votes is not None:
        limit = torch.where(votes, limit, -1)
    first, _ = bounds(places, stride)
    _, last = bounds(limit, stride)
    batch, (nq, nk) = call.q.shape[0], call.tiles(size)
    nqc, nkc = last.shape[-1], first.shape[-1]
    first = torch.where(first == 2**31 - 1, -1, first)
    out = call.q.new_zeros((batch, len(call.heads), nq, nk), dtype=torch.float32)
    per = size[0] // stride
    for kv, slots in groups(call):
        k = _key_cells(call, kv, per_slot(places, slots[:1]), stride, qk)
        at = [call.heads[s] for s in slots]
        step = _rows_per_chunk(call, nkc * batch * len(slots), per, stride)
        for c in range(0, nqc, step):
            stop = min(c + step, nqc)
            q = take_heads(call.q[:, :, c * stride : stop * stride], at).to(k.dtype)
            q = filled(q, (stop - c) * stride - q.shape[2])
            if qk == "int8":
                q = _rounded(q, stride)
            q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)
            free, n = 0, nkc  # cells that all rows see, that some row sees
            if call.causal and in_place(call):
                free = min(nkc, (call.q_start + c * stride) // stride + 1)
                n = min(nkc, (call.q_start + stop * stride - 1) // stride + 1)
            s = logits(q, k[:, :n], call.scale / stride)
            hide(s, per_slot(last, slots)[..., c:stop], per_slot(first, slots)[..., :n], free)
            p = softmax_(s)
            p = pad(p, (0, -n % (size[1] // stride), 0, -(stop - c) % per))
            p = p.unflatten(-1, (-1, size[1] // stride)).sum(-1).unflatten(2, (-1, per)).sum(3)
            out[:, slots, c // per : c // per + p.shape[2], : p.shape[3]] = p
    return out.masked_fill_(~visible_blocks(call, size), -float("inf"))


def _key_cells(call: Inputs, kv: int, places: Tensor, stride: int, qk: str) -> Tensor:
    """Cells of `stride` keys of a KV head one after another, `[B, nkc, stride · D]`; zeros
    behind the end and where `places` `[B|1, 1, Nk]` are −1.
    """
    k = key_head(call, kv)
    if call.key_mask is not None or call.k_pos is not None:
        k = k * (places[:, 0, :, None] >= 0)
    k = filled(k, -call.n_k % stride)
    if qk == "int8":
        k = _rounded(k - k[:, : call.n_k].mean(1, keepdim=True, dtype=torch.float32), stride)
    return k.reshape(k.shape[0], -1, stride * k.shape[-1])


def _rounded(x: Tensor, stride: int) -> Tensor:
    """`[…, N, D]` as int8 with one scale for each cell of `stride` tokens gives it, fp32."""
    cells = x.float().unflatten(-2, (-1, stride))
    scale = cells.abs().amax((-2, -1), keepdim=True).clamp(min=1e-20) / 127.0
    return ((cells / scale).round() * scale).flatten(-3, -2)


def block_mass(
    call: Inputs,
    lse: Tensor | None,
    size: tuple[int, int],
    rows: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Exact attention mass of each key block, mean over the rows of a tile, fp32
    `[B, H, len(rows), nk]`; a tile's masses sum to one.

    `lse` is the natural-log LSE of the dense rows, fp32 `[B, H, Nq]` for the call's heads, or None:
    then it is computed on the way. `rows` are the query tiles to look at, all by default.
    Calibration reads recall from this. Padding rows do not vote.
    """
    if lse is not None and dispatch.fast_device(call.q):
        from accelkit.kernels._triton import scores as fast

        if fast.mass_fits(call, size):
            some = None if rows is None else torch.as_tensor(rows, device=call.q.device)
            return fast.block_mass(call, lse, size, some)
    nq, nk = call.tiles(size)
    tiles = list(range(nq)) if rows is None else [int(r) for r in rows]
    seen, votes = (row_limits(call), key_places(call)), voting_rows(call)
    batch = call.q.shape[0]
    out = call.q.new_zeros((batch, len(call.heads), len(tiles), nk), dtype=torch.float32)
    for kv, slots in groups(call):
        k = key_head(call, kv)
        for i, tile in enumerate(tiles):
            r = slice(tile * size[0], min((tile + 1) * size[0], call.n_q))
            p = row_shares(call, k, slots, r, seen, lse)
            if votes is None:
                p = p.mean(2)
            else:
                vote = per_slot(votes, slots)[..., r, None]
                p = (p * vote).sum(2) / vote.sum(2).clamp(min=1)
            p = pad(p, (0, -p.shape[-1] % size[1])).unflatten(-1, (-1, size[1])).sum(-1)
            out[:, slots, i, : p.shape[-1]] = p
    return out


def sampled_max(
    call: Inputs,
    size: tuple[int, int],
    every: int = 4,
    seed: int = 0,
    key_order: Tensor | None = None,
) -> Tensor:
    """Greatest `exp(s − row maximum)` among sampled rows and keys of each block, fp32
    `[B, H, nq, nk]`, at most 1 (PSA, 2512.04025).

    One token in `every` is drawn at random, at the same places in all blocks; equal seeds draw
    equal places. Ragged ends repeat their last token. Keys are blocked in `key_order` (int32
    `[Nk]`). Raises `UnsupportedConfigurationError` for a call with causality, padding or permuted
    tokens.
    """
    if not sees_all(call):
        raise UnsupportedConfigurationError(
            "sampled_max draws the same places in all blocks: it needs a call without causality, "
            "padding and permuted positions"
        )
    (nq, nk), batch, device = call.tiles(size), call.q.shape[0], call.q.device
    q_places, k_places = (
        _drawn(size[0], every, seed, device),
        _drawn(size[1], every, seed + 1, device),
    )
    if dispatch.fast_device(call.q) and all(
        n & (n - 1) == 0 and n <= 128 for n in (q_places.numel(), k_places.numel())
    ):
        from accelkit.kernels._triton import scores as fast

        return fast.sampled_max(call, size, q_places, k_places, key_order)
    q = take_heads(_sampled(call.q, size[0], q_places), call.heads)  # [B, H, nq, r, D]
    k, rows = _sampled(call.k, size[1], k_places, key_order), q.shape[3]  # [B, Hkv, nk, c, D]
    q, k = q.float() * call.scale, k[:, call.kv_of_head].flatten(2, 3).float().transpose(-1, -2)
    out = torch.empty((batch, len(call.heads), nq, nk), dtype=torch.float32, device=device)
    step = max(1, _rows_per_chunk(call, k.shape[-1] * batch * len(call.heads), 1, 1) // rows)
    for i in range(0, nq, step):
        part = q[:, :, i : i + step].flatten(2, 3)
        peak = torch.matmul(part, k).unflatten(-1, (nk, -1)).amax(-1)
        peak = exp_(peak - peak.amax(-1, keepdim=True)).unflatten(2, (-1, rows))
        out[:, :, i : i + step] = peak.amax(3)
    return out


def _sampled(x: Tensor, block: int, places: Tensor, order: Tensor | None = None) -> Tensor:
    """Some tokens of each block of x, taken in an order; `[B, H, nb, len(places), D]`."""
    first = torch.arange(0, x.shape[2], block, device=x.device)[:, None]
    at = (first + places).clamp(max=x.shape[2] - 1)
    at = at if order is None else order[at]
    return x.index_select(2, at.flatten()).unflatten(2, at.shape)


@lru_cache(maxsize=64)
def _drawn(block: int, every: int, seed: int, device: torch.device) -> Tensor:
    """Places of the sampled tokens in a block, int32, ascending."""
    with torch.inference_mode(False):
        chance = torch.Generator().manual_seed(seed)
        inside = torch.randperm(block, generator=chance)[: max(1, block // every)]
        return inside.sort().values.int().to(device)

"""Estimators on the block grid that look at rows: every row × mean key, strided, sampled, exact.

Each returns fp32 `[B, H, nq, nk]` for the call's heads. Blocks that no row of the tile sees are
−inf in estimates and 0 in exact masses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import InvalidInputError, UnsupportedConfigurationError
from accelkit.kernels import dispatch
from accelkit.kernels.index import Inputs, ceil_div
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
from accelkit.kernels.scores_pooled import pool_keys

CHUNK_BYTES = 512 * 2**20
"""Logits held at a time on a GPU."""
CHUNK_TOKENS = 1024
"""Query tokens at a time on a CPU: logits stay in its caches, and few keys lie beyond the rows."""


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

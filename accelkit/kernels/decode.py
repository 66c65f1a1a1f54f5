"""Attention of one query row a head over a long cache: the same kernels, over lists cut in parts.

A row of `gather` or `block_sparse` is one program, so a decode step would leave most of a GPU idle.
Here the query heads that share a KV head become the rows of one tile, which reads its keys once;
its list is cut into parts that run at the same time, and `merge` joins them by their LSE:

    out = Σ_s exp(lse_s − lse) out_s          lse = log Σ_s exp lse_s          s = 1 … splits

Adapters leave decoding dense: preparing such a call takes the host longer than a dense step takes
the device, as `docs/kernel-limits.md` shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accelkit.errors import InvalidInputError
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex, Partial, ceil_div, device_range
from accelkit.kernels.merge import merge

LEAST = 512
"""Keys that make a part worth its merging."""


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    splits: int | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Partial:
    """Attention of the last token over the keys of the cache that `index` lists.

    Args:
        q: `[B, H, 1, D]`, one row for each query head; k: `[B, Hkv, Nk, D]`; v: `[B, Hkv, Nk, Dv]`.
            Query head `h` reads KV head `h // (H / Hkv)`.
        index: lists for the KV heads, `[B|1, Hkv, 1]`, of blocks or of single keys; `ALL` reads the
            whole cache. `size[0]` is not looked at.
        splits: parts of each list that run at once. None: as many as give every multiprocessor of
            the device one, none shorter than 512 keys of the cache; one on a CPU.
        scale, key_mask, backend: as in `attend`.

    Returns:
        `Partial(out, lse)`, `[B, H, 1, Dv]` and fp32 `[B, H, 1]`.

    Raises:
        InvalidInputError: more than one query row, lists that are not the KV heads', no part.
        KernelUnavailableError: the backend that was asked for cannot serve the call.
    """
    batch, heads, rows, _ = q.shape
    shared = k.shape[1]
    group = heads // shared
    if rows != 1 or heads != group * shared:
        raise InvalidInputError(
            f"decode: q has {rows} rows of {heads} heads over {shared} KV heads; expected one row "
            "and equal groups of heads"
        )
    if index.count.shape[1:] != (shared, 1) or index.pyramid:
        raise InvalidInputError(
            f"decode: lists have the shape {tuple(index.count.shape)}; expected plain lists for "
            f"{shared} KV heads, one row each"
        )
    splits = _splits(k, batch) if splits is None else splits
    if splits < 1:
        raise InvalidInputError(f"decode: splits is {splits}; expected at least 1")
    packed = q.reshape(batch, shared, group, q.shape[-1])
    found = attend(
        packed.repeat_interleave(splits, 1), k, v, cut(index, splits, k.shape[2], group),
        causal=False, scale=scale, key_mask=key_mask, backend=backend,
        kv_of_head=[head for head in range(shared) for _ in range(splits)],
    )  # fmt: skip
    out = found.out.unflatten(1, (shared, splits)).unbind(2)
    lse = found.lse.unflatten(1, (shared, splits)).unbind(2)
    shape = (batch, heads, 1)
    parts = [
        Partial(o.reshape(*shape, -1), s.reshape(shape)) for o, s in zip(out, lse, strict=True)
    ]
    return merge(parts)


def cut(index: BlockIndex, splits: int, n_k: int, group: int) -> BlockIndex:
    """Each KV head's list in `splits` runs of equal length, a row each, `[B|1, Hkv · splits, 1]`;
    `group` query heads are the rows of its tile. No host synchronisation.
    """
    whole = ceil_div(n_k, index.size[1])
    listed = index.blocks.numel()
    every = device_range(whole, index.blocks.device).int()
    start = torch.where(index.count == ALL, listed, index.start)
    count = torch.where(index.count == ALL, whole, index.count)
    length = (count + splits - 1) // splits
    at = device_range(splits, count.device) * length  # [B|1, Hkv, splits]
    counts = torch.minimum(count - at, length).clamp(min=0)
    bias = index.bias
    if isinstance(bias, Tensor) and bias.shape[1] > 1:
        bias = bias.repeat_interleave(splits, 1)
    return replace(
        index,
        start=(start + at).flatten(1)[..., None],
        count=counts.int().flatten(1)[..., None],
        blocks=torch.cat([index.blocks, every]),
        size=(max(16, 1 << (group - 1).bit_length()), index.size[1]),
        bias=bias,
    )


def _splits(k: Tensor, batch: int) -> int:
    if not k.is_cuda:
        return 1
    programs = torch.cuda.get_device_properties(k.device).multi_processor_count
    return max(1, min(ceil_div(programs, batch * k.shape[1]), k.shape[2] // LEAST))

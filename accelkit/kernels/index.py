"""The types that everything meets in: `BlockIndex` (what was selected), `Partial` (a piece
already computed) and `Inputs` (the tensors of one attention call, as estimators and methods see
them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ALL = -1
"""A row count that stands for every visible block: a dense head inside a sparse launch."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=1024)
def device_ids(
    values: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Small id tables live on the device; building them anew would copy from the host in every
    call, and wait for it.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def device_range(n: int, device: torch.device) -> Tensor:
    """0 … n − 1, int64; the same tensor for all calls."""
    with torch.inference_mode(False):
        return torch.arange(n, device=device)


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, which torch takes microseconds to say."""
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class BlockIndex:
    """Rows of key blocks, in visiting order. Row (b, h, i) is `blocks[start : start + count]`.

    `start` is int64 and `count` int32, both `[B|1, H, nq]` for the call's heads; `blocks` is one
    flat int32 list, so padded and ragged rows are the same type and joining head groups is `cat`
    and an offset. `size` is `(bq, bk)` in tokens and independent of any kernel's tile; `bk == 1`
    means single keys. With `pyramid` the entries run through means of 8, 4 and 2 keys and the keys
    themselves (`kernels.pyramid`), taken in `key_order` (int32 `[Nk]`, for all heads; None: as they
    come), so that nobody has to lay them out before. `bias` is added to the logits of the whole
    piece (float) or of each key (`[B|1, H|1, Nk]`), for merged or sampled keys that stand for
    several; `bias_by_entry` says that all keys of an entry have the same one and that entries
    differ by no more than some nats, as counts of keys do: kernels then apply it for less.
    """

    start: Tensor
    count: Tensor
    blocks: Tensor
    size: tuple[int, int]
    pyramid: bool = False
    key_order: Tensor | None = None
    bias: Tensor | float = 0.0
    bias_by_entry: bool = False
    lowered: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What kernels derived from this index, kept with it because reuse layers and steps ask again.
    """

    @property
    def heads(self) -> int:
        return self.count.shape[1]

    @property
    def rows(self) -> int:
        """Number of query tiles."""
        return self.count.shape[2]

    @staticmethod
    def from_mask(mask: Tensor, size: tuple[int, int]) -> BlockIndex:
        """Compact a bool mask `[B|1, H, nq, nk]`, ascending ids in each row. No host
        synchronisation.
        """
        batch, heads, nq, nk = mask.shape
        flat = mask.reshape(-1, nk)
        slot = flat.cumsum(-1, dtype=torch.int64) - 1
        row = torch.arange(flat.shape[0], device=mask.device, dtype=torch.int64) * nk
        # Entries that are not selected are written to one spare place behind the list.
        target = torch.where(flat, slot + row[:, None], flat.numel())
        blocks = torch.zeros(flat.numel() + 1, dtype=torch.int32, device=mask.device)
        ids = torch.arange(nk, dtype=torch.int32, device=mask.device).expand_as(flat)
        blocks.scatter_(0, target.reshape(-1), ids.reshape(-1))
        count = flat.sum(-1, dtype=torch.int32).view(batch, heads, nq)
        return BlockIndex(row.view(batch, heads, nq), count, blocks[:-1], size)

    @staticmethod
    def dense(heads: int, nq: int, size: tuple[int, int], device: torch.device) -> BlockIndex:
        """Every visible block for `heads` heads and `nq` query tiles (`count == ALL`)."""
        start = torch.zeros((1, heads, nq), dtype=torch.int64, device=device)
        count = torch.full((1, heads, nq), ALL, dtype=torch.int32, device=device)
        return BlockIndex(start, count, torch.zeros(0, dtype=torch.int32, device=device), size)

    @staticmethod
    def cat(parts: Sequence[BlockIndex]) -> BlockIndex:
        """Join head groups along the heads. All parts have the same `size` and number of query
        tiles.
        """
        if len(parts) == 1:
            return parts[0]
        if len({p.size for p in parts}) != 1 or len({p.rows for p in parts}) != 1:
            found = [(p.size, p.rows) for p in parts]
            raise ValueError(
                f"cat needs one unit size and one number of query tiles, found {found}"
            )
        if any(p.pyramid or not isinstance(p.bias, float) for p in parts):
            raise ValueError(
                "cat joins plain pieces only; pyramids and pieces with key biases run alone"
            )
        if len({p.bias for p in parts}) > 1:
            raise ValueError(f"cat needs one bias, found {[p.bias for p in parts]}")
        batch = max(p.count.shape[0] for p in parts)
        offset, starts = 0, []
        for p in parts:
            starts.append((p.start + offset).expand(batch, -1, -1))
            offset += p.blocks.numel()
        counts = [p.count.expand(batch, -1, -1) for p in parts]
        blocks = torch.cat([p.blocks for p in parts])
        return replace(
            parts[0], start=torch.cat(starts, 1), count=torch.cat(counts, 1), blocks=blocks
        )

    def take(self, heads: Sequence[int]) -> BlockIndex:
        """The rows of some heads, in the given order (a head map for reuse). Lists are shared,
        not copied.
        """
        ids = device_ids(tuple(heads), self.count.device)
        return replace(self, start=self.start[:, ids], count=self.count[:, ids])

    def to_mask(self, nk: int) -> Tensor:
        """Bool `[B|1, H, nq, nk]`; rows with `ALL` are wholly true. For tests, statistics and
        the torch reference.
        """
        batch, heads, nq = self.count.shape
        mask = torch.zeros((batch * heads * nq, nk), dtype=torch.bool, device=self.count.device)
        start, count = self.start.reshape(-1), self.count.reshape(-1)
        mask[count == ALL] = True
        length = count.clamp(min=0).long()
        row = torch.repeat_interleave(torch.arange(length.numel(), device=length.device), length)
        first = start - (length.cumsum(0) - length)
        ids = self.blocks[first[row] + torch.arange(row.numel(), device=row.device)].long()
        keep = (ids >= 0) & (ids < nk)
        mask[row[keep], ids[keep]] = True
        return mask.view(batch, heads, nq, nk)


@dataclass(frozen=True)
class Partial:
    """A computed piece: `out` `[B, H, Nq, Dv]` and its natural-log `lse`, fp32 `[B, H, Nq]`
    (−inf for empty rows).
    """

    out: Tensor
    lse: Tensor


def equal_groups(heads: int, kv_heads: int) -> tuple[int, ...]:
    """The KV head of each query head, as grouped-query attention shares them."""
    return tuple(head * kv_heads // heads for head in range(heads))


@dataclass(frozen=True)
class Inputs:
    """The tensors of one attention call.

    `q` `[B, Hq, Nq, D]`, `k` and `v` `[B, Hkv, Nk, D]`, any strides, never expanded to the query
    heads. `heads` names the query heads that the call is about and `kv_heads` the KV head of each;
    `take` narrows them and never copies q, k or v. Both are known on the host. `q_start` is the
    absolute position of query row 0. `key_mask` is bool `[B, Nk]` and marks real keys (padding
    only). `q_pos` and `k_pos` (int32 `[B|1, H|1, N]`) hold the original positions when the rows
    come in another order than the tokens; −1 marks a hole.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    q_start: int
    key_mask: Tensor | None
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None

    @property
    def kv_of_head(self) -> Tensor:
        """`kv_heads` on the device, int64 `[len(heads)]`."""
        return device_ids(self.kv_heads, self.q.device, torch.int64)

    @property
    def n_q(self) -> int:
        """Number of query rows."""
        return self.q.shape[2]

    @property
    def n_k(self) -> int:
        """Number of keys."""
        return self.k.shape[2]

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Query tiles and key blocks of the call at unit `size`."""
        return ceil_div(self.n_q, size[0]), ceil_div(self.n_k, size[1])


def plain_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    q_start: int = 0,
    key_mask: Tensor | None = None,
) -> Inputs:
    """`Inputs` over all heads of bare tensors, for benchmarks, tests and notebooks."""
    heads = q.shape[1]
    groups = equal_groups(heads, k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Inputs(q, k, v, scale, causal, q_start, key_mask, tuple(range(heads)), groups)

"""Token rows taken into another order and put back: the only copies that an order costs.

`table` int32 `[K, n]` holds the few distinct orders (ids of tokens, −1 a hole) and `row` int
`[H]` or `[B, H]` names the one that a head slot uses; `row` None: all heads use the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from accelkit.kernels.dispatch import fast_device
from accelkit.kernels.index import device_ids


def take_rows(
    x: Tensor, table: Tensor, row: Tensor | None = None, heads: Sequence[int] | Tensor | None = None
) -> Tensor:
    """`out[b, j, i] = x[b, heads[j], table[row[j], i]]`, zeros at holes; `[B, len(heads), n, D]`
    in x's dtype from x `[B, Hx, N, D]` of any strides. `heads` None: all heads of x.
    """
    slots = x.shape[1] if heads is None else len(heads)
    ids = _per_slot(table, row)
    if fast_device(x) and x.stride(-1) == 1:
        from accelkit.kernels._triton import permute as fast

        return fast.take_rows(x, ids, _heads(heads, slots, x))
    if heads is not None:
        x = x[:, _heads(heads, slots, x)]
    at = ids.clamp(min=0).long()
    if ids.shape[:2] == (1, 1):
        out = x.index_select(2, at[0, 0])
    else:
        at = at.expand(x.shape[0], slots, -1)
        out = x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3]))
    return out.masked_fill_((ids < 0)[..., None], 0)


def put_rows(
    out: Tensor,
    x: Tensor,
    table: Tensor,
    row: Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
) -> None:
    """`out[b, heads[j], table[row[j], i]] = x[b, j, i]`; holes go nowhere, tokens that the order
    leaves out stay as they are. `x` is `[B, len(heads), n, D]`, `out` `[B, Ho, N, D]`.
    """
    slots = x.shape[1]
    ids = _per_slot(table, row)
    if fast_device(x) and out.stride(-1) == 1 and x.stride(-1) == 1:
        from accelkit.kernels._triton import permute as fast

        return fast.put_rows(out, x, ids, _heads(heads, slots, x))
    b, j, i = (ids.expand(x.shape[0], slots, -1) >= 0).nonzero(as_tuple=True)
    at = ids.expand(x.shape[0], slots, -1)[b, j, i].long()
    out[b, _heads(heads, slots, x).long()[j], at] = x[b, j, i].to(out.dtype)


def _per_slot(table: Tensor, row: Tensor | None) -> Tensor:
    """Token ids of each head slot, `[B|1, slots|1, n]`, a view where all are alike."""
    if row is None or table.shape[0] == 1:
        return table[:1, None]
    ids = table[row.long()]
    return ids if ids.ndim == 3 else ids[None]


def _heads(heads: Sequence[int] | Tensor | None, slots: int, x: Tensor) -> Tensor:
    if isinstance(heads, Tensor):
        return heads
    return device_ids(tuple(range(slots)) if heads is None else tuple(heads), x.device)

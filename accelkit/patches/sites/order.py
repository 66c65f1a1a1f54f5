"""Tokens in another order: a call's rows laid out for the kernels, and a result put back."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from accelkit.kernels.index import Partial, device_ids
from accelkit.kernels.permute import put_rows, take_rows
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import Order


def in_kernel_order(call: AttentionCall, order: Order) -> AttentionCall:
    """The call with its rows laid out by `order`.

    An order that all heads have in common is gathered once for all of them, whatever group asks;
    otherwise rows are gathered for each query head of the call. Causal calls carry original
    positions along in `q_pos` and `k_pos`; others only say which places are holes or padding.
    """
    changed: dict[str, object] = {}
    common = is_common(order)
    row = None if common else order.row
    if order.k_table is not None:
        if common:
            changed["k"] = _gathered(call, "k", order.k_table)
            changed["v"] = _gathered(call, "v", order.k_table)
        else:
            changed["k"] = take_rows(call.k, order.k_table, row, call.kv_of_head)
            changed["v"] = take_rows(call.v, order.k_table, row, call.kv_of_head)
            changed["kv_heads"] = tuple(range(len(call.heads)))
        if call.causal or call.key_mask is not None or not (order.whole or order.whole_keys):
            ids = _ids(order.k_table, order.row)  # [B|1, H, n]
            if call.causal:
                place = ids
            else:
                place = _common_places(order.k_table) if common else _places(ids)
            if call.key_mask is not None:
                real = call.key_mask[:, None].expand(-1, ids.shape[1], -1)
                ids = ids.expand(real.shape[0], -1, -1)
                place = torch.where(real.gather(2, ids.clamp(min=0).long()), place, -1)
            changed["k_pos"] = place
        changed["key_mask"] = None
    if order.q_table is not None:
        if common:
            changed["q"] = _gathered(call, "q", order.q_table)
        else:
            q = take_rows(call.q, order.q_table, row, call.heads)
            if q.shape[1] < call.q.shape[1]:  # heads keep their ids
                whole = q.new_empty(q.shape[0], call.q.shape[1], *q.shape[2:])
                whole[:, device_ids(call.heads, q.device)] = q
                q = whole
            changed["q"] = q
        if call.causal or not order.whole:
            ids = _ids(order.q_table, order.row)
            at = torch.where(ids < 0, -1, ids + call.q_start)
            changed["q_pos"] = at if call.causal else _places(ids)
    return replace(call, **changed, _shared={})  # type: ignore[arg-type]


def is_common(order: Order) -> bool:
    """Whether all heads have one order."""
    return all(t is None or t.shape[0] == 1 for t in (order.q_table, order.k_table))


def _gathered(call: AttentionCall, name: str, table: Tensor) -> Tensor:
    """All heads of q, k or v in a common order, once for all groups of the call."""
    key = ("in order", name, id(table))
    if key not in call._shared:
        # The table is kept beside the rows, so that its id is not given to another one.
        call._shared[key] = (take_rows(getattr(call, name), table), table)
    return call._shared[key][0]


def _ids(table: Tensor, row: Tensor) -> Tensor:
    if table.shape[0] == 1:
        return table[None]
    ids = table[row.long()]
    return ids if ids.ndim == 3 else ids[None]


def _places(ids: Tensor) -> Tensor:
    """Places in the kernel, −1 for holes: without causality, positions say nothing else."""
    place = torch.arange(ids.shape[-1], device=ids.device, dtype=torch.int32)
    return torch.where(ids < 0, -1, place)


@lru_cache(maxsize=64)
def _common_places(table: Tensor) -> Tensor:
    """`_places` of an order that all heads have in common, the same tensor in every call."""
    return _places(table[None])


def in_token_order(part: Partial, order: Order, n: int) -> Partial:
    """A result of rows in `order` as `n` rows in token order; zeros and −inf where a token is left
    out.
    """
    assert order.q_table is not None
    table, row = order.q_table, None if is_common(order) else order.row
    out = part.out.new_empty(*part.out.shape[:2], n, part.out.shape[3])
    lse = part.lse.new_empty((*part.lse.shape[:2], n, 1))
    if not (order.whole or order.whole_keys):  # tokens that the order leaves out
        out.zero_()
        lse.fill_(float("-inf"))
    put_rows(out, part.out, table, row)
    put_rows(lse, part.lse[..., None], table, row)
    return Partial(out, lse[..., 0])

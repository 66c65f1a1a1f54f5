"""Key pyramids: instead of dropping a block, read the means of 2, 4 or 8 of its keys in a row.

A mean of h keys stands for h of them, so its logits get `+ log h` (exactly right for equal keys).
Means of 8, 4 and 2 keys and the keys themselves lie one level behind the other, each as far as its
entries are whole, so that one list and one launch run through all of them (Pyramid Sparse
Attention, 2512.04025).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from accelkit.errors import UnsupportedConfigurationError
from accelkit.kernels.index import BlockIndex, ceil_div

LEVELS = 4


def firsts(tokens: int, unit: int) -> tuple[int, ...]:
    """First entry of each level, 0 … 3, where an entry is `unit` keys or means; and behind them the
    number of all entries.
    """
    begin, found = 0, []
    for level in reversed(range(LEVELS)):
        found.append(begin)
        begin += tokens // (unit << level) if level else ceil_div(tokens, unit)
    return (*found[::-1], begin)


def rows(tokens: int, unit: int) -> int:
    """Keys and means of all levels."""
    return firsts(tokens, unit)[0] * unit + tokens


def lower(k: Tensor, v: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor, BlockIndex]:
    """Keys and values of all levels, `[B, Hkv, rows, D]` in k's dtype, and the same lists over them
    with what the logits of means get. Keys are averaged in the index's `key_order`.

    Raises:
        UnsupportedConfigurationError: the index has a bias of its own.
    """
    if isinstance(index.bias, Tensor) or index.bias:
        raise UnsupportedConfigurationError("pyramid: an index over levels takes no other bias")
    unit = index.size[1]
    bias = _bias(k.shape[2], unit, k.device)
    order = index.key_order
    counted = replace(index, pyramid=False, key_order=None, bias=bias, bias_by_entry=True)
    return _levels(k, unit, order), _levels(v, unit, order), counted


@lru_cache(maxsize=32)
def _bias(tokens: int, unit: int, device: torch.device) -> Tensor:
    """Logarithm of how many keys each row of a pyramid stands for, fp32 `[1, 1, rows]`."""
    first = firsts(tokens, unit)
    with torch.inference_mode(False):
        bias = torch.zeros(1, 1, rows(tokens, unit), device=device)
        for level in range(1, LEVELS):
            bias[..., first[level] * unit : first[level - 1] * unit] = math.log(1 << level)
        return bias


def _levels(x: Tensor, unit: int, order: Tensor | None) -> Tensor:
    from accelkit.kernels.dispatch import fast_device

    if fast_device(x) and x.stride(-1) == 1:
        from accelkit.kernels._triton import pyramid as fast

        return fast.levels(x, unit, order)
    x = x if order is None else x.index_select(2, order)
    parts = [x]
    for level in range(1, LEVELS):
        whole = x[:, :, : x.shape[2] // (unit << level) * (unit << level)]
        parts.append(whole.unflatten(2, (-1, 1 << level)).mean(3, dtype=torch.float32).to(x.dtype))
    return torch.cat(parts[::-1], 2)

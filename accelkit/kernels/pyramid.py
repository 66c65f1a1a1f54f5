"""Key pyramids: instead of dropping a block, read the means of 2, 4 or 8 of its keys in a row.

A mean of h keys stands for h of them, so its logits get `+ log h` (exactly right for equal keys).
Lists are cut by level into pieces, each a launch of its own over the means of that level: its bias
is one number, which only moves the log-sum-exp (Pyramid Sparse Attention, 2512.04025).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from accelkit.errors import UnsupportedConfigurationError
from accelkit.kernels.index import BlockIndex

LEVELS = 4


def lower(k: Tensor, v: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor, BlockIndex]:
    """Mean keys and values of the index's level, `[B, Hkv, Nk // 2**level, D]` in k's dtype, and
    the same lists over them. Keys behind the last whole mean are left out: list them at level 0.

    Raises:
        UnsupportedConfigurationError: the index has a bias for each key.
    """
    if isinstance(index.bias, Tensor) or index.level is None:
        raise UnsupportedConfigurationError("pyramid: an index with a level takes no bias per key")
    h = 1 << index.level
    counted = replace(index, level=None, bias=index.bias + math.log(h))
    return _means(k, h), _means(v, h), counted


def _means(x: Tensor, of: int) -> Tensor:
    from accelkit.kernels.dispatch import fast_device

    if fast_device(x) and x.stride(-1) == 1:
        from accelkit.kernels._triton import pyramid as fast

        return fast.means(x, of)
    whole = x[:, :, : x.shape[2] // of * of]
    return whole.unflatten(2, (-1, of)).mean(3, dtype=torch.float32).to(x.dtype)

"""Key pyramids: instead of dropping a block, read the means of 2, 4 or 8 of its keys in a row.

A mean key stands for h keys, so its logit gets `+ log h` (exactly right for equal keys). Every
entry of a list is one whole tile of `unit` keys, of `unit · 2**level` tokens; all levels lie one
behind the other in one long K and V, and the attention kernels see nothing but keys with a bias
(Pyramid Sparse Attention, 2512.04025).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import UnsupportedConfigurationError
from accelkit.kernels.index import BlockIndex, ceil_div

LEVELS = 4


def entries(tokens: int, unit: int) -> list[int]:
    """Entries of each level; the coarsest one is whole, so all cover equally many tokens."""
    coarsest = ceil_div(tokens, unit << (LEVELS - 1))
    return [coarsest << (LEVELS - 1 - r) for r in range(LEVELS)]


def lower(
    k: Tensor, v: Tensor, index: BlockIndex, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, BlockIndex]:
    """Keys and values of all levels, `[B, Hkv, n, D]`, and the lists that point into them, with
    the logarithm of the number of keys behind each as bias.

    Raises:
        UnsupportedConfigurationError: the index already has a bias for each key.
    """
    if isinstance(index.bias, Tensor) or index.level is None:
        raise UnsupportedConfigurationError("pyramid: an index with levels takes no bias per key")
    tokens, unit = k.shape[2], index.size[1]
    number = entries(tokens, unit)
    real = torch.ones(1, tokens, device=k.device) if key_mask is None else key_mask.float()
    short = number[0] * unit - tokens
    count = pad(real, (0, short))[:, None]  # [B|1, 1, n]
    rows = [pad(x * (1 if key_mask is None else real[:, None, :, None]), (0, 0, 0, short))
            for x in (k, v)]  # fmt: skip
    keys, values, counts = [rows[0]], [rows[1]], [count]
    total = [x.float() for x in rows]
    for _ in range(1, LEVELS):
        total = [x.unflatten(2, (-1, 2)).sum(3) for x in total]
        count = count.unflatten(2, (-1, 2)).sum(3)
        for levels, x, like in zip((keys, values), total, (k, v), strict=True):
            levels.append((x / count.clamp(min=1)[..., None]).to(like.dtype))
        counts.append(count)
    first = torch.zeros_like(index.blocks)
    for r in range(1, LEVELS):
        first = torch.where(index.level == r, sum(number[:r]), first)
    bias = torch.cat(counts, 2).log() + index.bias
    lowered = replace(index, blocks=index.blocks + first, level=None, bias=bias)
    return torch.cat(keys, 2), torch.cat(values, 2), lowered

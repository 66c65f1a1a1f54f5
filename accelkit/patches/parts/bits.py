"""Block masks as bits: what must last over steps or layers costs an eighth of a byte a block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(mask: Tensor) -> Tensor:
    """Bool `[…, n]` → uint8 `[…, ceil(n / 8)]`."""
    cells = pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (cells * _weights(mask.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """The first `n` of each row, bool `[…, n]`."""
    return (bits[..., None] & _weights(bits.device)).ne(0).flatten(-2)[..., :n]


def _weights(device: torch.device) -> Tensor:
    return torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=device),
        torch.arange(8, dtype=torch.uint8, device=device),
    )

"""One checked attention launch: what every backend receives, with all defaults resolved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelkit.kernels.index import BlockIndex, ceil_div, device_range

FAR = 2**31 - 1
"""Last position of a key block with a hole in it: beyond every row, so such a block always gets its
element mask.
"""

END = FAR - 1
"""What a row without causal limit sees up to."""


@dataclass(frozen=True)
class Launch:
    """`attend`'s arguments after checking. Slot `j` is the j-th head of the call.

    `q_heads`, `kv_heads` and `out_heads` (int32 `[H]`, on the device) say which head of q, of k and
    v, and of `out` slot `j` reads and writes. Padding is folded into `k_pos`: −1 is a key that
    nobody sees. `q_pos` and `k_pos` are int32 `[B|1, H|1, N]`, or None where position and place
    agree (`q_start + i`, `j`). `rows` (int64) are the query tiles to compute, None = all. `skip` is
    the natural-log threshold, fp32 `[H]`. `bias` is fp32 `[B|1, H|1, Nk]` or a number, which only
    moves the LSE. `head_ids` are the query heads where the host knows them and the KV heads serve
    equal groups of query heads; None elsewhere. `qk` and `pv` are the precisions of the two
    products; `smooth_k` takes the mean key from the keys before they are rounded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index: BlockIndex
    scale: float
    causal: bool
    q_start: int
    q_heads: Tensor
    kv_heads: Tensor
    out_heads: Tensor
    q_pos: Tensor | None
    k_pos: Tensor | None
    rows: Tensor | None
    skip: Tensor | None
    bias: Tensor | float
    out: Tensor
    lse: Tensor
    head_ids: tuple[int, ...] | None = None
    qk: str = "native"
    pv: str = "native"
    smooth_k: bool = False

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q_heads.numel()

    @property
    def n_q(self) -> int:
        return self.q.shape[2]

    @property
    def n_k(self) -> int:
        return self.k.shape[2]

    @property
    def key_blocks(self) -> int:
        return ceil_div(self.n_k, self.index.size[1])

    @property
    def tiles(self) -> Tensor:
        """Ids of the query tiles to compute, int64."""
        if self.rows is not None:
            return self.rows
        return device_range(self.index.rows, self.q.device)

    def row_positions(self) -> Tensor:
        """Last position that each query row may see, int32 `[B|1, H|1, Nq]`; −1 for rows that see
        nothing.
        """
        if self.q_pos is None:
            end = torch.arange(self.n_q, device=self.q.device, dtype=torch.int32) + self.q_start
            return (end if self.causal else torch.full_like(end, END)).view(1, 1, -1)
        return self.q_pos if self.causal else torch.where(self.q_pos < 0, -1, END).int()

    def key_positions(self) -> Tensor:
        """Position of each key, int32 `[B|1, H|1, Nk]`; −1 for keys that nobody sees."""
        if self.k_pos is not None:
            return self.k_pos
        return torch.arange(self.n_k, device=self.q.device, dtype=torch.int32).view(1, 1, -1)

    def row_bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest of `row_positions` in each query tile, int32 `[B|1, H|1, nq]`."""
        bq, pad = self.index.size[0], self.index.rows * self.index.size[0] - self.n_q
        limit = self.row_positions()
        low = torch.nn.functional.pad(limit, (0, pad), value=FAR).unflatten(-1, (-1, bq)).amin(-1)
        high = torch.nn.functional.pad(limit, (0, pad), value=-1).unflatten(-1, (-1, bq)).amax(-1)
        return low, high

    def key_bounds(self) -> tuple[Tensor, Tensor]:
        """First and last position in each key block, int32 `[B|1, H|1, nk]`.

        A block is wholly visible to a query tile if its last position is at most the tile's least
        limit, and not at all if its first is beyond the tile's greatest. Blocks with holes, padding
        or a ragged end have last = `FAR`.
        """
        bk, pad = self.index.size[1], self.key_blocks * self.index.size[1] - self.n_k
        pos = torch.nn.functional.pad(self.key_positions(), (0, pad), value=-1).unflatten(
            -1, (-1, bk)
        )
        seen = pos >= 0
        first = torch.where(seen, pos, FAR).amin(-1)
        last = torch.where(seen.all(-1), pos.amax(-1), FAR)
        return first, last

"""`attend` as a torch operator, for graphs that torch.compile makes: one opaque call with a known
result shape. Outside of a graph nothing comes by here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels import dispatch
from accelkit.kernels.index import BlockIndex


@torch.library.custom_op("accelkit::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    blocks: Tensor,
    size: Sequence[int],
    bias: Tensor | None,
    shift: float,
    scale: float | None,
    causal: bool,
    q_start: int,
    heads: Tensor | None,
    head_ids: Sequence[int] | None,
    kv_of_head: Tensor | None,
    kv_head_ids: Sequence[int] | None,
    key_mask: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    rows: Tensor | None,
    skip: Tensor | None,
    qk: str,
    pv: str,
    smooth_k: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`dispatch.attend` with its index and its unions taken apart, as operators want them."""
    index = BlockIndex(
        start, count, blocks, (size[0], size[1]), bias=shift if bias is None else bias
    )
    found = dispatch.attend(
        q, k, v, index, scale=scale, causal=causal, q_start=q_start,
        heads=head_ids if heads is None else heads,
        kv_of_head=kv_head_ids if kv_of_head is None else kv_of_head, key_mask=key_mask,
        q_pos=q_pos, k_pos=k_pos, rows=rows, skip=skip, qk=qk, pv=pv, smooth_k=smooth_k,
        backend=backend,
    )  # fmt: skip
    return found.out, found.lse


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, count: Tensor, *args: object
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], count.shape[1], q.shape[2])
    return q.new_empty((*shape, v.shape[3])), q.new_empty(shape, dtype=torch.float32)


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    heads: Sequence[int] | Tensor | None,
    kv_of_head: Sequence[int] | Tensor | None,
    rows: Sequence[int] | Tensor | None,
    skip: float | Tensor | None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The operator with `dispatch.attend`'s arguments."""
    tables = [None if not isinstance(t, Tensor) else t for t in (heads, kv_of_head)]
    ids = [None if t is None or isinstance(t, Tensor) else list(t) for t in (heads, kv_of_head)]
    if rows is not None and not isinstance(rows, Tensor):
        rows = torch.tensor(list(rows), device=q.device)
    if skip is not None and not isinstance(skip, Tensor):
        skip = torch.full((1,), skip, device=q.device)
    bias = index.bias if isinstance(index.bias, Tensor) else None
    shift = 0.0 if isinstance(index.bias, Tensor) else index.bias
    return attend(
        q, k, v, index.start, index.count, index.blocks, list(index.size), bias, shift,
        heads=tables[0], head_ids=ids[0], kv_of_head=tables[1], kv_head_ids=ids[1], rows=rows,
        skip=skip, **others,
    )  # fmt: skip

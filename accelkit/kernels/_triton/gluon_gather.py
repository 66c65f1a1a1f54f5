"""Host side of the warp-specialised Hopper kernel over single keys."""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.kernels._triton.gluon_block_sparse import (
    BM,
    descriptor,
    grid,
    items,
    layout,
    padded,
    refused_here,
)
from accelkit.kernels._triton.lower import lower_keys
from accelkit.kernels._triton.tile import LOG2E
from accelkit.kernels._triton.tuned import tuned
from accelkit.kernels.launch import Launch

BN = 128
"""Keys of a tile."""


def refusal(launch: Launch) -> str | None:
    """Why this kernel cannot serve a launch, or None."""
    if isinstance(launch.bias, Tensor):
        return "it takes no bias of single keys"
    return refused_here(launch)


def gather(launch: Launch, stages: int | None = None, mode: str = "lag", q_stages: int = 2) -> None:
    """Write `launch.out` and `launch.lse`."""
    from accelkit.kernels._triton import gluon_keys

    q, k, v = launch.q, launch.k, launch.v
    bd, bdv = padded(q), padded(v)
    if stages is None:
        stages, q_stages, mode = tuned("gluon_gather", q.device, max(bd, bdv), (BM, BN))
    with torch.cuda.device_of(q):
        work, starts = lower_keys(launch, BN)
        gluon_keys.key_gather[grid(launch, work)](
            descriptor(q, BM // 2, bd), k, v, descriptor(launch.out, BM // 2, bdv), launch.lse,
            work.items, work.lists, starts, launch.q_heads, launch.kv_heads, launch.out_heads,
            torch.zeros(1, dtype=torch.int32, device=q.device),
            *(step // 8 for t in (k, v) for step in t.stride()[:3]), *launch.lse.stride(),
            items(launch, work), launch.n_q, launch.n_k, launch.q_start, launch.scale * LOG2E,
            BQ=launch.index.size[0], BM=BM, BN=BN, D=q.shape[3], DV=v.shape[3], BD=bd, BDV=bdv,
            LAYOUT_K=layout(BN, bd, k.dtype), LAYOUT_V=layout(BN, bdv, v.dtype),
            CAUSAL=launch.causal, STAGES=stages, Q_STAGES=q_stages, MODE=mode, num_warps=4,
        )  # fmt: skip

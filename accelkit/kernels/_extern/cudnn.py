"""The block-sparse forward of cuDNN's frontend (CuTe DSL, `pip install "accelkit[cudnn]"`) as a
backend for calls without causality.

It allocates its results: where the caller gave `out` for them, they are copied.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels._extern import common
from accelkit.kernels.launch import Launch

HEAD_SIZES = (64, 96, 128)


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the package cannot be used, or None."""
    try:
        found = version("nvidia-cudnn-frontend")
    except PackageNotFoundError:
        return 'nvidia-cudnn-frontend is not installed: pip install "accelkit[cudnn]"'
    if tuple(int(n) for n in found.split(".")[:2]) < (1, 32):
        return f"nvidia-cudnn-frontend {found} is older than 1.32"
    return None


def refusal(launch: Launch) -> str | None:
    """Why this backend cannot serve a launch, or None."""
    return (
        missing()
        or common.device_refusal(launch.q.device)
        or common.tensors_refusal(launch)
        or _shapes(launch)
        or common.options_refusal(launch)
    )


def _shapes(launch: Launch) -> str | None:
    sizes = launch.q.shape[3], launch.v.shape[3]
    if launch.causal:
        return "it knows no causality"
    if any(n not in HEAD_SIZES for n in sizes):
        return f"head sizes {sizes[0]} and {sizes[1]} are not among {HEAD_SIZES}"
    if launch.index.size != (128, 128):
        return f"units of {launch.index.size[0]} × {launch.index.size[1]} tokens are not 128 × 128"
    return None


def block_sparse(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`."""
    q, k, v, out, lse = common.parts(launch)
    blocks, counts = _lists(launch)
    with torch.cuda.device_of(launch.q):
        found = _package()(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            blocks,
            q2k_block_nums=counts,
            sparse_block_size=launch.index.size[0],
            allow_empty_block_nums=True,
            softmax_scale=launch.scale,
            layout="bshd",
        )
        out.copy_(found["o_tensor"].transpose(1, 2))
        lse.copy_(found["lse_tensor"])


@lru_cache(maxsize=1)
def _package() -> Any:
    """The forward function."""
    from cudnn.block_sparse_attention.api import block_sparse_attention_forward

    return block_sparse_attention_forward


def _lists(launch: Launch) -> tuple[Tensor, Tensor]:
    """Block ids `[B, H, nq, n]` and counts `[B, H, nq]`, kept with the index."""
    from accelkit.kernels._triton import lower

    index, heads = launch.index, launch.head_ids or ()
    key = ("cudnn", launch.batch, launch.n_q, launch.n_k, heads)
    found = index.lowered.get(key)
    if found is None:
        if list(heads) != sorted(heads):
            # Sorted on the device: a table from the host would have to be copied.
            at = launch.q_heads.argsort()
            index = replace(index, start=index.start[:, at], count=index.count[:, at])
        lists, masked, clean = lower.lists_of(replace(launch, index=index))
        shape = (launch.batch, launch.heads, index.rows)
        found = lists.view(*shape, launch.key_blocks), (masked + clean).view(shape)
        if lists.numel() * 4 <= lower._KEEP_BYTES:
            launch.index.lowered[key] = found
    return found

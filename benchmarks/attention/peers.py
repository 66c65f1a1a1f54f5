"""Attention by every library at hand: dense, and flex_attention over the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention.shapes import Shape


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Torch's dense attention `[B, H, Nq, Dv]` by one of its backends."""
    group = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group)


cudnn = partial(sdpa, SDPBackend.CUDNN_ATTENTION)


def dense_paths(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention by every library at hand."""
    paths: dict[str, Callable[[], object]] = {
        "cudnn": partial(cudnn, q, k, v, shape.causal),
        "FA2": partial(sdpa, SDPBackend.FLASH_ATTENTION, q, k, v, shape.causal),
    }
    try:
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return paths
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    paths["fa4 dense"] = lambda: _flash_attn_fwd(*turned, causal=shape.causal, return_lse=True)
    return paths


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _not_later(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def flex(shape: Shape, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """Compiled flex_attention over the same blocks; only the diagonal is partial."""
    from torch.nn.attention.flex_attention import BlockMask

    def lists(m: Tensor) -> tuple[Tensor, Tensor]:
        order = m.int().argsort(dim=-1, descending=True, stable=True)
        return m.sum(-1, dtype=torch.int32), order.int()

    diagonal = torch.eye(mask.shape[2], dtype=torch.bool, device="cuda") & mask
    full, partial = (mask & ~diagonal, diagonal) if shape.causal else (mask, torch.zeros_like(mask))
    block_mask = BlockMask.from_kv_blocks(
        *lists(partial),
        *lists(full),
        BLOCK_SIZE=128,
        mask_mod=_not_later,
        seq_lengths=(shape.tokens, shape.tokens),
    )
    group = shape.heads > shape.kv_heads
    return lambda: _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=group)

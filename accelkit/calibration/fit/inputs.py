"""What a fit measures on: random calls with the shape of a layer, and random lists of blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accelkit.kernels.index import BlockIndex, ceil_div, plain_inputs
from accelkit.patches.call import AttentionCall, Clock, Geometry, Site

UNKNOWN = Geometry()
DRAWN = 1 << 21
"""Entries of random lists that are drawn at a time."""


@dataclass(frozen=True)
class Shape:
    """Heads of a layer, how many layers there are to share lists that follow from geometry, prompts
    in a batch, whether later tokens are hidden from earlier ones, and what the tokens of a
    denoiser's call are.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 1
    batch: int = 1
    causal: bool = True
    geometry: Geometry = UNKNOWN


def random_call(
    shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int
) -> AttentionCall:
    """A call on random data with some structure: a sink, and neighbours alike."""
    g = torch.Generator(device=device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        x = torch.randn(size, generator=g, device=device)
        coarse = torch.randn(
            shape.batch, heads, ceil_div(tokens, 64), shape.head_dim, generator=g, device=device
        )
        x += coarse.repeat_interleave(64, 2)[:, :, :tokens]
        x[:, :, :4] *= 2
        return x.to(dtype)

    q, k, v = draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads)
    base = plain_inputs(q, k, v, causal=shape.causal)
    return AttentionCall(
        q, k, v, base.scale, shape.causal, 0, None, base.heads, base.kv_heads,
        site=Site("fit", 0), clock=Clock("prefill" if shape.causal else "denoise"),
        geometry=shape.geometry,
    )  # fmt: skip


def shorter(call: AttentionCall, tokens: int) -> AttentionCall:
    """The beginning of a call."""
    q, k, v = (t[:, :, :tokens] for t in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, _shared={})


def fresh(call: AttentionCall) -> AttentionCall:
    """The same call without the estimates that methods left with it."""
    return replace(call, _shared={})


def random_index(call: AttentionCall, size: tuple[int, int], density: float) -> BlockIndex:
    """Random visible blocks, the first and the diagonal ones always among them."""
    (nq, nk), (bq, bk) = call.tiles(size), size
    device, heads = call.q.device, len(call.heads)
    g = torch.Generator(device=device).manual_seed(1)
    rows = torch.arange(nq, device=device)[:, None]
    keys = torch.arange(nk, device=device)[None]
    visible = (keys * bk < (rows + 1) * bq) | (not call.causal)
    # The tile's own keys, or a part of them where tiles are tall. Causal methods list them all, and
    # a CPU runs a square without gaps in it without a mask.
    edge = keys * bk < (rows + 1) * bq
    whole = call.causal and device.type == "cpu"
    gap = 0 if whole else max(0, bq - 128)
    own = visible & edge & ((keys + 1) * bk > rows * bq + gap)
    always = own | (visible & (keys == 0))
    # Over single keys a draw takes far more than the lists that come of it.
    step, parts = max(1, DRAWN // (nq * nk)), list[BlockIndex]()
    for first in range(0, heads, step):
        some = min(step, heads - first)
        drawn = torch.rand(some, nq, nk, generator=g, device=device) < density
        parts.append(BlockIndex.from_mask((drawn & visible | always)[None], size))
    return BlockIndex.cat(parts)

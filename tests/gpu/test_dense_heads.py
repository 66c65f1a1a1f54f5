"""Dense heads beside sparse ones are bit for bit what the whole layer computes without a patch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from accelkit.kernels.index import equal_groups
from accelkit.patches.call import AttentionCall
from accelkit.patches.sites import dense

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "width"),
    [(2, 4, 2, 16384, 64), (1, 32, 8, 8192, 128)],
)
def test_bits_of_the_unpatched_layer(batch, heads, kv_heads, tokens, width):
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, h, width, generator=g, device="cuda", dtype=torch.bfloat16)
        for h in (heads, kv_heads, kv_heads)
    )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    kv = equal_groups(heads, kv_heads)
    call = AttentionCall(q, k, v, width**-0.5, True, 0, None, tuple(range(heads)), kv)
    whole = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for some in (range(1, heads), (0, heads - 1), range(0, heads, 2), (2,)):
        some = tuple(some)
        out = torch.full_like(whole, torch.nan)
        dense.attend(call.take(some), out)
        assert torch.equal(out[:, some], whole[:, some])

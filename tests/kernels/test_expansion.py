"""What stands for a block: exact for the tile's mean query, and to first order around it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from accelkit import kernels
from accelkit.kernels import expansion
from accelkit.kernels.expansion import expand
from accelkit.kernels.index import Inputs, plain_inputs
from accelkit.kernels.merge import merge

SIZE = (16, 16)


def call_around(spread: float, **options) -> Inputs:
    """Queries that lie `spread` around one of each tile: 96 rows and keys, 4 heads over 2."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn((1, 4, 6, 1, 8), generator=g, dtype=torch.float64)
    away = torch.randn((1, 4, 6, 16, 8), generator=g, dtype=torch.float64)
    q = (centre + spread * (away - away.mean(3, keepdim=True))).flatten(2, 3)
    k, v = (torch.randn((1, 2, 96, 8), generator=g, dtype=torch.float64) for _ in range(2))
    return plain_inputs(q.float(), k.float(), v.float(), **{"causal": True, **options})


def exact(call: Inputs, head: int, keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of a head over some keys, without a mask, fp64."""
    kv = int(call.kv_of_head[head])
    k, v = call.k[0, kv, keys].double(), call.v[0, kv, keys].double()
    logits = call.q[0, head].double() @ k.T * call.scale
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def first_block(call: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for block 0, to head 3's rows behind it."""
    found = expand(call, SIZE)
    blocks = torch.zeros(1, 4, 6, 6, dtype=torch.bool)
    blocks[..., 1:, 0] = True
    piece = found.piece(blocks)
    return piece.out[0, 3], piece.lse[0, 3]


def test_equal_queries_are_exact() -> None:
    call = call_around(0.0)
    out, lse = first_block(call)
    true, true_lse = exact(call, 3, slice(0, 16))
    torch.testing.assert_close(out[16:].double(), true[16:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[16:].double(), true_lse[16:], rtol=1e-5, atol=1e-5)


def test_rows_without_a_block_are_empty() -> None:
    out, lse = first_block(call_around(0.3))
    assert (lse[:16] == -math.inf).all()
    assert out.isfinite().all()


def test_the_mass_is_right_to_first_order() -> None:
    """Twice the spread, four times the error."""
    gaps = []
    for spread in (0.02, 0.04):
        call = call_around(spread)
        gap = first_block(call)[1].double() - exact(call, 3, slice(0, 16))[1]
        gaps.append(float(gap[16:].abs().mean()))
    assert gaps[1] / gaps[0] == pytest.approx(4.0, rel=0.1)


def test_shares_of_blocks() -> None:
    """Of a tile's rows over whole blocks and its own, where equal queries make them exact."""
    call = call_around(0.0, causal=False)
    mass = expand(call, SIZE).mass()
    kv = int(call.kv_of_head[1])
    share = (call.q[0, 1] @ call.k[0, kv].T * call.scale).softmax(-1)
    want = share.unflatten(-1, (6, 16)).sum(-1).unflatten(0, (6, 16)).mean(1)
    torch.testing.assert_close(mass[0, 1], want, rtol=1e-4, atol=1e-5)


def test_padding_is_not_seen() -> None:
    mask = torch.ones(1, 96, dtype=torch.bool)
    mask[:, :20] = False
    found = expand(call_around(0.3, key_mask=mask), SIZE)
    assert (found.mass()[..., 0] == -math.inf).all()
    assert not found.whole[..., 1].any()
    piece = found.piece(found.whole.expand(1, 4, 6, 6))
    assert piece.out.isfinite().all()


def test_logits_are_held_by_parts(monkeypatch) -> None:
    """Values wider than keys run as products of matrices, a few tiles at a time."""
    call = call_around(0.3)
    wide = replace(call, v=torch.cat([call.v, 2 * call.v], -1))
    blocks = expansion.expand(wide, SIZE).whole.expand(1, 4, 6, 6)
    whole = expansion.expand(wide, SIZE).piece(blocks)
    narrow = expansion.expand(call, SIZE).piece(blocks)
    monkeypatch.setattr(expansion, "_LOGITS", 1)
    parts = expansion.expand(wide, SIZE).piece(blocks)
    assert torch.equal(parts.out, whole.out)
    assert torch.equal(parts.lse, whole.lse)
    torch.testing.assert_close(whole.out[..., :8], narrow.out)


def test_pieces_join_to_dense() -> None:
    """Read blocks and expanded ones together are close to dense attention."""
    call = call_around(0.1)
    found = expand(call, SIZE)
    seen = kernels.select.visible_blocks(call, SIZE)
    index = kernels.select.compact((seen & ~found.whole).expand(1, 4, 6, 6), SIZE)
    part = found.piece((seen & found.whole).expand(1, 4, 6, 6))
    near = kernels.attend(call.q, call.k, call.v, index, causal=True)
    joined = merge((near, part))
    dense = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=True, enable_gqa=True
    )
    gap = (joined.out - dense).abs().sum() / dense.abs().sum()
    alone = (near.out - dense).abs().sum() / dense.abs().sum()
    assert gap < 0.05 < alone

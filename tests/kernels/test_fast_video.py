"""Triton kernels of diffusion against their torch twins, in the interpreter or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from accelkit.kernels import dispatch, permute, scores
from accelkit.kernels.index import plain_inputs

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytestmark = [
        pytest.mark.interpreter,
        pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="no interpreter"),
    ]

from accelkit.kernels._triton import permute as fast_permute
from accelkit.kernels._triton import scores as fast
from accelkit.kernels.scores_blocks import _fast_self_similarity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch):
    """Public functions take the torch way here, also on a GPU."""
    for module in (dispatch, permute, scores.sampled_max.__globals__):
        table = module if isinstance(module, dict) else vars(module)
        if "fast_device" in table:
            monkeypatch.setitem(table, "fast_device", lambda t: False)
    torch.manual_seed(0)


def rows(batch: int, heads: int, n: int, d: int) -> torch.Tensor:
    """Tokens as projections leave them: heads beside one another."""
    return torch.randn(batch, n, heads, d, device=DEVICE).transpose(1, 2)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_move_and_come_back(shared: bool):
    x = rows(2, 3, 90, 24)
    table = torch.stack([torch.randperm(90), torch.randperm(90)])
    table = torch.cat([table, torch.full((2, 6), -1)], 1)[:, torch.randperm(96)].int().to(DEVICE)
    row = torch.tensor([0, 0] if shared else [1, 0], device=DEVICE)
    heads = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    ids = table[:1][None] if shared else table[row][None]
    table = table[:1] if shared else table
    moved = permute.take_rows(x, table, row, heads)
    assert torch.equal(moved, fast_permute.take_rows(x, ids, heads))
    for h, slot in ((2, 0), (0, 1)):
        at = ids[0, 0 if shared else slot].long()
        assert torch.equal(moved[:, slot, at >= 0], x[:, h, at[at >= 0]])
        assert not moved[:, slot, at < 0].any()
    for put in (
        lambda out: permute.put_rows(out, moved, table, row, heads),
        lambda out: fast_permute.put_rows(out, moved, ids, heads),
    ):
        out = torch.zeros_like(x)
        put(out)
        assert torch.equal(out[:, [2, 0]], x[:, [2, 0]])
        assert not out[:, 1].any()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_self_similarity(center: bool, masked: bool):
    x = rows(2, 3, 90, 24)
    mask = (torch.rand(2, 1, 90) > 0.2).to(DEVICE) if masked else None
    slow = scores.self_similarity(x, 16, mask, center)
    torch.testing.assert_close(
        slow, _fast_self_similarity(x, 16, mask, center), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (32, 16)])
def test_block_mass(size: tuple[int, int]):
    """Exact masses of a tile sum to one, whichever way they are found."""
    call = plain_inputs(rows(1, 4, 150, 24), rows(1, 2, 150, 24), rows(1, 2, 150, 24), causal=False)
    s = call.q @ call.k.repeat_interleave(2, 1).transpose(-1, -2) * call.scale
    lse = s.logsumexp(-1)
    assert fast.mass_fits(call, size)
    found = fast.block_mass(call, lse, size)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), atol=2e-4, rtol=0)
    torch.testing.assert_close(found, scores.block_mass(call, lse, size), atol=2e-4, rtol=1e-3)

"""The profile of a site's attention, and how much it resembles an earlier site's."""

from __future__ import annotations

import planted
import pytest
import torch

from accelkit.calibration.capture import dense_attention
from accelkit.calibration.profile import UNIT, profile
from accelkit.kernels.scores import block_mass
from accelkit.patches.parts import bits

TOKENS = 2100
"""Seventeen key blocks: three bytes of bits."""
TILES = torch.tensor([2, 9, 16])


def test_heaviest_blocks_are_kept_as_bits_and_compared() -> None:
    call = planted.planted(TOKENS)
    dense = dense_attention(call)
    found, heavy = profile(call, dense, TILES, {})
    assert (heavy.dtype, heavy.shape) == (torch.uint8, (planted.HEADS, len(TILES), 3))
    assert found.similarity == {}
    mass = block_mass(call, dense.lse, UNIT, TILES)[0]
    visible = TILES + 1
    for row, seen in enumerate(visible.tolist()):
        best = mass[:, row].topk(-(-seen // 10)).indices.sort(-1).values
        inside = bits.unpack(heavy, 17)[:, row]
        assert [mask.nonzero()[:, 0].tolist() for mask in inside] == best.tolist()
    alone = torch.zeros(planted.HEADS, len(TILES), 3, dtype=torch.uint8)
    alone[..., 2] = 1  # the last key block only
    earlier = {"same": heavy, "last": alone, "other tiles": heavy[:, :2]}
    again, _ = profile(call, dense, TILES, earlier)
    assert list(again.similarity) == ["same", "last"]
    held = (mass * bits.unpack(heavy, 17)).sum(-1).mean(-1)
    assert again.similarity["same"] == pytest.approx(held.tolist(), abs=1e-4)
    assert again.similarity["last"] == pytest.approx(mass[..., 16].mean(-1).tolist(), abs=1e-4)

"""Radial Attention: widths by hand, densities of a real video."""

import pytest

from accelkit.patches.methods.radial_attention import PARTLY, RadialAttention
from accelkit.patches.parts import grids
from accelkit.patches.parts.grids import Visual


def test_widths():
    """A frame of 3600 tokens: S = 4096; the width halves as the distance doubles."""
    method = RadialAttention(decay=0.5)
    widths = [method._width(d, 3600) for d in range(21)]
    assert widths[:2] == [3600, 3600]
    assert widths[2:4] == [512, 512]
    assert widths[4:8] == [256] * 4
    assert widths[8:21] == [128] * 13


def test_far_frames_of_small_ones_are_skipped():
    """A frame of 200 tokens: at distance 8 … 15 L is 16, so every eighth distance stays."""
    widths = [RadialAttention()._width(d, 200) for d in range(16)]
    assert [d for d in range(8, 16) if widths[d] > 0] == [8]
    assert all(w == 128 for w in widths[2:] if w > 0)


@pytest.mark.parametrize(("decay", "density"), [(1.0, 0.40), (0.8, 0.36)])
def test_density_of_a_video_of_21_frames(decay: float, density: float):
    method = RadialAttention(decay=decay)
    where = Visual(0, (21, 45, 80), 75600)
    widths = [method._width(d, where.frame) for d in range(21)]
    mask = grids.frame_bands(where, widths, (128, 128), least=PARTLY)
    mask |= grids.first_blocks(where, where.frame, 128)
    assert float(mask.float().mean()) == pytest.approx(density, abs=0.015)

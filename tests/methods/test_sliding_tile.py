"""Sliding Tile Attention by hand."""

import hand
import planted

from accelkit.patches.call import Site
from accelkit.patches.methods.sliding_tile import SlidingTile


def test_lists():
    """Five tiles, a window of three; the centre stays one tile away from the borders."""
    q, k, v = planted.noise(80)
    call = planted.video_call(q, k, v, (1, 1, 80))
    method = SlidingTile(window=(1.0, 1.0, 0.5), tile=(1, 1, 16), block=16)
    assert hand.lists(method, call) == [
        [0, 1, 2],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [2, 3, 4],
    ]


def test_published_canvas():
    """5 × 6 × 10 tiles, window (5, 3, 3): 28 … 30 % of the entries of the released plan say so; it
    reads 45 of 300 tiles.
    """
    q, k, v = planted.noise(300 * 16, width=16)
    call = planted.video_call(q, k, v, (5, 24, 40))
    method = SlidingTile(window=(1.0, 0.5, 0.3), tile=(1, 4, 4), block=16)
    assert {len(row) for row in hand.lists(method, call)} == {45}


def test_calibration_tries_the_searched_windows():
    settings = SlidingTile().calibrator(Site("a", 0)).settings()
    assert (1.0, 0.5, 0.3) in {m.window for m in settings} and len(settings) == 5

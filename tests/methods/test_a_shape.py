"""A-shape and Tri-shape by hand."""

import hand

from accelkit.patches.methods.a_shape import AShape


def test_lists():
    # Keys after 16i − 16: blocks i−1 and i; sinks: blocks 0 and 1.
    method = AShape(sink_tokens=20, local_tokens=16, block=16)
    assert hand.lists(method, hand.call_with(96, {})) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 3, 4],
        [0, 1, 4, 5],
    ]


def test_tri_shape_ends_dense():
    """The last 20 rows begin in tile 4."""
    method = AShape(sink_tokens=16, local_tokens=16, dense_rows=20, block=16)
    found = hand.lists(method, hand.call_with(96, {}))
    assert found[3:] == [[0, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]

"""PowerAttention by hand."""

import hand

from accelkit.patches.methods.power_attention import PowerAttention


def test_lists():
    method = PowerAttention(block=16, local_blocks=1, sink_blocks=1)
    found = hand.lists(method, hand.call_with(192, {}))
    assert found[11] == [0, 3, 7, 9, 10, 11]  # distances 11 (sink), 8, 4, 2, 1, 0
    assert found[4] == [0, 2, 3, 4]  # 4, 2, 1, 0
    assert found[0] == [0]


def test_length_of_a_row_grows_with_the_logarithm():
    found = hand.lists(PowerAttention(block=16), hand.call_with(16 * 130, {}))
    # Distances 0 … 4, 8, 16, 32, 64, 128 and the sink.
    assert len(found[129]) == 11

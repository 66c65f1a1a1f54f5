"""Window: lists by hand, and the sinks of a padded sequence."""

import hand
import planted
import torch

from accelkit.patches.methods.window import Window


def test_lists():
    # Rows 16i … 16i+15 see keys after 16i − 32, so blocks i−2, i−1, i; and block 0.
    method = Window(sink_tokens=4, window_tokens=32, block=16)
    assert hand.lists(method, hand.call_with(96, {})) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 2, 3, 4],
        [0, 3, 4, 5],
    ]


def test_sinks_are_the_first_real_keys():
    call = hand.call_with(96, {})
    mask = torch.ones(1, 96, dtype=torch.bool)
    mask[:, :32] = False
    call = planted.make_call(call.q, call.k, call.v, key_mask=mask)
    method = Window(sink_tokens=4, window_tokens=16, block=16)
    assert hand.lists(method, call)[5] == [2, 4, 5]


def test_within_the_window_it_is_dense():
    assert Window(window_tokens=128).index(hand.call_with(128, {})) is None

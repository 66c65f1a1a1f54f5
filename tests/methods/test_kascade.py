"""Kascade by hand: tiles of 4, keys 1, 6 and, less, 3 matter to everyone."""

import hand
import torch

from accelkit.patches.methods.kascade import Kascade

SMALL = Kascade(share=0.25, floor_tokens=2, tile=4)
NATS = {1: 9.0, 6: 8.0, 3: 5.0}


def test_lists():
    """A quarter of the 0, 4, 8, 12 keys before the tile, at least 2; and the tile's own."""
    assert hand.lists(SMALL, hand.call_with(16, NATS)) == [
        [0, 1, 2, 3],
        [1, 3, 4, 5, 6, 7],
        [1, 6, 8, 9, 10, 11],
        [1, 3, 6, 12, 13, 14, 15],
    ]


def test_a_group_shares_its_list():
    """Two heads on one KV head want different keys; the pooled list has what they want most."""
    call = hand.call_with(16, {1: 9.0})
    call.q[:, 1, :, 0], call.q[:, 1, :, 1] = 0.0, 1.0
    call.k[:, :, 6, 1] = 9.0 * 4
    assert hand.lists(SMALL, call)[2] == [1, 6, 8, 9, 10, 11]
    assert hand.lists(SMALL, call, head=1) == hand.lists(SMALL, call)


def test_dense_anchor_runs_dense_and_emits():
    first = SMALL.model_copy(update={"dense_output": True})
    call = hand.call_with(16, NATS)
    assert first.index(call) is None
    emitted = first.emit(call, None)
    assert hand.rows(emitted) == hand.lists(SMALL, call)
    assert SMALL.emit(call, None) is None


def test_tail_tile_is_its_own():
    found = hand.lists(SMALL, hand.call_with(14, NATS))
    assert found[3][-2:] == [12, 13]
    assert torch.tensor(found[3]).max() == 13

"""VMoBA by hand: chunks by turns, own chunk, one budget for a head."""

from dataclasses import replace

import hand
import planted
import torch

from accelkit.patches.call import Site
from accelkit.patches.methods.vmoba import VMoBA


def call_with(nats):
    """Six chunks of one frame of 16; all queries alike."""
    call = hand.call_with(96, nats)
    made = planted.video_call(call.q, call.k, call.v, (6, 4, 4))
    return replace(made, site=Site("a", 0))


SMALL = {"frames": 1, "query_block": 16, "key_block": 16}


def test_lists():
    """Scaled gates are 1 for chunk 4 and 0 elsewhere; six own pairs hold 1 of 6, so 0.5 of the sum
    is reached by two more pairs of chunk 4.
    """
    lists = hand.lists(VMoBA(coverage=0.5, **SMALL), call_with({range(64, 80): 20.0}))
    assert lists == [[0, 4], [1, 4], [2], [3], [4], [5]]


def test_own_chunk_alone_may_be_enough():
    lists = hand.lists(VMoBA(coverage=0.1, **SMALL), call_with({range(64, 80): 20.0}))
    assert lists == [[0], [1], [2], [3], [4], [5]]


def test_layers_take_turns():
    """Chunks of frames, of columns through all frames, of boxes."""
    call, method = call_with({}), VMoBA(columns=(2, 2), box=(3, 2, 4), **SMALL)
    first = []
    for layer in range(4):
        table = method.order(replace(call, site=Site("a", layer))).q_table[0]
        first.append(table[:6].tolist())
    assert first == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 4, 5, 16, 17],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
    boxes = method.order(replace(call, site=Site("a", 2))).q_table[0]
    assert boxes[:24].tolist() == [16 * f + i for f in range(3) for i in range(8)]


def test_ragged_chunks_have_their_own_mean():
    """Seven frames in chunks of two: the last has one, and its mean is that frame's."""
    from accelkit.patches.parts import chunks, grids

    q, k, v = planted.noise(7 * 8 + 3)
    call = planted.video_call(q, k, v, (7, 2, 4))
    where = grids.visual(call)
    made = chunks.of(where, (2, 2, 4), (16, 16), torch.device("cpu"))
    gate = chunks.gate(call, made, 16)
    mean = call.k[0, 0, 3 + 48 :].mean(0)
    expected = call.q[0, 0, 16:32].mean(0) @ mean
    torch.testing.assert_close(gate[0, 0, 1, 3], expected)
    assert made.begin.diff().tolist() == [16, 16, 16, 8]

"""Vertical-slash: one column and one diagonal by hand, and the two pieces kept apart."""

import hand
import planted
import torch

from accelkit.patches.methods.vertical_slash import PUBLISHED, VerticalSlash


def small(**fields: int) -> VerticalSlash:
    sizes = {"vertical_columns": 1, "slash_offsets": 1, "sink_tokens": 0, "local_tokens": 1}
    return VerticalSlash(**{**sizes, "probe_rows": 16, "block": 16, **fields})


def test_one_column():
    """Tile 2 has key 37 in its own block, earlier tiles do not see it."""
    blocks, columns = hand.pieces(small(), hand.call_with(160, {37: 20.0}))
    assert hand.rows(blocks) == [[i] for i in range(10)]
    assert hand.rows(columns) == [[], [], [], *[[37]] * 7]
    assert (blocks.size, columns.size) == ((16, 16), (16, 1))


def test_one_diagonal():
    """q[i] = 20 · k[i − 48]: offset 48 touches keys [16i − 48, 16i − 32), just block i − 3."""
    n = 160
    k = torch.eye(n)[None, None]
    q = torch.zeros(1, 2, n, n)
    q[:, :, 48:] = 20 * n**0.5 * k[:, :, :-48]
    blocks, _ = hand.pieces(small(slash_offsets=2), planted.make_call(q, k, k))
    assert hand.rows(blocks)[:5] == [[0], [1], [2], [0, 3], [1, 4]]
    assert hand.rows(blocks)[9] == [6, 9]


def test_sinks_come_before_strong_columns():
    call = hand.call_with(160, {37: 20.0})
    _, columns = hand.pieces(small(sink_tokens=1), call)
    assert hand.rows(columns)[9] == [0]


def test_calibration_tries_the_published_pairs():
    from accelkit.patches.call import Site

    settings = VerticalSlash().calibrator(Site("a", 0)).settings()
    assert [(s.vertical_columns, s.slash_offsets) for s in settings] == list(PUBLISHED)
